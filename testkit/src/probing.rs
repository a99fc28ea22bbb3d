//! An event loop with health checks, which a test runs until a condition holds.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::{Events, Poll, Token};
use udp_fanout::testing::health::model::{HealthState, ProbeOutcome, TargetStatus};
use udp_fanout::testing::health::probe_stats::ProbeStats;
use udp_fanout::testing::health::settings::{HealthSettings, ProbeProtocol, ProbeSettings};
use udp_fanout::testing::health::weights::HealthMark;
use udp_fanout::testing::health::{HealthChecks, ListenerCheck};
use udp_fanout::testing::model::ListenerId;

/// Timeout of every wait. A passing test never reaches it.
const LIMIT: Duration = Duration::from_secs(60);

const FIRST_TOKEN: Token = Token(100);
pub const LISTENER: ListenerId = ListenerId(0);

pub struct Bench {
    poll: Poll,
    events: Events,
    pub health: HealthChecks,
    started: Instant,
}

/// Health check settings with this protocol and intervals short enough for a test.
pub fn settings(protocol: ProbeProtocol) -> HealthSettings {
    let probe = ProbeSettings {
        protocol,
        interval: Duration::from_millis(400),
        timeout: Duration::from_millis(300),
        unhealthy_threshold: 1,
        healthy_threshold: 1,
    };
    HealthSettings { probe, fail_open: true, slow_start: Duration::ZERO }
}

pub fn watch(downstreams: &[SocketAddr], settings: &HealthSettings) -> ListenerCheck {
    ListenerCheck {
        listener: LISTENER,
        name: Arc::from("lab"),
        downstreams: downstreams.to_vec(),
        settings: settings.clone(),
    }
}

impl Bench {
    #[expect(clippy::new_without_default, reason = "it opens sockets")]
    pub fn new() -> Bench {
        let poll = Poll::new().unwrap();
        let health = HealthChecks::new(poll.registry(), FIRST_TOKEN).unwrap();
        Bench { poll, events: Events::with_capacity(64), health, started: Instant::now() }
    }

    /// One listener with these downstreams, probed with this protocol.
    pub fn probing(downstreams: &[SocketAddr], protocol: ProbeProtocol) -> Bench {
        let mut bench = Bench::new();
        bench.set(&[watch(downstreams, &settings(protocol))]);
        bench
    }

    pub fn now(&self) -> Duration {
        self.started.elapsed()
    }

    pub fn set(&mut self, watches: &[ListenerCheck]) {
        let now = self.now();
        self.health.set_targets(watches, now);
    }

    pub fn recheck(&mut self, host: IpAddr) {
        let now = self.now();
        self.health.recheck(host, now);
    }

    fn turn(&mut self) {
        let now = self.started.elapsed();
        let wait = self.health.next_deadline().map_or(LIMIT, |due| due.saturating_sub(now));
        self.poll.poll(&mut self.events, Some(wait)).unwrap();
        for event in &self.events {
            assert!(self.health.owns(event.token()));
            self.health.on_event(event.token(), self.started.elapsed());
        }
        let now = self.started.elapsed();
        self.health.on_timer(now);
    }

    /// Runs the event loop until the condition holds.
    pub fn until(&mut self, what: &str, so: impl Fn(&HealthChecks) -> bool) {
        let end = Instant::now() + LIMIT;
        while !so(&self.health) {
            if Instant::now() > end {
                let seen: Vec<_> = self.health.downstreams().take(20).collect();
                let local_errors: Vec<_> = self.health.local_errors().collect();
                panic!("timed out waiting until {what}: {seen:#?} {local_errors:#?}");
            }
            self.turn();
        }
    }

    pub fn until_healthy(&mut self, downstream: SocketAddr) -> TargetStatus {
        self.until(&format!("{downstream} is healthy"), |health| state(health, downstream) == HealthState::Healthy);
        assert!(!matches!(self.health.map().get(LISTENER, downstream), Some(HealthMark::Unhealthy(_))));
        status(&self.health, downstream)
    }

    /// Runs the event loop until the downstream is unhealthy, and returns the reason.
    pub fn until_unhealthy(&mut self, downstream: SocketAddr) -> String {
        self.until(&format!("{downstream} is unhealthy"), |health| state(health, downstream) == HealthState::Unhealthy);
        assert!(matches!(self.health.map().get(LISTENER, downstream), Some(HealthMark::Unhealthy(_))));
        status(&self.health, downstream).failure.expect("a reason").to_string()
    }

    /// Runs the event loop until this many more probes have ended.
    pub fn until_probed(&mut self, rounds: u64) {
        let count = |health: &HealthChecks| {
            let all_stats =
                udp_fanout::testing::health::settings::ProbeKind::ALL.map(|kind| health.probe_stats().of(kind).clone());
            all_stats.iter().flat_map(|stats| stats.outcomes().map(|(_, n)| n).collect::<Vec<_>>()).sum::<u64>()
        };
        let before = count(&self.health);
        self.until("probes have ended", |health| count(health) >= before + rounds);
    }
}

/// The number of probes with this outcome.
pub fn ended(stats: &ProbeStats, outcome: ProbeOutcome) -> u64 {
    stats.outcomes().filter(|(of, _)| *of == outcome).map(|(_, n)| n).sum()
}

pub fn status(health: &HealthChecks, downstream: SocketAddr) -> TargetStatus {
    let seen = health.downstreams().find(|seen| seen.downstream == downstream);
    seen.unwrap_or_else(|| panic!("{downstream} is not watched")).status.clone()
}

pub fn state(health: &HealthChecks, downstream: SocketAddr) -> HealthState {
    status(health, downstream).state
}
