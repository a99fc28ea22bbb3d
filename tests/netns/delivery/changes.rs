//! Neighbours, interfaces, addresses and routes that change while the daemon runs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::counters::{PacketCounts, check_counters, start};
use udp_fanout_lab::INGRESS;
use udp_fanout_lab::netns::{End, connect};
use udp_fanout_lab::{Collectors, DaemonConfig, Expect, Lab, Namespace, Place, Sender, scrape};

#[test]
fn netns_nothing_is_lost_while_neighbours_are_resolved() {
    for (ipv6, ip_forward) in [(false, false), (false, true), (true, false), (true, true)] {
        let places = [Place::OtherInterface, Place::Pod, Place::BehindRouter, Place::SameInterface];
        let lab = Lab::builder().receivers(places).ipv6(ipv6).ip_forward(ip_forward).build().unwrap();
        for mode in ["tc_ebpf", "userspace"] {
            let daemon = start(&lab, &DaemonConfig::for_lab(&lab, mode));
            let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
            let mut sender = Sender::in_lab(&lab).unwrap();
            for _ in 0..2 {
                lab.gateway.ip("neigh flush all").unwrap();
                // Fewer for each neighbour than the kernel queues while it resolves it: unres_qlen_bytes, at least 64
                // KiB.
                sender.burst(4 * 25, &collectors).unwrap();
                assert!(collectors.wait_for(sender.sent(), udp_fanout_lab::traffic::PATIENCE));
            }
            let report = collectors.finish(&[&sender]).unwrap();
            assert!(report.is_complete(), "{mode}: {report}");
            assert_eq!(report.counts(), [50; 4], "{mode}: {report}");
            match mode {
                "tc_ebpf" => {
                    check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(200)), PacketCounts::NOTHING)
                }
                _ => check_counters(&daemon, &lab.gateway, None, PacketCounts::forwarded(200)),
            }
            daemon.stop().unwrap();
        }
    }
}

/// The HTTP status of the readiness probe.
fn ready(lab: &Lab) -> u16 {
    scrape::get(&lab.gateway, "127.0.0.1:9090".parse().unwrap(), "/readyz").unwrap().status
}

#[test]
fn netns_an_interface_that_comes_back_is_served_again() {
    // Also with TCX, where the kernel has it.
    for (bind, attach) in [("10.0.0.1:5514", "clsact"), ("0.0.0.0:5514", "clsact"), ("10.0.0.1:5514", "auto")] {
        let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap();
        let mut config = DaemonConfig::for_lab(&lab, "tc_ebpf");
        config.listeners[0].bind = bind.into();
        config.head = format!("attach = \"{attach}\"");
        let mut daemon = start(&lab, &config);
        let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
        let mut sender = Sender::in_lab(&lab).unwrap();
        sender.send(400, &collectors).unwrap();

        lab.gateway.ip(&format!("link del {INGRESS}")).unwrap();
        daemon.wait_for_line("interface not found: eth0").unwrap();
        assert_eq!(ready(&lab), 503);
        connect(
            End { namespace: &lab.gateway, device: INGRESS, addresses: "10.0.0.1/24" },
            End { namespace: &lab.sender, device: "eth0", addresses: "10.0.0.2/24" },
        )
        .unwrap();
        lab.sender.ip("route add default via 10.0.0.1").unwrap();
        daemon.wait_for_line("attached TC eBPF program to ingress interface=\"eth0\"").unwrap();
        assert_eq!(ready(&lab), 200);

        sender.send(400, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_perfect(), "{report}");
        assert_eq!(report.counts(), [400; 2]);
        check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(800)), PacketCounts::NOTHING);
        let (status, _, log) = daemon.stop().unwrap();
        assert!(status.success(), "{log}");
    }
}

#[test]
fn netns_a_pod_that_comes_back_gets_its_share_again() {
    let lab = Lab::builder().receivers([Place::Pod, Place::OtherInterface]).build().unwrap();
    let mut daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
    let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::in_lab(&lab).unwrap();
    sender.send(100, &collectors).unwrap();

    lab.gateway.ip("link del pod1").unwrap();
    daemon.wait_for_line("no route to downstream 10.244.0.10:5514").unwrap();
    daemon.wait_for_line("updated tc_ebpf downstream set listener_id=0 endpoints=2").unwrap();
    // Its datagrams are dropped, and no others.
    let mut meanwhile = Sender::in_lab(&lab).unwrap();
    meanwhile.burst(10, &collectors).unwrap();
    assert!(collectors.wait_for(105, udp_fanout_lab::traffic::PATIENCE));
    let line = daemon.wait_for_line("WARN FIB lookup failed, a datagram was dropped").unwrap();
    let source = meanwhile.address().unwrap();
    let who = format!("listener=\"lab\" source={source} destination=10.0.0.1:5514 downstream=10.244.0.10:5514 reason=");
    assert!(line.contains(&who) && line.contains("no_route"), "{line}");

    let pod = lab.namespace_of(&lab.sites[0]);
    connect(
        End { namespace: &lab.gateway, device: "pod1", addresses: "" },
        End { namespace: pod, device: "eth0", addresses: "10.244.0.10/32" },
    )
    .unwrap();
    pod.ip("route add default dev eth0").unwrap();
    lab.gateway.ip("route add 10.244.0.10/32 dev pod1").unwrap();
    daemon.wait_for_line("updated tc_ebpf downstream set listener_id=0 endpoints=2").unwrap();
    sender.send(100, &collectors).unwrap();

    let report = collectors.finish(&[&sender, &meanwhile]).unwrap();
    assert_eq!((report.lost, report.duplicated, report.unexpected), (5, 0, 0), "{report}");
    assert_eq!(report.counts(), [100, 105], "{report}");
    let kernel = PacketCounts { received: 210, forwarded: 205, dropped: 5, passed: 0 };
    check_counters(&daemon, &lab.gateway, Some(kernel), PacketCounts::NOTHING);
    let page = daemon.metrics(&lab.gateway).unwrap();
    assert_eq!(page.sum("udp_fanout_packets_dropped_total", &[("mode", "tc_ebpf"), ("reason", "no_route")]), 5);
}

#[test]
fn netns_an_address_that_is_added_is_the_listeners_too() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap();
    let mut config = DaemonConfig::for_lab(&lab, "tc_ebpf");
    config.listeners[0].bind = "0.0.0.0:5514".into();
    let daemon = start(&lab, &config);
    lab.gateway.ip(&format!("address add 10.0.0.77/24 dev {INGRESS}")).unwrap();
    let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::open(&lab.sender, (lab.sender_address(), 0), "10.0.0.77:5514".parse().unwrap()).unwrap();
    // The socket serves the address at once, the kernel program once netlink has notified the daemon.
    let by_kernel = || {
        let labels = [("mode", "tc_ebpf")];
        daemon.metrics(&lab.gateway).unwrap().sum("udp_fanout_packets_forwarded_total", &labels)
    };
    while by_kernel() == 0 {
        sender.send(1, &collectors).unwrap();
    }
    let by_socket = sender.sent() - by_kernel();
    sender.send(400, &collectors).unwrap();
    let by_kernel = sender.sent() - by_socket;
    let report = collectors.finish(&[&sender]).unwrap();
    assert!(report.is_complete(), "{report}");
    check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(by_kernel)), PacketCounts::forwarded(by_socket));
}

/// Packets that a device has sent.
pub fn sent_by(namespace: &Namespace, device: &str) -> u64 {
    let text = namespace.tool("cat", "/proc/thread-self/net/dev").unwrap();
    let line = text.lines().find_map(|line| line.trim().strip_prefix(&format!("{device}:"))).unwrap();
    line.split_whitespace().nth(9).unwrap().parse().unwrap()
}

#[test]
fn netns_datagrams_follow_a_route_that_moves() {
    for ip_forward in [false, true] {
        // Two links to one receiver, which has the same address behind each.
        let lab = Lab::builder().receiver(Place::OtherInterface).ip_forward(ip_forward).build().unwrap();
        let receiver = lab.namespace_of(&lab.sites[0]);
        connect(
            End { namespace: &lab.gateway, device: "out2", addresses: "10.0.11.1/24" },
            End { namespace: receiver, device: "eth1", addresses: "10.0.11.2/24" },
        )
        .unwrap();
        receiver.ip("address add 10.99.0.1/32 dev lo").unwrap();
        for device in ["all", "eth0", "eth1"] {
            receiver.sysctl(&format!("net.ipv4.conf.{device}.rp_filter"), "2").unwrap();
        }
        for device in ["out1", "out2"] {
            // With a queue, packets do not bypass the link, so the link counts them.
            lab.gateway.tc(&format!("qdisc add dev {device} root tbf rate 1gbit burst 1mb latency 1s")).unwrap();
        }
        let routes =
            ["10.0.10.2 dev out1", "10.0.11.2 dev out2"].map(|via| format!("route replace 10.99.0.1/32 via {via}"));
        lab.gateway.ip(&routes[0]).unwrap();

        let mut config = DaemonConfig::for_lab(&lab, "tc_ebpf");
        let address = "10.99.0.1:5514".parse().unwrap();
        config.listeners[0].downstreams = vec![("roaming".into(), address, 1)];
        let mut daemon = start(&lab, &config);
        let updated = "updated tc_ebpf downstream set listener_id=0 endpoints=1";
        daemon.wait_for_logged(updated).unwrap();
        let collectors = Collectors::start_at([("roaming", receiver, address)], Expect::OneOfThem).unwrap();
        let mut sender = Sender::in_lab(&lab).unwrap();
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let flow = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    sender.send(100, &collectors).unwrap();
                }
            });
            for n in 1..=6 {
                lab.gateway.ip(&routes[n % 2]).unwrap();
                // Logged once the new next hop is in force.
                daemon.wait_for_line(updated).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
            flow.join().unwrap();
        });
        let before = ["out1", "out2"].map(|device| sent_by(&lab.gateway, device));
        sender.send(1_000, &collectors).unwrap();
        let after = ["out1", "out2"].map(|device| sent_by(&lab.gateway, device));
        assert!(after[0] - before[0] >= 1_000 && after[1] - before[1] < 100, "{before:?} {after:?}");
        let sent = sender.sent();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_complete(), "{report}");
        check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(sent)), PacketCounts::NOTHING);
    }
}
