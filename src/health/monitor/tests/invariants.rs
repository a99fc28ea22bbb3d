//! What always holds of a [`HealthMonitor`], whatever has happened.

use super::super::*;
use crate::health::settings::ProbeKind;

/// Panics where something does not hold.
pub(super) fn check(monitor: &HealthMonitor, now: Duration) {
    each_target_is_due_once_or_waits(monitor);
    probes_under_way_are_those_of_rounds(monitor);
    connections_are_bounded(monitor);
    for (number, watched) in &monitor.targets {
        assert_eq!(monitor.numbers.get(&watched.target), Some(number));
        assert!(monitor.hosts.contains(&(watched.target.address.ip(), *number)));
        soon_enough(watched, now);
        states_follow_from_rounds(watched);
    }
    assert_eq!(monitor.numbers.len(), monitor.targets.len());
    assert_eq!(monitor.hosts.len(), monitor.targets.len());
}

fn each_target_is_due_once_or_waits(monitor: &HealthMonitor) {
    let due: BTreeSet<(Duration, u64)> =
        monitor.targets.iter().filter_map(|(number, watched)| Some((watched.due?, *number))).collect();
    assert_eq!(monitor.timers, due);
    let idle: BTreeSet<u64> =
        monitor.targets.iter().filter(|(_, watched)| watched.due.is_none()).map(|(number, _)| *number).collect();
    let waiting: BTreeSet<u64> = monitor.waiting.iter().copied().collect();
    assert_eq!(waiting, idle);
    assert_eq!(waiting.len(), monitor.waiting.len(), "one waits twice");
}

fn probes_under_way_are_those_of_rounds(monitor: &HealthMonitor) {
    let mut in_flight = [0; ProbeKind::ALL.len()];
    let mut probes = 0;
    for (number, watched) in &monitor.targets {
        let Some(round) = &watched.round else { continue };
        assert!(watched.due.is_some(), "a round waits for nothing");
        assert!(round.sent >= 1 && round.sent <= watched.attempts());
        assert!(round.pending.len() <= round.sent as usize);
        for attempt in &round.pending {
            assert_eq!(monitor.probes.get(&attempt.probe), Some(number));
            assert!(attempt.sent >= round.started);
        }
        probes += round.pending.len();
        in_flight[watched.target.settings.protocol.kind() as usize] += round.pending.len() as u64;
    }
    assert_eq!(monitor.probes.len(), probes);
    for kind in ProbeKind::ALL {
        let stats = monitor.probe_stats.of(kind);
        assert_eq!(stats.sent() - stats.outcomes().map(|(_, n)| n).sum::<u64>(), in_flight[kind as usize], "{kind}");
    }
}

fn connections_are_bounded(monitor: &HealthMonitor) {
    let connects = |watched: &&MonitoredTarget| watched.target.settings.protocol.connects();
    let rounds = monitor.targets.values().filter(connects).filter(|watched| watched.round.is_some()).count();
    assert_eq!(monitor.connecting, rounds);
    assert!(rounds <= monitor.limit);
    assert!(monitor.waiting.is_empty() || rounds == monitor.limit, "someone waits though there is room");
}

/// Nobody is forgotten: the next thing to do for a target is never further away than its interval.
fn soon_enough(watched: &MonitoredTarget, now: Duration) {
    let settings = &watched.target.settings;
    let Some(due) = watched.due else { return };
    match &watched.round {
        None => assert!(due <= now + settings.interval, "idle for longer than an interval"),
        Some(_) => assert!(due <= now + settings.timeout, "a round outlasts its timeout"),
    }
}

fn states_follow_from_rounds(watched: &MonitoredTarget) {
    let MonitoredTarget { status, target, .. } = watched;
    let settings = &target.settings;
    assert!(watched.failed == 0 || watched.passed == 0);
    match status.state {
        HealthState::Unhealthy => {
            assert!(status.failure.is_some(), "unhealthy without a reason");
            assert!(watched.passed < settings.healthy_threshold);
            assert!(!status.recovered);
        }
        HealthState::Healthy | HealthState::Unknown => assert!(watched.failed < settings.unhealthy_threshold),
    }
}
