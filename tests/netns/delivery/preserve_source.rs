//! `preserve_source`: datagrams that the socket forwards keep their sender's address and port.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::counters::{PacketCounts, binary, check_counters, check_downstream_counters, start};
use super::packets::widen_ingress;
use super::wire::udp_errors;
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Place, Report, Sender};

fn config(lab: &Lab, mode: &str) -> DaemonConfig {
    DaemonConfig::for_lab(lab, mode).settings("workers = 2\npreserve_source = true\n")
}

/// Sends datagrams of this size from two senders, single and as super-packets. Returns what arrived, and the senders.
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

/// Runs (payload size, datagrams from each sender) to receivers in these places, over both families.
fn check_sources(places: &[Place], runs: &[(usize, u64)]) {
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
        check_counters(&daemon, &lab.gateway, None, PacketCounts::forwarded(sent));
        daemon.stop().unwrap();
    }
}

#[test]
fn netns_receivers_everywhere_see_who_sent_what_they_get() {
    check_sources(&Place::ALL, &[(20, 500), (100, 500), (1_372, 500)]);
}

#[test]
fn netns_receivers_see_who_sent_what_takes_several_packets() {
    let places = [Place::OtherInterface, Place::BehindRouter, Place::Pod, Place::GatewayHost];
    check_sources(&places, &[(1_473, 60), (8_001, 60), (60_000, 10)]);
}

#[test]
fn netns_copies_keep_their_senders_too() {
    for ipv6 in [false, true] {
        let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).ipv6(ipv6).build().unwrap();
        let daemon = start(&lab, &config(&lab, "userspace").extra("policy = \"replicate\""));
        let (report, senders) = send(&lab, Expect::EachOfThem, 100, 1_200);
        assert_from(&report, &senders);
        assert_eq!(report.counts(), [2_400; 2], "{report}");
        check_counters(&daemon, &lab.gateway, None, PacketCounts::forwarded(2_400));
        check_downstream_counters(&daemon, &lab.gateway, &report);
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
    let kernel = PacketCounts { received: 100, forwarded: 0, dropped: 0, passed: 100 };
    check_counters(&daemon, &lab.gateway, Some(kernel), PacketCounts::forwarded(100));
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
