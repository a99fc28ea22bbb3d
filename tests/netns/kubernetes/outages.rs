//! The API server is unavailable: known endpoints stay in use, and a daemon that starts meanwhile logs what it waits
//! for.

use super::kubernetes_lab::{KubernetesLab, NAMESPACE, SERVICE, shares};
use udp_fanout_lab::{Collectors, Expect, Place};

fn outage(mode: &'static str) {
    let k8s = KubernetesLab::new(mode, [Place::OtherInterface, Place::Pod, Place::BehindRouter]);
    k8s.apply("a", k8s.ready(&[0, 1]));
    let mut daemon = k8s.start(&k8s.config(&KubernetesLab::by_number()), 2);
    let page = k8s.wait_for_metrics("a watch", |page| KubernetesLab::synced(page, SERVICE) == 1);
    let labels = [("namespace", NAMESPACE), ("service", SERVICE)];
    assert!(page.has("udp_fanout_discovery_last_event_age_seconds", &labels));
    assert_eq!(page.sum("udp_fanout_discovery_errors_total", &labels), 0);
    assert_eq!(page.select("udp_fanout_discovery_errors_total", &labels).count(), 11, "each kind, even at zero");

    let collectors = Collectors::start(&k8s.lab, Expect::OneOfThem).unwrap();
    let during = k8s.while_flowing(&collectors, || {
        k8s.server.stop();
        daemon.wait_for_line("cannot follow the endpoints of logging/receivers").unwrap();
    });
    let page = k8s.metrics();
    assert_eq!(KubernetesLab::synced(&page, SERVICE), 0);
    let connect = [("namespace", NAMESPACE), ("service", SERVICE), ("kind", "connect")];
    assert!(page.sum("udp_fanout_discovery_errors_total", &connect) >= 1);
    assert_eq!(k8s.readyz(), 200, "known endpoints stay in use");
    let meanwhile = k8s.rounds(&collectors);

    // The server comes back, and the daemon finds what has changed.
    k8s.apply("a", k8s.ready(&[2]));
    let back = k8s.while_flowing(&collectors, || {
        k8s.server.restart();
        daemon.wait_for_line("endpoints of logging/receivers are being followed again").unwrap();
        daemon.wait_for_logged(&k8s.updated(1)).unwrap();
    });
    let after = k8s.rounds(&collectors);
    let page = k8s.metrics();
    assert_eq!(KubernetesLab::synced(&page, SERVICE), 1);
    assert!(page.sum("udp_fanout_discovery_watch_restarts_total", &labels) >= 1);

    let report = collectors.finish(&[&during, &meanwhile, &back, &after]).unwrap();
    assert!(report.is_complete(), "{report}\n{}", daemon.log());
    assert_eq!(report.counts_of(meanwhile.run_id()), shares(3, &[0, 1]), "{report}");
    assert_eq!(report.counts_of(after.run_id()), shares(3, &[2]), "{report}");
    daemon.stop().unwrap();
}

#[test]
fn netns_the_kernels_endpoints_outlast_the_api_server() {
    outage("tc_ebpf");
}

#[test]
fn netns_the_sockets_endpoints_outlast_the_api_server() {
    outage("userspace");
}

#[test]
fn netns_a_start_without_the_api_server_waits_and_says_for_what() {
    for mode in ["tc_ebpf", "userspace"] {
        let k8s = KubernetesLab::new(mode, [Place::OtherInterface, Place::Pod]);
        k8s.apply("a", k8s.ready(&[0, 1]));
        k8s.server.stop();
        let config = k8s.config(&KubernetesLab::by_number());
        let mut daemon = k8s.spawn(&config);
        let line = daemon.wait_for_line("cannot follow the endpoints of logging/receivers").unwrap();
        assert!(line.contains("WARN") && line.contains("Connection refused"), "{line}");
        assert!(line.ends_with("none are known yet; retrying"), "{line}");
        daemon.wait_for_logged("serving metrics").unwrap();
        assert_eq!(k8s.readyz(), 503);
        let body = udp_fanout_lab::scrape::get(&k8s.lab.gateway, "127.0.0.1:9090".parse().unwrap(), "/readyz").unwrap();
        assert!(body.body.contains("listener lab: waiting for its first downstream set"), "{}", body.body);
        let filters = k8s.lab.gateway.tc("filter show dev eth0 ingress").unwrap();
        assert!(!filters.contains("udp_fanout"), "nothing is taken from the host's sockets yet: {filters}");

        k8s.server.restart();
        daemon.wait_until_ready(&k8s.lab.gateway, 1).unwrap();
        daemon.wait_for_logged(&k8s.updated(2)).unwrap();
        let collectors = Collectors::start(&k8s.lab, Expect::OneOfThem).unwrap();
        let sender = k8s.rounds(&collectors);
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_complete(), "{mode}: {report}");
        assert_eq!(report.counts(), shares(2, &[0, 1]), "{mode}: {report}");
        daemon.stop().unwrap();
    }
}
