//! Health checks in the real daemon: a receiver that stops replying is removed from the round robin, and comes back.
mod kinds;
mod settings;

use std::net::SocketAddr;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use udp_fanout_lab::scrape::Metrics;
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Place, Sender};

const HEALTH: &str = r#"
[health]
enabled = true
interval_secs = 0.6
timeout_secs = 0.5
protocol = "icmp"
"#;

fn metrics(lab: &Lab) -> Metrics {
    Metrics::scrape(&lab.gateway, "127.0.0.1:9090".parse().unwrap(), "/metrics").unwrap()
}

fn active(lab: &Lab) -> u64 {
    metrics(lab).sum("udp_fanout_downstream_active", &[("listener", "lab")])
}

/// Waits until the metrics page satisfies the condition.
fn wait_for_metrics(lab: &Lab, what: &str, mut is_so: impl FnMut(&Metrics) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_so(&metrics(lab)) {
        assert!(Instant::now() < deadline, "still not: {what}");
        thread::yield_now();
    }
}

/// Sends `n` datagrams and returns how many each receiver got.
fn shares(lab: &Lab, n: u64) -> Vec<u64> {
    shares_by(lab, lab.listener(), n)
}

/// The same for another listener.
fn shares_by(lab: &Lab, listener: SocketAddr, n: u64) -> Vec<u64> {
    let collectors = Collectors::start(lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::open(&lab.sender, (lab.sender_address(), 0), listener).unwrap();
    sender.send(n, &collectors).unwrap();
    let report = collectors.finish(&[&sender]).unwrap();
    assert!(report.is_complete(), "{report}");
    report.counts()
}

/// Blocks pings to a receiver, or unblocks them. Datagrams still arrive.
fn ignore_pings(lab: &Lab, receiver: usize, ignored: bool) {
    let namespace = lab.namespace_of(&lab.sites[receiver]);
    namespace.sysctl("net.ipv4.icmp_echo_ignore_all", u8::from(ignored).to_string().as_str()).unwrap();
}

fn updated(mode: &str, endpoints: usize) -> String {
    format!("updated {mode} downstream set listener_id=0 endpoints={endpoints}")
}

fn fails_and_recovers(mode: &str) {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod, Place::BehindRouter]).build().unwrap();
    let config = DaemonConfig::for_lab(&lab, mode).to_toml() + HEALTH;
    let binary = Path::new(env!("CARGO_BIN_EXE_udp-fanout"));
    let mut daemon = Daemon::spawn(&lab.gateway, binary, &config).unwrap();
    daemon.wait_for_line(&updated(mode, 3)).unwrap();
    daemon.wait_for_line("serving metrics").unwrap();
    assert_eq!(shares(&lab, 300), [100, 100, 100]);

    ignore_pings(&lab, 1, true);
    daemon.wait_for_line("health check failed").unwrap();
    daemon.wait_for_line(&updated(mode, 2)).unwrap();
    assert_eq!(shares(&lab, 300), [150, 0, 150]);
    assert_eq!(active(&lab), 2);
    let endpoint = lab.sites[1].address.to_string();
    assert!(metrics(&lab).has("udp_fanout_downstream_health", &[("endpoint", &endpoint)]));
    let health = |endpoint: &str| metrics(&lab).sum("udp_fanout_downstream_health", &[("endpoint", endpoint)]);
    assert_eq!(health(&endpoint), 0);
    assert_eq!(metrics(&lab).sum("udp_fanout_downstream_health", &[("listener", "lab")]), 2);

    ignore_pings(&lab, 1, false);
    daemon.wait_for_line("health check passed again").unwrap();
    daemon.wait_for_line(&updated(mode, 3)).unwrap();
    assert_eq!(shares(&lab, 300), [100, 100, 100]);
    assert_eq!(health(&endpoint), 1);
    let page = metrics(&lab);
    for to in ["unhealthy", "healthy"] {
        let labels = [("listener", "lab"), ("to", to)];
        assert_eq!(page.sum("udp_fanout_downstream_health_transitions_total", &labels), 1, "{to}");
    }
    let answered = page.sum("udp_fanout_health_probes_total", &[("protocol", "icmp"), ("result", "answered")]);
    assert!(answered >= 5, "three replies at first, two to recover: {answered}");
    let times = page.sum("udp_fanout_health_probe_round_trip_seconds_count", &[("protocol", "icmp")]);
    assert!((1..=answered).contains(&times), "{times} of {answered}");

    // A firewall that drops pings must not stop the datagrams: if all receivers fail, all get their share.
    for receiver in 0..3 {
        ignore_pings(&lab, receiver, true);
    }
    for _ in 0..3 {
        daemon.wait_for_line("health check failed").unwrap();
    }
    daemon.wait_for_line(&updated(mode, 3)).unwrap();
    assert_eq!(shares(&lab, 300), [100, 100, 100]);
    daemon.stop().unwrap();
}

#[test]
fn netns_a_failed_receiver_leaves_the_kernels_round() {
    fails_and_recovers("tc_ebpf");
}

#[test]
fn netns_a_failed_receiver_leaves_the_sockets_round() {
    fails_and_recovers("userspace");
}
