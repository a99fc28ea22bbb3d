//! What a target's changes mean for listeners and say in the log. The targets' own life is tested in
//! [`monitor`](crate::health::monitor).

use std::io;
use std::sync::{Mutex, PoisonError};

use tracing_subscriber::fmt::MakeWriter;

use super::*;
use crate::health::monitor::{MonitorAction, MonitorEvent};
use crate::health::settings::ProbeProtocol;
use crate::logging::capture;

const A: ListenerId = ListenerId(0);
const B: ListenerId = ListenerId(1);

fn downstream(last: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, last], 5514))
}

fn check(listener: ListenerId, lasts: &[u8], settings: &HealthSettings) -> ListenerCheck {
    let name = if listener == A { "syslog" } else { "netflow" };
    ListenerCheck {
        listener,
        name: name.into(),
        downstreams: lasts.iter().map(|&last| downstream(last)).collect(),
        settings: settings.clone(),
    }
}

/// CheckedListeners and a monitor for their targets; of the network, `dead` says which addresses do not answer.
#[derive(Default)]
struct Bench {
    listeners: CheckedListeners,
    monitor: Option<HealthMonitor>,
    now: Duration,
    dead: Vec<u8>,
}

impl Bench {
    fn set(&mut self, checks: &[ListenerCheck]) {
        capture::prepare();
        let targets = self.listeners.replace_checks(checks);
        let monitor = self.monitor.get_or_insert_with(|| HealthMonitor::new(10));
        let actions = monitor.handle(MonitorEvent::Targets(targets), self.now);
        assert!(actions.iter().all(|action| matches!(action, MonitorAction::Cancel { .. })), "{actions:?}");
        self.listeners.sync_with(monitor);
    }

    fn run(&mut self, length: Duration) {
        let end = self.now + length;
        let monitor = self.monitor.as_mut().unwrap();
        while let Some(due) = monitor.next_deadline().filter(|&due| due <= end) {
            self.now = due;
            let mut actions = monitor.handle(MonitorEvent::Tick, self.now);
            while let Some(action) = actions.pop() {
                match action {
                    MonitorAction::Send { probe, target } => {
                        if !self.dead.iter().any(|&last| downstream(last).ip() == target.address.ip()) {
                            actions.extend(monitor.handle(MonitorEvent::Answered { probe, exact: true }, self.now));
                        }
                    }
                    MonitorAction::Cancel { .. } => {}
                    MonitorAction::Changed { target, change } => self.listeners.handle_change(&target, &change),
                }
            }
        }
        self.now = end;
    }

    fn unhealthy(&self, listener: ListenerId) -> Vec<SocketAddr> {
        let map = self.listeners.map();
        let is_out =
            |downstream: &&SocketAddr| matches!(map.get(listener, **downstream), Some(HealthMark::Unhealthy(_)));
        self.listeners.listeners[&listener].downstreams.iter().filter(is_out).copied().collect()
    }
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'w> MakeWriter<'w> for Log {
    type Writer = Log;

    fn make_writer(&'w self) -> Log {
        self.clone()
    }
}

/// The lines that `work` logs.
fn logged(work: impl FnOnce()) -> Vec<String> {
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt()
        .with_writer(log.clone())
        .without_time()
        .with_target(false)
        .with_ansi(false)
        .with_max_level(tracing::Level::INFO)
        .finish();
    capture::with(subscriber, work);
    let bytes = log.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
    String::from_utf8(bytes).unwrap().lines().map(|line| line.trim().to_owned()).collect()
}

const LONG: Duration = Duration::from_secs(20);

#[test]
fn each_change_is_said_once_in_the_promised_words() {
    let mut bench = Bench::default();
    let settings = HealthSettings::default();
    bench.set(&[check(A, &[1, 2, 3], &settings)]);
    assert_eq!(logged(|| bench.run(LONG)), [""; 0]);
    bench.dead = vec![2];
    assert_eq!(
        logged(|| bench.run(LONG * 3)),
        [
            r#"WARN health check failed downstream=10.0.0.2:5514 listener="syslog" protocol="icmp" reason="no answer within 2s""#
        ]
    );
    bench.dead.clear();
    let lines = logged(|| bench.run(LONG));
    assert_eq!(lines.len(), 1, "{lines:?}");
    let start =
        r#"INFO health check passed again downstream=10.0.0.2:5514 listener="syslog" protocol="icmp" unhealthy_for="#;
    assert!(lines[0].starts_with(start), "{lines:?}");
    let transitions: Vec<_> = bench.listeners.transitions().collect();
    assert_eq!(transitions, [(A, Transitions { failed: 1, recovered: 1 })]);
}

#[test]
fn the_last_to_go_is_said_loudly() {
    for (fail_open, consequence) in [(true, "still sending to all of them"), (false, "dropping all datagrams")] {
        let mut bench = Bench::default();
        let settings = HealthSettings { fail_open, ..HealthSettings::default() };
        bench.set(&[check(A, &[1, 2], &settings), check(B, &[], &settings)]);
        bench.dead = vec![1, 2];
        let lines = logged(|| bench.run(LONG));
        let errors: Vec<&String> = lines.iter().filter(|line| line.starts_with("ERROR")).collect();
        assert_eq!(errors.len(), 1, "{lines:?}");
        assert_eq!(errors[0], lines.last().unwrap());
        assert!(
            errors[0].contains(consequence) && errors[0].contains(r#"listener="syslog" downstreams=2"#),
            "{lines:?}"
        );
        // The same pattern finds it as finds a single one.
        assert!(lines.iter().all(|line| line.split_once("health").unwrap().1.contains("failed")), "{lines:?}");
        // Not again when the set is given again, and not when it changes but all are still out.
        assert_eq!(logged(|| bench.set(&[check(A, &[1, 2], &settings)])), [""; 0]);
        assert_eq!(logged(|| bench.set(&[check(A, &[1], &settings)])), [""; 0]);
        let lines = logged(|| bench.set(&[check(A, &[1, 3], &settings)]));
        assert_eq!(lines, [r#"INFO not all downstreams are unhealthy any more listener="syslog" downstreams=2"#]);
        let lines = logged(|| bench.set(&[check(A, &[1], &settings)]));
        assert!(lines.len() == 1 && lines[0].starts_with("ERROR"), "{lines:?}");
    }
}

#[test]
fn a_target_speaks_for_all_its_users() {
    let mut bench = Bench::default();
    let settings = HealthSettings::default();
    let both = [check(A, &[1, 2], &settings), check(B, &[2, 3], &settings)];
    bench.set(&both);
    assert_eq!(bench.monitor.as_ref().unwrap().targets().count(), 3);
    bench.dead = vec![2];
    assert_eq!(logged(|| bench.run(LONG)).len(), 2);
    assert_eq!(bench.unhealthy(A), [downstream(2)]);
    assert_eq!(bench.unhealthy(B), [downstream(2)]);
    // A listener that joins learns what is known already, and one whose timing changes forgets nothing.
    let mut slower = settings.clone();
    slower.probe.interval *= 2;
    bench.set(&[check(A, &[1, 2, 3], &slower)]);
    assert_eq!(bench.unhealthy(A), [downstream(2)]);
    bench.set(&both);
    assert_eq!(bench.unhealthy(B), [downstream(2)]);
    // One that leaves and comes back is new.
    bench.set(&[check(A, &[1], &settings)]);
    bench.set(&both);
    assert_eq!(bench.unhealthy(A), []);
}

#[test]
fn the_controller_hears_of_changes_that_matter_to_it() {
    let mut bench = Bench::default();
    let settings = HealthSettings::default();
    bench.set(&[check(A, &[1, 2], &settings)]);
    assert_eq!(bench.listeners.take_change(), None);
    // That someone unknown turns out to be healthy changes nobody's share.
    bench.run(LONG);
    assert_eq!(bench.listeners.take_change(), None);
    bench.dead = vec![1];
    bench.run(LONG);
    let map = bench.listeners.take_change().unwrap();
    assert!(matches!(map.get(A, downstream(1)), Some(HealthMark::Unhealthy(_))));
    assert_eq!(map.get(A, downstream(2)), None);
    assert_eq!(bench.listeners.take_change(), None);
    bench.dead.clear();
    bench.run(LONG);
    let map = bench.listeners.take_change().unwrap();
    assert!(matches!(map.get(A, downstream(1)), Some(HealthMark::Recovering(_))));
    bench.set(&[]);
    assert_eq!(bench.listeners.take_change(), Some(HealthMap::default()));
}

#[test]
fn every_downstream_is_shown_with_what_is_known_of_it() {
    let mut bench = Bench::default();
    let mut settings = HealthSettings::default();
    settings.probe.protocol = ProbeProtocol::Tcp { port: Some(80) };
    bench.set(&[check(A, &[1, 2], &settings), check(B, &[2], &HealthSettings::default())]);
    bench.dead = vec![1];
    bench.run(LONG);
    let monitor = bench.monitor.as_ref().unwrap();
    let protocol = |listener| bench.listeners.listeners[&listener].settings.protocol.kind().name();
    let seen: Vec<_> = bench
        .listeners
        .downstreams(monitor)
        .map(|seen| (seen.listener, seen.downstream, protocol(seen.listener), seen.status.state))
        .collect();
    assert_eq!(
        seen,
        [
            (A, downstream(1), "tcp", HealthState::Unhealthy),
            (A, downstream(2), "tcp", HealthState::Healthy),
            (B, downstream(2), "icmp", HealthState::Healthy),
        ]
    );
}
