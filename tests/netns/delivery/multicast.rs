//! Listeners on multicast groups: each datagram of the group becomes a unicast one to a receiver, in both modes.

use std::net::{IpAddr, SocketAddr};

use super::counters::{PacketCounts, check_counters, check_downstream_counters, start};
use super::wire::Wire;
use udp_fanout_lab::INGRESS;
use udp_fanout_lab::{Collectors, DaemonConfig, Expect, Lab, Place, Sender};

const PLACES: [Place; 4] = [Place::OtherInterface, Place::BehindRouter, Place::Pod, Place::GatewayHost];
/// A group of each family, and a link-local one of IPv6.
const GROUPS: [&str; 3] = ["239.1.1.1:9000", "[ff05::1:1]:9000", "[ff02::1:1]:9000"];
const MODES: [&str; 2] = ["tc_ebpf", "userspace"];

fn lab(group: &str) -> Lab {
    Lab::builder().receivers(PLACES).ipv6(group.starts_with('[')).build().unwrap()
}

/// A daemon's configuration for a group, which is joined on the gateway's interface towards the sender.
fn config(lab: &Lab, group: &str, mode: &str) -> DaemonConfig {
    let mut config = DaemonConfig::for_lab(lab, mode);
    config.listeners[0].bind = group.to_owned();
    config.listeners[0].interface = Some(INGRESS.to_owned());
    config
}

/// A sender to the group. For a link-local group, it sends from its link-local address.
fn sender(lab: &Lab, group: &str) -> Sender {
    let mut group: SocketAddr = group.parse().unwrap();
    let link = lab.sender.link("eth0").unwrap().index;
    if let SocketAddr::V6(v6) = &mut group {
        v6.set_scope_id(link);
    }
    Sender::open(&lab.sender, (lab.sender_address(), 0), group).unwrap()
}

/// True if the gateway is a member of the group on its interface towards the sender.
fn is_member(lab: &Lab, group: &str) -> bool {
    let group = group.parse::<SocketAddr>().unwrap().ip().to_string();
    let text = lab.gateway.ip(&format!("maddress show dev {INGRESS}")).unwrap();
    text.split_whitespace().any(|word| word == group)
}

#[test]
fn netns_a_groups_datagrams_go_round() {
    for (group, mode) in GROUPS.iter().flat_map(|group| MODES.map(|mode| (*group, mode))) {
        let lab = lab(group);
        let mut daemon = start(&lab, &config(&lab, group, mode));
        assert!(is_member(&lab, group), "{group}");
        let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
        let mut sender = sender(&lab, group);
        sender.send(2_000, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_complete(), "{group} {mode}: {report}");
        assert_eq!(report.counts(), [500; 4], "{group} {mode}");
        let kernel = (mode == "tc_ebpf").then_some(PacketCounts::forwarded(2_000));
        let user = if kernel.is_some() { PacketCounts::NOTHING } else { PacketCounts::forwarded(2_000) };
        check_counters(&daemon, &lab.gateway, kernel, user);
        check_downstream_counters(&daemon, &lab.gateway, &report);
        if kernel.is_some() {
            assert!(report.all_from(lab.sender_address()), "{report}");
        }
        assert!(!daemon.log().contains("no interface of this host has"), "{}", daemon.log());
        daemon.stop().unwrap();
        assert!(!is_member(&lab, group), "{group}");
    }
}

#[test]
fn netns_a_groups_datagrams_are_copied_to_everyone() {
    for (group, ip_forward) in [(GROUPS[0], false), (GROUPS[0], true), (GROUPS[1], false)] {
        let ipv6 = group.starts_with('[');
        let lab = Lab::builder().receivers(PLACES).ipv6(ipv6).ip_forward(ip_forward).build().unwrap();
        for mode in MODES {
            let daemon = start(&lab, &config(&lab, group, mode).extra("policy = \"replicate\""));
            let collectors = Collectors::start(&lab, Expect::EachOfThem).unwrap();
            let mut sender = sender(&lab, group);
            sender.send(500, &collectors).unwrap();
            let report = collectors.finish(&[&sender]).unwrap();
            assert!(report.is_complete(), "{group} {mode} ip_forward={ip_forward}: {report}");
            daemon.stop().unwrap();
        }
    }
}

/// The TTL of multicast limits how far it reaches, by default to the link. A receiver may be further away.
#[test]
fn netns_what_was_meant_for_the_link_has_the_life_of_a_new_datagram() {
    for group in &GROUPS[..2] {
        let lab = Lab::builder().receiver(Place::BehindRouter).ipv6(group.starts_with('[')).build().unwrap();
        let daemon = start(&lab, &config(&lab, group, "tc_ebpf"));
        let tap = Wire::open(lab.namespace_of(&lab.sites[0]), "eth0").unwrap();
        let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
        // The kernel's default for groups is 1.
        let mut sender = sender(&lab, group);
        sender.send(10, &collectors).unwrap();
        assert!(collectors.finish(&[&sender]).unwrap().is_complete());
        for frame in tap.udp_frames_to(lab.sites[0].address.port(), 10).unwrap() {
            // One router lies between.
            let ttl = if group.starts_with('[') { frame[21] } else { frame[22] };
            assert_eq!(ttl, 63);
        }
        check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(10)), PacketCounts::NOTHING);
    }
}

#[test]
fn netns_other_groups_and_other_interfaces_are_left_alone() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap();
    // On a second link, where the same group must not be served.
    let inside = lab.namespace_of(&lab.sites[0]);
    for mode in MODES {
        let daemon = start(&lab, &config(&lab, GROUPS[0], mode));
        let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
        let group: SocketAddr = GROUPS[0].parse().unwrap();
        let source: IpAddr = "10.0.10.2".parse().unwrap();
        let mut elsewhere = Sender::open(inside, (source, 0), group).unwrap();
        elsewhere.burst(20, &collectors).unwrap();
        for other in ["239.1.1.2:9000", "239.1.1.1:9001"] {
            let mut sender = Sender::open(&lab.sender, (Lab::SENDER, 0), other.parse().unwrap()).unwrap();
            sender.burst(20, &collectors).unwrap();
        }
        let mut right = Sender::open(&lab.sender, (Lab::SENDER, 0), group).unwrap();
        right.burst(20, &collectors).unwrap();
        assert!(collectors.wait_for(20, std::time::Duration::from_secs(10)));
        let report = collectors.finish(&[&right]).unwrap();
        assert_eq!((report.unexpected, report.counts()), (0, vec![10, 10]), "{mode}: {report}");
        daemon.stop().unwrap();
    }
}

#[test]
fn netns_the_group_is_joined_again_on_an_interface_that_comes_back() {
    let lab = Lab::builder().receivers([Place::OtherInterface]).build().unwrap();
    for mode in MODES {
        let mut daemon = start(&lab, &config(&lab, GROUPS[0], mode));
        lab.gateway.ip(&format!("link delete {INGRESS}")).unwrap();
        daemon.wait_for_line("serving it when it appears").unwrap();
        let mac = "02:75:66:ff:ff:01";
        lab.gateway
            .ip(&format!("link add {INGRESS} address {mac} type veth peer name eth0 netns {}", lab.sender.name()))
            .unwrap();
        lab.gateway.ip_batch(&format!("address add 10.0.0.1/24 dev {INGRESS}\nlink set {INGRESS} up\n")).unwrap();
        lab.sender
            .ip_batch("address add 10.0.0.2/24 dev eth0\nlink set eth0 up\nroute add default via 10.0.0.1\n")
            .unwrap();
        daemon.wait_for_line("joined multicast group").unwrap();
        if mode == "tc_ebpf" {
            daemon.wait_for_logged("attached TC eBPF program to ingress").unwrap();
        }
        assert!(is_member(&lab, GROUPS[0]));
        let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
        let mut sender = sender(&lab, GROUPS[0]);
        sender.send(100, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_complete(), "{mode}: {report}");
        daemon.stop().unwrap();
    }
}
