//! Direct delivery into pods, which bypasses the link, while nothing is attached to the link that has to see packets.

use std::ffi::CStr;
use std::time::{Duration, Instant};

use libbpf_rs::libbpf_sys;

use super::changes::sent_by;
use super::counters::{PacketCounts, check_counters, check_downstream_counters, start};
use super::filters::Other;
use udp_fanout_lab::INGRESS;
use udp_fanout_lab::netns::{End, connect};
use udp_fanout_lab::traffic::PATIENCE;
use udp_fanout_lab::{Collectors, DaemonConfig, Expect, Lab, Namespace, Place, Sender};

/// How long the daemon may take to notice changes without a kernel notification. Only a failing test waits that long.
const LIMIT: Duration = Duration::from_secs(30);

/// One pod, a daemon, and a flow of datagrams through it.
struct Flow<'a> {
    lab: &'a Lab,
    collectors: Collectors,
    sender: Sender,
}

impl<'a> Flow<'a> {
    fn new(lab: &'a Lab) -> Flow<'a> {
        let collectors = Collectors::start(lab, Expect::OneOfThem).unwrap();
        Flow { lab, collectors, sender: Sender::in_lab(lab).unwrap() }
    }

    /// Sends some datagrams. Returns how many of them went through the pod's link.
    fn through_the_link(&mut self) -> u64 {
        let before = sent_by(&self.lab.gateway, "pod1");
        self.sender.send(20, &self.collectors).unwrap();
        sent_by(&self.lab.gateway, "pod1") - before
    }

    /// Sends until datagrams bypass the link (`direct`), or go through it again.
    fn wait_for_direct(&mut self, direct: bool, why: &str) {
        let deadline = Instant::now() + LIMIT;
        // The kernel sends the pod a few packets of its own, such as ARP requests, which are counted too.
        while (self.through_the_link() < 20) != direct {
            assert!(Instant::now() < deadline, "not noticed: {why}");
        }
    }

    fn finish(self) -> u64 {
        let sent = self.sender.sent();
        let report = self.collectors.finish(&[&self.sender]).unwrap();
        assert!(report.is_complete(), "{report}");
        sent
    }
}

#[test]
fn netns_pods_are_entered_bypassing_their_links() {
    for (ipv6, ip_forward) in [(false, false), (false, true), (true, false), (true, true)] {
        let lab = Lab::builder().receivers([Place::Pod; 2]).ipv6(ipv6).ip_forward(ip_forward).build().unwrap();
        let daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
        let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
        let mut sender = Sender::in_lab(&lab).unwrap();
        // The pod's own firewall sees them nevertheless.
        let pod = lab.namespace_of(&lab.sites[0]);
        pod.tool("nft", "add table inet watch").unwrap();
        pod.tool("nft", "add chain inet watch in { type filter hook input priority 0 ; }").unwrap();
        pod.tool("nft", "add rule inet watch in udp dport 5514 counter").unwrap();
        let before = ["pod1", "pod2"].map(|device| sent_by(&lab.gateway, device));
        sender.send(2_000, &collectors).unwrap();
        let after = ["pod1", "pod2"].map(|device| sent_by(&lab.gateway, device));
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_perfect(), "{report}");
        assert_eq!(report.counts(), [1_000; 2]);
        for (before, after) in before.iter().zip(after) {
            assert!(after - before < 20, "{} packets went through a pod's link", after - before);
        }
        let seen = pod.tool("nft", "list table inet watch").unwrap();
        assert!(seen.contains("packets 1000 "), "{seen}");
        check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(2_000)), PacketCounts::NOTHING);
        check_downstream_counters(&daemon, &lab.gateway, &report);
    }
}

/// Attaches a hook to the pod's link and removes it again: while attached, it must see every packet.
fn check_link_hook(ip_forward: bool, put: &[&str], take: &[&str]) {
    let lab = Lab::builder().receiver(Place::Pod).ip_forward(ip_forward).build().unwrap();
    let daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
    let mut flow = Flow::new(&lab);
    flow.wait_for_direct(true, "no hook on the link");
    let run = |lines: &[&str]| {
        for line in lines {
            let (program, words) = line.split_once(' ').unwrap();
            lab.gateway.tool(program, words).unwrap();
        }
    };
    for _ in 0..2 {
        run(put);
        flow.wait_for_direct(false, put[0]);
        run(take);
        flow.wait_for_direct(true, take[0]);
    }
    let sent = flow.finish();
    check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(sent)), PacketCounts::NOTHING);
}

#[test]
fn netns_a_pod_whose_rate_is_limited_is_entered_through_its_link() {
    let limit = "tc qdisc add dev pod1 root tbf rate 1gbit burst 1mb latency 1s";
    check_link_hook(true, &[limit], &["tc qdisc del dev pod1 root"]);
}

#[test]
fn netns_a_filter_on_the_way_into_a_pod_sees_every_packet() {
    let filter = "tc filter add dev pod1 egress protocol all u32 match u32 0 0";
    check_link_hook(false, &["tc qdisc add dev pod1 clsact", filter], &["tc qdisc del dev pod1 clsact"]);
}

#[test]
fn netns_filters_that_several_links_share_count_as_each_ones() {
    let filter = "tc filter add block 22 protocol all u32 match u32 0 0";
    let shared = "tc qdisc add dev pod1 egress_block 22 clsact";
    check_link_hook(true, &[shared, filter], &["tc filter del block 22", "tc qdisc del dev pod1 clsact"]);
}

#[test]
fn netns_a_firewall_on_the_way_into_a_pod_sees_every_packet() {
    let chain = "nft add chain netdev guard out { type filter hook egress device pod1 priority 0 ; }";
    check_link_hook(false, &["nft add table netdev guard", chain], &["nft delete table netdev guard"]);
}

#[test]
fn netns_a_link_that_joins_a_bridge_is_not_bypassed() {
    check_link_hook(
        true,
        &["ip link add br9 type bridge", "ip link set br9 up", "ip link set pod1 master br9"],
        &["ip link set pod1 nomaster", "ip link del br9"],
    );
}

/// Attaches a TCX program that passes everything.
fn tcx(namespace: &Namespace, device: &str, name: &CStr) -> Other {
    let mut other = Other::load(name);
    other.attach_tcx(namespace, device, libbpf_sys::BPF_TCX_EGRESS);
    other
}

#[test]
fn netns_a_bpf_program_on_the_way_into_a_pod_sees_every_packet() {
    let lab = Lab::builder().receiver(Place::Pod).build().unwrap();
    let daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
    let mut flow = Flow::new(&lab);
    flow.wait_for_direct(true, "no hook on the link");
    let program = tcx(&lab.gateway, "pod1", c"pod_policy");
    flow.wait_for_direct(false, "a TCX program");
    drop(program);
    flow.wait_for_direct(true, "the TCX program is detached");
    let sent = flow.finish();
    check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(sent)), PacketCounts::NOTHING);
}

#[test]
fn netns_a_pod_replaced_under_its_address_gets_its_datagrams() {
    for ip_forward in [false, true] {
        let lab = Lab::builder().receivers([Place::Pod, Place::OtherInterface]).ip_forward(ip_forward).build().unwrap();
        let mut daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
        let updated = "updated tc_ebpf downstream set listener_id=0 endpoints=2";
        daemon.wait_for_logged(updated).unwrap();
        let mut sent = 0;
        for generation in 0..3 {
            let mut flow = Flow::new(&lab);
            flow.wait_for_direct(true, "the pod's link");
            sent += flow.finish();
            // As a network plugin does it: the new pod's link is there before the route moves, and the old one's goes
            // last.
            let successor = Namespace::create("successor").unwrap();
            let device = format!("next{generation}");
            connect(
                End { namespace: &lab.gateway, device: &device, addresses: "" },
                End { namespace: &successor, device: "eth0", addresses: "10.244.0.10/32" },
            )
            .unwrap();
            successor.ip("route add default dev eth0").unwrap();
            lab.gateway.ip(&format!("route replace 10.244.0.10/32 dev {device}")).unwrap();
            daemon.wait_for_line(updated).unwrap();

            let mut sender = Sender::in_lab(&lab).unwrap();
            let other = &lab.sites[1];
            let places =
                [("successor", &successor, lab.sites[0].address), ("other", lab.namespace_of(other), other.address)];
            let collectors = Collectors::start_at(places, Expect::OneOfThem).unwrap();
            sender.send(400, &collectors).unwrap();
            let before = sent_by(&lab.gateway, &device);
            sender.send(400, &collectors).unwrap();
            let through = sent_by(&lab.gateway, &device) - before;
            assert!(through < 20, "{through} of 200 went through the new pod's link");
            let report = collectors.finish(&[&sender]).unwrap();
            assert!(report.is_complete(), "{report}");
            assert_eq!(report.counts(), [400; 2]);
            sent += 800;
            lab.gateway.ip("route replace 10.244.0.10/32 dev pod1").unwrap();
            daemon.wait_for_line(updated).unwrap();
        }
        check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(sent)), PacketCounts::NOTHING);
    }
}

/// A receiver changes its link-layer address without an announcement. With `queued`, its link has a queue,
/// so that packets are not delivered directly.
fn change_silently(place: Place, ip_forward: bool, queued: bool) {
    let lab = Lab::builder().receiver(place).ip_forward(ip_forward).build().unwrap();
    let device = if place == Place::Pod { "pod1" } else { INGRESS };
    if queued {
        lab.gateway.tc(&format!("qdisc add dev {device} root tbf rate 1gbit burst 1mb latency 1s")).unwrap();
    }
    for (setting, value) in [("delay_first_probe_time", "1"), ("retrans_time_ms", "100")] {
        lab.gateway.sysctl(&format!("net.ipv4.neigh.{device}.{setting}"), value).unwrap();
    }
    let daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
    let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::in_lab(&lab).unwrap();
    sender.send(400, &collectors).unwrap();

    let inside = lab.namespace_of(&lab.sites[0]);
    let (address, before) = (lab.sites[0].address.ip(), inside.link("eth0").unwrap().mac);
    inside.ip("link set eth0 address 02:75:66:ff:ff:01").unwrap();
    // The kernel alone would take half a minute to reach this state.
    lab.gateway.ip(&format!("neigh change {address} dev {device} lladdr {before} nud stale")).unwrap();
    let arrived = || collectors.progress().now().1;
    let deadline = Instant::now() + LIMIT;
    let (mut lost, mut in_a_row) = (0, 0);
    // One or two may arrive through the kernel before the daemon learns the new address.
    while in_a_row < 10 {
        let before = arrived();
        sender.burst(1, &collectors).unwrap();
        if collectors.wait_for(before + 1, Duration::from_millis(100)) {
            in_a_row += 1;
        } else {
            (lost, in_a_row) = (lost + 1, 0);
        }
        assert!(Instant::now() < deadline, "the receiver's new address has not been found");
    }
    let so_far = arrived();
    for n in 1..=400 {
        sender.burst(1, &collectors).unwrap();
        assert!(collectors.wait_for(so_far + n, PATIENCE), "{n}");
    }
    let sent = sender.sent();
    let report = collectors.finish(&[&sender]).unwrap();
    assert_eq!((report.lost, report.duplicated, report.unexpected), (lost, 0, 0), "{report}");
    // Direct delivery does not depend on the link-layer address.
    assert!(lost == 0 || place != Place::Pod || queued, "{report}");
    check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(sent)), PacketCounts::NOTHING);
}

#[test]
fn netns_a_pod_whose_address_changes_silently_gets_its_datagrams() {
    change_silently(Place::Pod, false, false);
    change_silently(Place::Pod, true, false);
}

#[test]
fn netns_a_pod_behind_a_queue_whose_address_changes_silently_is_found() {
    change_silently(Place::Pod, true, true);
}

#[test]
fn netns_a_receiver_whose_address_changes_silently_is_found() {
    change_silently(Place::SameInterface, false, false);
    change_silently(Place::SameInterface, true, false);
}

#[test]
fn netns_a_receiver_behind_a_queue_whose_address_changes_silently_is_found() {
    change_silently(Place::SameInterface, false, true);
    change_silently(Place::SameInterface, true, true);
}
