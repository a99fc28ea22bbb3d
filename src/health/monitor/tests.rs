//! Rounds step by step. Whole histories are in [`histories`], checked by [`invariants`] after every step.

mod histories;
mod invariants;

use super::*;
use crate::health::model::ProbeFailureKind;
use crate::health::probe_stats::ProbeStats;
use crate::health::settings::{ProbeBytes, ProbeKind, ProbeSettings};

impl ProbeStats {
    fn count(&self, outcome: ProbeOutcome) -> u64 {
        self.outcomes().filter(|(of, _)| *of == outcome).map(|(_, n)| n).sum()
    }
}

impl HealthMonitor {
    /// All targets with their status.
    pub fn targets(&self) -> impl Iterator<Item = (&Arc<ProbeTarget>, &TargetStatus)> {
        self.targets.values().map(|watched| (&watched.target, &watched.status))
    }
}

pub(super) fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

pub(super) fn address(n: u32) -> SocketAddr {
    SocketAddr::new(IpAddr::from(std::net::Ipv4Addr::from(0x0a00_0000 + n)), 514)
}

pub(super) fn target(n: u32, settings: &ProbeSettings) -> ProbeTarget {
    ProbeTarget::new(address(n), &Arc::new(settings.clone()))
}

fn refusal() -> ProbeFailure {
    ProbeFailure::new(ProbeFailureKind::Refused, "connection refused")
}

/// A monitor and its clock, with checks after each step.
struct Bench {
    monitor: HealthMonitor,
    now: Duration,
}

impl Bench {
    fn new(targets: Vec<ProbeTarget>) -> Bench {
        let mut bench = Bench { monitor: HealthMonitor::new(100), now: Duration::ZERO };
        assert_eq!(bench.handle(MonitorEvent::Targets(targets)), []);
        bench
    }

    /// One target with these settings.
    fn with(settings: ProbeSettings) -> Bench {
        Bench::new(vec![target(1, &settings)])
    }

    fn handle(&mut self, event: MonitorEvent) -> Vec<MonitorAction> {
        let actions = self.monitor.handle(event, self.now);
        invariants::check(&self.monitor, self.now);
        actions
    }

    /// Lets the time come at which something is due, and does it.
    fn next(&mut self) -> Vec<MonitorAction> {
        self.now = self.monitor.next_deadline().expect("something to wait for");
        self.handle(MonitorEvent::Tick)
    }

    /// The same, and it must be one probe.
    fn next_probe(&mut self) -> ProbeId {
        one_probe(&self.next())
    }

    fn answer(&mut self, probe: ProbeId) -> Vec<MonitorAction> {
        self.handle(MonitorEvent::Answered { probe, exact: true })
    }

    fn refuse(&mut self, probe: ProbeId) -> Vec<MonitorAction> {
        self.handle(MonitorEvent::Failed { probe, failure: refusal() })
    }

    /// Goes on until the only target's round has failed, without any answer.
    fn fail_round(&mut self) -> Vec<MonitorAction> {
        self.next_probe();
        loop {
            let actions = self.next();
            if !matches!(actions[..], [MonitorAction::Send { .. }]) {
                return actions;
            }
        }
    }

    fn pass_round(&mut self) -> Vec<MonitorAction> {
        let probe = self.next_probe();
        self.answer(probe)
    }

    fn only(&self) -> &TargetStatus {
        self.monitor.targets().next().expect("a target").1
    }
}

fn one_probe(actions: &[MonitorAction]) -> ProbeId {
    match actions {
        [MonitorAction::Send { probe, .. }] => *probe,
        other => panic!("not a probe: {other:?}"),
    }
}

fn cancelled(actions: &[MonitorAction]) -> Vec<ProbeId> {
    let cancelled = |action: &MonitorAction| match action {
        MonitorAction::Cancel { probe, .. } => Some(*probe),
        _ => None,
    };
    actions.iter().filter_map(cancelled).collect()
}

fn change(actions: &[MonitorAction]) -> Option<(HealthState, HealthState)> {
    actions.iter().find_map(|action| match action {
        MonitorAction::Changed { change, .. } => Some((change.from, change.status.state)),
        _ => None,
    })
}

#[test]
fn a_dead_target_is_asked_three_times_and_is_out_after_the_timeout() {
    let mut bench = Bench::with(ProbeSettings::default());
    let first = bench.next_probe();
    let start = bench.now;
    assert!(start < ms(5000));
    let second = bench.next_probe();
    let third = bench.next_probe();
    assert!(bench.now < start + ms(1334));
    assert_eq!(bench.only().state, HealthState::Unknown);
    let end = bench.next();
    assert_eq!(bench.now, start + ms(2000));
    assert_eq!(cancelled(&end), [first, second, third]);
    assert_eq!(change(&end), Some((HealthState::Unknown, HealthState::Unhealthy)));
    let status = bench.only();
    assert_eq!((status.state, status.since), (HealthState::Unhealthy, bench.now));
    assert_eq!(status.failure.as_ref().unwrap().to_string(), "no answer within 2s");
    assert_eq!(bench.monitor.probe_stats().of(ProbeKind::Icmp).count(ProbeOutcome::NoAnswer), 3);
}

#[test]
fn an_answer_to_any_probe_ends_the_round() {
    for answered in 0..3 {
        let mut bench = Bench::with(ProbeSettings::default());
        let mut probes = vec![bench.next_probe()];
        let start = bench.now;
        while probes.len() < 3 {
            probes.push(bench.next_probe());
        }
        bench.now += ms(10);
        let actions = bench.answer(probes.remove(answered));
        assert_eq!(cancelled(&actions), probes);
        assert_eq!(change(&actions), Some((HealthState::Unknown, HealthState::Healthy)));
        assert!(!bench.only().recovered);
        // What comes later changes nothing.
        for probe in probes {
            assert_eq!(bench.answer(probe), []);
            assert_eq!(bench.refuse(probe), []);
        }
        assert_eq!(bench.monitor.next_deadline(), Some(start + ms(5000)));
    }
}

#[test]
fn the_round_trip_is_that_of_the_probe_answered_and_only_where_that_is_certain() {
    let mut bench = Bench::with(ProbeSettings::default());
    bench.next_probe();
    let second = bench.next_probe();
    bench.now += ms(30);
    bench.answer(second);
    assert_eq!(bench.only().round_trip, Some(ms(30)));
    let probe = bench.next_probe();
    bench.now += ms(70);
    bench.handle(MonitorEvent::Answered { probe, exact: false });
    assert_eq!(bench.only().round_trip, Some(ms(30)));
    assert_eq!(bench.monitor.probe_stats().of(ProbeKind::Icmp).round_trips.count(), 1);
}

#[test]
fn refusals_are_not_waited_out_but_one_alone_decides_nothing() {
    let mut bench = Bench::with(ProbeSettings::default());
    let first = bench.next_probe();
    let start = bench.now;
    assert_eq!(bench.refuse(first), []);
    let second = bench.next_probe();
    assert_eq!(bench.now, start + ms(200));
    assert_eq!(bench.refuse(second), []);
    let third = bench.next_probe();
    assert_eq!(bench.now, start + ms(400));
    assert_eq!(change(&bench.refuse(third)), Some((HealthState::Unknown, HealthState::Unhealthy)));
    assert_eq!(bench.only().failure, Some(refusal()));

    let mut bench = Bench::with(ProbeSettings::default());
    let first = bench.next_probe();
    bench.refuse(first);
    assert_eq!(change(&bench.pass_round()), Some((HealthState::Unknown, HealthState::Healthy)));
}

#[test]
fn a_refusal_followed_by_silence_takes_the_whole_timeout_and_gives_the_reason() {
    let mut bench = Bench::with(ProbeSettings::default());
    let first = bench.next_probe();
    let start = bench.now;
    bench.refuse(first);
    bench.next_probe();
    bench.next_probe();
    bench.next();
    assert_eq!(bench.now, start + ms(2000));
    assert_eq!(bench.only().failure, Some(refusal()));
}

#[test]
fn thresholds_count_rounds_in_a_row() {
    let mut bench =
        Bench::with(ProbeSettings { unhealthy_threshold: 3, healthy_threshold: 2, ..ProbeSettings::default() });
    assert_eq!(change(&bench.pass_round()), Some((HealthState::Unknown, HealthState::Healthy)));
    for _ in 0..2 {
        assert_eq!(change(&bench.fail_round()), None);
        assert_eq!(change(&bench.fail_round()), None);
        assert!(bench.only().failure.is_some());
        assert_eq!(change(&bench.pass_round()), None);
        assert_eq!(bench.only().failure, None);
    }
    bench.fail_round();
    bench.fail_round();
    assert_eq!(change(&bench.fail_round()), Some((HealthState::Healthy, HealthState::Unhealthy)));
    let out = bench.now;
    assert_eq!(change(&bench.pass_round()), None);
    assert!(bench.only().failure.is_some(), "why it is out is known while it is");
    bench.fail_round();
    assert_eq!(change(&bench.pass_round()), None);
    let back = bench.pass_round();
    assert_eq!(change(&back), Some((HealthState::Unhealthy, HealthState::Healthy)));
    assert!(bench.only().recovered);
    let Some(MonitorAction::Changed { change, .. }) = back.last() else { panic!("{back:?}") };
    assert_eq!(change.lasted, bench.now - out);
}

#[test]
fn an_unhealthy_target_is_asked_once_a_round() {
    let mut bench = Bench::with(ProbeSettings::default());
    bench.fail_round();
    let probe = bench.next_probe();
    let start = bench.now;
    let end = bench.next();
    assert_eq!(cancelled(&end), [probe]);
    assert_eq!(change(&end), None);
    assert_eq!(bench.now, start + ms(2000));
    let probe = bench.next_probe();
    assert_eq!(bench.now, start + ms(5000));
    assert_eq!(bench.refuse(probe), []);
    assert_eq!(bench.monitor.next_deadline(), Some(start + ms(10_000)));
}

#[test]
fn a_late_caller_shortens_no_probes_time() {
    let mut bench = Bench::with(ProbeSettings::default());
    bench.next_probe();
    bench.now += ms(60_000);
    one_probe(&bench.handle(MonitorEvent::Tick));
    let third = bench.next_probe();
    let sent = bench.now;
    bench.now = bench.monitor.next_deadline().unwrap();
    assert!(bench.now >= sent + ms(666));
    bench.answer(third);
    assert_eq!(bench.only().state, HealthState::Healthy);
}

#[test]
fn rounds_stay_on_their_grid_and_do_not_overlap() {
    let settings = ProbeSettings { interval: ms(1000), timeout: ms(1000), ..ProbeSettings::default() };
    let mut bench = Bench::with(settings);
    let probe = bench.next_probe();
    let start = bench.now;
    bench.now += ms(3);
    bench.answer(probe);
    bench.next_probe();
    assert_eq!(bench.now, start + ms(1000));
    // A round as long as the interval is followed by the next at once.
    bench.next_probe();
    bench.next_probe();
    let end = bench.next();
    assert_eq!((bench.now, bench.only().state), (start + ms(2000), HealthState::Unhealthy));
    assert!(matches!(end.last(), Some(MonitorAction::Send { .. })), "{end:?}");
    // What was missed is not made up for.
    bench.now += ms(10_400);
    let late = bench.handle(MonitorEvent::Tick);
    let Some(MonitorAction::Send { probe, .. }) = late.last() else { panic!("{late:?}") };
    bench.answer(*probe);
    assert_eq!(bench.monitor.next_deadline(), Some(start + ms(13_000)));
}

#[test]
fn what_this_host_cannot_send_says_nothing() {
    let mut bench = Bench::with(ProbeSettings { unhealthy_threshold: 1, ..ProbeSettings::default() });
    for _ in 0..5 {
        let probe = bench.next_probe();
        let start = bench.now;
        assert_eq!(bench.handle(MonitorEvent::NotSent(probe)), []);
        assert_eq!(bench.monitor.next_deadline(), Some(start + ms(5000)));
    }
    // A round begun is not lost by one: the probe is sent later.
    let first = bench.next_probe();
    for _ in 0..2 {
        let probe = bench.next_probe();
        bench.handle(MonitorEvent::NotSent(probe));
    }
    bench.next_probe();
    bench.next_probe();
    assert_eq!(change(&bench.next()), Some((HealthState::Unknown, HealthState::Unhealthy)));
    assert_eq!(bench.answer(first), []);
    // One that never gets its probes out is given up without a verdict.
    let mut bench = Bench::with(ProbeSettings::default());
    bench.next_probe();
    let start = bench.now;
    loop {
        let actions = bench.next();
        let actions = bench.handle(MonitorEvent::NotSent(one_probe(&actions)));
        if !actions.is_empty() {
            assert_eq!(change(&actions), None);
            break;
        }
    }
    assert!(bench.now >= start + ms(6000) && bench.now < start + ms(7000));
    assert_eq!(bench.only().state, HealthState::Unknown);
}

#[test]
fn a_hint_brings_the_next_round_forward_but_no_more_than_one_a_timeout() {
    let mut bench = Bench::with(ProbeSettings::default());
    let probe = bench.next_probe();
    let start = bench.now;
    bench.answer(probe);
    let hint = || MonitorEvent::Recheck(address(1).ip());
    bench.now = start + ms(1000);
    bench.handle(MonitorEvent::Recheck(address(2).ip()));
    assert_eq!(bench.monitor.next_deadline(), Some(start + ms(5000)));
    assert_eq!(bench.handle(hint()), []);
    assert_eq!(bench.monitor.next_deadline(), Some(start + ms(2000)));
    assert_eq!(bench.handle(hint()), []);
    let probe = bench.next_probe();
    assert_eq!(bench.now, start + ms(2000));
    bench.answer(probe);
    assert_eq!(bench.monitor.next_deadline(), Some(start + ms(5000)));
    bench.now = start + ms(4500);
    bench.handle(hint());
    assert_eq!(bench.monitor.next_deadline(), Some(bench.now));
    let probe = bench.next_probe();
    // One in a round says that what its probes have found may be out of date.
    let due = bench.monitor.next_deadline();
    bench.now += ms(100);
    bench.handle(hint());
    assert_eq!(bench.monitor.next_deadline(), due);
    bench.answer(probe);
    assert_eq!(bench.monitor.next_deadline(), Some(start + ms(5000)), "its turn comes first");
    let probe = bench.next_probe();
    bench.handle(hint());
    bench.answer(probe);
    assert_eq!(bench.monitor.next_deadline(), Some(start + ms(7000)));
}

#[test]
fn listeners_share_a_target_and_its_timing_may_change() {
    let settings = ProbeSettings::default();
    let mut bench = Bench::new(vec![target(1, &settings), target(1, &settings)]);
    assert_eq!(bench.monitor.targets().count(), 1);
    bench.fail_round();
    // Other thresholds, other interval: the same receiver, still dead.
    let slower = ProbeSettings { interval: ms(9000), ..settings.clone() };
    bench.handle(MonitorEvent::Targets(vec![target(1, &slower), target(2, &slower)]));
    let state = |bench: &Bench, n, settings| bench.monitor.status(&target(n, settings)).map(|status| status.state);
    assert_eq!(state(&bench, 1, &settings), None);
    assert_eq!(state(&bench, 1, &slower), Some(HealthState::Unhealthy));
    assert_eq!(state(&bench, 2, &slower), Some(HealthState::Unknown));
    // Asked in another way, it may well answer.
    let tcp = ProbeSettings { protocol: ProbeProtocol::Tcp { port: None }, ..settings };
    bench.handle(MonitorEvent::Targets(vec![target(1, &tcp)]));
    assert_eq!(state(&bench, 1, &tcp), Some(HealthState::Unknown));
}

#[test]
fn removal_cancels_what_is_under_way_and_a_snapshot_repeated_changes_nothing() {
    let settings = ProbeSettings::default();
    let mut bench = Bench::new(vec![target(1, &settings), target(2, &settings)]);
    let probe = bench.next_probe();
    let both = || MonitorEvent::Targets(vec![target(2, &settings), target(1, &settings)]);
    let deadline = bench.monitor.next_deadline();
    assert_eq!(bench.handle(both()), []);
    assert_eq!(bench.monitor.next_deadline(), deadline);
    let actions = bench.handle(MonitorEvent::Targets(vec![]));
    assert_eq!(cancelled(&actions), [probe]);
    assert_eq!(bench.monitor.next_deadline(), None);
    assert_eq!(bench.answer(probe), []);
    assert_eq!(bench.monitor.probe_stats().of(ProbeKind::Icmp).count(ProbeOutcome::Abandoned), 1);
}

#[test]
fn a_tick_sends_a_burst_at_most_and_leaves_the_rest_due() {
    let settings = ProbeSettings::default();
    let mut bench = Bench::new((0..200).map(|n| target(n, &settings)).collect());
    bench.now = ms(5000);
    let mut sent = Vec::new();
    for _ in 0..4 {
        assert!(bench.monitor.next_deadline().unwrap() <= bench.now);
        sent.push(bench.handle(MonitorEvent::Tick).len());
    }
    assert_eq!(sent, [64, 64, 64, 8]);
    assert!(bench.monitor.next_deadline().unwrap() > bench.now);
}

#[test]
fn connections_are_bounded_and_each_waiting_target_gets_its_turn() {
    let settings = ProbeSettings { protocol: ProbeProtocol::Tcp { port: None }, ..ProbeSettings::default() };
    let mut bench = Bench { monitor: HealthMonitor::new(2), now: Duration::ZERO };
    let mut targets: Vec<ProbeTarget> = (0..7).map(|n| target(n, &settings)).collect();
    // Datagrams need no socket of their own and do not wait.
    targets.push(target(7, &ProbeSettings::default()));
    bench.handle(MonitorEvent::Targets(targets.clone()));
    bench.now = ms(5000);
    let sent = bench.handle(MonitorEvent::Tick);
    assert_eq!(sent.len(), 3);
    let mut asked: BTreeSet<ProbeTarget> = BTreeSet::new();
    let mut probes: VecDeque<ProbeId> = VecDeque::new();
    let mut actions: VecDeque<MonitorAction> = sent.into();
    while let Some(action) = actions.pop_front() {
        if let MonitorAction::Send { probe, target } = action {
            assert!(asked.insert((*target).clone()), "{target:?} is asked again before others are asked at all");
            probes.push_back(probe);
        }
        if actions.is_empty()
            && let Some(probe) = probes.pop_front()
        {
            actions.extend(bench.handle(MonitorEvent::Answered { probe, exact: true }));
        }
    }
    assert_eq!(asked.len(), 8);

    // Those that wait and go leave nothing behind.
    bench.now += ms(10_000);
    bench.handle(MonitorEvent::Tick);
    assert!(bench.monitor.waiting.len() >= 5);
    bench.handle(MonitorEvent::Targets(targets.split_off(6)));
    assert!(bench.monitor.waiting.is_empty());
}

#[test]
fn thousands_of_targets_spread_evenly_over_the_interval() {
    let settings = ProbeSettings::default();
    let targets = 10_000;
    let mut monitor = HealthMonitor::new(1);
    monitor.handle(MonitorEvent::Targets((0..targets).map(|n| target(n, &settings)).collect()), ms(123_456));
    let mut slices = [0u32; 50];
    for &(due, _) in &monitor.timers {
        slices[((due - ms(123_456)).as_millis() / 100) as usize] += 1;
    }
    assert!(slices.iter().all(|&n| (140..260).contains(&n)), "{slices:?}");
}

#[test]
fn what_a_target_is_follows_from_the_protocol() {
    let of = |address: &str, protocol| {
        let settings = Arc::new(ProbeSettings { protocol, ..ProbeSettings::default() });
        ProbeTarget::new(address.parse().unwrap(), &settings).address.to_string()
    };
    assert_eq!(of("10.0.0.1:514", ProbeProtocol::Icmp), "10.0.0.1:0");
    assert_eq!(of("10.0.0.1:514", ProbeProtocol::UdpEcho { port: None }), "10.0.0.1:514");
    assert_eq!(of("10.0.0.1:514", ProbeProtocol::Tcp { port: Some(80) }), "10.0.0.1:80");
    assert_eq!(of("[::ffff:10.0.0.1]:514", ProbeProtocol::Http { port: None, path: "/".into() }), "10.0.0.1:514");
    let udp = ProbeProtocol::Udp { port: Some(9), payload: ProbeBytes::default(), expect: ProbeBytes::default() };
    assert_eq!(of("[2001:db8::1%7]:514", udp), "[2001:db8::1]:9");
    assert_eq!(of("[fe80::1%7]:514", ProbeProtocol::Icmp), "[fe80::1%7]:0");
}
