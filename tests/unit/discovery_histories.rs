//! Random histories of EndpointSlices: after any history, the set that is published in the end must be
//! the one that follows from the final state.
//!
//! Once without I/O, thousands of histories straight into the pure core; once through the API server and the
//! watcher, with cut connections, compacted history and server restarts in between. A failure prints its seed.

mod history;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use history::{History, NODE, Step, ZONE, expected, requests};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use rand::RngExt;
use serde_json::Value;
use udp_fanout::testing::discovery::DiscoveryUpdate;
use udp_fanout::testing::discovery::aggregator::{Aggregator, WatchEvent};
use udp_fanout::testing::discovery::service_key::ServiceKey;
use udp_fanout::testing::discovery::slices::Slice;
use udp_fanout::testing::discovery::wire::{ApiSlice, BetaEndpointSlice};
use udp_fanout::testing::model::ListenerId;
use udp_fanout_lab::apiserver::{ApiServer, Kind, Rule};
use udp_fanout_testkit::watching::{Watching, limits};

/// An object as either version of the API returns it.
fn read(object: &Value, beta: bool) -> Slice {
    if !beta {
        return serde_json::from_value::<EndpointSlice>(object.clone()).unwrap().to_slice();
    }
    let mut object = object.clone();
    for endpoint in object["endpoints"].as_array_mut().into_iter().flatten() {
        let mut topology = serde_json::Map::new();
        for (ours, theirs) in [("nodeName", "kubernetes.io/hostname"), ("zone", "topology.kubernetes.io/zone")] {
            if let Some(value) = endpoint.as_object_mut().unwrap().remove(ours) {
                topology.insert(theirs.to_owned(), value);
            }
        }
        endpoint["topology"] = topology.into();
    }
    serde_json::from_value::<BetaEndpointSlice>(object).unwrap().to_slice()
}

/// All slices of one Service, as its watch reports them.
fn finding(history: &History, namespace: &str, service: &str, beta: bool) -> WatchEvent {
    let ours = |object: &&Value| {
        object["metadata"]["namespace"] == namespace
            && object["metadata"]["labels"][udp_fanout_lab::cluster::LABEL] == service
    };
    let slices = history.cluster.values().filter(ours).map(|object| Arc::new(read(object, beta))).collect();
    WatchEvent::Slices(ServiceKey::new(namespace, service), slices)
}

fn socket_addresses(update: &DiscoveryUpdate) -> Vec<SocketAddr> {
    update.set.downstreams.iter().map(|downstream| downstream.address).collect()
}

/// Applies updates as the controller does, and checks the order of generations.
fn publish(aggregator: &mut Aggregator, published: &mut BTreeMap<ListenerId, DiscoveryUpdate>) {
    for update in aggregator.flush().0 {
        let before = published.insert(update.listener, update.clone());
        if let Some(before) = before {
            assert!(before.set.generation < update.set.generation);
            assert_ne!(before.set.downstreams, update.set.downstreams, "an update that changes nothing");
        }
    }
}

fn pure_history(seed: u64) {
    let mut history = History::new(seed);
    let requests = requests(&mut history.rng);
    let beta = history.rng.random();
    let mut aggregator = Aggregator::new("default", Some(NODE.to_owned()));
    aggregator.replace_requests(requests.clone());
    let mut published = BTreeMap::new();
    let mut findings = vec![WatchEvent::Zone(Some(ZONE.into()))];
    let keys: Vec<ServiceKey> = aggregator.wanted_services().cloned().collect();
    findings.extend(keys.iter().map(|key| finding(&history, &key.namespace, &key.service, beta)));
    findings.into_iter().for_each(|finding| aggregator.handle_event(finding));
    for _ in 0..history.rng.random_range(1..30) {
        let step = history.step();
        let (namespace, name) = match &step {
            Step::Apply(object) => {
                let text = |field: &Value| field.as_str().unwrap().to_owned();
                (
                    text(&object["metadata"]["namespace"]),
                    text(&object["metadata"]["labels"][udp_fanout_lab::cluster::LABEL]),
                )
            }
            // Slices are named SERVICE-NUMBER.
            Step::Delete { namespace, name } => (namespace.clone(), name.split_once('-').unwrap().0.to_owned()),
        };
        aggregator.handle_event(finding(&history, &namespace, &name, beta));
        if history.rng.random_range(0..8) == 0 {
            aggregator.handle_event(WatchEvent::Failed(ServiceKey::new(&namespace, &name)));
        }
        // One update may be late, and cover several changes.
        if history.rng.random() {
            publish(&mut aggregator, &mut published);
        }
    }
    publish(&mut aggregator, &mut published);
    for request in &requests {
        let found = socket_addresses(&published[&request.listener]);
        let wanted = expected(&history.cluster, request, NODE, ZONE);
        assert_eq!(found, wanted, "seed {seed}, {request:?}, {:#?}", history.cluster);
    }
}

#[test]
fn the_final_state_decides_whatever_the_history() {
    (0..4000).for_each(pure_history);
}

/// A random fault of the server.
fn disturb(server: &ApiServer, history: &mut History) {
    match history.rng.random_range(0..8) {
        0 => server.cut(),
        1 => server.end_watches(),
        2 => server.compact(),
        3 => server.bookmark(),
        4 => {
            server.stop();
            server.restart();
        }
        5 => server.drip(Some((history.rng.random_range(5..500), std::time::Duration::from_micros(20)))),
        6 => server.drip(None),
        _ => {}
    }
}

fn watched_history(seed: u64) {
    let server = ApiServer::start();
    server.allow(Rule::new(&["get"], "nodes"));
    server.apply(Kind::Node, udp_fanout_lab::cluster::node(NODE, ZONE));
    let mut history = History::new(seed);
    if history.rng.random() {
        server.serve_versions(&["v1beta1"]);
    }
    let requests = requests(&mut history.rng);
    let steps = history.rng.random_range(10..40);
    let mut watching = None;
    let mut start = Some(history.rng.random_range(0..10));
    for n in 0..steps {
        if start == Some(n) {
            start = None;
            watching = Some(Watching::with(&server.kubeconfig(), requests.clone(), Some(NODE), limits()));
        }
        match history.step() {
            Step::Apply(object) => server.apply(Kind::EndpointSlice, object),
            Step::Delete { namespace, name } => server.delete(Kind::EndpointSlice, &namespace, &name),
        }
        disturb(&server, &mut history);
    }
    server.drip(None);
    let mut watching = watching.unwrap();
    println!("seed {seed}");
    for request in &requests {
        let wanted: Vec<String> =
            expected(&history.cluster, request, NODE, ZONE).iter().map(ToString::to_string).collect();
        watching.until_listener(request.listener.0, &wanted.iter().map(String::as_str).collect::<Vec<_>>());
    }
}

#[test]
fn the_final_state_arrives_whatever_happens_to_the_server() {
    for seed in 0..60 {
        watched_history(seed);
    }
}
