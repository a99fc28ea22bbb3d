//! How long an endpoint change takes from the API server to the kernel's table, with 1,000 endpoints.
//!
//! Measured from the moment the API server has the change, which it writes as a watch event immediately, in three ways:
//!
//! - to the kernel's table, in the real daemon: TLS, parsing, merging ten slices of 100 endpoints, passing the update
//!   between threads, looking up a thousand routes, the plan, the table; until its log line, written once the table is
//!   published, has been read. Needs root, for namespaces and the kernel program.
//! - to the arrival of the update on the event loop's channel.
//! - from slices to downstreams, the part of the program's own code without I/O.
//!
//! `cargo bench --bench discovery` prints the distributions; `-- --test` or `-- --quick` runs it briefly. The first is held to 10 ms at the
//! 99th percentile.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a bench that cannot go on should stop, and prints"
)]

use std::path::Path;
use std::time::{Duration, Instant};

use udp_fanout::testing::discovery::aggregator::{Aggregator, WatchEvent};
use udp_fanout::testing::discovery::service_key::ServiceKey;
use udp_fanout::testing::discovery::wire::ApiSlice;
use udp_fanout::testing::discovery::{DiscoveryRequest, DiscoveryTimeouts};
use udp_fanout_lab::apiserver::{ApiServer, Kind};
use udp_fanout_lab::cluster::{nth, ready, slice, slices_of, unready};
use udp_fanout_lab::{Daemon, DaemonConfig, Lab, Place, Surroundings};
use udp_fanout_testkit::watching::{Watching, request};

const ENDPOINTS: usize = 1000;
/// Goal for the 99th percentile to the kernel's table.
const GOAL: Duration = Duration::from_millis(10);

/// The slice that changes: the readiness of one of its hundred endpoints.
fn changed(flip: bool) -> serde_json::Value {
    let endpoint = |n: usize| if n == 50 && flip { unready(&nth(n)) } else { ready(&nth(n)) };
    slice("logging", "bench", "bench-0000", (0..100).map(endpoint))
}

fn main() {
    let brief = std::env::args().any(|argument| argument == "--test" || argument == "--quick");
    let rounds = if brief { 20 } else { 2000 };
    let pause = DiscoveryTimeouts::default().coalesce * 2;
    if nix::unistd::geteuid().is_root() {
        let p99 = to_the_kernel("to the kernel's table, one change at a time", rounds, pause);
        to_the_kernel("to the kernel's table, changes back to back", rounds, Duration::ZERO);
        let verdict = if p99 < GOAL { "reached" } else { "missed" };
        println!("goal: p99 under {GOAL:?}, {verdict}");
    } else {
        println!("to the kernel's table: skipped, because it needs root");
    }
    through_the_server("one change at a time", rounds, pause);
    through_the_server("changes back to back", rounds, Duration::ZERO);
    pure("slices to downstreams alone", rounds);
}

/// Measures the real daemon in a namespace. Nothing listens at the endpoints, but there is a route to each.
fn to_the_kernel(title: &str, rounds: usize, pause: Duration) -> Duration {
    let lab = Lab::builder().receiver(Place::OtherInterface).build().unwrap();
    lab.gateway.ip("route add 10.1.0.0/16 via 10.0.10.2").unwrap();
    let server = lab.gateway.run(|| Ok(ApiServer::start())).unwrap();
    server.apply_all(Kind::EndpointSlice, slices_of("logging", "bench", 0, ENDPOINTS));
    let mut config = DaemonConfig::for_lab(&lab, "tc_ebpf")
        .extra("kubernetes = { namespace = \"logging\", service = \"bench\", port = 5514 }");
    config.listeners[0].downstreams.clear();
    let arguments = vec!["--kubeconfig".to_owned(), server.kubeconfig().display().to_string()];
    let surroundings = Surroundings { arguments, environment: Vec::new() };
    let binary = Path::new(env!("CARGO_BIN_EXE_udp-fanout"));
    let mut daemon = Daemon::spawn_in(&lab.gateway, binary, &config, &surroundings).unwrap();
    let updated = |endpoints: usize| format!("updated tc_ebpf downstream set listener_id=0 endpoints={endpoints}");
    daemon.wait_for_line(&updated(ENDPOINTS)).unwrap();
    server.wait_for_watches(1);
    let times = (0..rounds).map(|round| {
        let flip = round % 2 == 0;
        let (object, line) = (changed(flip), updated(ENDPOINTS - usize::from(flip)));
        std::thread::sleep(pause);
        let started = Instant::now();
        server.apply(Kind::EndpointSlice, object);
        daemon.wait_for_line(&line).unwrap();
        started.elapsed()
    });
    let p99 = report(title, times.collect());
    daemon.stop().unwrap();
    p99
}

/// Measures up to the event loop's channel. Without a pause, the result includes the coalescing window.
fn through_the_server(title: &str, rounds: usize, pause: Duration) {
    let server = ApiServer::start();
    server.apply_all(Kind::EndpointSlice, slices_of("logging", "bench", 0, ENDPOINTS));
    let mut watching = Watching::with(&server.kubeconfig(), vec![request("bench")], None, DiscoveryTimeouts::default());
    assert_eq!(watching.next_update().set.downstreams.len(), ENDPOINTS);
    server.wait_for_watches(1);
    let times = (0..rounds).map(|round| {
        let flip = round % 2 == 0;
        let object = changed(flip);
        // Lets the coalescing window of the last update pass.
        std::thread::sleep(pause);
        let started = Instant::now();
        server.apply(Kind::EndpointSlice, object);
        let update = watching.next_update();
        let took = started.elapsed();
        assert_eq!(update.set.downstreams.len(), ENDPOINTS - usize::from(flip));
        took
    });
    report(title, times.collect());
}

/// Measures the program's own code alone: parsing one slice from JSON, and merging all.
fn pure(title: &str, rounds: usize) {
    let read = |object: &serde_json::Value| {
        let text = object.to_string();
        std::sync::Arc::new(
            serde_json::from_str::<k8s_openapi::api::discovery::v1::EndpointSlice>(&text).unwrap().to_slice(),
        )
    };
    let others: Vec<_> = slices_of("logging", "bench", 0, ENDPOINTS).iter().skip(1).map(read).collect();
    let key = ServiceKey::new("logging", "bench");
    let mut aggregator = Aggregator::new("default", None);
    let wanted: Vec<DiscoveryRequest> = vec![request("bench")];
    aggregator.replace_requests(wanted);
    let texts = [changed(false).to_string(), changed(true).to_string()];
    let times = (0..rounds).map(|round| {
        let started = Instant::now();
        let slice: k8s_openapi::api::discovery::v1::EndpointSlice =
            serde_json::from_str(&texts[(round + 1) % 2]).unwrap();
        let mut slices = others.clone();
        slices.push(std::sync::Arc::new(slice.to_slice()));
        aggregator.handle_event(WatchEvent::Slices(key.clone(), slices));
        let (updates, _) = aggregator.flush();
        let took = started.elapsed();
        assert_eq!(updates.len(), 1);
        took
    });
    report(title, times.collect());
}

/// Prints the distribution and returns its 99th percentile.
fn report(title: &str, mut times: Vec<Duration>) -> Duration {
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
    at(0.99)
}
