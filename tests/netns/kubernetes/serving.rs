//! `/serving`: 200 only while there is somewhere to forward to, and otherwise the reason.

use std::time::Instant;

use udp_fanout_lab::apiserver::DEADLINE;
use udp_fanout_lab::scrape::{self, Page};
use udp_fanout_lab::{Daemon, DaemonConfig, Lab, Place};

use super::kubernetes_lab::{KubernetesLab, binary};

fn get(lab: &Lab, path: &str) -> Page {
    scrape::get(&lab.gateway, "127.0.0.1:9090".parse().unwrap(), path).unwrap()
}

/// Polls the page of all listeners until it is as expected. Then the page of the only listener must be the
/// same.
fn wait_for(lab: &Lab, status: u16, start: &str) {
    let is_so = |page: &Page| page.status == status && page.body.starts_with(&format!("listener lab: {start}"));
    let deadline = Instant::now() + DEADLINE;
    loop {
        let page = get(lab, "/serving");
        if is_so(&page) {
            break;
        }
        assert!(Instant::now() < deadline, "{page:?}");
    }
    let one = get(lab, "/serving/lab");
    assert!(is_so(&one), "{one:?}");
}

#[test]
fn netns_a_node_without_endpoints_is_ready_but_not_serving() {
    for mode in ["tc_ebpf", "userspace"] {
        let k8s = KubernetesLab::new(mode, [Place::OtherInterface]);
        k8s.apply("a", Vec::new());
        let mut daemon = k8s.spawn(&k8s.config(&KubernetesLab::by_number()));
        daemon.wait_until_ready(&k8s.lab.gateway, 1).unwrap();
        wait_for(&k8s.lab, 503, "no downstreams found\n");
        assert_eq!(k8s.readyz(), 200);

        k8s.apply("a", k8s.ready(&[0]));
        daemon.wait_for_logged(&k8s.updated(1)).unwrap();
        wait_for(&k8s.lab, 200, "serving, usable downstreams: 1\n");
        let unknown = get(&k8s.lab, "/serving/other");
        assert_eq!((unknown.status, unknown.body.as_str()), (404, "no listener \"other\"; there are: lab\n"));

        k8s.apply("a", Vec::new());
        wait_for(&k8s.lab, 503, "no downstreams found\n");
        daemon.stop().unwrap();
    }
}

#[test]
fn netns_a_listener_that_waits_for_its_interface_is_not_serving() {
    let lab = Lab::builder().receiver(Place::OtherInterface).build().unwrap();
    let daemon = Daemon::start(&lab.gateway, binary(), &DaemonConfig::for_lab(&lab, "tc_ebpf")).unwrap();
    wait_for(&lab, 200, "serving, usable downstreams: 1\n");
    lab.gateway.ip("link del eth0").unwrap();
    wait_for(&lab, 503, "not attached: interface not found: eth0");
    daemon.stop().unwrap();
}

#[test]
fn netns_a_listener_without_a_route_to_any_downstream_is_not_serving() {
    let lab = Lab::builder().receiver(Place::OtherInterface).build().unwrap();
    let mut config = DaemonConfig::for_lab(&lab, "tc_ebpf");
    config.listeners[0].downstreams = vec![("nowhere".into(), "10.99.0.1:514".parse().unwrap(), 1)];
    let daemon = Daemon::start(&lab.gateway, binary(), &config).unwrap();
    wait_for(&lab, 503, "no route to any downstream\n");
    lab.gateway.ip("route add 10.99.0.0/24 via 10.0.0.2").unwrap();
    wait_for(&lab, 200, "serving, usable downstreams: 1\n");
    daemon.stop().unwrap();
}

#[test]
fn netns_while_all_receivers_are_unhealthy_fail_open_decides() {
    for (fail_open, status, text) in [
        (true, 200, "serving, but all downstreams fail their health checks: still sending to all of them"),
        (false, 503, "all downstreams fail their health checks, and fail_open = false drops all datagrams\n"),
    ] {
        let lab = Lab::builder().receiver(Place::OtherInterface).build().unwrap();
        let mut config = DaemonConfig::for_lab(&lab, "userspace");
        config.listeners[0].downstreams = vec![("nowhere".into(), "10.99.0.1:514".parse().unwrap(), 1)];
        let health =
            format!("[health]\nenabled = true\ninterval_secs = 0.6\ntimeout_secs = 0.5\nfail_open = {fail_open}\n");
        let mut daemon = Daemon::spawn(&lab.gateway, binary(), &(config.to_toml() + &health)).unwrap();
        daemon.wait_for_line("health check failed").unwrap();
        wait_for(&lab, status, text);
        daemon.stop().unwrap();
    }
}
