//! A running discovery under test: its updates, its log, its status.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use udp_fanout::testing::discovery::{
    Discovery, DiscoveryRequest, DiscoverySettings, DiscoveryTimeouts, DiscoveryUpdate, ErrorKind, Locality, PortRef,
    ServiceRef, ServiceStatus, Terminating,
};
use udp_fanout::testing::model::ListenerId;
use udp_fanout::testing::net::Family;

use udp_fanout_lab::apiserver::{ApiServer, DEADLINE};

/// A request of listener 0 for one service in the namespace `logging`, with a numeric port.
pub fn request(service: &str) -> DiscoveryRequest {
    request_of(0, &[("logging", service)])
}

pub fn request_of(listener: u32, services: &[(&str, &str)]) -> DiscoveryRequest {
    DiscoveryRequest {
        listener: ListenerId(listener),
        services: services
            .iter()
            .map(|&(namespace, service)| ServiceRef {
                namespace: Some(namespace.to_owned()),
                service: service.to_owned(),
                port: PortRef::Number(5514),
            })
            .collect(),
        family: Family::V4,
        locality: Locality::Cluster,
        terminating: Terminating::Fallback,
    }
}

/// Timeouts long enough for a slow machine, with short backoffs.
pub fn limits() -> DiscoveryTimeouts {
    DiscoveryTimeouts {
        request_timeout: Duration::from_secs(20),
        stall_timeout: Duration::from_secs(60),
        watch_timeout: Duration::from_secs(290),
        short_watch: Duration::from_millis(50),
        backoff_min: Duration::from_millis(5),
        backoff_max: Duration::from_millis(50),
        coalesce: Duration::from_millis(5),
    }
}

/// A discovery connected to a test API server.
pub struct Watching {
    pub discovery: Discovery,
    pub updates: Receiver<DiscoveryUpdate>,
    /// Kept because the waker is registered with it.
    poll: mio::Poll,
    latest: BTreeMap<ListenerId, DiscoveryUpdate>,
}

impl Watching {
    pub fn start(server: &ApiServer, requests: Vec<DiscoveryRequest>) -> Watching {
        Watching::with(&server.kubeconfig(), requests, None, limits())
    }

    pub fn with(
        kubeconfig: &Path,
        requests: Vec<DiscoveryRequest>,
        node: Option<&str>,
        limits: DiscoveryTimeouts,
    ) -> Watching {
        collect_logs();
        let settings = DiscoverySettings {
            kubeconfig: Some(kubeconfig.to_owned()),
            config: Some("/etc/udp-fanout/config.toml".into()),
            node_name: node.map(str::to_owned),
            limits,
        };
        let poll = mio::Poll::new().unwrap();
        let waker = Arc::new(mio::Waker::new(poll.registry(), mio::Token(0)).unwrap());
        let (sender, updates) = channel();
        let discovery = Discovery::start(requests, settings, sender, waker).unwrap();
        Watching { discovery, updates, poll, latest: BTreeMap::new() }
    }

    /// The next update of any listener. Generations must increase.
    pub fn next_update(&mut self) -> DiscoveryUpdate {
        let update = self.updates.recv_timeout(DEADLINE).expect("no discovery update arrived");
        let before = self.latest.insert(update.listener, update.clone());
        assert!(before.is_none_or(|before| before.set.generation < update.set.generation), "{update:?}");
        update
    }

    /// The addresses of the next update.
    pub fn next_addresses(&mut self) -> Vec<String> {
        addresses(&self.next_update())
    }

    /// Reads updates until listener 0 has these endpoints, and returns the number of updates.
    pub fn until(&mut self, expected: &[&str]) -> usize {
        self.until_listener(0, expected)
    }

    pub fn until_listener(&mut self, listener: u32, expected: &[&str]) -> usize {
        let until = Instant::now() + DEADLINE;
        for n in 0.. {
            let latest = self.latest.get(&ListenerId(listener));
            if latest.is_some_and(|update| addresses(update) == expected) {
                return n;
            }
            assert!(Instant::now() < until, "expected {expected:?}, got {:?}", latest.map(addresses));
            self.next_update();
        }
        unreachable!()
    }

    /// True if the event loop is woken before the deadline.
    pub fn is_woken(&mut self) -> bool {
        let mut events = mio::Events::with_capacity(1);
        self.poll.poll(&mut events, Some(DEADLINE)).unwrap();
        !events.is_empty()
    }

    /// Asserts that nothing has been published since the last update that was read.
    pub fn quiet(&self) {
        assert_eq!(self.updates.try_recv().ok(), None);
    }

    /// The only service's status.
    pub fn status(&self) -> ServiceStatus {
        let mut services = self.discovery.status().services();
        assert_eq!(services.len(), 1);
        services.remove(0)
    }

    pub fn errors(&self, kind: ErrorKind) -> u64 {
        self.status().errors.iter().find(|(k, _)| *k == kind).unwrap().1
    }

    /// Polls the status until the condition holds.
    pub fn wait_status(&self, what: &str, condition: impl Fn(&ServiceStatus) -> bool) {
        let until = Instant::now() + DEADLINE;
        while !condition(&self.status()) {
            assert!(Instant::now() < until, "timed out waiting for {what}: {:?}", self.status());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

pub fn addresses(update: &DiscoveryUpdate) -> Vec<String> {
    update.set.downstreams.iter().map(|downstream| downstream.address.to_string()).collect()
}

/// Log lines of the program, for all tests of the binary: a test recognises its own by the names of its services.
#[derive(Default)]
struct Lines {
    lines: Mutex<Vec<String>>,
    /// Lines of level debug.
    debug: Mutex<Vec<String>>,
    more: Condvar,
}

fn lines() -> &'static Lines {
    static LINES: OnceLock<Lines> = OnceLock::new();
    LINES.get_or_init(Lines::default)
}

fn collect_logs() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        let subscriber = tracing_subscriber::registry().with(Collector);
        tracing::subscriber::set_global_default(subscriber).unwrap();
    });
}

struct Collector;

impl<S: tracing::Subscriber> Layer<S> for Collector {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let meta = event.metadata();
        if !meta.target().starts_with("udp_fanout") || *meta.level() > tracing::Level::DEBUG {
            return;
        }
        let mut line = Line(meta.level().to_string());
        event.record(&mut line);
        if *meta.level() == tracing::Level::DEBUG {
            lines().debug.lock().unwrap().push(line.0);
            return;
        }
        lines().lines.lock().unwrap().push(line.0);
        lines().more.notify_all();
    }
}

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.0 += &format!(" {value:?}");
        } else {
            self.0 += &format!(" {}={value:?}", field.name());
        }
    }
}

/// Waits for a log line that contains all these parts, and returns it.
pub fn logged(parts: &[&str]) -> String {
    let until = Instant::now() + DEADLINE;
    let mut all = lines().lines.lock().unwrap();
    loop {
        if let Some(line) = all.iter().find(|line| parts.iter().all(|part| line.contains(part))) {
            return line.clone();
        }
        let left = until.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "no log line with {parts:?} among {all:#?}");
        all = lines().more.wait_timeout(all, left).unwrap().0;
    }
}

/// The number of log lines so far that contain all these parts.
pub fn log_count(parts: &[&str]) -> usize {
    let all = lines().lines.lock().unwrap();
    all.iter().filter(|line| parts.iter().all(|part| line.contains(part))).count()
}

/// The backoff delays that discovery has logged so far after failures of this service's watch.
pub fn waits(service: &str) -> Vec<Duration> {
    let head = format!("next attempt to follow the endpoints of logging/{service} in ");
    let all = lines().debug.lock().unwrap();
    let ms = all.iter().filter_map(|line| line.split_once(&head)?.1.strip_suffix(" ms")?.parse().ok());
    ms.map(Duration::from_millis).collect()
}
