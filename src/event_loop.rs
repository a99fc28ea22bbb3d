//! The main thread: turns what happens into events for the controller and carries out the actions it answers with.
//!
//! It owns every map write, the netlink sockets, the signals and the timers. Dispatch only: what to do is decided in
//! `controller`, how to do it in `datapath` and `host`.

mod ahead;
mod answer;
mod control;
mod drops;
mod reload;
mod report;
mod service;
mod sources;
mod succession;
mod trace;

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Registry, Token, Waker};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook_mio::v1_0::Signals;

use self::ahead::Ahead;
use self::control::Control;
use self::drops::DropLog;
use self::reload::{Cause, Reloading};
use self::service::Service;
use self::sources::Sources;
use self::trace::Tracing;
use crate::config::{Config, RequestedMode};
use crate::controller::{Action, Controller, Event};
use crate::datapath::Datapath;
use crate::datapath::kernel::{KernelDatapath, KernelSetup};
use crate::datapath::user::UserDatapath;
use crate::health::HealthChecks;
use crate::host::probe::{HostFeatures, TcUnsupported, tc_ebpf_support};
use crate::host::{HostFacts, HostMonitor, HostNetwork, NextHopTracking};
use crate::metrics::PlanApplies;
use crate::metrics::http::{self, Request};
use crate::model::Mode;
use crate::plan::Plan;
use crate::{error_hints, logging, open_files};

const SIGNALS: Token = Token(0);
const NETLINK: Token = Token(1);
/// Another thread has something for us: an HTTP request or a set of downstreams.
const WAKE: Token = Token(2);
/// Something has happened to the configuration file.
const CONFIG: Token = Token(3);

/// The TC program has something to tell.
const KERNEL: Token = Token(4);

/// The health checks' sockets have tokens from here on.
const HEALTH: Token = Token(1 << 20);

/// How often it is checked that filters are still in place and workers still run.
const UPKEEP: Duration = Duration::from_secs(5);
/// Changes of the host that follow each other within this time are looked at together.
const SETTLE: Duration = Duration::from_millis(50);

/// What the operator has said on the command line, which a configuration does not change.
#[derive(Debug, Default)]
pub struct Options {
    /// Where to find the API server of Kubernetes.
    pub kubeconfig: Option<PathBuf>,
    /// The status socket, in place of the configuration's.
    pub status_socket: Option<PathBuf>,
}

/// Runs the daemon until a signal ends it.
///
/// # Errors
/// When something in the configuration does not fit this host; nothing is left attached or bound then.
pub fn run(config: Config, options: Options) -> Result<()> {
    let mut daemon = Daemon::start(config, options)?;
    let result = daemon.turn_until_stopped();
    daemon.service.stopping();
    let stopped = daemon.stop();
    result.and(stopped)
}

struct Daemon {
    poll: Poll,
    signals: Signals,
    host: HostNetwork,
    monitor: HostMonitor,
    controller: Controller,
    user: UserDatapath,
    kernel: Option<KernelDatapath>,
    http: Option<(http::Server, Receiver<Request>)>,
    sources: Sources,
    health: HealthChecks,
    control: Control,
    plan_applies: PlanApplies,
    /// Who is on interfaces before our program.
    ahead: Ahead,
    drop_log: DropLog,
    tracing: Tracing,
    /// What is in force.
    config: Config,
    reloading: Reloading,
    service: Service,
    /// With which other threads wake this one.
    waker: Arc<Waker>,
    started: Instant,
    started_at: SystemTime,
    /// Why the last plan could not be applied, until one can.
    failure: Option<anyhow::Error>,
    /// The start is over: what fails from now on is tried again.
    serving: bool,
    timers: Timers,
}

/// When something is due, if it is.
#[derive(Debug, Default)]
struct Timers {
    tick: Option<Instant>,
    look_at_host: Option<Instant>,
    upkeep: Option<Instant>,
    beat: Option<Instant>,
    trace: Option<Instant>,
}

impl Timers {
    fn next(&self) -> Option<Instant> {
        [self.tick, self.look_at_host, self.upkeep, self.beat, self.trace].into_iter().flatten().min()
    }
}

/// True once, when the time has come.
fn take_due(timer: &mut Option<Instant>, now: Instant) -> bool {
    timer.take_if(|due| *due <= now).is_some()
}

impl Daemon {
    fn start(config: Config, options: Options) -> Result<Daemon> {
        fit_open_files(&config);
        let poll = Poll::new().context("cannot create an event queue (epoll)")?;
        // Signals first: one that comes during the start must still end in a clean stop.
        let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("cannot handle signals")?;
        poll.registry().register(&mut signals, SIGNALS, Interest::READABLE).context("cannot watch signals")?;
        let mut monitor = HostMonitor::open()?;
        poll.registry().register(&mut monitor, NETLINK, Interest::READABLE).context("cannot watch netlink")?;
        let mut host = HostNetwork::open()?;
        let Options { kubeconfig, status_socket } = options;
        let (control, no_control) = Control::open(&config, status_socket, poll.registry())?;
        let page = config.metrics.as_ref().map(http::Bound::new).transpose()?;
        let (kernel, tc_support) = load_kernel(&config)?;
        if let Some(kernel) = &kernel {
            // Before the first facts, so that no change falls between the two.
            track_next_hops(kernel, &mut monitor, &mut host)?;
        }
        let facts = host.facts(&BTreeSet::new())?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKE).context("cannot create a waker")?);
        let sources = Sources::start(&config, kubeconfig, &waker)?;
        let health = HealthChecks::new(poll.registry(), HEALTH)?;
        let controller = Controller::new(config.clone(), &tc_support, facts)?;
        let mut kernel = kernel.filter(|_| controller.modes().any(|(_, choice)| choice.mode == Mode::TcEbpf));
        kernel.as_mut().map(|kernel| succession::begin(kernel, &config, poll.registry())).transpose()?;

        let (now, started_at) = (Instant::now(), SystemTime::now());
        let mut daemon = Daemon {
            signals,
            host,
            monitor,
            controller,
            user: UserDatapath::new(),
            kernel,
            http: None,
            sources,
            health,
            control,
            plan_applies: PlanApplies::default(),
            ahead: Ahead::new(),
            drop_log: DropLog::default(),
            tracing: Tracing::default(),
            reloading: Reloading::new(&config, poll.registry(), CONFIG, started_at),
            service: Service::from_environment(),
            config,
            waker,
            started: now,
            started_at,
            failure: None,
            serving: false,
            timers: Timers { upkeep: Some(now + UPKEEP), ..Timers::default() },
            poll,
        };
        daemon.begin(page, no_control)?;
        Ok(daemon)
    }

    /// Puts the first plan in force, and lets others look on.
    fn begin(&mut self, page: Option<http::Bound>, no_control: Option<anyhow::Error>) -> Result<()> {
        self.tell_modes();
        self.look_at_host(&self.controller.route_addresses())?;
        if let Some(error) = self.failure.take() {
            return Err(error);
        }
        self.serving = true;
        if let Some(error) = no_control {
            tracing::warn!("{error:#}");
        }
        self.succeed_predecessors();
        self.look_ahead();
        self.watch_health();
        if let Some(page) = page {
            tracing::info!(address = %page.address(), "serving metrics");
            self.http = Some(page.serve(Arc::clone(&self.waker), http::Limits::default())?);
        }
        self.tell_ready();
        Ok(())
    }

    fn turn_until_stopped(&mut self) -> Result<()> {
        let mut events = Events::with_capacity(64);
        loop {
            let timeout = self.next_due().map(|due| due.saturating_duration_since(Instant::now()));
            match self.poll.poll(&mut events, timeout) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                result => result.context("cannot wait for events")?,
            }
            for event in &events {
                match event.token() {
                    SIGNALS if self.told_to_stop() => return Ok(()),
                    NETLINK => self.drain_netlink(),
                    KERNEL => self.take_kernel_events(),
                    CONFIG => self.reloading.drain_watch(),
                    WAKE => self.answer_requests(),
                    token if self.control.owns(token) => self.control_event(token),
                    token => self.health_event(token),
                }
            }
            self.take_downstreams();
            self.run_health();
            self.run_timers();
        }
    }

    fn next_due(&self) -> Option<Instant> {
        let probe = self.health.next_deadline();
        let since_start = probe.into_iter().chain(self.sources.next_deadline()).min();
        let since_start = since_start.map(|due| self.started + due);
        let others = self.reloading.due.into_iter().chain(self.service.due).chain(self.control.due());
        self.timers.next().into_iter().chain(others).chain(since_start).min()
    }

    fn health_event(&mut self, token: Token) {
        if self.health.owns(token) {
            self.health.on_event(token, self.started.elapsed());
        }
    }

    /// Gives the probes that are due and takes what they have found out.
    fn run_health(&mut self) {
        self.health.on_timer(self.started.elapsed());
        if let Some(map) = self.health.take_change() {
            self.handle(Event::Health(map));
        }
    }

    /// Tells the health checks whom to check, after any change of downstreams.
    fn watch_health(&mut self) {
        self.health.set_targets(&self.controller.watches(), self.started.elapsed());
    }

    /// Says which datapath each listener has, and why.
    fn tell_modes(&self) {
        for (listener, choice) in self.controller.modes() {
            tracing::info!(listener = listener.name, bind = %listener.bind, mode = %choice.mode, reason = choice.reason, "listener configured");
        }
    }

    fn told_to_stop(&mut self) -> bool {
        let signals: Vec<i32> = self.signals.pending().collect();
        for signal in signals {
            if signal == SIGHUP {
                self.reload(Cause::Signal);
                continue;
            }
            let name = if signal == SIGTERM { "SIGTERM" } else { "SIGINT" };
            tracing::info!(signal = name, "stopping");
            return true;
        }
        false
    }

    fn drain_netlink(&mut self) {
        match self.monitor.drain() {
            Ok(false) => {}
            Ok(true) => {
                self.timers.look_at_host.get_or_insert_with(|| Instant::now() + SETTLE);
            }
            Err(error) => tracing::error!("{error:#}"),
        }
    }

    fn take_kernel_events(&mut self) {
        let Some(kernel) = &mut self.kernel else { return };
        match kernel.events().drain() {
            Ok(events) => {
                for event in events {
                    let name = self.controller.listener_name(event.listener).unwrap_or_default();
                    self.drop_log.write(&event, name);
                    if event.traced {
                        self.tell_traced(&event);
                    }
                }
                // Someone may have gone meanwhile.
                self.follow_traces();
            }
            Err(error) => tracing::error!("{error:#}"),
        }
    }

    fn run_timers(&mut self) {
        let now = Instant::now();
        self.beat(now);
        self.resume_trace(now);
        self.feed_watchdog(now);
        self.look_at_config(now);
        self.serve_waiting_clients(now);
        if take_due(&mut self.timers.look_at_host, now)
            && let Err(error) = self.look_at_host(&self.controller.route_addresses())
        {
            tracing::error!("{}; trying again", error_hints::add_open_files_hint(format!("{error:#}")));
            self.timers.look_at_host = Some(now + crate::controller::RETRY);
        }
        if take_due(&mut self.timers.tick, now) {
            self.handle(Event::Tick);
        }
        if take_due(&mut self.timers.upkeep, now) {
            self.timers.upkeep = Some(now + UPKEEP);
            self.sources.tend();
            self.look_ahead();
            self.reloading.tend();
            self.tell_status();
            tell_lost_lines();
            if let Err(error) = self.user.tend() {
                tracing::error!("{error:#}");
            }
            match self.host.maintain(self.controller.facts()) {
                Ok(false) => {}
                Ok(true) => self.timers.look_at_host = Some(now),
                Err(error) => tracing::error!("{error:#}"),
            }
            if let Some(kernel) = &mut self.kernel {
                self.drop_log.note_lost(kernel.events().lost());
            }
            if self.kernel.as_ref().is_some_and(|kernel| !kernel.attached_everywhere()) {
                self.handle(Event::Disturbed(
                    "the TC filter has been taken off by someone else; attaching again".into(),
                ));
            }
        }
    }

    fn look_at_host(&mut self, addresses: &BTreeSet<IpAddr>) -> Result<()> {
        let facts = self.facts(addresses)?;
        self.handle(Event::Host(facts));
        Ok(())
    }

    fn facts(&mut self, addresses: &BTreeSet<IpAddr>) -> Result<HostFacts> {
        let facts = self.host.facts(addresses)?;
        self.monitor.watch(&facts);
        for (&link, hook) in &facts.egress_hooks {
            if self.controller.facts().egress_hooks.get(&link) != Some(hook) {
                let interface = facts.link(link).map(|link| link.name.as_str());
                tracing::info!(interface, "datagrams into the namespace behind it pass {hook} on their way");
            }
        }
        self.recheck(&facts);
        Ok(facts)
    }

    /// Has those probed soon whom the host may have lost, or found again.
    fn recheck(&mut self, facts: &HostFacts) {
        if self.health.next_deadline().is_none() {
            return;
        }
        for address in self.controller.facts().changed_paths(facts) {
            self.health.recheck(address, self.started.elapsed());
        }
    }

    /// Gives the controller an event, carries out what it answers with, and goes on with what follows from that.
    fn handle(&mut self, event: Event) {
        self.handle_all([event].into());
    }

    /// As [`Self::handle`], for events that came together: the host, which answers for all listeners at once, is looked at
    /// after the last of them.
    fn handle_all(&mut self, mut events: VecDeque<Event>) {
        let mut look = None;
        while let Some(event) = events.pop_front() {
            for action in self.controller.handle(event, self.started.elapsed()) {
                match action {
                    Action::Warn(text) => tracing::warn!("{}", error_hints::add_open_files_hint(text)),
                    Action::WakeAt(at) => self.timers.tick = Some(self.started + at),
                    Action::Settled(outcome) => self.settled(outcome),
                    Action::Apply(plan) => {
                        events.push_back(self.apply(&plan));
                        if self.start_failed() {
                            return;
                        }
                    }
                    Action::LookAtHost(addresses) => look = Some(addresses),
                }
            }
            if events.is_empty()
                && let Some(addresses) = look.take()
            {
                match self.facts(&addresses) {
                    Ok(facts) => events.push_back(Event::Host(facts)),
                    Err(error) => {
                        tracing::error!("{}; trying again", error_hints::add_open_files_hint(format!("{error:#}")));
                        self.timers.look_at_host = Some(Instant::now() + crate::controller::RETRY);
                    }
                }
            }
        }
    }

    /// Sockets first: from the moment the TC program is attached, something must be there for what it passes up.
    fn apply(&mut self, plan: &Plan) -> Event {
        self.hold_links();
        let user = self.user.apply(plan);
        // A start that has failed already must not touch any interface. Later, what one datapath lacks must not keep the
        // other from the new plan.
        let kernel = match &mut self.kernel {
            Some(kernel) if user.is_ok() || self.serving => kernel.apply(plan),
            _ => Ok(()),
        };
        match user.and(kernel) {
            Ok(()) => {
                self.plan_applies.success += 1;
                self.failure = None;
                self.settle_kernel();
                Event::Applied
            }
            Err(error) => {
                self.plan_applies.error += 1;
                let text = format!("{error:#}");
                self.failure = Some(error);
                Event::ApplyFailed(text)
            }
        }
    }

    /// True if the daemon cannot even begin: the reason is then its last word, and nothing is tried again.
    fn start_failed(&self) -> bool {
        !self.serving && self.failure.is_some()
    }

    /// Off the interfaces first, then the sockets finish what they hold.
    fn stop(&mut self) -> Result<()> {
        if let Some((server, _)) = self.http.take() {
            server.shutdown();
        }
        if let Some((discovery, _)) = self.sources.discovery.take() {
            discovery.shutdown();
        }
        // To take the program off takes a descriptor, which there may be none of but by this.
        self.control.close();
        let kernel = self.kernel.as_mut().map_or(Ok(()), Datapath::shutdown);
        let user = self.user.shutdown();
        kernel.and(user)
    }
}

/// Raises the limit of open files, and says so where that is not enough. That is no reason not to try.
fn fit_open_files(config: &Config) {
    match open_files::raise(config) {
        Ok(warning) => warning.iter().for_each(|warning| tracing::warn!("{warning}")),
        Err(error) => tracing::warn!("{error:#}"),
    }
}

/// Says that the log has gaps, once there is no more of them.
fn tell_lost_lines() {
    let lines = logging::take_lost();
    if lines > 0 {
        tracing::warn!(
            lines,
            "lines of the log are lost: its disk was full, or its reader had gone or did not keep up"
        );
    }
}

/// From now on the host's facts include what the kernel program's ways of delivery depend on.
fn track_next_hops(kernel: &KernelDatapath, monitor: &mut HostMonitor, host: &mut HostNetwork) -> Result<()> {
    monitor.track_next_hops()?;
    host.track_next_hops(if kernel.resolves_neighbours() {
        NextHopTracking::ResolvePods
    } else {
        NextHopTracking::ResolveAll
    });
    Ok(())
}

/// Wakes the loop when the program has something to tell. That ends with the program.
fn watch_events(kernel: &mut KernelDatapath, registry: &Registry) -> Result<()> {
    let Some(descriptor) = kernel.events().descriptor() else { return Ok(()) };
    let mut source = SourceFd(&descriptor.as_raw_fd());
    registry.register(&mut source, KERNEL, Interest::READABLE).context("cannot watch the TC program")
}

/// Finds out whether the TC program can be used by loading it, if any listener might want it.
///
/// # Errors
/// When the host cannot be probed at all.
fn load_kernel(config: &Config) -> Result<(Option<KernelDatapath>, Result<(), TcUnsupported>)> {
    if config.listeners.iter().all(|listener| listener.mode == RequestedMode::Userspace) {
        return Ok((None, Ok(())));
    }
    let ability = HostFeatures::probe()?;
    if let Err(obstacle) = tc_ebpf_support(&ability) {
        return Ok((None, Err(obstacle)));
    }
    let setup = KernelSetup {
        redirects: ability.redirect_neigh == Some(true),
        ring_buffer: ability.ring_buffer == Some(true),
        tcx: ability.tcx == Some(true),
        ..KernelSetup::new(&config.limits)
    };
    match KernelDatapath::open(&setup) {
        Ok(kernel) => Ok((Some(kernel), Ok(()))),
        Err(error) => Ok((None, Err(TcUnsupported::Kernel(format!("{error:#}"))))),
    }
}
