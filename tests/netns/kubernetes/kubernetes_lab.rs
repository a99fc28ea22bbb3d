//! A lab whose gateway runs an API server and a daemon that watches it.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use serde_json::Value;

use udp_fanout_lab::apiserver::{ApiServer, Kind};
use udp_fanout_lab::cluster::{ready, slice};
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Lab, Metrics, Place, Sender, Surroundings, scrape};

/// The namespace and the Service that most tests watch.
pub const NAMESPACE: &str = "logging";
pub const SERVICE: &str = "receivers";

/// Divisible by every number of receivers here, so that equal shares are exact.
pub const ROUNDS: u64 = 240;

pub struct KubernetesLab {
    // Dropped first: its connections are in the lab.
    pub server: ApiServer,
    pub lab: Lab,
    pub mode: &'static str,
}

pub fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_udp-fanout"))
}

impl KubernetesLab {
    pub fn new(mode: &'static str, places: impl IntoIterator<Item = Place>) -> KubernetesLab {
        let lab = Lab::builder().receivers(places).build().unwrap();
        let server = lab.gateway.run(|| Ok(ApiServer::start())).unwrap();
        KubernetesLab { server, lab, mode }
    }

    /// The address of a receiver of the lab, without its port.
    pub fn ip(&self, receiver: usize) -> String {
        self.lab.sites[receiver].address.ip().to_string()
    }

    /// These receivers of the lab as ready endpoints.
    pub fn ready(&self, receivers: &[usize]) -> Vec<Value> {
        receivers.iter().map(|&receiver| ready(&self.ip(receiver))).collect()
    }

    /// Creates or replaces a slice of the watched Service.
    pub fn apply(&self, name: &str, endpoints: Vec<Value>) {
        self.server.apply(Kind::EndpointSlice, slice(NAMESPACE, SERVICE, name, endpoints));
    }

    /// One listener with receivers from Kubernetes, with these keys of `kubernetes`.
    pub fn config(&self, kubernetes: &str) -> DaemonConfig {
        let mut config = DaemonConfig::for_lab(&self.lab, self.mode).extra(&format!("kubernetes = {{ {kubernetes} }}"));
        config.listeners[0].downstreams.clear();
        config
    }

    /// The keys that watch the one Service, with a port number.
    pub fn by_number() -> String {
        format!("namespace = \"{NAMESPACE}\", service = \"{SERVICE}\", port = 5514")
    }

    pub fn surroundings(&self) -> Surroundings {
        let kubeconfig = self.server.kubeconfig().display().to_string();
        Surroundings { arguments: vec!["--kubeconfig".into(), kubeconfig], environment: Vec::new() }
    }

    /// Starts the daemon without waiting.
    pub fn spawn(&self, config: &DaemonConfig) -> Daemon {
        Daemon::spawn_in(&self.lab.gateway, binary(), config, &self.surroundings()).unwrap()
    }

    /// Starts the daemon and waits until it is ready with `endpoints` endpoints.
    pub fn start(&self, config: &DaemonConfig, endpoints: usize) -> Daemon {
        let mut daemon = self.spawn(config);
        daemon.wait_until_ready(&self.lab.gateway, config.listeners.len()).unwrap();
        daemon.wait_for_logged(&self.updated(endpoints)).unwrap();
        daemon
    }

    /// The log line once a table is in force.
    pub fn updated(&self, endpoints: usize) -> String {
        format!("updated {} downstream set listener_id=0 endpoints={endpoints}", self.mode)
    }

    pub fn metrics(&self) -> Metrics {
        Metrics::scrape(&self.lab.gateway, Self::page(), "/metrics").unwrap()
    }

    pub fn readyz(&self) -> u16 {
        scrape::get(&self.lab.gateway, Self::page(), "/readyz").map_or(0, |page| page.status)
    }

    fn page() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 9090))
    }

    /// Polls the metrics until they satisfy the condition.
    pub fn wait_for_metrics(&self, what: &str, condition: impl Fn(&Metrics) -> bool) -> Metrics {
        let until = std::time::Instant::now() + udp_fanout_lab::apiserver::DEADLINE;
        loop {
            let page = self.metrics();
            if condition(&page) {
                return page;
            }
            assert!(std::time::Instant::now() < until, "never happened: {what}");
        }
    }

    /// The metric that a Service is in sync: 1 or 0.
    pub fn synced(page: &Metrics, service: &str) -> u64 {
        page.sum("udp_fanout_discovery_synced", &[("namespace", NAMESPACE), ("service", service)])
    }

    /// Sends datagrams while `change` runs, and returns their sender.
    pub fn while_flowing(&self, collectors: &Collectors, change: impl FnOnce()) -> Sender {
        let mut sender = Sender::in_lab(&self.lab).unwrap();
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let flow = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    sender.send(60, collectors).unwrap();
                }
            });
            change();
            stop.store(true, Ordering::Relaxed);
            flow.join().unwrap();
        });
        sender
    }

    /// Sends [`ROUNDS`] datagrams and returns their sender.
    pub fn rounds(&self, collectors: &Collectors) -> Sender {
        let mut sender = Sender::in_lab(&self.lab).unwrap();
        sender.send(ROUNDS, collectors).unwrap();
        sender
    }
}

/// The counts of `of` receivers if those in `receivers` share [`ROUNDS`] datagrams equally.
pub fn shares(of: usize, receivers: &[usize]) -> Vec<u64> {
    let each = ROUNDS / receivers.len() as u64;
    (0..of).map(|receiver| if receivers.contains(&receiver) { each } else { 0 }).collect()
}
