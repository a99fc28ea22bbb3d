//! Health checks: which downstreams work, found out by asking them.
//!
//! ```text
//! downstream sets ─► set_targets ─► state::Monitor (pure) ─► probers ─► network
//!      mio events ─► on_event ───► what came back ─┘  │
//!           clock ─► on_timer                         └─► HealthMap ─► controller ─► share::shares ─► table
//! ```
//!
//! [`Health`] is owned by the event loop and does everything on its thread: [`state`] decides what is asked when and what
//! follows from answers, [`probers`] holds the sockets, [`listeners`] knows whose downstreams the targets are. What health
//! means for a listener's table is computed by the controller, with [`share::shares`].
//!
//! ```no_run
//! # use std::time::{Duration, Instant};
//! # use udp_fanout::health::{Health, Watch};
//! # fn handle(_: udp_fanout::health::share::HealthMap) {}
//! # fn main() -> anyhow::Result<()> {
//! # let (watches, started): (Vec<Watch>, _) = (vec![], Instant::now());
//! let mut poll = mio::Poll::new()?;
//! let mut events = mio::Events::with_capacity(1024);
//! let mut health = Health::new(poll.registry(), mio::Token(1 << 20))?;
//! health.set_targets(&watches, started.elapsed());
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
pub mod probers;
pub mod settings;
pub mod share;
pub mod state;
pub mod tally;

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use mio::{Registry, Token};
use nix::sys::resource::{Resource, getrlimit};

pub use self::listeners::Watch;
use self::listeners::{DownstreamHealth, Listeners, Transitions};
use self::probers::{Probers, Reply, Unsent, Verdict};
use self::settings::ProtocolKind;
use self::share::HealthMap;
use self::state::{ATTEMPTS, Action, Event, Monitor};
use self::tally::Tallies;
use crate::model::ListenerId;

/// By how much the caller must be late for all sockets to be read before anyone's time is up: events may be waiting that
/// it has not asked the kernel for.
const LATE: Duration = Duration::from_millis(20);

/// How long it must go well until trouble with sending is over, and how often it is spoken of while it lasts.
const TROUBLE: Duration = Duration::from_secs(60);

/// Most sockets for connections, and the part of the limit of open files that they may take.
pub(crate) const SOCKETS: u64 = 4096;
pub(crate) const PART_OF_FILES: u64 = 4;

/// All health checks of the daemon. Times are durations since it started, and do not go back.
#[derive(Debug)]
pub struct Health {
    monitor: Monitor,
    probers: Probers,
    listeners: Listeners,
    troubles: BTreeMap<ProtocolKind, Trouble>,
    replies: Vec<Reply>,
}

/// Something that keeps this host from sending probes.
#[derive(Debug)]
struct Trouble {
    reason: String,
    last: Duration,
    told: Duration,
}

impl Health {
    /// Without targets. Sockets are watched with `registry`, under tokens from `first_token` on, of which
    /// [`probers::TOKENS`] must be free. Their number adapts to the limit of open files as it is now.
    ///
    /// # Errors
    /// When the registry or the limit cannot be read.
    pub fn new(registry: &Registry, first_token: Token) -> Result<Health> {
        let registry = registry.try_clone().context("cannot share the event loop with the health checks")?;
        let (files, _) = getrlimit(Resource::RLIMIT_NOFILE).context("cannot read the limit of open files")?;
        let sockets = (files / PART_OF_FILES).clamp(u64::from(ATTEMPTS), SOCKETS);
        // At most SOCKETS.
        let rounds = usize::try_from(sockets / u64::from(ATTEMPTS)).unwrap_or(1);
        Ok(Health {
            monitor: Monitor::new(rounds),
            probers: Probers::new(registry, first_token),
            listeners: Listeners::default(),
            troubles: BTreeMap::new(),
            replies: Vec::new(),
        })
    }

    /// Says what is to be watched from now on: every listener that has health checks, with all its downstreams. Those
    /// watched before keep their state.
    pub fn set_targets(&mut self, watches: &[Watch], now: Duration) {
        let targets = self.listeners.replace(watches);
        self.probers.keep(targets.iter());
        let actions = self.monitor.handle(Event::Targets(targets), now);
        self.carry_out(actions, now);
        self.listeners.settle(&self.monitor);
    }

    /// Whether an event with this token is for [`on_event`](Self::on_event).
    #[must_use]
    pub fn owns(&self, token: Token) -> bool {
        self.probers.tokens().contains(&token.0)
    }

    /// Takes in what has come to the socket of this token.
    pub fn on_event(&mut self, token: Token, now: Duration) {
        self.probers.on_event(token, &mut self.replies);
        self.take_replies(now);
    }

    /// Does what is due. To be called after the events of a turn, when [`next_deadline`](Self::next_deadline) has come;
    /// more often does no harm.
    pub fn on_timer(&mut self, now: Duration) {
        if self.monitor.next_deadline().is_some_and(|due| due + LATE <= now) {
            self.probers.read_all(&mut self.replies);
        } else {
            self.probers.read_rest(&mut self.replies);
        }
        self.take_replies(now);
        let actions = self.monitor.handle(Event::Tick, now);
        self.carry_out(actions, now);
    }

    /// When [`on_timer`](Self::on_timer) is to be called; possibly a time that has passed. None if there is nothing to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        if self.probers.has_rest() { Some(Duration::ZERO) } else { self.monitor.next_deadline() }
    }

    /// Has the downstreams on a host probed at once: something (a lost route, an ICMP error, a link that came up) suggests
    /// that their state has changed. Costs little when it is called often: no more than one round begins in a timeout.
    pub fn recheck(&mut self, host: IpAddr, now: Duration) {
        self.monitor.handle(Event::Recheck(host.to_canonical()), now);
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
    pub fn all_out(&self) -> impl Iterator<Item = (&str, &'static str)> {
        self.listeners.all_out()
    }

    /// How often downstreams have become unhealthy, and healthy again, by listener.
    pub fn transitions(&self) -> impl Iterator<Item = (ListenerId, Transitions)> + '_ {
        self.listeners.transitions()
    }

    /// Probes and round trips counted since the start, by protocol.
    #[must_use]
    pub fn tallies(&self) -> &Tallies {
        self.monitor.tallies()
    }

    /// What keeps this host from sending probes of some protocol, if anything does: in words for the operator.
    pub fn troubles(&self) -> impl Iterator<Item = (ProtocolKind, &str)> {
        self.troubles.iter().map(|(kind, trouble)| (*kind, trouble.reason.as_str()))
    }

    /// Sockets that are open at the moment.
    #[must_use]
    pub fn open_sockets(&self) -> usize {
        self.probers.open_sockets()
    }

    fn take_replies(&mut self, now: Duration) {
        let mut replies = std::mem::take(&mut self.replies);
        for Reply { probe, verdict } in replies.drain(..) {
            let event = match verdict {
                Verdict::Answered { exact } => Event::Answered { probe, exact },
                Verdict::Failed(failure) => Event::Failed { probe, failure },
            };
            let actions = self.monitor.handle(event, now);
            self.carry_out(actions, now);
        }
        self.replies = replies;
    }

    fn carry_out(&mut self, actions: Vec<Action>, now: Duration) {
        let mut actions = VecDeque::from(actions);
        while let Some(action) = actions.pop_front() {
            match action {
                Action::Send { probe, target } => {
                    let kind = target.settings.protocol.kind();
                    match self.probers.send(probe, &target, now) {
                        Ok(()) => self.no_trouble(kind, now),
                        Err(Unsent::Failed(failure)) => {
                            actions.extend(self.monitor.handle(Event::Failed { probe, failure }, now));
                        }
                        Err(Unsent::Trouble(reason)) => {
                            self.trouble(kind, reason, now);
                            actions.extend(self.monitor.handle(Event::NotSent(probe), now));
                        }
                    }
                }
                Action::Cancel { probe, target } => self.probers.cancel(probe, &target),
                Action::Changed { target, change } => self.listeners.changed(&target, &change),
            }
        }
    }

    fn trouble(&mut self, kind: ProtocolKind, reason: String, now: Duration) {
        let known = self.troubles.get(&kind);
        let told = known.map(|trouble| trouble.told).filter(|&told| now < told + TROUBLE);
        if told.is_none() {
            let (protocol, reason) = (kind.name(), reason.as_str());
            tracing::warn!(protocol, reason, "cannot send health probes; downstreams keep the state they have");
        }
        self.troubles.insert(kind, Trouble { reason, last: now, told: told.unwrap_or(now) });
    }

    fn no_trouble(&mut self, kind: ProtocolKind, now: Duration) {
        if self.troubles.get(&kind).is_some_and(|trouble| trouble.last + TROUBLE <= now) {
            self.troubles.remove(&kind);
            tracing::info!(protocol = kind.name(), "health probes can be sent again");
        }
    }
}
