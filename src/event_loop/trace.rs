//! `udp-fanout trace`: subscriptions of the status socket's clients become the kernel program's trace filter, and its events
//! become their lines.
//!
//! The program traces only while a client asks for it, and no more than all clients together want. After
//! [`MAX_PER_SECOND`] datagrams in a second, tracing pauses until that second is over.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use http::StatusCode;
use nix::time::{ClockId, clock_gettime};

use super::Daemon;
use crate::admission::Prefix;
use crate::control::protocol::{RequestError, StatusReply, TraceLine, TraceQuery};
use crate::control::throttle::{MAX_PER_SECOND, TraceThrottle};
use crate::control::trace::{TraceRecord, TraceSubscription};
use crate::datapath::kernel::events::{DatagramEvent, DatagramOutcome, DeliveryPath, TraceFilter};
use crate::model::Mode;

/// What is traced, and how much.
#[derive(Debug, Default)]
pub(super) struct TraceState {
    /// The filter that the kernel program has.
    in_force: Option<TraceSubscription>,
    throttle: TraceThrottle,
}

impl Daemon {
    /// Answers a client that asks for a trace.
    pub(super) fn start_trace(&self, query: &TraceQuery) -> StatusReply {
        match self.subscription(query) {
            Ok(subscription) => {
                let userspace = self.controller.modes().filter(|(_, choice)| choice.mode == Mode::Userspace);
                let left_out: Vec<&str> = match &query.listener {
                    None => userspace.map(|(config, _)| config.name.as_str()).collect(),
                    Some(_) => Vec::new(),
                };
                let mut note = "tracing until interrupted".to_owned();
                if !left_out.is_empty() {
                    note += &format!("; listeners in mode userspace are not traced: {}", left_out.join(", "));
                }
                StatusReply::Trace(subscription, note)
            }
            Err(reason) => StatusReply::Error(RequestError::new(StatusCode::BAD_REQUEST, reason)),
        }
    }

    fn subscription(&self, query: &TraceQuery) -> Result<TraceSubscription, String> {
        let source = query
            .source
            .as_deref()
            .map(|text| Prefix::parse(text).map_err(|_| format!("source {text:?} is neither an address nor a prefix")))
            .transpose()?;
        let in_kernel = |mode: Mode| mode == Mode::TcEbpf;
        let advice = "use `tcpdump -ni any udp` instead";
        let Some(name) = query.listener.as_deref() else {
            if !self.controller.modes().any(|(_, choice)| in_kernel(choice.mode)) {
                return Err(format!("all listeners are in mode userspace, which is not traced; {advice}"));
            }
            return Ok(TraceSubscription { listener: None, source });
        };
        let Some((config, choice)) = self.controller.modes().find(|(config, _)| config.name == name) else {
            let names: Vec<&str> = self.controller.modes().map(|(config, _)| config.name.as_str()).collect();
            return Err(format!("there is no listener {name:?}; there are {}", names.join(", ")));
        };
        if !in_kernel(choice.mode) {
            return Err(format!(
                "listener {name:?} is in mode userspace ({}), which is not traced; {advice}",
                choice.reason
            ));
        }
        Ok(TraceSubscription { listener: Some(config.id), source })
    }

    /// Gives the kernel program the filter that covers all clients, if that has changed.
    pub(super) fn update_trace_filter(&mut self) {
        let wanted = self.status_socket.subscriptions();
        if wanted != self.tracing.in_force {
            self.set_trace_filter(wanted);
        }
    }

    /// Sets the filter again: after a pause, or for a new kernel program.
    pub(super) fn restart_trace(&mut self) {
        let wanted = self.status_socket.subscriptions();
        self.set_trace_filter(wanted);
    }

    fn set_trace_filter(&mut self, wanted: Option<TraceSubscription>) {
        self.tracing.in_force = wanted;
        self.timers.trace = None;
        let Some(kernel) = &mut self.kernel else { return };
        let filter = wanted.map(|wanted| TraceFilter {
            listener: wanted.listener,
            source: wanted.source.map(|prefix| (prefix.address(), prefix.length())),
        });
        if let Err(error) = kernel.events().trace(filter.as_ref()) {
            self.tracing.in_force = None;
            self.status_socket.end_traces(&TraceLine::Error { error: format!("{error:#}") });
        }
    }

    /// Sends an event to the clients that subscribe to it.
    pub(super) fn send_to_traces(&mut self, event: &DatagramEvent) {
        if self.tracing.in_force.is_none() {
            return;
        }
        if let Err(until) = self.tracing.throttle.count(Instant::now()) {
            self.pause_trace(until);
            return;
        }
        let record = TraceLine::Record(Box::new(self.trace_record(event)));
        self.status_socket.publish(&record, |wanted| wanted.matches(event.listener, event.source.ip()));
    }

    fn pause_trace(&mut self, until: Instant) {
        if self.timers.trace.is_some() {
            return;
        }
        if let Some(kernel) = &mut self.kernel
            && let Err(error) = kernel.events().trace(None)
        {
            tracing::error!("{error:#}");
        }
        self.timers.trace = Some(until);
        let note = format!("more than {MAX_PER_SECOND} datagrams in a second: the rest of this second is not shown");
        self.status_socket.publish(&TraceLine::Note { note }, |_| true);
    }

    fn trace_record(&self, event: &DatagramEvent) -> TraceRecord {
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
        TraceRecord {
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
