//! Whole histories against a simulated network, each made from a seed that a failure prints.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::super::*;
use super::{address, invariants, ms, target};
use crate::health::model::ProbeFailureKind;
use crate::health::settings::ProbeSettings;

/// Receivers behind a network, the monitor that probes them, and the time.
struct World {
    rng: SmallRng,
    monitor: HealthMonitor,
    now: Duration,
    hosts: BTreeMap<SocketAddr, Host>,
    /// What comes back when: the probe, and whether it is an answer or a refusal.
    mail: BTreeMap<(Duration, u64), (ProbeId, bool)>,
    letters: u64,
    /// When which target was probed.
    sent: Vec<(Duration, Arc<ProbeTarget>)>,
    changes: Vec<(Duration, SocketAddr, HealthState)>,
    /// How late the event loop comes round at most.
    lateness: Duration,
}

/// How a receiver and the network on the way to it behave.
#[derive(Clone)]
struct Host {
    up: bool,
    /// While down, it refuses rather than being silent.
    refuses: bool,
    /// The shortest and longest round trip.
    round_trip: (Duration, Duration),
    /// How many probes of each round get lost, any of them.
    loses: u32,
    /// Which round the next is known by, and how many of it are still to be lost.
    round: Option<(Duration, u32, u32)>,
}

impl Host {
    fn up() -> Host {
        Host { up: true, refuses: false, round_trip: (ms(1), ms(50)), loses: 0, round: None }
    }
}

impl World {
    fn new(seed: u64, limit: usize) -> World {
        World {
            rng: SmallRng::seed_from_u64(seed),
            monitor: HealthMonitor::new(limit),
            now: Duration::ZERO,
            hosts: BTreeMap::new(),
            mail: BTreeMap::new(),
            letters: 0,
            sent: Vec::new(),
            changes: Vec::new(),
            lateness: ms(2),
        }
    }

    fn between(&mut self, (from, to): (Duration, Duration)) -> Duration {
        Duration::from_micros(self.rng.random_range(from.as_micros() as u64..=to.as_micros() as u64))
    }

    fn handle(&mut self, event: MonitorEvent) {
        let tick = event == MonitorEvent::Tick;
        let actions = self.monitor.handle(event, self.now);
        let known: BTreeSet<&ProbeTarget> = self.monitor.targets().map(|(target, _)| &**target).collect();
        let mut sent = Vec::new();
        for action in &actions {
            match action {
                MonitorAction::Send { probe, target } => {
                    assert!(known.contains(&**target), "a probe for a target that is gone");
                    sent.push((*probe, Arc::clone(target)));
                }
                MonitorAction::Cancel { probe, .. } => self.mail.retain(|_, (of, _)| of != probe),
                MonitorAction::Changed { target, change } => {
                    assert_ne!(change.from, change.status.state);
                    self.changes.push((self.now, target.address, change.status.state));
                }
            }
        }
        assert!(!tick || sent.len() as u64 <= MAX_PROBES_PER_TICK);
        for (probe, target) in sent {
            self.post(probe, &target);
            self.sent.push((self.now, target));
        }
        invariants::check(&self.monitor, self.now);
    }

    /// Takes a probe to its target and schedules what comes back, if anything does.
    fn post(&mut self, probe: ProbeId, target: &ProbeTarget) {
        let Some(host) = self.hosts.get(&target.address).cloned() else { return };
        let mut lost = false;
        if host.loses > 0 {
            let start = self.monitor.targets.values().find(|watched| *watched.target == *target);
            let start = start.and_then(|watched| watched.last_start).unwrap_or_default();
            let (probes, losses) = match host.round {
                Some((round, probes, losses)) if round == start => (probes, losses),
                _ => (PROBES_PER_ROUND, host.loses),
            };
            // Any `losses` of the `probes` still to come.
            lost = losses > 0 && self.rng.random_range(0..probes) < losses;
            if let Some(host) = self.hosts.get_mut(&target.address) {
                host.round = Some((start, probes.saturating_sub(1).max(1), losses - u32::from(lost)));
            }
        }
        if lost || !(host.up || host.refuses) {
            return;
        }
        let at = self.now + self.between(host.round_trip);
        self.letters += 1;
        self.mail.insert((at, self.letters), (probe, host.up));
    }

    /// Goes on to `end`, event by event, or until `enough`.
    fn run(&mut self, end: Duration, enough: impl Fn(&World) -> bool) {
        loop {
            let mail = self.mail.first_key_value().map(|((at, _), _)| *at);
            let timer = self.monitor.next_deadline();
            let Some(next) = mail.into_iter().chain(timer).min().filter(|&next| next <= end) else { break };
            let late = self.between((Duration::ZERO, self.lateness));
            self.now = self.now.max(next + late);
            self.deliver();
            if self.monitor.next_deadline().is_some_and(|due| due <= self.now) {
                self.handle(MonitorEvent::Tick);
            }
            if enough(self) {
                return;
            }
        }
        self.now = self.now.max(end);
    }

    /// Reads what has arrived, as the event loop does before it looks at the clock.
    fn deliver(&mut self) {
        while let Some((&(at, letter), &(probe, answer))) = self.mail.first_key_value() {
            if at > self.now {
                break;
            }
            self.mail.remove(&(at, letter));
            self.handle(if answer {
                MonitorEvent::Answered { probe, exact: true }
            } else {
                MonitorEvent::Failed { probe, failure: ProbeFailure::new(ProbeFailureKind::Refused, "refused") }
            });
        }
    }

    fn watch(&mut self, targets: Vec<ProbeTarget>) {
        self.handle(MonitorEvent::Targets(targets));
    }
}

/// Runs a history for each seed; a failure names the seed.
fn for_seeds(count: u64, history: impl Fn(u64)) {
    for seed in 0..count {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| history(seed))) {
            eprintln!("the seed was {seed}");
            resume_unwind(panic);
        }
    }
}

fn settings(rng: &mut SmallRng) -> ProbeSettings {
    let interval = rng.random_range(100..6000);
    ProbeSettings {
        protocol: if rng.random_bool(0.7) { ProbeProtocol::Icmp } else { ProbeProtocol::Tcp { port: None } },
        interval: ms(interval),
        timeout: ms(rng.random_range(30..=interval)),
        unhealthy_threshold: rng.random_range(1..4),
        healthy_threshold: rng.random_range(1..4),
    }
}

#[test]
fn losing_all_but_one_probe_of_each_round_ejects_nobody() {
    for_seeds(40, |seed| {
        let mut world = World::new(seed, 1000);
        // Now and then the event loop is held up for longer than the timeout.
        world.lateness = if seed % 4 == 0 { ms(3000) } else { ms(2) };
        let settings = ProbeSettings { interval: ms(1500), timeout: ms(1200), ..ProbeSettings::default() };
        for n in 0..10 {
            // The last probe of a round has a third of the timeout left.
            let host = Host { loses: PROBES_PER_ROUND - 1, round_trip: (ms(0), ms(395)), ..Host::up() };
            world.hosts.insert(target(n, &settings).address, host);
        }
        world.watch((0..10).map(|n| target(n, &settings)).collect());
        world.run(ms(60_000), |_| false);
        assert!(world.changes.iter().all(|(_, _, state)| *state == HealthState::Healthy), "{:?}", world.changes);
        assert_eq!(world.changes.len(), 10);
        assert!(world.sent.len() > 100);
    });
}

#[test]
fn a_dead_receiver_is_out_within_interval_and_timeout_and_comes_back() {
    for_seeds(300, |seed| {
        let mut world = World::new(seed, 1000);
        let mut settings = settings(&mut world.rng);
        settings.unhealthy_threshold = 1;
        if seed % 3 == 0 {
            settings = ProbeSettings::default();
        }
        let timeout = settings.timeout;
        let host = Host { round_trip: (ms(0), timeout / 4), ..Host::up() };
        for n in 0..5 {
            world.hosts.insert(target(n, &settings).address, host.clone());
        }
        world.watch((0..5).map(|n| target(n, &settings)).collect());
        let alive = world.between((ms(0), settings.interval * 4));
        world.run(alive, |_| false);
        let victim = target(2, &settings).address;
        let refuses = world.rng.random_bool(0.5);
        world.hosts.insert(victim, Host { up: false, refuses, ..host.clone() });
        // What was on its way when it died may still arrive.
        let died = world.now + host.round_trip.1;
        let is = |world: &World, state| world.monitor.targets().any(|(t, s)| t.address == victim && s.state == state);
        world.run(died + settings.interval * 3 + timeout, |world| is(world, HealthState::Unhealthy));
        let slack = world.lateness * 8;
        assert!(world.now <= died + settings.interval + timeout + slack, "{:?} after {died:?}", world.now);

        let back = world.now;
        world.hosts.insert(victim, host);
        let rounds = settings.healthy_threshold + 2;
        world.run(back + settings.interval * rounds * 2, |world| is(world, HealthState::Healthy));
        assert!(world.now <= back + settings.interval * rounds + timeout + slack * rounds, "{:?} {back:?}", world.now);
        let out: Vec<_> = world.changes.iter().filter(|(_, _, state)| *state == HealthState::Unhealthy).collect();
        assert_eq!(out.len(), 1, "the others had no trouble");
    });
}

#[test]
fn with_the_guides_settings_a_dead_receiver_is_out_within_seven_seconds() {
    let settings = ProbeSettings::default();
    let mut worst = Duration::ZERO;
    for n in 0..500 {
        let mut world = World::new(u64::from(n), 1);
        world.lateness = Duration::ZERO;
        let target = target(n, &settings);
        world.hosts.insert(target.address, Host { round_trip: (ms(1), ms(1)), ..Host::up() });
        world.watch(vec![target.clone()]);
        // The worst moment to die: right after an answer.
        world.run(ms(30_000), |world| world.changes.len() == 1);
        let died = world.now;
        world.hosts.clear();
        world.run(ms(60_000), |world| world.changes.len() == 2);
        worst = worst.max(world.now - died);
    }
    assert!(worst <= ms(7000), "{worst:?}");
    assert!(worst >= ms(6990), "this is no longer the worst case: {worst:?}");
}

#[test]
fn nobody_is_probed_more_often_than_promised() {
    for_seeds(20, |seed| {
        let mut world = World::new(seed, 3);
        let settings = settings(&mut world.rng);
        for n in 0..12 {
            let host = Host { up: n % 3 != 0, refuses: n % 2 == 0, ..Host::up() };
            world.hosts.insert(target(n, &settings).address, host);
        }
        world.watch((0..12).map(|n| target(n, &settings)).collect());
        let length = settings.interval * 30;
        world.run(length, |_| false);
        for n in 0..12 {
            let target = target(n, &settings);
            let times: Vec<Duration> =
                world.sent.iter().filter(|(_, to)| **to == target).map(|(time, _)| *time).collect();
            // A round on each point of the grid, of three probes at most.
            assert!(times.len() <= 3 * 31, "{} probes in {length:?} with {settings:?}", times.len());
            assert!(times.is_sorted());
        }
    });
}

/// Anything in any order: more than 100,000 events, each followed by a check of everything.
#[test]
fn no_history_breaks_an_invariant() {
    let events = std::cell::Cell::new(0u64);
    for_seeds(1200, |seed| {
        let limit = 1 + seed as usize % 4;
        let mut world = World::new(seed, limit);
        let palette: Vec<ProbeSettings> = (0..3).map(|_| settings(&mut world.rng)).collect();
        for _ in 0..100 {
            events.set(events.get() + 1);
            anything(&mut world, &palette);
        }
        events.set(events.get() + world.sent.len() as u64);
    });
    assert!(events.get() > 100_000, "{events:?}");
}

fn anything(world: &mut World, palette: &[ProbeSettings]) {
    let probe = match world.monitor.probes.keys().min() {
        Some(&probe) if world.rng.random_bool(0.8) => probe,
        _ => ProbeId(world.rng.random_range(0..200)),
    };
    match world.rng.random_range(0..100) {
        0..8 => {
            let count = world.rng.random_range(0..12);
            let mut targets = Vec::new();
            for _ in 0..count {
                let n = world.rng.random_range(0..8);
                let settings = &palette[world.rng.random_range(0..palette.len())];
                targets.push(target(n, settings));
            }
            world.watch(targets);
        }
        8..16 => {
            let n = world.rng.random_range(0..8);
            let host = Host {
                up: world.rng.random_bool(0.6),
                refuses: world.rng.random_bool(0.5),
                round_trip: (ms(0), ms(world.rng.random_range(0..500))),
                loses: world.rng.random_range(0..4),
                round: None,
            };
            world.hosts.insert(address(n), host.clone());
            let mut without_port = address(n);
            without_port.set_port(0);
            world.hosts.insert(without_port, host);
        }
        16..24 => world.handle(MonitorEvent::Answered { probe, exact: false }),
        24..32 => {
            world.handle(MonitorEvent::Failed {
                probe,
                failure: ProbeFailure::new(ProbeFailureKind::Unreachable, "no route"),
            });
        }
        32..42 => world.handle(MonitorEvent::NotSent(probe)),
        42..50 => {
            let host = address(world.rng.random_range(0..8)).ip();
            world.handle(MonitorEvent::Recheck(host));
        }
        50..56 => world.handle(MonitorEvent::Tick),
        56..60 => {
            // The process was stopped for a while.
            world.now += ms(world.rng.random_range(0..20_000));
            world.handle(MonitorEvent::Tick);
        }
        _ => {
            let end = world.now + ms(world.rng.random_range(0..400));
            world.run(end, |_| false);
        }
    }
}
