//! `preserve_source`: what goes through the socket keeps its sender's address and port.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::books::{Books, audit, audit_downstreams, binary, start};
use super::packets::widen_ingress;
use super::wire::udp_errors;
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Place, Report, Sender};

fn config(lab: &Lab, mode: &str) -> DaemonConfig {
    DaemonConfig::for_lab(lab, mode).settings("workers = 2\npreserve_source = true\n")
}

/// Two senders, each with datagrams of this size, one by one and in pieces. Says what arrived, and from whom it came.
fn send(lab: &Lab, expect: Expect, payload: usize, count: u64) -> (Report, BTreeSet<SocketAddr>) {
    let collectors = Collectors::start(lab, expect).unwrap();
    let mut one = Sender::in_lab(lab).unwrap().payload(payload);
    let mut joined = Sender::in_lab(lab).unwrap().payload(payload);
    if payload <= 1_372 {
        joined = joined.segments(10);
    }
    one.send(count, &collectors).unwrap();
    joined.send(count, &collectors).unwrap();
    let report = collectors.finish(&[&one, &joined]).unwrap();
    (report, [one, joined].iter().map(|sender| sender.address().unwrap()).collect())
}

fn assert_from(report: &Report, senders: &BTreeSet<SocketAddr>) {
    assert!(report.is_complete(), "{senders:?}: {report}");
    for receiver in &report.receivers {
        assert_eq!(&receiver.sources, senders, "{report}");
    }
}

/// Datagrams of these sizes, so many from each sender, to receivers in these places, over both families.
fn see_senders(places: &[Place], runs: &[(usize, u64)]) {
    for ipv6 in [false, true] {
        let lab = Lab::builder().receivers(places.iter().copied()).ipv6(ipv6).build().unwrap();
        widen_ingress(&lab, 9_000);
        let daemon = start(&lab, &config(&lab, "userspace"));
        let mut sent = 0;
        for &(payload, count) in runs {
            let (report, senders) = send(&lab, Expect::OneOfThem, payload, count);
            assert_from(&report, &senders);
            let each = count * 2 / places.len() as u64;
            assert_eq!(report.counts(), vec![each; places.len()], "{payload} bytes: {report}");
            sent += count * 2;
        }
        for site in &lab.sites {
            assert_eq!(udp_errors(lab.namespace_of(site)), 0, "{}: a checksum is wrong", site.name);
        }
        audit(&daemon, &lab.gateway, None, Books::forwarded(sent));
        daemon.stop().unwrap();
    }
}

#[test]
fn netns_receivers_everywhere_see_who_sent_what_they_get() {
    see_senders(&Place::ALL, &[(20, 500), (100, 500), (1_372, 500)]);
}

#[test]
fn netns_receivers_see_who_sent_what_takes_several_packets() {
    let places = [Place::OtherInterface, Place::BehindRouter, Place::Pod, Place::GatewayHost];
    see_senders(&places, &[(1_473, 60), (8_001, 60), (60_000, 10)]);
}

#[test]
fn netns_copies_keep_their_senders_too() {
    for ipv6 in [false, true] {
        let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).ipv6(ipv6).build().unwrap();
        let daemon = start(&lab, &config(&lab, "userspace").extra("policy = \"replicate\""));
        let (report, senders) = send(&lab, Expect::EachOfThem, 100, 1_200);
        assert_from(&report, &senders);
        assert_eq!(report.counts(), [2_400; 2], "{report}");
        audit(&daemon, &lab.gateway, None, Books::forwarded(2_400));
        audit_downstreams(&daemon, &lab.gateway, &report);
        daemon.stop().unwrap();
    }
}

#[test]
fn netns_what_the_program_passes_to_the_socket_keeps_its_sender() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::BehindRouter]).build().unwrap();
    widen_ingress(&lab, 9_000);
    let daemon = start(&lab, &config(&lab, "tc_ebpf"));
    let (report, senders) = send(&lab, Expect::OneOfThem, 8_000, 50);
    assert_from(&report, &senders);
    let kernel = Books { received: 100, forwarded: 0, dropped: 0, passed: 100 };
    audit(&daemon, &lab.gateway, Some(kernel), Books::forwarded(100));
    daemon.stop().unwrap();
}

#[test]
fn netns_without_the_privilege_the_daemon_says_which() {
    let lab = Lab::builder().receiver(Place::OtherInterface).build().unwrap();
    let before = ["setpriv", "--inh-caps=-all", "--bounding-set=-net_raw"];
    let text = config(&lab, "userspace").to_toml();
    let mut daemon = Daemon::spawn_behind(&lab.gateway, &before, binary(), &text, &Default::default()).unwrap();
    let status = daemon.wait().unwrap();
    let log = daemon.log();
    assert!(!status.success(), "{log}");
    assert!(
        log.contains("settings.preserve_source needs CAP_NET_RAW, to send with the senders' addresses; grant it"),
        "{log}"
    );
}
