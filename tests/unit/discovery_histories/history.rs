//! Seeded random histories of EndpointSlices, and a model that derives the expected set from the final state.
//!
//! The model follows the specification and works on the JSON objects: for every address it collects what any
//! slice contains about it, then filters. It shares no code and no algorithm with the program.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use udp_fanout::testing::discovery::{DiscoveryRequest, Locality, PortRef, ServiceRef, Terminating};
use udp_fanout::testing::model::ListenerId;
use udp_fanout::testing::net::Family;

use udp_fanout_lab::cluster::slice;

pub const NAMESPACES: [&str; 2] = ["logging", "tenant"];
pub const SERVICES: [&str; 2] = ["vector", "statsd"];
const NODES: [&str; 3] = ["n1", "n2", "n3"];
const ZONES: [&str; 2] = ["west", "east"];
const PORTS: [&str; 3] = ["", "syslog", "metrics"];
/// The node and the zone of the daemon in a history.
pub const NODE: &str = "n1";
pub const ZONE: &str = "west";

/// A change of one slice.
#[derive(Debug, Clone)]
pub enum Step {
    Apply(Value),
    Delete { namespace: String, name: String },
}

/// The existing objects, by namespace and name.
pub type Cluster = BTreeMap<(String, String), Value>;

/// A generator of valid successive changes.
pub struct History {
    pub rng: StdRng,
    pub cluster: Cluster,
}

impl History {
    pub fn new(seed: u64) -> History {
        History { rng: StdRng::seed_from_u64(seed), cluster: Cluster::new() }
    }

    fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.rng.random_range(0..of.len())]
    }

    fn maybe(&mut self) -> Option<bool> {
        [None, Some(true), Some(false)][self.rng.random_range(0..3)]
    }

    /// The next change, which is already applied to `cluster`.
    pub fn step(&mut self) -> Step {
        let number = self.cluster.len();
        if number > 0 && self.rng.random_range(0..4) == 0 {
            let key = self.cluster.keys().nth(self.rng.random_range(0..number)).unwrap().clone();
            self.cluster.remove(&key);
            return Step::Delete { namespace: key.0, name: key.1 };
        }
        let (namespace, service) = (self.one(&NAMESPACES), self.one(&SERVICES));
        let name = format!("{service}-{}", self.rng.random_range(0..4));
        let mut object = slice(namespace, service, &name, []);
        let kind = self.one(&["IPv4", "IPv4", "IPv4", "IPv6", "FQDN"]);
        object["addressType"] = json!(kind);
        object["endpoints"] = match self.rng.random_range(0..8) {
            0 => Value::Null,
            _ => (0..self.rng.random_range(0..6)).map(|_| self.endpoint(kind)).collect(),
        };
        object["ports"] = match self.rng.random_range(0..8) {
            0 => Value::Null,
            _ => self.ports(),
        };
        self.cluster.insert((namespace.to_owned(), name), object.clone());
        Step::Apply(object)
    }

    fn ports(&mut self) -> Value {
        let chosen: Vec<&str> = PORTS.into_iter().filter(|_| self.rng.random()).collect();
        chosen
            .into_iter()
            .map(|name| {
                let mut port = json!({"protocol": self.one(&["UDP", "UDP", "TCP"])});
                if !name.is_empty() || self.rng.random() {
                    port["name"] = json!(name);
                }
                if self.rng.random_range(0..5) > 0 {
                    port["port"] = json!(self.rng.random_range(5000..5003));
                }
                port
            })
            .collect()
    }

    fn endpoint(&mut self, kind: &str) -> Value {
        // Few addresses, so that slices overlap.
        let last = self.rng.random_range(1..9);
        let address = match kind {
            "IPv4" => format!("10.0.0.{last}"),
            "IPv6" => format!("fd00::{last}"),
            _ => format!("pod-{last}.example"),
        };
        let mut endpoint = json!({"addresses": [address, "10.99.99.99"]});
        if self.rng.random_range(0..6) > 0 {
            let conditions = [("ready", self.maybe()), ("serving", self.maybe()), ("terminating", self.maybe())];
            let known = conditions.into_iter().filter_map(|(name, value)| Some((name.to_owned(), json!(value?))));
            endpoint["conditions"] = Value::Object(known.collect());
        }
        // A pod does not move: node and zone follow from the address, but not every slice contains them.
        if self.rng.random() {
            endpoint["nodeName"] = json!(NODES[last % 3]);
        }
        if self.rng.random() {
            endpoint["zone"] = json!(ZONES[last % 2]);
        }
        endpoint
    }
}

/// Listeners with every combination of settings.
pub fn requests(rng: &mut StdRng) -> Vec<DiscoveryRequest> {
    let localities = [Locality::Cluster, Locality::PreferNode, Locality::Node, Locality::PreferZone];
    let terminatings = [Terminating::Never, Terminating::Fallback, Terminating::UntilGone];
    (0..4)
        .map(|n| DiscoveryRequest {
            listener: ListenerId(n),
            services: (0..rng.random_range(1..=2))
                .map(|_| ServiceRef {
                    namespace: Some(NAMESPACES[rng.random_range(0..2)].to_owned()),
                    service: SERVICES[rng.random_range(0..2)].to_owned(),
                    port: match rng.random_range(0..4) {
                        0 => PortRef::Number(9000),
                        n => PortRef::Name(PORTS[n - 1].to_owned()),
                    },
                })
                .collect(),
            family: if rng.random_range(0..4) == 0 { Family::V6 } else { Family::V4 },
            locality: localities[rng.random_range(0..4)],
            terminating: terminatings[rng.random_range(0..3)],
        })
        .collect()
}

/// What the slices contain about an address.
#[derive(Default)]
struct Observed {
    ready: bool,
    leaving: bool,
    nodes: BTreeSet<String>,
    zones: BTreeSet<String>,
}

/// The endpoints that a listener must have, given all objects.
pub fn expected(cluster: &Cluster, request: &DiscoveryRequest, node: &str, zone: &str) -> Vec<SocketAddr> {
    let mut observed: BTreeMap<SocketAddr, Observed> = BTreeMap::new();
    for service in &request.services {
        for ((namespace, _), object) in cluster {
            let ours = Some(namespace) == service.namespace.as_ref()
                && object["metadata"]["labels"][udp_fanout_lab::cluster::LABEL] == service.service.as_str();
            if ours {
                collect(object, service, request.family, &mut observed);
            }
        }
    }
    let good = |observed: &Observed| match request.terminating {
        Terminating::UntilGone => observed.ready || observed.leaving,
        _ => observed.ready,
    };
    let mut usable: Vec<_> = observed.iter().filter(|(_, observed)| good(observed)).collect();
    let strict = |list: &[(&SocketAddr, &Observed)]| {
        request.locality == Locality::Node && !list.iter().any(|(_, observed)| observed.nodes.contains(node))
    };
    if request.terminating == Terminating::Fallback && (usable.is_empty() || strict(&usable)) {
        usable = observed.iter().filter(|(_, observed)| observed.leaving && !observed.ready).collect();
    }
    let near = |observed: &Observed| match request.locality {
        Locality::Cluster => true,
        Locality::Node | Locality::PreferNode => observed.nodes.contains(node),
        Locality::PreferZone => observed.zones.contains(zone),
    };
    let none_near = !usable.iter().any(|(_, observed)| near(observed));
    let anywhere = none_near && request.locality != Locality::Node;
    usable.into_iter().filter(|(_, observed)| anywhere || near(observed)).map(|(address, _)| *address).collect()
}

fn collect(object: &Value, service: &ServiceRef, family: Family, observed: &mut BTreeMap<SocketAddr, Observed>) {
    let wanted = if family == Family::V4 { "IPv4" } else { "IPv6" };
    if object["addressType"] != wanted {
        return;
    }
    let port = match &service.port {
        PortRef::Number(number) => Some(u64::from(*number)),
        PortRef::Name(name) => object["ports"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|port| port["name"].as_str().unwrap_or("") == name)
            .and_then(|port| port["port"].as_u64()),
    };
    let Some(port) = port else { return };
    for endpoint in object["endpoints"].as_array().into_iter().flatten() {
        let ip: IpAddr = endpoint["addresses"][0].as_str().unwrap().parse().unwrap();
        let observed = observed.entry(SocketAddr::new(ip, u16::try_from(port).unwrap())).or_default();
        let is = |name: &str| endpoint["conditions"][name].as_bool();
        if is("ready") != Some(false) {
            observed.ready = true;
        } else if is("serving") == Some(true) && is("terminating") == Some(true) {
            observed.leaving = true;
        }
        observed.nodes.extend(endpoint["nodeName"].as_str().map(str::to_owned));
        observed.zones.extend(endpoint["zone"].as_str().map(str::to_owned));
    }
}
