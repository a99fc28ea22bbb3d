//! Tells clients of the status socket what becomes of single datagrams, while any of them wants to know.
//!
//! The kernel program's switch is on only then, and only for what they want. No more than [`MOST`] datagrams are told of in
//! a second: after that the switch is off for the rest of it, so that tracing a busy listener costs the program and this
//! loop hardly anything.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

use super::{Daemon, take_due};
use crate::admission::Prefix;
use crate::control::protocol::Response;
use crate::control::server::Answer;
use crate::control::trace::{Traced, Watch};
use crate::datapath::kernel::events::{DatagramEvent, DatagramOutcome, DeliveryPath, TraceFilter};
use crate::model::Mode;

/// Datagrams told of in a second.
const MOST: u32 = 1_000;
/// The time over which they are counted.
const WINDOW: Duration = Duration::from_secs(1);

/// What is traced, and how much has been.
#[derive(Debug, Default)]
pub(super) struct Tracing {
    /// What the kernel program has been told.
    in_force: Option<Watch>,
    /// Told of since the window began.
    told: u32,
    window: Option<Instant>,
}

impl Daemon {
    /// Answers a client that asks for a trace.
    pub(super) fn trace(&self, listener: Option<&str>, source: Option<&str>) -> Answer {
        match self.watch_for(listener, source) {
            Ok(watch) => {
                let sockets = self.controller.modes().filter(|(_, choice)| choice.mode == Mode::Userspace);
                let left_out: Vec<&str> = match listener {
                    None => sockets.map(|(config, _)| config.name.as_str()).collect(),
                    Some(_) => Vec::new(),
                };
                let mut note = "tracing until interrupted".to_owned();
                if !left_out.is_empty() {
                    note += &format!("; but for what is forwarded in user space: {}", left_out.join(", "));
                }
                Answer { response: Response::Note(note), watch: Some(watch) }
            }
            Err(reason) => Response::Error(reason).into(),
        }
    }

    fn watch_for(&self, listener: Option<&str>, source: Option<&str>) -> Result<Watch, String> {
        let source = source.map(Prefix::parse).transpose().map_err(|_| "the source is no prefix".to_owned())?;
        let in_kernel = |mode: Mode| mode == Mode::TcEbpf;
        let see = "`tcpdump -ni any udp` shows what comes and goes";
        let Some(name) = listener else {
            if !self.controller.modes().any(|(_, choice)| in_kernel(choice.mode)) {
                return Err(format!("all listeners are forwarded in user space, where nothing is traced; {see}"));
            }
            return Ok(Watch { listener: None, source });
        };
        let Some((config, choice)) = self.controller.modes().find(|(config, _)| config.name == name) else {
            let names: Vec<&str> = self.controller.modes().map(|(config, _)| config.name.as_str()).collect();
            return Err(format!("there is no listener {name:?}; there are {}", names.join(", ")));
        };
        if !in_kernel(choice.mode) {
            return Err(format!(
                "listener {name:?} is forwarded in user space ({}), where nothing is traced; {see}",
                choice.reason
            ));
        }
        Ok(Watch { listener: Some(config.id), source })
    }

    /// Has the kernel program tell what clients want to know, and nothing else.
    pub(super) fn follow_traces(&mut self) {
        let wanted = self.control.watches();
        if wanted != self.tracing.in_force {
            self.switch_trace(wanted);
        }
    }

    /// The kernel program is another one, or there is none.
    pub(super) fn trace_anew(&mut self) {
        let wanted = self.control.watches();
        self.switch_trace(wanted);
    }

    fn switch_trace(&mut self, wanted: Option<Watch>) {
        self.tracing.in_force = wanted;
        self.timers.trace = None;
        let Some(kernel) = &mut self.kernel else { return };
        let filter = wanted.map(|watch| TraceFilter {
            listener: watch.listener,
            source: watch.source.map(|prefix| (prefix.address(), prefix.length())),
        });
        if let Err(error) = kernel.events().trace(filter.as_ref()) {
            self.tracing.in_force = None;
            self.control.end_watches(&Response::Error(format!("{error:#}")));
        }
    }

    /// Tells those who want to know of a datagram.
    pub(super) fn tell_traced(&mut self, event: &DatagramEvent) {
        if self.tracing.in_force.is_none() {
            return;
        }
        let now = Instant::now();
        if self.tracing.window.is_none_or(|start| now.duration_since(start) >= WINDOW) {
            self.tracing.window = Some(now);
            self.tracing.told = 0;
        }
        self.tracing.told += 1;
        if self.tracing.told > MOST {
            self.pause_trace(now);
            return;
        }
        let traced = self.traced(event);
        self.control.tell(&Response::Traced(Box::new(traced)), |watch| watch.wants(event.listener, event.source.ip()));
    }

    /// Enough for this second.
    fn pause_trace(&mut self, now: Instant) {
        if self.timers.trace.is_some() {
            return;
        }
        if let Some(kernel) = &mut self.kernel
            && let Err(error) = kernel.events().trace(None)
        {
            tracing::error!("{error:#}");
        }
        self.timers.trace = Some(self.tracing.window.map_or(now, |start| start + WINDOW));
        let note = format!("more than {MOST} in a second: the others of this second are left out");
        self.control.tell(&Response::Note(note), |_| true);
    }

    /// Goes on after a pause.
    pub(super) fn resume_trace(&mut self, now: Instant) {
        if take_due(&mut self.timers.trace, now) {
            self.trace_anew();
        }
    }

    fn traced(&self, event: &DatagramEvent) -> Traced {
        let (fate, way, reason) = match event.outcome {
            DatagramOutcome::Forwarded(way) => ("forwarded", way, None),
            DatagramOutcome::Passed => ("passed", DeliveryPath::None, None),
            DatagramOutcome::Dropped(reason) => ("dropped", DeliveryPath::None, Some(reason)),
            DatagramOutcome::Copied(way) => ("copied", way, None),
            DatagramOutcome::CopyDropped(reason) => ("copy_dropped", DeliveryPath::None, Some(reason)),
        };
        let link = |index: u32| {
            let known = self.controller.facts().link(index).map(|link| link.name.clone());
            known.unwrap_or_else(|| index.to_string())
        };
        let plan = self.controller.plan().listeners.iter().find(|plan| plan.id == event.listener);
        let name = |to| plan?.targets.iter().map(|target| &target.downstream).find(|known| known.address == to);
        Traced {
            time: wall_clock(event.at),
            listener: self.controller.listener_name(event.listener).unwrap_or_default().to_owned(),
            source: event.source,
            destination: event.destination,
            interface: link(event.link),
            fate: fate.to_owned(),
            reason: reason.map(|reason| reason.label().to_owned()),
            downstream: event.downstream,
            name: event.downstream.and_then(name).map(|downstream| downstream.name.to_string()),
            out_interface: (event.out_link != 0).then(|| link(event.out_link)),
            way: (way != DeliveryPath::None).then(|| way.name().to_owned()),
            datagrams: event.datagrams,
            bytes: event.bytes,
        }
    }
}

/// Seconds since 1970 at this time of `CLOCK_MONOTONIC`.
fn wall_clock(at: Duration) -> f64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(at, Duration::from);
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since_1970.saturating_sub(now.saturating_sub(at)).as_secs_f64()
}
