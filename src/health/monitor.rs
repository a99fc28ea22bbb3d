//! The state machine of health checks for all targets. No I/O.
//!
//! [`HealthMonitor::handle`] takes a [`MonitorEvent`] and the time and returns [`MonitorAction`]s, which
//! [`HealthChecks`](super::HealthChecks) carries out. A target is probed in rounds:
//!
//! ```text
//! interval  ├──────────────────────────────────────────┤
//! timeout   ├─────────────────┤                        │
//! probes    1st   2nd   3rd   ▲ no answer to any:      1st of the next round
//!            └── answered: the round is over             the round has failed
//! ```
//!
//! An answer to any probe counts for the round, so one or two lost datagrams do not make a receiver unhealthy; a dead receiver is
//! detected within interval + timeout (at the default threshold of one round). After a refusal the next probe follows
//! soon, and when all are refused the round has failed ([`fail_round`](HealthMonitor::fail_round)). An unhealthy target gets one
//! probe per round.
//!
//! Each target's rounds start at a fixed phase of the interval, a hash of its address: thousands of targets spread evenly, and
//! do not move when others come and go. If the caller is late, a probe still gets its full time before it counts as
//! unanswered. A tick sends at most [`MAX_PROBES_PER_TICK`] probes, so that their replies can be read before the next are sent.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use super::model::{HealthState, ProbeFailure, ProbeId, ProbeOutcome, ProbeTarget, StateChange, TargetStatus};
use super::probe_stats::ProbeStatsByKind;
use super::settings::ProbeProtocol;
use crate::net::endpoint_hash;

/// Probes per round, spread evenly over the timeout. An unhealthy target gets only one.
pub const PROBES_PER_ROUND: u32 = 3;

/// The most probes sent for one [`MonitorEvent::Tick`]. Their replies (about 1 KiB each, as the kernel accounts) fit the smallest
/// default receive buffer; over loopback they arrive before the next probe is sent.
pub const MAX_PROBES_PER_TICK: u64 = 64;

/// After a refusal the next probe follows after timeout / `RETRY_DIVISOR`.
const RETRY_DIVISOR: u32 = 10;

/// A round whose probes this host cannot send ends without a result after this many timeouts.
const MAX_UNSENT_TIMEOUTS: u32 = 3;

/// An input of [`HealthMonitor::handle`].
#[derive(Debug, Clone, PartialEq)]
pub enum MonitorEvent {
    /// The complete new list of targets. Known ones keep their state.
    Targets(Vec<ProbeTarget>),
    /// A valid reply.
    Answered {
        /// The probe, or another one of the same round.
        probe: ProbeId,
        /// True if it is certainly this probe.
        exact: bool,
    },
    /// A refusal, or a failure to send that is due to the target or the path to it.
    Failed {
        /// The probe.
        probe: ProbeId,
        /// The reason.
        failure: ProbeFailure,
    },
    /// This host could not send the probe, through no fault of the target.
    NotSent(ProbeId),
    /// The state of this host may have changed: begin a round now, or one timeout after the start of the last one.
    Recheck(IpAddr),
    /// The time of [`HealthMonitor::next_deadline`] has come.
    Tick,
}

/// An output of [`HealthMonitor::handle`], to be carried out in order.
#[derive(Debug, Clone, PartialEq)]
pub enum MonitorAction {
    /// Send a probe and report its outcome.
    Send {
        /// The probe's number.
        probe: ProbeId,
        /// Destination and protocol.
        target: Arc<ProbeTarget>,
    },
    /// Forget a probe. Its outcome no longer matters.
    Cancel {
        /// The probe's number.
        probe: ProbeId,
        /// Its target.
        target: Arc<ProbeTarget>,
    },
    /// A target's state has changed.
    Changed {
        /// The target.
        target: Arc<ProbeTarget>,
        /// The old and the new state.
        change: StateChange,
    },
}

/// All targets, their state, and the time of their next action.
#[derive(Debug)]
pub struct HealthMonitor {
    /// The most concurrent rounds with probes that need a socket each (TCP, HTTP); further ones wait in `waiting`. It bounds
    /// rounds, not probes, so that every round that has begun can end.
    limit: usize,
    targets: BTreeMap<u64, MonitoredTarget>,
    numbers: HashMap<Arc<ProbeTarget>, u64>,
    hosts: BTreeSet<(IpAddr, u64)>,
    probes: HashMap<ProbeId, u64>,
    /// Each target's next action, by time; a target in `waiting` has none.
    timers: BTreeSet<(Duration, u64)>,
    waiting: VecDeque<u64>,
    connecting: usize,
    next_number: u64,
    next_probe: u64,
    probe_stats: ProbeStatsByKind,
}

/// One target.
#[derive(Debug)]
struct MonitoredTarget {
    target: Arc<ProbeTarget>,
    status: TargetStatus,
    /// Rounds in a row.
    failed: u32,
    /// Rounds in a row.
    passed: u32,
    round: Option<ProbeRound>,
    last_start: Option<Duration>,
    /// The time of its next action; none while it is in `waiting`.
    due: Option<Duration>,
}

#[derive(Debug)]
struct ProbeRound {
    started: Duration,
    sent: u32,
    pending: Vec<SentProbe>,
    /// The reason of the last refusal.
    refusal: Option<ProbeFailure>,
    /// A recheck was requested during the round: the next one starts early.
    recheck_requested: bool,
}

#[derive(Debug, Clone, Copy)]
struct SentProbe {
    probe: ProbeId,
    sent: Duration,
}

impl MonitoredTarget {
    fn timeout(&self) -> Duration {
        self.target.settings.timeout
    }

    fn probe_spacing(&self) -> Duration {
        self.timeout() / PROBES_PER_ROUND
    }

    fn attempts(&self) -> u32 {
        if self.status.state.usable() { PROBES_PER_ROUND } else { 1 }
    }

    /// The first regular start of a round after `time`.
    fn start_after(&self, time: Duration) -> Duration {
        let interval = nanos(self.target.settings.interval).max(1);
        let phase = endpoint_hash(self.target.address) % interval;
        let rounds = nanos(time).checked_sub(phase).map_or(0, |past| past / interval + 1);
        Duration::from_nanos(phase.saturating_add(rounds.saturating_mul(interval)))
    }

    /// Sets the state. Returns an action if it has changed.
    fn set_state(&mut self, state: HealthState, now: Duration) -> Option<MonitorAction> {
        let from = self.status.state;
        if from == state {
            return None;
        }
        let lasted = now.saturating_sub(self.status.since);
        self.status.state = state;
        self.status.since = now;
        self.status.recovered = from == HealthState::Unhealthy;
        let change = StateChange { from, lasted, status: self.status.clone() };
        Some(MonitorAction::Changed { target: Arc::clone(&self.target), change })
    }
}

impl HealthMonitor {
    /// A monitor without targets. `limit` is the most concurrent rounds of TCP and HTTP probes, from 1; each takes up to
    /// [`PROBES_PER_ROUND`] sockets.
    #[must_use]
    pub fn new(limit: usize) -> HealthMonitor {
        HealthMonitor {
            limit: limit.max(1),
            targets: BTreeMap::new(),
            numbers: HashMap::new(),
            hosts: BTreeSet::new(),
            probes: HashMap::new(),
            timers: BTreeSet::new(),
            waiting: VecDeque::new(),
            connecting: 0,
            next_number: 0,
            next_probe: 1,
            probe_stats: ProbeStatsByKind::default(),
        }
    }

    /// Handles an event and returns the resulting actions, in order. `now` is the time since the daemon's start; it never
    /// decreases.
    pub fn handle(&mut self, event: MonitorEvent, now: Duration) -> Vec<MonitorAction> {
        let mut actions = Vec::new();
        match event {
            MonitorEvent::Targets(targets) => self.replace_targets(targets, now, &mut actions),
            MonitorEvent::Answered { probe, exact } => self.handle_answer(probe, exact, now, &mut actions),
            MonitorEvent::Failed { probe, failure } => self.handle_failure(probe, failure, now, &mut actions),
            MonitorEvent::NotSent(probe) => self.handle_not_sent(probe, now, &mut actions),
            MonitorEvent::Recheck(host) => self.recheck(host, now),
            MonitorEvent::Tick => self.tick(now, &mut actions),
        }
        actions
    }

    /// The time of the next [`MonitorEvent::Tick`]; may be in the past. None without targets.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        self.timers.first().map(|&(due, _)| due)
    }

    /// The status of a target; none if it is unknown.
    #[must_use]
    pub fn status(&self, target: &ProbeTarget) -> Option<&TargetStatus> {
        let number = self.numbers.get(target)?;
        self.targets.get(number).map(|watched| &watched.status)
    }

    /// Statistics since the start.
    #[must_use]
    pub fn probe_stats(&self) -> &ProbeStatsByKind {
        &self.probe_stats
    }

    fn replace_targets(&mut self, targets: Vec<ProbeTarget>, now: Duration, actions: &mut Vec<MonitorAction>) {
        let wanted: BTreeSet<ProbeTarget> = targets.into_iter().collect();
        let gone: Vec<u64> = self
            .targets
            .iter()
            .filter(|(_, known)| !wanted.contains(&*known.target))
            .map(|(&number, _)| number)
            .collect();
        let new: Vec<ProbeTarget> = wanted.into_iter().filter(|target| !self.numbers.contains_key(target)).collect();
        // A new target that differs from a known one only in timing inherits its status.
        let mut known: HashMap<(SocketAddr, &ProbeProtocol), &TargetStatus> = HashMap::new();
        if !new.is_empty() {
            for watched in self.targets.values() {
                let ProbeTarget { address, settings } = &*watched.target;
                known.insert((*address, &settings.protocol), &watched.status);
            }
        }
        let inherited: Vec<Option<TargetStatus>> = new
            .iter()
            .map(|target| known.get(&(target.address, &target.settings.protocol)).map(|&status| status.clone()))
            .collect();
        for number in gone {
            self.remove_target(number, now, actions);
        }
        self.waiting.retain(|number| self.targets.contains_key(number));
        for (target, status) in new.into_iter().zip(inherited) {
            self.add_target(Arc::new(target), status, now);
        }
        self.start_waiting_rounds(now, actions);
    }

    fn add_target(&mut self, target: Arc<ProbeTarget>, status: Option<TargetStatus>, now: Duration) {
        let number = self.next_number;
        self.next_number += 1;
        let unknown = || TargetStatus {
            state: HealthState::Unknown,
            since: now,
            recovered: false,
            failure: None,
            round_trip: None,
        };
        self.numbers.insert(Arc::clone(&target), number);
        self.hosts.insert((target.address.ip(), number));
        let watched = MonitoredTarget {
            target,
            status: status.unwrap_or_else(unknown),
            failed: 0,
            passed: 0,
            round: None,
            last_start: None,
            due: None,
        };
        let due = watched.start_after(now);
        self.targets.insert(number, watched);
        self.set_due(number, Some(due));
    }

    fn remove_target(&mut self, number: u64, now: Duration, actions: &mut Vec<MonitorAction>) {
        self.end_round(number, ProbeOutcome::Abandoned, now, actions);
        self.set_due(number, None);
        if let Some(watched) = self.targets.remove(&number) {
            self.hosts.remove(&(watched.target.address.ip(), number));
            self.numbers.remove(&watched.target);
        }
    }

    fn tick(&mut self, now: Duration, actions: &mut Vec<MonitorAction>) {
        let first = self.next_probe;
        while let Some(&(due, number)) = self.timers.first()
            && due <= now
            && self.next_probe - first < MAX_PROBES_PER_TICK
        {
            self.run_due(number, now, actions);
        }
    }

    /// Runs a target's due action: start a round, send the next probe, or fail the round.
    fn run_due(&mut self, number: u64, now: Duration, actions: &mut Vec<MonitorAction>) {
        let Some(watched) = self.targets.get(&number) else { return };
        match &watched.round {
            None => self.start_round(number, now, actions),
            Some(round) if round.sent < watched.attempts() => self.send_probe(number, now, actions),
            Some(_) => self.fail_round(number, now, actions),
        }
    }

    fn start_round(&mut self, number: u64, now: Duration, actions: &mut Vec<MonitorAction>) {
        let Some(watched) = self.targets.get_mut(&number) else { return };
        if watched.target.settings.protocol.connects() {
            if self.connecting >= self.limit {
                self.waiting.push_back(number);
                self.set_due(number, None);
                return;
            }
            self.connecting += 1;
        }
        watched.round =
            Some(ProbeRound { started: now, sent: 0, pending: Vec::new(), refusal: None, recheck_requested: false });
        watched.last_start = Some(now);
        self.send_probe(number, now, actions);
    }

    /// Starts waiting rounds while there is room.
    fn start_waiting_rounds(&mut self, now: Duration, actions: &mut Vec<MonitorAction>) {
        while self.connecting < self.limit
            && let Some(number) = self.waiting.pop_front()
        {
            self.start_round(number, now, actions);
        }
    }

    fn send_probe(&mut self, number: u64, now: Duration, actions: &mut Vec<MonitorAction>) {
        let Some(watched) = self.targets.get_mut(&number) else { return };
        let (attempts, gap, timeout) = (watched.attempts(), watched.probe_spacing(), watched.timeout());
        let Some(round) = &mut watched.round else { return };
        let probe = ProbeId(self.next_probe);
        self.next_probe += 1;
        round.sent += 1;
        round.pending.push(SentProbe { probe, sent: now });
        // The last probe gets its full time even if it was sent late.
        let due = if round.sent < attempts { now + gap } else { (now + gap).max(round.started + timeout) };
        let target = Arc::clone(&watched.target);
        self.probes.insert(probe, number);
        self.probe_stats.of_mut(target.settings.protocol.kind()).record_sent();
        self.set_due(number, Some(due));
        actions.push(MonitorAction::Send { probe, target });
    }

    fn handle_answer(&mut self, probe: ProbeId, exact: bool, now: Duration, actions: &mut Vec<MonitorAction>) {
        let Some((number, attempt)) = self.record_outcome(probe, ProbeOutcome::Answered) else { return };
        let Some(watched) = self.targets.get_mut(&number) else { return };
        if exact {
            let round_trip = now.saturating_sub(attempt.sent);
            watched.status.round_trip = Some(round_trip);
            self.probe_stats.of_mut(watched.target.settings.protocol.kind()).round_trips.observe(round_trip);
        }
        watched.failed = 0;
        watched.passed = watched.passed.saturating_add(1);
        let healthy = watched.status.state.usable() || watched.passed >= watched.target.settings.healthy_threshold;
        if healthy {
            watched.status.failure = None;
        }
        let change = if healthy { watched.set_state(HealthState::Healthy, now) } else { None };
        self.end_round(number, ProbeOutcome::Abandoned, now, actions);
        actions.extend(change);
        self.start_waiting_rounds(now, actions);
    }

    fn handle_failure(
        &mut self,
        probe: ProbeId,
        failure: ProbeFailure,
        now: Duration,
        actions: &mut Vec<MonitorAction>,
    ) {
        let Some((number, _)) = self.record_outcome(probe, failure.kind.into()) else { return };
        let Some(watched) = self.targets.get_mut(&number) else { return };
        let (attempts, soon) = (watched.attempts(), now + watched.timeout() / RETRY_DIVISOR);
        let due = watched.due;
        let Some(round) = &mut watched.round else { return };
        round.refusal = Some(failure);
        if round.sent < attempts {
            self.set_due(number, Some(due.map_or(soon, |due| due.min(soon))));
        } else if round.pending.is_empty() {
            self.fail_round(number, now, actions);
        }
    }

    fn handle_not_sent(&mut self, probe: ProbeId, now: Duration, actions: &mut Vec<MonitorAction>) {
        let Some((number, _)) = self.record_outcome(probe, ProbeOutcome::NotSent) else { return };
        let Some(watched) = self.targets.get_mut(&number) else { return };
        let (later, timeout) = (now + watched.probe_spacing(), watched.timeout());
        let Some(round) = &mut watched.round else { return };
        round.sent -= 1;
        if round.sent == 0 || now >= round.started + timeout * MAX_UNSENT_TIMEOUTS {
            self.end_round(number, ProbeOutcome::Abandoned, now, actions);
            self.start_waiting_rounds(now, actions);
        } else {
            self.set_due(number, Some(later));
        }
    }

    fn recheck(&mut self, host: IpAddr, now: Duration) {
        let numbers: Vec<u64> = self.hosts.range((host, 0)..=(host, u64::MAX)).map(|&(_, number)| number).collect();
        for number in numbers {
            let Some(watched) = self.targets.get_mut(&number) else { continue };
            if let Some(round) = &mut watched.round {
                round.recheck_requested = true;
                continue;
            }
            let rested = watched.last_start.map_or(now, |start| now.max(start + watched.timeout()));
            if watched.due.is_some_and(|due| due > rested) {
                self.set_due(number, Some(rested));
            }
        }
    }

    fn fail_round(&mut self, number: u64, now: Duration, actions: &mut Vec<MonitorAction>) {
        let Some(watched) = self.targets.get_mut(&number) else { return };
        let timeout = watched.timeout();
        let refusal = watched.round.as_mut().and_then(|round| round.refusal.take());
        watched.status.failure = Some(refusal.unwrap_or_else(|| ProbeFailure::silence(timeout)));
        watched.passed = 0;
        watched.failed = watched.failed.saturating_add(1);
        let unhealthy = watched.failed >= watched.target.settings.unhealthy_threshold;
        let change = if unhealthy { watched.set_state(HealthState::Unhealthy, now) } else { None };
        self.end_round(number, ProbeOutcome::NoAnswer, now, actions);
        actions.extend(change);
        self.start_waiting_rounds(now, actions);
    }

    /// Records the outcome of a probe. None if it already has one.
    fn record_outcome(&mut self, probe: ProbeId, outcome: ProbeOutcome) -> Option<(u64, SentProbe)> {
        let number = self.probes.remove(&probe)?;
        let watched = self.targets.get_mut(&number)?;
        let pending = &mut watched.round.as_mut()?.pending;
        let place = pending.iter().position(|attempt| attempt.probe == probe)?;
        self.probe_stats.of_mut(watched.target.settings.protocol.kind()).record_outcome(outcome);
        Some((number, pending.remove(place)))
    }

    /// Ends the running round, if any, and its pending probes with outcome `rest`; schedules the next round.
    fn end_round(&mut self, number: u64, rest: ProbeOutcome, now: Duration, actions: &mut Vec<MonitorAction>) {
        let Some(watched) = self.targets.get_mut(&number) else { return };
        let Some(round) = watched.round.take() else { return };
        let protocol = &watched.target.settings.protocol;
        if protocol.connects() {
            self.connecting -= 1;
        }
        for attempt in round.pending {
            self.probes.remove(&attempt.probe);
            self.probe_stats.of_mut(protocol.kind()).record_outcome(rest);
            actions.push(MonitorAction::Cancel { probe: attempt.probe, target: Arc::clone(&watched.target) });
        }
        // If the round took longer than the interval, the next one is due at once.
        let turn = watched.start_after(round.started);
        let due = if round.recheck_requested { turn.min(round.started + watched.timeout()) } else { turn }.max(now);
        self.set_due(number, Some(due));
    }

    fn set_due(&mut self, number: u64, due: Option<Duration>) {
        let Some(watched) = self.targets.get_mut(&number) else { return };
        if let Some(due) = watched.due {
            self.timers.remove(&(due, number));
        }
        if let Some(due) = due {
            self.timers.insert((due, number));
        }
        watched.due = due;
    }
}

/// Nanoseconds; 64 bits last for 584 years.
fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
