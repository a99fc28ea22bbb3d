//! The state machine of health checks: every target, no I/O.
//!
//! [`Monitor::handle`] takes an [`Event`] and says what is to be sent; it opens nothing and reads no clock. A target is
//! probed in rounds:
//!
//! ```text
//! interval  ├──────────────────────────────────────────┤
//! timeout   ├─────────────────┤                        │
//! probes    1st   2nd   3rd   ▲ no answer to any:      1st of the next round
//!            └── answered: the round is over             the round has failed
//! ```
//!
//! An answer to any of the probes counts for the round, so that a lost datagram or two don't make a receiver unhealthy,
//! and yet a dead one is found out within interval + timeout of its death (at the default threshold of one round). A
//! refusal is not waited out: the next probe follows soon, and when all have been refused the round has failed. A target
//! that is unhealthy already is probed once a round.
//!
//! Rounds start on a grid of the target's own, whose phase is a hash of its address: thousands of targets spread evenly
//! over the interval, and stay where they are when others come and go. Should the caller have been held up, a probe
//! still gets its time before it counts as unanswered, and a tick sends no more than [`BURST`] probes, so that their
//! answers can be read before the next are sent.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use super::model::{Change, Failure, Outcome, ProbeId, State, Status, Target};
use super::settings::Protocol;
use super::tally::Tallies;
use crate::plan::maglev;

/// Probes in one round of a target that is not unhealthy, spread evenly over the timeout.
pub const ATTEMPTS: u32 = 3;

/// Most probes sent for one [`Event::Tick`]. Their answers, about 1 KiB each as the kernel counts, fit into the smallest
/// default receive buffer; over loopback they are there before the next probe is sent.
pub const BURST: u64 = 64;

/// After a refusal the next probe follows in this part of the timeout.
const HURRY: u32 = 10;

/// A round some of whose probes this host cannot send is given up, without a verdict, after so many timeouts.
const STALEMATE: u32 = 3;

/// Something that has happened. Times are durations since the daemon started.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The targets are these from now on. Those known before keep their state.
    Targets(Vec<Target>),
    /// A valid answer has come.
    Answered {
        /// To this probe, or to one of the same round.
        probe: ProbeId,
        /// Certainly to this one.
        exact: bool,
    },
    /// A probe has been refused, or could not be sent for a reason that lies on the way to the target.
    Failed {
        /// Which.
        probe: ProbeId,
        /// How.
        failure: Failure,
    },
    /// A probe could not be sent for a reason that lies with this host.
    NotSent(ProbeId),
    /// Something may have happened to this host: begin a round now, or, where one has begun within the timeout, when that
    /// has passed.
    Recheck(IpAddr),
    /// The time of [`Monitor::next_deadline`] has come.
    Tick,
}

/// Something to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Send a probe, and report how it ends.
    Send {
        /// Its number.
        probe: ProbeId,
        /// Where to and how.
        target: Arc<Target>,
    },
    /// Forget a probe. What comes of it no longer matters.
    Cancel {
        /// Its number.
        probe: ProbeId,
        /// Where it was sent.
        target: Arc<Target>,
    },
    /// A target's state is another.
    Changed {
        /// Whose.
        target: Arc<Target>,
        /// From what to what.
        change: Change,
    },
}

/// All targets, what is known of them and what is to be sent when.
#[derive(Debug)]
pub struct Monitor {
    /// Most rounds under way at a time among targets whose probes need a socket each; others wait in `waiting`. What is
    /// bounded are rounds and not probes, so that a round once begun can end, and makes room.
    limit: usize,
    targets: BTreeMap<u64, Watched>,
    numbers: HashMap<Arc<Target>, u64>,
    hosts: BTreeSet<(IpAddr, u64)>,
    probes: HashMap<ProbeId, u64>,
    /// What is due when; each target but the waiting ones once.
    timers: BTreeSet<(Duration, u64)>,
    waiting: VecDeque<u64>,
    connecting: usize,
    next_number: u64,
    next_probe: u64,
    tallies: Tallies,
}

/// One target.
#[derive(Debug)]
struct Watched {
    target: Arc<Target>,
    status: Status,
    /// Rounds in a row.
    failed: u32,
    /// Rounds in a row.
    passed: u32,
    round: Option<Round>,
    last_start: Option<Duration>,
    /// When to look at it again; none while it waits for room.
    due: Option<Duration>,
}

#[derive(Debug)]
struct Round {
    started: Duration,
    sent: u32,
    pending: Vec<Attempt>,
    /// The last refusal.
    refusal: Option<Failure>,
    /// Something has happened since it began, so the next is not to wait for its turn.
    again: bool,
}

#[derive(Debug, Clone, Copy)]
struct Attempt {
    probe: ProbeId,
    sent: Duration,
}

impl Watched {
    fn timeout(&self) -> Duration {
        self.target.settings.timeout
    }

    fn gap(&self) -> Duration {
        self.timeout() / ATTEMPTS
    }

    fn attempts(&self) -> u32 {
        if self.status.state.usable() { ATTEMPTS } else { 1 }
    }

    /// The first start of a round after `time`.
    fn start_after(&self, time: Duration) -> Duration {
        let interval = nanos(self.target.settings.interval).max(1);
        let phase = maglev::identity(self.target.address) % interval;
        let rounds = nanos(time).checked_sub(phase).map_or(0, |past| past / interval + 1);
        Duration::from_nanos(phase.saturating_add(rounds.saturating_mul(interval)))
    }

    /// Changes the state, if it is another.
    fn turn(&mut self, state: State, now: Duration) -> Option<Action> {
        let from = self.status.state;
        if from == state {
            return None;
        }
        let lasted = now.saturating_sub(self.status.since);
        self.status.state = state;
        self.status.since = now;
        self.status.recovered = from == State::Unhealthy;
        let change = Change { from, lasted, status: self.status.clone() };
        Some(Action::Changed { target: Arc::clone(&self.target), change })
    }
}

impl Monitor {
    /// Without targets. `limit` is the most rounds under way at a time among those whose probes need a socket each, of
    /// which a round has up to [`ATTEMPTS`]; at least one.
    #[must_use]
    pub fn new(limit: usize) -> Monitor {
        Monitor {
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
            tallies: Tallies::default(),
        }
    }

    /// Takes an event in and says what is to be done, in order. `now` is the time since the daemon started; it does not
    /// go back.
    pub fn handle(&mut self, event: Event, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Targets(targets) => self.replace(targets, now, &mut actions),
            Event::Answered { probe, exact } => self.answered(probe, exact, now, &mut actions),
            Event::Failed { probe, failure } => self.refused(probe, failure, now, &mut actions),
            Event::NotSent(probe) => self.not_sent(probe, now, &mut actions),
            Event::Recheck(host) => self.recheck(host, now),
            Event::Tick => self.tick(now, &mut actions),
        }
        actions
    }

    /// When the next [`Event::Tick`] is due; possibly at once. None without targets.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        self.timers.first().map(|&(due, _)| due)
    }

    /// What is known of a target; none if it is not one.
    #[must_use]
    pub fn status(&self, target: &Target) -> Option<&Status> {
        let number = self.numbers.get(target)?;
        self.targets.get(number).map(|watched| &watched.status)
    }

    /// The targets.
    pub fn targets(&self) -> impl Iterator<Item = (&Arc<Target>, &Status)> {
        self.targets.values().map(|watched| (&watched.target, &watched.status))
    }

    /// What has been counted since the start.
    #[must_use]
    pub fn tallies(&self) -> &Tallies {
        &self.tallies
    }

    fn replace(&mut self, targets: Vec<Target>, now: Duration, actions: &mut Vec<Action>) {
        let wanted: BTreeSet<Target> = targets.into_iter().collect();
        let gone: Vec<u64> = self
            .targets
            .iter()
            .filter(|(_, known)| !wanted.contains(&*known.target))
            .map(|(&number, _)| number)
            .collect();
        let new: Vec<Target> = wanted.into_iter().filter(|target| !self.numbers.contains_key(target)).collect();
        // A target that differs from a known one in its timing alone is what that one is.
        let mut known: HashMap<(SocketAddr, &Protocol), &Status> = HashMap::new();
        if !new.is_empty() {
            for watched in self.targets.values() {
                let Target { address, settings } = &*watched.target;
                known.insert((*address, &settings.protocol), &watched.status);
            }
        }
        let inherited: Vec<Option<Status>> = new
            .iter()
            .map(|target| known.get(&(target.address, &target.settings.protocol)).map(|&status| status.clone()))
            .collect();
        for number in gone {
            self.remove(number, now, actions);
        }
        self.waiting.retain(|number| self.targets.contains_key(number));
        for (target, status) in new.into_iter().zip(inherited) {
            self.add(Arc::new(target), status, now);
        }
        self.admit(now, actions);
    }

    fn add(&mut self, target: Arc<Target>, status: Option<Status>, now: Duration) {
        let number = self.next_number;
        self.next_number += 1;
        let unknown =
            || Status { state: State::Unknown, since: now, recovered: false, failure: None, round_trip: None };
        self.numbers.insert(Arc::clone(&target), number);
        self.hosts.insert((target.address.ip(), number));
        let watched = Watched {
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

    fn remove(&mut self, number: u64, now: Duration, actions: &mut Vec<Action>) {
        self.end_round(number, Outcome::Abandoned, now, actions);
        self.set_due(number, None);
        if let Some(watched) = self.targets.remove(&number) {
            self.hosts.remove(&(watched.target.address.ip(), number));
            self.numbers.remove(&watched.target);
        }
    }

    fn tick(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let first = self.next_probe;
        while let Some(&(due, number)) = self.timers.first()
            && due <= now
            && self.next_probe - first < BURST
        {
            self.act(number, now, actions);
        }
    }

    /// Does what is due for a target.
    fn act(&mut self, number: u64, now: Duration, actions: &mut Vec<Action>) {
        let Some(watched) = self.targets.get(&number) else { return };
        match &watched.round {
            None => self.start(number, now, actions),
            Some(round) if round.sent < watched.attempts() => self.attempt(number, now, actions),
            Some(_) => self.round_failed(number, now, actions),
        }
    }

    fn start(&mut self, number: u64, now: Duration, actions: &mut Vec<Action>) {
        let Some(watched) = self.targets.get_mut(&number) else { return };
        if watched.target.settings.protocol.connects() {
            if self.connecting >= self.limit {
                self.waiting.push_back(number);
                self.set_due(number, None);
                return;
            }
            self.connecting += 1;
        }
        watched.round = Some(Round { started: now, sent: 0, pending: Vec::new(), refusal: None, again: false });
        watched.last_start = Some(now);
        self.attempt(number, now, actions);
    }

    /// Starts rounds that have waited for room.
    fn admit(&mut self, now: Duration, actions: &mut Vec<Action>) {
        while self.connecting < self.limit
            && let Some(number) = self.waiting.pop_front()
        {
            self.start(number, now, actions);
        }
    }

    fn attempt(&mut self, number: u64, now: Duration, actions: &mut Vec<Action>) {
        let Some(watched) = self.targets.get_mut(&number) else { return };
        let (attempts, gap, timeout) = (watched.attempts(), watched.gap(), watched.timeout());
        let Some(round) = &mut watched.round else { return };
        let probe = ProbeId(self.next_probe);
        self.next_probe += 1;
        round.sent += 1;
        round.pending.push(Attempt { probe, sent: now });
        // The last probe gets its time even if it was sent late.
        let due = if round.sent < attempts { now + gap } else { (now + gap).max(round.started + timeout) };
        let target = Arc::clone(&watched.target);
        self.probes.insert(probe, number);
        self.tallies.of_mut(target.settings.protocol.kind()).sent();
        self.set_due(number, Some(due));
        actions.push(Action::Send { probe, target });
    }

    fn answered(&mut self, probe: ProbeId, exact: bool, now: Duration, actions: &mut Vec<Action>) {
        let Some((number, attempt)) = self.settle(probe, Outcome::Answered) else { return };
        let Some(watched) = self.targets.get_mut(&number) else { return };
        if exact {
            let round_trip = now.saturating_sub(attempt.sent);
            watched.status.round_trip = Some(round_trip);
            self.tallies.of_mut(watched.target.settings.protocol.kind()).round_trips.observe(round_trip);
        }
        watched.failed = 0;
        watched.passed = watched.passed.saturating_add(1);
        let healthy = watched.status.state.usable() || watched.passed >= watched.target.settings.healthy_threshold;
        if healthy {
            watched.status.failure = None;
        }
        let change = if healthy { watched.turn(State::Healthy, now) } else { None };
        self.end_round(number, Outcome::Abandoned, now, actions);
        actions.extend(change);
        self.admit(now, actions);
    }

    fn refused(&mut self, probe: ProbeId, failure: Failure, now: Duration, actions: &mut Vec<Action>) {
        let Some((number, _)) = self.settle(probe, failure.kind.into()) else { return };
        let Some(watched) = self.targets.get_mut(&number) else { return };
        let (attempts, soon) = (watched.attempts(), now + watched.timeout() / HURRY);
        let due = watched.due;
        let Some(round) = &mut watched.round else { return };
        round.refusal = Some(failure);
        if round.sent < attempts {
            self.set_due(number, Some(due.map_or(soon, |due| due.min(soon))));
        } else if round.pending.is_empty() {
            self.round_failed(number, now, actions);
        }
    }

    fn not_sent(&mut self, probe: ProbeId, now: Duration, actions: &mut Vec<Action>) {
        let Some((number, _)) = self.settle(probe, Outcome::NotSent) else { return };
        let Some(watched) = self.targets.get_mut(&number) else { return };
        let (later, timeout) = (now + watched.gap(), watched.timeout());
        let Some(round) = &mut watched.round else { return };
        round.sent -= 1;
        if round.sent == 0 || now >= round.started + timeout * STALEMATE {
            self.end_round(number, Outcome::Abandoned, now, actions);
            self.admit(now, actions);
        } else {
            self.set_due(number, Some(later));
        }
    }

    fn recheck(&mut self, host: IpAddr, now: Duration) {
        let numbers: Vec<u64> = self.hosts.range((host, 0)..=(host, u64::MAX)).map(|&(_, number)| number).collect();
        for number in numbers {
            let Some(watched) = self.targets.get_mut(&number) else { continue };
            if let Some(round) = &mut watched.round {
                round.again = true;
                continue;
            }
            let rested = watched.last_start.map_or(now, |start| now.max(start + watched.timeout()));
            if watched.due.is_some_and(|due| due > rested) {
                self.set_due(number, Some(rested));
            }
        }
    }

    fn round_failed(&mut self, number: u64, now: Duration, actions: &mut Vec<Action>) {
        let Some(watched) = self.targets.get_mut(&number) else { return };
        let timeout = watched.timeout();
        let refusal = watched.round.as_mut().and_then(|round| round.refusal.take());
        watched.status.failure = Some(refusal.unwrap_or_else(|| Failure::silence(timeout)));
        watched.passed = 0;
        watched.failed = watched.failed.saturating_add(1);
        let unhealthy = watched.failed >= watched.target.settings.unhealthy_threshold;
        let change = if unhealthy { watched.turn(State::Unhealthy, now) } else { None };
        self.end_round(number, Outcome::NoAnswer, now, actions);
        actions.extend(change);
        self.admit(now, actions);
    }

    /// Notes how a probe has ended. None if it has before.
    fn settle(&mut self, probe: ProbeId, outcome: Outcome) -> Option<(u64, Attempt)> {
        let number = self.probes.remove(&probe)?;
        let watched = self.targets.get_mut(&number)?;
        let pending = &mut watched.round.as_mut()?.pending;
        let place = pending.iter().position(|attempt| attempt.probe == probe)?;
        self.tallies.of_mut(watched.target.settings.protocol.kind()).ended(outcome);
        Some((number, pending.remove(place)))
    }

    /// Ends the round, if one is under way, and with it the probes not yet settled, and schedules the next.
    fn end_round(&mut self, number: u64, rest: Outcome, now: Duration, actions: &mut Vec<Action>) {
        let Some(watched) = self.targets.get_mut(&number) else { return };
        let Some(round) = watched.round.take() else { return };
        let protocol = &watched.target.settings.protocol;
        if protocol.connects() {
            self.connecting -= 1;
        }
        for attempt in round.pending {
            self.probes.remove(&attempt.probe);
            self.tallies.of_mut(protocol.kind()).ended(rest);
            actions.push(Action::Cancel { probe: attempt.probe, target: Arc::clone(&watched.target) });
        }
        // Where the round has taken longer than the interval, the next is due already.
        let turn = watched.start_after(round.started);
        let due = if round.again { turn.min(round.started + watched.timeout()) } else { turn }.max(now);
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

/// Nanoseconds, which fill 64 bits after 584 years.
fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
