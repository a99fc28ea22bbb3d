//! Datagrams that arrive on an L3 link (tun, WireGuard), without link-layer headers, and leave by links of either kind.

use std::net::SocketAddr;

use super::counters::{PacketCounts, check_counters, check_downstream_counters, start};
use super::packets::{device_to, routed_frame, widen_ingress};
use super::wire::{Wire, udp_errors};
use udp_fanout_lab::INGRESS;
use udp_fanout_lab::netns::End;
use udp_fanout_lab::tun::TunLink;
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, LabBuilder, Namespace, Place, Sender};
use udp_fanout_testkit::kernel::packet::Frame;

/// Behind Ethernet links, and on the gateway.
const PLACES: [Place; 4] = [Place::OtherInterface, Place::BehindRouter, Place::Pod, Place::GatewayHost];
/// Either family, on a gateway that forwards by itself and on one that does not.
const KINDS: [(bool, bool); 4] = [(false, false), (false, true), (true, false), (true, true)];

fn builder(ipv6: bool, ip_forward: bool) -> LabBuilder {
    Lab::builder().receivers(PLACES).ipv6(ipv6).ip_forward(ip_forward).l3_ingress(true)
}

/// One more receiver, behind another L3 link.
struct L3Receiver {
    _link: TunLink,
    namespace: Namespace,
    address: SocketAddr,
}

impl L3Receiver {
    const NAME: &str = "beyond";

    fn of(lab: &Lab) -> L3Receiver {
        let namespace = Namespace::create(Self::NAME).unwrap();
        let [near, far] = ["10.0.99.1/24 fd00:0:0:99::1/64", "10.0.99.2/24 fd00:0:0:99::2/64"];
        let gateway = End { namespace: &lab.gateway, device: "tun1", addresses: near };
        let link = TunLink::between(gateway, End { namespace: &namespace, device: "eth0", addresses: far }).unwrap();
        let ip = if lab.sender_address().is_ipv6() { "fd00:0:0:99::2" } else { "10.0.99.2" };
        let (default4, default6) = ("route add default dev eth0", "-6 route add default dev eth0");
        namespace.ip_batch(default4).and_then(|()| namespace.ip(default6)).unwrap();
        L3Receiver { _link: link, namespace, address: SocketAddr::new(ip.parse().unwrap(), 7_000) }
    }

    /// A daemon for all the lab's receivers and this one.
    fn start(&self, lab: &Lab, extra: &str) -> Daemon {
        let mut config = DaemonConfig::for_lab(lab, "tc_ebpf").extra(extra);
        config.listeners[0].downstreams.push((Self::NAME.to_owned(), self.address, 1));
        start(lab, &config)
    }

    fn collect(&self, lab: &Lab, expect: Expect) -> Collectors {
        let sites = lab.sites.iter().map(|site| (site.name.as_str(), lab.namespace_of(site), site.address));
        Collectors::start_at(sites.chain([(Self::NAME, &self.namespace, self.address)]), expect).unwrap()
    }
}

#[test]
fn netns_what_comes_without_a_frame_reaches_receivers_everywhere() {
    for (ipv6, ip_forward) in KINDS {
        let lab = builder(ipv6, ip_forward).build().unwrap();
        let l3_receiver = L3Receiver::of(&lab);
        let daemon = l3_receiver.start(&lab, "");
        let collectors = l3_receiver.collect(&lab, Expect::OneOfThem);
        let mut sender = Sender::in_lab(&lab).unwrap();
        sender.send(1_000, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_perfect(), "{report}");
        assert_eq!(report.counts(), [200; 5], "{report}");
        assert!(report.all_from(lab.sender_address()), "{report}");
        check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(1_000)), PacketCounts::NOTHING);
        check_downstream_counters(&daemon, &lab.gateway, &report);
    }
}

#[test]
fn netns_what_comes_without_a_frame_is_copied_to_everyone() {
    for (ipv6, ip_forward) in KINDS {
        let lab = builder(ipv6, ip_forward).build().unwrap();
        let l3_receiver = L3Receiver::of(&lab);
        let daemon = l3_receiver.start(&lab, "policy = \"replicate\"");
        // The first copies are reinjected, until the neighbours are known.
        lab.gateway.ip("neigh flush all").unwrap();
        let collectors = l3_receiver.collect(&lab, Expect::EachOfThem);
        let mut sender = Sender::in_lab(&lab).unwrap();
        sender.send(300, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_complete(), "ip_forward={ip_forward}: {report}");
        assert!(report.all_from(lab.sender_address()), "{report}");
        check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(300)), PacketCounts::NOTHING);
        check_downstream_counters(&daemon, &lab.gateway, &report);
    }
}

#[test]
fn netns_fragments_that_come_without_frames_follow_each_other() {
    for (ipv6, policy) in [(false, "round_robin"), (true, "round_robin"), (false, "replicate"), (true, "replicate")] {
        let lab = builder(ipv6, false).build().unwrap();
        let l3_receiver = L3Receiver::of(&lab);
        let daemon = l3_receiver.start(&lab, &format!("policy = \"{policy}\""));
        let expect = if policy == "replicate" { Expect::EachOfThem } else { Expect::OneOfThem };
        let collectors = l3_receiver.collect(&lab, expect);
        let mut sender = Sender::in_lab(&lab).unwrap().payload(5_000);
        sender.send(50, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_complete(), "{policy}: {report}");
        assert!(report.all_from(lab.sender_address()), "{report}");
        check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(50)), PacketCounts::NOTHING);
        let page = daemon.metrics(&lab.gateway).unwrap();
        let strays =
            page.sum("udp_fanout_fragments_stray_total", &[]) + page.sum("udp_fanout_fragments_lost_total", &[]);
        assert_eq!(strays, 0, "{policy}");
    }
}

#[test]
fn netns_super_packets_that_come_without_a_frame_count_as_what_they_hold() {
    for ipv6 in [false, true] {
        let lab = builder(ipv6, false).build().unwrap();
        let daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
        let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
        let mut sender = Sender::in_lab(&lab).unwrap().payload(200).segments(20).window(60);
        sender.send(800, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_complete(), "{report}");
        check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(800)), PacketCounts::NOTHING);
        check_downstream_counters(&daemon, &lab.gateway, &report);
    }
}

#[test]
fn netns_checksums_of_what_comes_without_a_frame_arrive_right() {
    for ipv6 in [false, true] {
        let lab = builder(ipv6, false).build().unwrap();
        let _daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
        // Computed by the last device, and by the sender.
        for offload in ["on", "off"] {
            lab.sender.ethtool(&format!("-K eth0 tx {offload}")).unwrap();
            for site in lab.sites.iter().filter(|site| matches!(site.place, Place::OtherInterface | Place::Pod)) {
                lab.gateway.ethtool(&format!("-K {} tx {offload}", device_to(site))).unwrap();
            }
            let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
            let mut sender = Sender::in_lab(&lab).unwrap().payload(101);
            sender.send(100, &collectors).unwrap();
            let report = collectors.finish(&[&sender]).unwrap();
            assert!(report.is_perfect(), "{report}");
            assert!(lab.sites.iter().all(|site| udp_errors(lab.namespace_of(site)) == 0));
        }
    }
}

#[test]
fn netns_what_comes_without_a_frame_leaves_as_a_router_would_have_sent_it() {
    for (ipv6, ip_forward) in KINDS {
        let places = [Place::OtherInterface, Place::Pod];
        let lab = Lab::builder().receivers(places).port(9_000).ipv6(ipv6).ip_forward(ip_forward).l3_ingress(true);
        let lab = lab.build().unwrap();
        let _daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
        let wire = Wire::open(&lab.sender, "eth0").unwrap();
        let taps = lab.sites.iter().map(|site| Wire::open(lab.namespace_of(site), "eth0").unwrap());
        let taps: Vec<Wire> = taps.collect();
        let source = SocketAddr::new(lab.sender_address(), 4_000).to_string();
        let sent = Frame::new(&source, &lab.listener().to_string(), b"by hand");
        for _ in 0..8 {
            wire.send(&sent.bytes()[14..]).unwrap();
        }
        for (tap, site) in taps.iter().zip(&lab.sites) {
            let expected = routed_frame(&sent, &lab, site);
            for frame in tap.udp_frames_to(9_000, 4).unwrap() {
                assert_eq!(frame, expected, "\n{frame:02x?}\n{expected:02x?}");
            }
        }
    }
}

/// What the program passes to the stack still begins with the IP header.
#[test]
fn netns_datagrams_exceeding_the_egress_mtu_go_through_the_socket_from_a_link_without_frames() {
    for ipv6 in [false, true] {
        let lab = builder(ipv6, false).build().unwrap();
        widen_ingress(&lab, 9_000);
        let daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
        let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
        let mut sender = Sender::in_lab(&lab).unwrap().payload(3_000);
        sender.send(40, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_complete(), "{report}");
        // All but the receiver on the gateway, to which no MTU applies, get theirs from the socket.
        let kernel = PacketCounts { received: 40, forwarded: 10, dropped: 0, passed: 30 };
        check_counters(&daemon, &lab.gateway, Some(kernel), PacketCounts::forwarded(30));
    }
}

#[test]
fn netns_a_groups_datagrams_go_round_that_come_without_frames() {
    for (group, policy) in
        [("239.1.1.1:9000", "round_robin"), ("[ff05::1:1]:9000", "round_robin"), ("239.1.1.1:9000", "replicate")]
    {
        let ipv6 = group.starts_with('[');
        let lab = builder(ipv6, false).build().unwrap();
        let mut config = DaemonConfig::for_lab(&lab, "tc_ebpf").extra(&format!("policy = \"{policy}\""));
        config.listeners[0].bind = group.to_owned();
        let daemon = start(&lab, &config);
        let expect = if policy == "replicate" { Expect::EachOfThem } else { Expect::OneOfThem };
        let collectors = Collectors::start(&lab, expect).unwrap();
        let mut sender =
            Sender::open(&lab.sender, (lab.sender_address(), 0), group.parse::<SocketAddr>().unwrap()).unwrap();
        sender.send(400, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_complete(), "{group} {policy}: {report}");
        assert!(report.all_from(lab.sender_address()), "{report}");
        check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(400)), PacketCounts::NOTHING);
    }
}

/// A packet that would be a datagram for the listener if its first bytes were an Ethernet header.
#[test]
fn netns_what_comes_without_a_frame_is_never_read_as_if_it_had_one() {
    for (ipv6, first) in [(false, 0x45), (true, 0x60)] {
        let lab = Lab::builder().receiver(Place::OtherInterface).port(9_000).ipv6(ipv6).l3_ingress(true);
        let lab = lab.build().unwrap();
        let daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
        let wire = Wire::open(&lab.sender, "eth0").unwrap();
        let tap = Wire::open(lab.namespace_of(&lab.sites[0]), "eth0").unwrap();
        let source = SocketAddr::new(lab.sender_address(), 4_000).to_string();
        let mut inside = Frame::new(&source, &lab.listener().to_string(), b"by hand");
        let datagram = inside.bytes();
        inside.destination_mac[0] = first;
        for _ in 0..50 {
            wire.send(&datagram[14..]).unwrap();
            wire.send(&inside.bytes()).unwrap();
        }
        wire.send(&datagram[14..]).unwrap();
        tap.udp_frames_to(9_000, 51).unwrap();
        check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(51)), PacketCounts::NOTHING);
    }
}

/// An Ethernet link with the name and the index of the L3 link, with addresses that make its frames begin like an IP
/// packet of either version: what the program knows of the index is out of date.
#[test]
fn netns_a_link_with_frames_may_take_the_place_of_one_without() {
    for (ipv6, first) in [(false, "46"), (true, "62")] {
        // None on the gateway, which gets its address later than the link.
        let places = [Place::OtherInterface, Place::Pod];
        let mut lab = Lab::builder().receivers(places).ipv6(ipv6).l3_ingress(true).build().unwrap();
        let mut daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
        let index = lab.gateway.link(INGRESS).unwrap().index;
        let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
        let mut sender = Sender::in_lab(&lab).unwrap();
        sender.send(100, &collectors).unwrap();

        lab.cut();
        daemon.wait_for_line("interface not found: eth0").unwrap();
        let mac = format!("{first}:00:00:00:00:01");
        let sender_side = format!("peer name eth0 netns {}", lab.sender.name());
        let cable = format!("link add {INGRESS} index {index} address {mac} type veth {sender_side}");
        lab.gateway.ip(&cable).unwrap();
        let (near, far) = if ipv6 { ("fd00::1/64", "fd00::2/64") } else { ("10.0.0.1/24", "10.0.0.2/24") };
        End { namespace: &lab.gateway, device: INGRESS, addresses: near }.bring_up().unwrap();
        End { namespace: &lab.sender, device: "eth0", addresses: far }.bring_up().unwrap();
        daemon.wait_for_line("attached TC eBPF program to ingress interface=\"eth0\"").unwrap();

        sender.send(100, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_perfect(), "{report}");
        check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(200)), PacketCounts::NOTHING);
    }
}
