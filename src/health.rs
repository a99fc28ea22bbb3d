//! Health checks: which downstreams work, found out by asking them.
//!
//! ```text
//! downstream sets ─► set_targets ─► monitor::HealthMonitor (pure) ─► probers ─► network
//!      mio events ─► on_event ───► what came back ─┘  │
//!           clock ─► on_timer                         └─► HealthMap ─► controller ─► weights::effective_weights ─► table
//! ```
//!
//! [`HealthChecks`] is owned by the event loop and does everything on its thread: [`monitor`] decides what is asked when and what
//! follows from answers, [`probers`] holds the sockets, [`listeners`] knows whose downstreams the targets are. What health
//! means for a listener's table is computed by the controller, with [`weights::effective_weights`].
//!
//! ```no_run
//! # use std::time::{Duration, Instant};
//! # use udp_fanout::health::{HealthChecks, ListenerCheck};
//! # fn handle(_: udp_fanout::health::weights::HealthMap) {}
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

pub mod keys;
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

/// By how much the caller must be late for all sockets to be read before anyone's time is up: events may be waiting that
/// it has not asked the kernel for.
const LATE_TICK: Duration = Duration::from_millis(20);

/// How long it must go well until trouble with sending is over, and how often it is spoken of while it lasts.
const LOCAL_ERROR_HOLD: Duration = Duration::from_secs(60);

/// Most sockets for connections, and the part of the limit of open files that they may take.
pub(crate) const MAX_SOCKETS: u64 = 4096;
pub(crate) const OPEN_FILES_DIVISOR: u64 = 4;

/// All health checks of the daemon. Times are durations since it started, and do not go back.
#[derive(Debug)]
pub struct HealthChecks {
    monitor: HealthMonitor,
    probers: Probers,
    listeners: CheckedListeners,
    local_errors: BTreeMap<ProbeKind, LocalError>,
    replies: Vec<ProbeReply>,
}

/// Something that keeps this host from sending probes.
#[derive(Debug)]
struct LocalError {
    reason: String,
    last: Duration,
    logged: Duration,
}

impl HealthChecks {
    /// Without targets. Sockets are watched with `registry`, under tokens from `first_token` on, of which
    /// [`probers::TOKENS`] must be free. Their number adapts to the limit of open files as it is now.
    ///
    /// # Errors
    /// When the registry or the limit cannot be read.
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

    /// Says what is to be watched from now on: every listener that has health checks, with all its downstreams. Those
    /// watched before keep their state.
    pub fn set_targets(&mut self, checks: &[ListenerCheck], now: Duration) {
        let targets = self.listeners.replace_checks(checks);
        self.probers.close_unneeded(targets.iter());
        let actions = self.monitor.handle(MonitorEvent::Targets(targets), now);
        self.run_actions(actions, now);
        self.listeners.sync_with(&self.monitor);
    }

    /// Whether an event with this token is for [`on_event`](Self::on_event).
    #[must_use]
    pub fn owns(&self, token: Token) -> bool {
        self.probers.tokens().contains(&token.0)
    }

    /// Takes in what has come to the socket of this token.
    pub fn on_event(&mut self, token: Token, now: Duration) {
        self.probers.on_event(token, &mut self.replies);
        self.handle_replies(now);
    }

    /// Does what is due. To be called after the events of a turn, when [`next_deadline`](Self::next_deadline) has come;
    /// more often does no harm.
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

    /// When [`on_timer`](Self::on_timer) is to be called; possibly a time that has passed. None if there is nothing to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        if self.probers.has_unread() { Some(Duration::ZERO) } else { self.monitor.next_deadline() }
    }

    /// Has the downstreams on a host probed at once: something (a lost route, an ICMP error, a link that came up) suggests
    /// that their state has changed. Costs little when it is called often: no more than one round begins in a timeout.
    pub fn recheck(&mut self, host: IpAddr, now: Duration) {
        self.monitor.handle(MonitorEvent::Recheck(host.to_canonical()), now);
    }

    /// What the controller needs to know, if it has changed since the last call.
    pub fn take_change(&mut self) -> Option<HealthMap> {
        self.listeners.take_change()
    }

    /// What the controller needs to know.
    #[must_use]
    pub fn map(&self) -> &HealthMap {
        self.listeners.map()
    }

    /// Everything known of every downstream that is watched, by listener and address.
    pub fn downstreams(&self) -> impl Iterator<Item = DownstreamHealth<'_>> {
        self.listeners.downstreams(&self.monitor)
    }

    /// The names of the listeners all of whose downstreams are unhealthy, and what is done with their datagrams.
    pub fn all_unhealthy(&self) -> impl Iterator<Item = (&str, &'static str)> {
        self.listeners.all_unhealthy()
    }

    /// How often downstreams have become unhealthy, and healthy again, by listener.
    pub fn transitions(&self) -> impl Iterator<Item = (ListenerId, Transitions)> + '_ {
        self.listeners.transitions()
    }

    /// Probes and round trips counted since the start, by protocol.
    #[must_use]
    pub fn probe_stats(&self) -> &ProbeStatsByKind {
        self.monitor.probe_stats()
    }

    /// What keeps this host from sending probes of some protocol, if anything does: in words for the operator.
    pub fn local_errors(&self) -> impl Iterator<Item = (ProbeKind, &str)> {
        self.local_errors.iter().map(|(kind, error)| (*kind, error.reason.as_str()))
    }

    /// Sockets that are open at the moment.
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
