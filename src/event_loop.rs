//! The main thread: waits for events, and calls the function that handles each of them.
//!
//! [`Daemon::dispatch`] maps an event's token to its function, [`Daemon::run_timers`] maps a timer to its function. Each
//! function sits in the submodule of its subject:
//!
//! | What happens | Function | Module |
//! | --- | --- | --- |
//! | the daemon starts, stops | `start`, `stop` | `start` |
//! | SIGHUP, SIGTERM, SIGINT | `handle_signals` | `signals` |
//! | the configuration file changes, SIGHUP | `reload`, then `take_read_config` | `reload`, `reload_reader` |
//! | a link, an address or a route changes | `drain_netlink`, then `refresh_host` | `host` |
//! | a Service or a DNS name has new endpoints | `take_downstream_updates` | `downstream_sources` |
//! | a health probe is due or answered | `run_health_checks` | `health` |
//! | the controller has decided something | `handle`, `apply` | `actions` |
//! | the TC program reports a datagram | `read_kernel_events` | `kernel_events` |
//! | a scrape, `/healthz`, `/readyz`, `/serving` | `answer_http_requests` | `scrape` |
//! | `udp-fanout status`, `udp-fanout trace` | `on_status_socket_event` | `status_socket`, `status`, `trace` |
//! | the heartbeat is due; an earlier daemon's program is taken over | `renew_heartbeat`, `take_over` | `handover` |
//! | every five seconds | `maintain` | `maintenance` |
//! | systemd's watchdog is due | `feed_watchdog` | `service` |
//!
//! All map writes, netlink sockets, signals and timers belong to this thread. It decides nothing: what to do is decided by
//! `controller`, how to do it by `datapath` and `host`.

mod actions;
mod downstream_sources;
mod handover;
mod health;
mod host;
mod kernel_events;
mod maintenance;
mod preceding_programs;
mod prepare;
mod reload;
mod reload_reader;
mod scrape;
mod service;
mod signals;
mod start;
mod status;
mod status_socket;
mod trace;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use mio::{Events, Poll, Token, Waker};
use signal_hook_mio::v1_0::Signals;

use self::downstream_sources::DownstreamSources;
use self::preceding_programs::PrecedingPrograms;
use self::reload::ReloadState;
use self::reload_reader::ReloadCause;
use self::status_socket::StatusSocket;
use self::trace::TraceState;
use crate::config::Config;
use crate::controller::{Controller, ControllerEvent};
use crate::datapath::kernel::KernelDatapath;
use crate::datapath::user::UserDatapath;
use crate::drop_log::DropLog;
use crate::health::HealthChecks;
use crate::host::{HostMonitor, HostNetwork};
use crate::metrics::PlanApplyCounts;
use crate::metrics::http::{MainLoopRequest, MetricsServer};
use crate::service_manager::ServiceManager;

const SIGNALS: Token = Token(0);
const NETLINK: Token = Token(1);
/// Another thread has sent something: an HTTP request or a set of downstreams.
const WAKE: Token = Token(2);
/// inotify reports a change of the configuration file.
const CONFIG_FILE: Token = Token(3);
/// The TC program's ring buffer holds events.
const KERNEL_EVENTS: Token = Token(4);
/// First token of the health checks' sockets; the status socket's tokens come before.
const HEALTH: Token = Token(1 << 20);

/// How often [`Daemon::maintain`] runs.
const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(5);

/// Command-line options of the daemon; a reload does not change them.
#[derive(Debug, Default)]
pub struct DaemonOptions {
    /// The kubeconfig file to use for the Kubernetes API.
    pub kubeconfig: Option<PathBuf>,
    /// The status socket's path, instead of the configuration's `status_socket`.
    pub status_socket: Option<PathBuf>,
}

/// Runs the daemon until a signal ends it.
///
/// # Errors
/// When the configuration cannot be put in force on this host. Nothing is left attached or bound then.
pub fn run(config: Config, options: DaemonOptions) -> Result<()> {
    let mut daemon = Daemon::start(config, options)?;
    let result = daemon.run_until_stopped();
    daemon.service_manager.notify_stopping();
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
    http: Option<(MetricsServer, Receiver<MainLoopRequest>)>,
    sources: DownstreamSources,
    health: HealthChecks,
    status_socket: StatusSocket,
    plan_applies: PlanApplyCounts,
    preceding_programs: PrecedingPrograms,
    drop_log: DropLog,
    tracing: TraceState,
    /// The configuration in force.
    config: Config,
    reloading: ReloadState,
    service_manager: ServiceManager,
    /// Wakes this thread from others.
    waker: Arc<Waker>,
    started: Instant,
    started_at: SystemTime,
    /// Why the last plan could not be applied; none once one has been.
    apply_error: Option<anyhow::Error>,
    /// The first plan is in force. Before that a failure ends the daemon, after that it is retried.
    serving: bool,
    timers: Timers,
}

/// When each timer is due; none if it is not set.
#[derive(Debug, Default)]
struct Timers {
    controller: Option<Instant>,
    host: Option<Instant>,
    maintenance: Option<Instant>,
    heartbeat: Option<Instant>,
    trace: Option<Instant>,
}

impl Timers {
    fn next(&self) -> Option<Instant> {
        [self.controller, self.host, self.maintenance, self.heartbeat, self.trace].into_iter().flatten().min()
    }
}

/// Clears a timer that is due, and returns whether it was.
fn take_due(timer: &mut Option<Instant>, now: Instant) -> bool {
    timer.take_if(|due| *due <= now).is_some()
}

impl Daemon {
    fn run_until_stopped(&mut self) -> Result<()> {
        let mut events = Events::with_capacity(64);
        loop {
            let timeout = self.next_deadline().map(|due| due.saturating_duration_since(Instant::now()));
            match self.poll.poll(&mut events, timeout) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                result => result.context("cannot wait for events")?,
            }
            for event in &events {
                if event.token() == SIGNALS && self.handle_signals() {
                    return Ok(());
                }
                self.dispatch(event.token());
            }
            self.take_read_config();
            self.take_downstream_updates();
            self.run_health_checks();
            self.run_timers();
        }
    }

    fn dispatch(&mut self, token: Token) {
        match token {
            SIGNALS => {}
            NETLINK => self.drain_netlink(),
            KERNEL_EVENTS => self.read_kernel_events(),
            CONFIG_FILE => self.reloading.drain_watch(),
            WAKE => self.answer_http_requests(),
            token if self.status_socket.owns(token) => self.on_status_socket_event(token),
            token => self.on_health_event(token),
        }
    }

    fn run_timers(&mut self) {
        let now = Instant::now();
        if take_due(&mut self.timers.heartbeat, now) {
            self.renew_heartbeat(now);
        }
        if take_due(&mut self.timers.trace, now) {
            self.restart_trace();
        }
        if take_due(&mut self.service_manager.watchdog_due, now) {
            self.feed_watchdog(now);
        }
        if take_due(&mut self.reloading.read_due, now) {
            self.reload(ReloadCause::File);
        }
        self.report_stalled_read(now);
        self.status_socket.retry_accept(now);
        if take_due(&mut self.timers.host, now) {
            self.refresh_host();
        }
        if take_due(&mut self.timers.controller, now) {
            self.handle(ControllerEvent::Tick);
        }
        if take_due(&mut self.timers.maintenance, now) {
            self.maintain(now);
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let since_start = self.health.next_deadline().into_iter().chain(self.sources.next_deadline()).min();
        let since_start = since_start.map(|due| self.started + due);
        let others = [self.reloading.due(), self.service_manager.watchdog_due, self.status_socket.due(), since_start];
        self.timers.next().into_iter().chain(others.into_iter().flatten()).min()
    }
}
