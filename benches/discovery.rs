//! How long an endpoint change takes from the API server to the event loop, with 1,000 endpoints.
//!
//! From the moment the server has the change (it writes the watch event at once) to the arrival of the update on the
//! channel: TLS, parsing, merging ten slices of 100 endpoints, and the hand-over between threads. `cargo bench --bench
//! discovery` prints the distribution; `-- --test` runs it briefly.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a bench that cannot go on should stop, and prints"
)]

#[path = "../tests/support/apiserver/server.rs"]
mod apiserver;
#[path = "../tests/support/cluster.rs"]
mod cluster;
#[path = "../tests/support/watching.rs"]
mod watching;

use std::time::{Duration, Instant};

use apiserver::{ApiServer, Kind};
use cluster::{nth, ready, slice, slices_of, unready};
use udp_fanout::discovery::hub::{Finding, Hub, ServiceKey};
use udp_fanout::discovery::wire::Wire;
use udp_fanout::discovery::{Limits, Request};
use watching::{Watching, request};

const ENDPOINTS: usize = 1000;

/// The slice that changes: one of its hundred endpoints is ready or not.
fn changed(flip: bool) -> serde_json::Value {
    let endpoint = |n: usize| if n == 50 && flip { unready(&nth(n)) } else { ready(&nth(n)) };
    slice("logging", "bench", "bench-0000", (0..100).map(endpoint))
}

fn main() {
    let brief = std::env::args().any(|argument| argument == "--test");
    let rounds = if brief { 20 } else { 2000 };
    let pause = Limits::default().coalesce * 2;
    through_the_server("one change at a time", rounds, pause);
    through_the_server("changes back to back", rounds, Duration::ZERO);
    pure("slices to downstreams alone", rounds);
}

/// Without a pause, the window in which changes are gathered is part of what is measured.
fn through_the_server(title: &str, rounds: usize, pause: Duration) {
    let server = ApiServer::start();
    server.apply_all(Kind::EndpointSlice, slices_of("logging", "bench", 0, ENDPOINTS));
    let mut watching = Watching::with(&server.kubeconfig(), vec![request("bench")], None, Limits::default());
    assert_eq!(watching.next().set.downstreams.len(), ENDPOINTS);
    server.wait_for_watches(1);
    let times = (0..rounds).map(|round| {
        let flip = round % 2 == 0;
        let object = changed(flip);
        // Lets the window of the last update pass; nothing is waited for by it.
        std::thread::sleep(pause);
        let started = Instant::now();
        server.apply(Kind::EndpointSlice, object);
        let update = watching.next();
        let took = started.elapsed();
        assert_eq!(update.set.downstreams.len(), ENDPOINTS - usize::from(flip));
        took
    });
    report(title, times.collect());
}

/// What of that is spent in our own code: one slice read from its JSON text, all merged.
fn pure(title: &str, rounds: usize) {
    let read = |object: &serde_json::Value| {
        let text = object.to_string();
        std::sync::Arc::new(
            serde_json::from_str::<k8s_openapi::api::discovery::v1::EndpointSlice>(&text).unwrap().slice(),
        )
    };
    let others: Vec<_> = slices_of("logging", "bench", 0, ENDPOINTS).iter().skip(1).map(read).collect();
    let key = ServiceKey::new("logging", "bench");
    let mut hub = Hub::new("default", None);
    let wanted: Vec<Request> = vec![request("bench")];
    hub.replace(wanted);
    let texts = [changed(false).to_string(), changed(true).to_string()];
    let times = (0..rounds).map(|round| {
        let started = Instant::now();
        let slice: k8s_openapi::api::discovery::v1::EndpointSlice =
            serde_json::from_str(&texts[(round + 1) % 2]).unwrap();
        let mut slices = others.clone();
        slices.push(std::sync::Arc::new(slice.slice()));
        hub.take(Finding::Slices(key.clone(), slices));
        let (updates, _) = hub.flush();
        let took = started.elapsed();
        assert_eq!(updates.len(), 1);
        took
    });
    report(title, times.collect());
}

fn report(title: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    println!(
        "{title}: {ENDPOINTS} endpoints, {} changes: p50 {:?}, p90 {:?}, p99 {:?}, longest {:?}",
        times.len(),
        at(0.5),
        at(0.9),
        at(0.99),
        at(1.0)
    );
}
