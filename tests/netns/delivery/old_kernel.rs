//! The delivery path on kernels before 5.10, where the program cannot ask the kernel to resolve neighbours: it
//! addresses frames itself, and passes to the socket what it cannot address.

use std::collections::BTreeSet;

use super::counters::{PacketCounts, binary, check_counters, check_downstream_counters};
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Place, Sender, old_kernel};

/// A ready daemon that treats this kernel as an old one.
fn start(lab: &Lab, config: &DaemonConfig) -> Daemon {
    Daemon::start_behind(&lab.gateway, &old_kernel(), binary(), config).unwrap()
}

const PLACES: [Place; 5] = Place::ALL;

#[test]
fn netns_an_old_kernel_delivers_everywhere() {
    for (ipv6, ip_forward) in [(false, false), (false, true), (true, false), (true, true)] {
        let lab = Lab::builder().receivers(PLACES).ipv6(ipv6).ip_forward(ip_forward).build().unwrap();
        let daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
        let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
        let mut sender = Sender::in_lab(&lab).unwrap();
        sender.send(2_000, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_perfect(), "{ipv6} {ip_forward}: {report}");
        assert_eq!(report.counts(), [400; 5], "{report}");
        let sources: BTreeSet<_> = report.receivers.iter().flat_map(|receiver| receiver.sources.iter()).collect();
        assert_eq!(sources, BTreeSet::from([&sender.address().unwrap()]), "{report}");
        // The daemon has had all neighbours resolved before its program saw the first datagram.
        check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(2_000)), PacketCounts::NOTHING);
        check_downstream_counters(&daemon, &lab.gateway, &report);
    }
}

#[test]
fn netns_an_old_kernel_copies_to_everyone() {
    for ip_forward in [false, true] {
        let lab = Lab::builder().receivers(PLACES).ip_forward(ip_forward).build().unwrap();
        let daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf").extra("policy = \"replicate\""));
        let collectors = Collectors::start(&lab, Expect::EachOfThem).unwrap();
        let mut sender = Sender::in_lab(&lab).unwrap();
        sender.send(1_000, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_perfect(), "{ip_forward}: {report}");
        assert_eq!(report.counts(), [1_000; 5], "{report}");
        check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(1_000)), PacketCounts::NOTHING);
        check_downstream_counters(&daemon, &lab.gateway, &report);
    }
}

/// While neighbours are unknown, the socket forwards, so that the kernel resolves them.
#[test]
fn netns_an_old_kernel_loses_nothing_while_neighbours_are_resolved() {
    for ip_forward in [false, true] {
        let places = [Place::OtherInterface, Place::Pod, Place::BehindRouter, Place::SameInterface];
        let lab = Lab::builder().receivers(places).ip_forward(ip_forward).build().unwrap();
        for device in ["out1", "rtr3", "eth0"] {
            // Direct delivery over a link needs no known neighbour; a queue prevents it.
            lab.gateway.tc(&format!("qdisc add dev {device} root tbf rate 1gbit burst 1mb latency 1s")).unwrap();
        }
        let daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
        let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
        let mut sender = Sender::in_lab(&lab).unwrap();
        for _ in 0..20 {
            lab.gateway.ip("neigh flush all").unwrap();
            sender.burst(4 * 5, &collectors).unwrap();
            assert!(collectors.wait_for(sender.sent(), udp_fanout_lab::traffic::PATIENCE));
        }
        let sent = sender.sent();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_complete(), "{ip_forward}: {report}");
        let page = daemon.metrics(&lab.gateway).unwrap();
        let count = |what: &str, mode: &str| page.sum(&format!("udp_fanout_packets_{what}_total"), &[("mode", mode)]);
        let passed = count("passed", "tc_ebpf");
        // With ip_forward, the FIB lookup reports a missing neighbour; without, the daemon has to tell the program
        // first.
        assert!(passed > 0 || !ip_forward);
        let kernel = PacketCounts { received: sent, forwarded: sent - passed, dropped: 0, passed };
        check_counters(&daemon, &lab.gateway, Some(kernel), PacketCounts::forwarded(passed));
    }
}
