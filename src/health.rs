//! Health checks: probes every downstream and reports which ones are unhealthy.
//!
//! ```text
//! downstream sets ─► set_targets ─► monitor::HealthMonitor (pure) ─► probers ─► network
//!      mio events ─► on_event ───► replies ────────┘  │
//!           clock ─► on_timer                         └─► HealthMap ─► controller ─► weights::effective_weights ─► table
//! ```
//!
//! The event loop owns [`HealthChecks`] and calls it on its own thread: [`monitor`] decides when to probe and what follows from
//! replies, [`probers`] holds the sockets, [`listeners`] maps targets to the listeners that use them. The controller turns the
//! [`HealthMap`] into a listener's table with [`weights::effective_weights`].
//!
//! | event | first function | ends in |
//! | --- | --- | --- |
//! | a reply, or a refusal | [`HealthChecks::on_event`] | `HealthMonitor::handle_answer` or `handle_failure` |
//! | no reply in time | [`HealthChecks::on_timer`] | `HealthMonitor::fail_round` |
//! | a downstream's state changes | `CheckedListeners::handle_change` | [`HealthChecks::take_change`], then the controller |
//!
//! ```no_run
//! # use std::time::{Duration, Instant};
//! # use udp_fanout::testing::health::{HealthChecks, ListenerCheck};
//! # fn handle(_: udp_fanout::testing::health::weights::HealthMap) {}
//! # fn main() -> anyhow::Result<()> {
//! # let (checks, started): (Vec<ListenerCheck>, _) = (vec![], Instant::now());
//! let mut poll = mio::Poll::new()?;
//! let mut events = mio::Events::with_capacity(1024);
//! let mut health = HealthChecks::new(poll.registry(), mio::Token(1 << 20))?;
//! health.set_targets(&checks, started.elapsed());
//! loop {
//!     let wait = health.next_deadline().map(|due| due.saturating_sub(started.elapsed()));
//!     poll.poll(&mut events, wait)?;
//!     for event in &events {
//!         if health.owns(event.token()) {
//!             health.on_event(event.token(), started.elapsed());
//!         }
//!     }
//!     health.on_timer(started.elapsed());
//!     if let Some(map) = health.take_change() {
//!         handle(map);
//!     }
//! }
//! # }
//! ```

pub mod listeners;
pub mod model;
pub mod monitor;
pub mod probe_stats;
pub mod probers;
pub mod settings;
pub mod weights;

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use mio::{Registry, Token};
use nix::sys::resource::{Resource, getrlimit};

pub use self::listeners::ListenerCheck;
use self::listeners::{CheckedListeners, DownstreamHealth, Transitions};
use self::monitor::{HealthMonitor, MonitorAction, MonitorEvent, PROBES_PER_ROUND};
use self::probe_stats::ProbeStatsByKind;
use self::probers::{ProbeReply, ProbeVerdict, Probers, SendError};
use self::settings::ProbeKind;
use self::weights::HealthMap;
use crate::model::ListenerId;

/// If a tick is later than this, all sockets are read before any probe times out: replies may be waiting that the caller has not
/// polled for.
const LATE_TICK: Duration = Duration::from_millis(20);

/// A local error is over after this long without another one. While it lasts, it is logged once per this period.
const LOCAL_ERROR_HOLD: Duration = Duration::from_secs(60);

/// The most sockets for TCP and HTTP probes, and the part of the open-files limit that they may take (1/4).
pub(crate) const MAX_SOCKETS: u64 = 4096;
pub(crate) const OPEN_FILES_DIVISOR: u64 = 4;

/// All health checks of the daemon. Times are durations since its start and never decrease.
#[derive(Debug)]
pub struct HealthChecks {
    monitor: HealthMonitor,
    probers: Probers,
    listeners: CheckedListeners,
    local_errors: BTreeMap<ProbeKind, LocalError>,
    replies: Vec<ProbeReply>,
}

/// A reason on this host that prevents probes from being sent.
#[derive(Debug)]
struct LocalError {
    reason: String,
    last: Duration,
    logged: Duration,
}

impl HealthChecks {
    /// Health checks without targets. Sockets are registered with `registry` under [`probers::TOKENS`] tokens from `first_token`
    /// on. The current limit of open files bounds their number.
    ///
    /// # Errors
    /// If the registry cannot be cloned or the limit of open files cannot be read.
    pub fn new(registry: &Registry, first_token: Token) -> Result<HealthChecks> {
        let registry = registry.try_clone().context("cannot share the event loop with the health checks")?;
        let (files, _) = getrlimit(Resource::RLIMIT_NOFILE).context("cannot read the limit of open files")?;
        let sockets = (files / OPEN_FILES_DIVISOR).clamp(u64::from(PROBES_PER_ROUND), MAX_SOCKETS);
        // At most MAX_SOCKETS.
        let rounds = usize::try_from(sockets / u64::from(PROBES_PER_ROUND)).unwrap_or(1);
        Ok(HealthChecks {
            monitor: HealthMonitor::new(rounds),
            probers: Probers::new(registry, first_token),
            listeners: CheckedListeners::default(),
            local_errors: BTreeMap::new(),
            replies: Vec::new(),
        })
    }

    /// Replaces the targets by all downstreams of all listeners that have health checks. Known targets keep their state.
    pub fn set_targets(&mut self, checks: &[ListenerCheck], now: Duration) {
        let targets = self.listeners.replace_checks(checks);
        self.probers.close_unneeded(targets.iter());
        let actions = self.monitor.handle(MonitorEvent::Targets(targets), now);
        self.run_actions(actions, now);
        self.listeners.sync_with(&self.monitor);
    }

    /// True if events with this token are for [`on_event`](Self::on_event).
    #[must_use]
    pub fn owns(&self, token: Token) -> bool {
        self.probers.tokens().contains(&token.0)
    }

    /// Reads the socket of this token and handles the replies.
    pub fn on_event(&mut self, token: Token, now: Duration) {
        self.probers.on_event(token, &mut self.replies);
        self.handle_replies(now);
    }

    /// Sends probes that are due and times out those without a reply. Call it after the events of a poll, once
    /// [`next_deadline`](Self::next_deadline) has passed; calling it earlier is harmless.
    pub fn on_timer(&mut self, now: Duration) {
        if self.monitor.next_deadline().is_some_and(|due| due + LATE_TICK <= now) {
            self.probers.read_all(&mut self.replies);
        } else {
            self.probers.read_unread(&mut self.replies);
        }
        self.handle_replies(now);
        let actions = self.monitor.handle(MonitorEvent::Tick, now);
        self.run_actions(actions, now);
    }

    /// When to call [`on_timer`](Self::on_timer); may be in the past. None without targets.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        if self.probers.has_unread() { Some(Duration::ZERO) } else { self.monitor.next_deadline() }
    }

    /// Probes the downstreams on a host at once, because an event (a lost route, an ICMP error, a link that came up) suggests
    /// that their state has changed. Cheap to call often: at most one round begins per timeout.
    pub fn recheck(&mut self, host: IpAddr, now: Duration) {
        self.monitor.handle(MonitorEvent::Recheck(host.to_canonical()), now);
    }

    /// The health map, if it has changed since the last call.
    pub fn take_change(&mut self) -> Option<HealthMap> {
        self.listeners.take_change()
    }

    /// The health map.
    #[must_use]
    pub fn map(&self) -> &HealthMap {
        self.listeners.map()
    }

    /// The state of every checked downstream, by listener and address.
    pub fn downstreams(&self) -> impl Iterator<Item = DownstreamHealth<'_>> {
        self.listeners.downstreams(&self.monitor)
    }

    /// The listeners with only unhealthy downstreams: their names, and what happens to their datagrams.
    pub fn all_unhealthy(&self) -> impl Iterator<Item = (&str, &'static str)> {
        self.listeners.all_unhealthy()
    }

    /// Counts of transitions to unhealthy and back to healthy, by listener.
    pub fn transitions(&self) -> impl Iterator<Item = (ListenerId, Transitions)> + '_ {
        self.listeners.transitions()
    }

    /// Probes and round trips since the start, by protocol.
    #[must_use]
    pub fn probe_stats(&self) -> &ProbeStatsByKind {
        self.monitor.probe_stats()
    }

    /// Protocols whose probes this host cannot send, with the reason and the fix for the operator.
    pub fn local_errors(&self) -> impl Iterator<Item = (ProbeKind, &str)> {
        self.local_errors.iter().map(|(kind, error)| (*kind, error.reason.as_str()))
    }

    /// The number of open sockets.
    #[must_use]
    pub fn open_sockets(&self) -> usize {
        self.probers.open_sockets()
    }

    fn handle_replies(&mut self, now: Duration) {
        let mut replies = std::mem::take(&mut self.replies);
        for ProbeReply { probe, verdict } in replies.drain(..) {
            let event = match verdict {
                ProbeVerdict::Answered { exact } => MonitorEvent::Answered { probe, exact },
                ProbeVerdict::Failed(failure) => MonitorEvent::Failed { probe, failure },
            };
            let actions = self.monitor.handle(event, now);
            self.run_actions(actions, now);
        }
        self.replies = replies;
    }

    fn run_actions(&mut self, actions: Vec<MonitorAction>, now: Duration) {
        let mut actions = VecDeque::from(actions);
        while let Some(action) = actions.pop_front() {
            match action {
                MonitorAction::Send { probe, target } => {
                    let kind = target.settings.protocol.kind();
                    match self.probers.send(probe, &target, now) {
                        Ok(()) => self.clear_local_error(kind, now),
                        Err(SendError::Target(failure)) => {
                            actions.extend(self.monitor.handle(MonitorEvent::Failed { probe, failure }, now));
                        }
                        Err(SendError::Local(reason)) => {
                            self.record_local_error(kind, reason, now);
                            actions.extend(self.monitor.handle(MonitorEvent::NotSent(probe), now));
                        }
                    }
                }
                MonitorAction::Cancel { probe, target } => self.probers.cancel(probe, &target),
                MonitorAction::Changed { target, change } => self.listeners.handle_change(&target, &change),
            }
        }
    }

    fn record_local_error(&mut self, kind: ProbeKind, reason: String, now: Duration) {
        let known = self.local_errors.get(&kind);
        let logged = known.map(|error| error.logged).filter(|&logged| now < logged + LOCAL_ERROR_HOLD);
        if logged.is_none() {
            let (protocol, reason) = (kind.name(), reason.as_str());
            tracing::warn!(protocol, reason, "cannot send health probes; downstreams keep the state they have");
        }
        self.local_errors.insert(kind, LocalError { reason, last: now, logged: logged.unwrap_or(now) });
    }

    fn clear_local_error(&mut self, kind: ProbeKind, now: Duration) {
        if self.local_errors.get(&kind).is_some_and(|error| error.last + LOCAL_ERROR_HOLD <= now) {
            self.local_errors.remove(&kind);
            tracing::info!(protocol = kind.name(), "health probes can be sent again");
        }
    }
}
