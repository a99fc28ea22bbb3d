//! A lab whose gateway has an API server and a daemon that follows it.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use serde_json::Value;

use udp_fanout_lab::apiserver::{ApiServer, Kind};
use udp_fanout_lab::cluster::{ready, slice};
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Lab, Metrics, Place, Sender, Surroundings, scrape};

/// The namespace and the Service that most tests follow.
pub const NAMESPACE: &str = "logging";
pub const SERVICE: &str = "receivers";

/// Divisible by every number of receivers here, so that equal shares are exact.
pub const ROUNDS: u64 = 240;

pub struct World {
    // Dropped first: its connections are in the lab.
    pub server: ApiServer,
    pub lab: Lab,
    pub mode: &'static str,
}

pub fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_udp-fanout"))
}

impl World {
    pub fn new(mode: &'static str, places: impl IntoIterator<Item = Place>) -> World {
        let lab = Lab::builder().receivers(places).build().unwrap();
        let server = lab.gateway.run(|| Ok(ApiServer::start())).unwrap();
        World { server, lab, mode }
    }

    /// The address of a receiver of the lab, without its port.
    pub fn ip(&self, receiver: usize) -> String {
        self.lab.sites[receiver].address.ip().to_string()
    }

    /// These receivers of the lab as ready endpoints.
    pub fn ready(&self, receivers: &[usize]) -> Vec<Value> {
        receivers.iter().map(|&receiver| ready(&self.ip(receiver))).collect()
    }

    /// Creates or replaces a slice of the Service that is followed.
    pub fn apply(&self, name: &str, endpoints: Vec<Value>) {
        self.server.apply(Kind::EndpointSlice, slice(NAMESPACE, SERVICE, name, endpoints));
    }

    /// One listener that takes its receivers from Kubernetes, as these keys of `kubernetes` say.
    pub fn config(&self, kubernetes: &str) -> DaemonConfig {
        let mut config = DaemonConfig::for_lab(&self.lab, self.mode).extra(&format!("kubernetes = {{ {kubernetes} }}"));
        config.listeners[0].downstreams.clear();
        config
    }

    /// The keys that follow the one Service by number.
    pub fn by_number() -> String {
        format!("namespace = \"{NAMESPACE}\", service = \"{SERVICE}\", port = 5514")
    }

    pub fn surroundings(&self) -> Surroundings {
        let kubeconfig = self.server.kubeconfig().display().to_string();
        Surroundings { arguments: vec!["--kubeconfig".into(), kubeconfig], environment: Vec::new() }
    }

    /// Starts the daemon and waits for nothing.
    pub fn spawn(&self, config: &DaemonConfig) -> Daemon {
        Daemon::spawn_in(&self.lab.gateway, binary(), config, &self.surroundings()).unwrap()
    }

    /// Starts the daemon and waits until it is ready with so many endpoints.
    pub fn start(&self, config: &DaemonConfig, endpoints: usize) -> Daemon {
        let mut daemon = self.spawn(config);
        daemon.wait_until_ready(&self.lab.gateway, config.listeners.len()).unwrap();
        daemon.wait_for_logged(&self.updated(endpoints)).unwrap();
        daemon
    }

    /// What is logged once a table is in force.
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

    /// Asks for the metrics until they say this. Nothing else tells of it, so it asks again and again.
    pub fn wait_for_metrics(&self, what: &str, condition: impl Fn(&Metrics) -> bool) -> Metrics {
        let until = std::time::Instant::now() + udp_fanout_lab::apiserver::DEADLINE;
        loop {
            let page = self.metrics();
            if condition(&page) {
                return page;
            }
            assert!(std::time::Instant::now() < until, "{what} did not come about");
        }
    }

    /// How a Service is followed, as the metrics say: 1 or 0.
    pub fn synced(page: &Metrics, service: &str) -> u64 {
        page.sum("udp_fanout_discovery_synced", &[("namespace", NAMESPACE), ("service", service)])
    }

    /// Keeps datagrams flowing while something changes, and returns their sender.
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

/// What each of `of` receivers gets of [`ROUNDS`] datagrams when these share them equally.
pub fn shares(of: usize, receivers: &[usize]) -> Vec<u64> {
    let each = ROUNDS / receivers.len() as u64;
    (0..of).map(|receiver| if receivers.contains(&receiver) { each } else { 0 }).collect()
}
