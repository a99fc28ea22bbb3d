//! Several listeners and interfaces, and addresses and interfaces that the daemon detects.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::thread;

use super::counters::{PacketCounts, check_counters, check_listener_counters, filters, start};
use super::packets::widen_ingress;
use udp_fanout_lab::INGRESS;
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Namespace, Place, Sender};

/// True if our filter is on the device's ingress.
fn attached(namespace: &Namespace, device: &str) -> bool {
    filters(namespace, device).iter().any(|line| line.contains("udp_fanout"))
}

#[test]
fn netns_two_listeners_keep_to_their_own_receivers() {
    let lab = Lab::builder().receivers([Place::Pod, Place::Pod, Place::OtherInterface]).build().unwrap();
    for mode in ["tc_ebpf", "userspace"] {
        let mut config = DaemonConfig::for_lab(&lab, mode);
        let mut second = config.listeners[0].clone();
        (second.name, second.bind) = ("second".into(), "10.0.0.1:9125".into());
        second.downstreams = config.listeners[0].downstreams.split_off(2);
        config.listeners.push(second);
        let daemon = start(&lab, &config);
        let collect = |sites: &[usize]| {
            let places = sites.iter().map(|&n| &lab.sites[n]);
            let places = places.map(|site| (site.name.as_str(), lab.namespace_of(site), site.address));
            Collectors::start_at(places, Expect::OneOfThem).unwrap()
        };
        let (first, second) = (collect(&[0, 1]), collect(&[2]));
        let target = "10.0.0.1:9125".parse().unwrap();
        let mut to_second = Sender::open(&lab.sender, (Lab::SENDER, 0), target).unwrap();
        let mut to_first = Sender::in_lab(&lab).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| to_first.send(2_000, &first).unwrap());
            scope.spawn(|| to_second.send(1_000, &second).unwrap());
        });
        let first = first.finish(&[&to_first]).unwrap();
        let second = second.finish(&[&to_second]).unwrap();
        assert!(first.is_complete() && second.is_complete(), "{mode}: {first}{second}");
        // Each sender stays on its CPU, and each CPU has its own round robin.
        assert_eq!((first.counts(), second.counts()), (vec![1_000; 2], vec![1_000]), "{mode}: {first}{second}");
        for (listener, count) in [(("lab", 0), 2_000), (("second", 1), 1_000)] {
            let forwarded = PacketCounts::forwarded(count);
            match mode {
                "tc_ebpf" => {
                    check_listener_counters(&daemon, &lab.gateway, listener, Some(forwarded), PacketCounts::NOTHING)
                }
                _ => check_listener_counters(&daemon, &lab.gateway, listener, None, forwarded),
            }
        }
        daemon.stop().unwrap();
    }
}

/// A daemon that listens on every address, on interfaces given as a line of TOML, with all receivers but the first.
fn start_wide(lab: &Lab, interface: &str) -> Daemon {
    let mut config = DaemonConfig::for_lab(lab, "tc_ebpf");
    let listener = &mut config.listeners[0];
    (listener.bind, listener.interface, listener.extra) = ("0.0.0.0:5514".into(), None, interface.to_owned());
    listener.downstreams.remove(0);
    start(lab, &config)
}

#[test]
fn netns_datagrams_come_in_through_several_interfaces() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod, Place::Pod]).build().unwrap();
    let daemon = start_wide(&lab, "interface = [\"eth0\", \"out1\"]");
    assert!(attached(&lab.gateway, "eth0") && attached(&lab.gateway, "out1") && !attached(&lab.gateway, "pod2"));
    let places = lab.sites[1..].iter().map(|site| (site.name.as_str(), lab.namespace_of(site), site.address));
    let collectors = Collectors::start_at(places, Expect::OneOfThem).unwrap();
    // The host's own address counts on every ingress interface.
    let mut senders = [
        (&lab.sender, "10.0.0.2", "10.0.0.1:5514"),
        (&lab.sender, "10.0.0.2", "10.0.10.1:5514"),
        (lab.namespace_of(&lab.sites[0]), "10.0.10.2", "10.0.10.1:5514"),
    ]
    .map(|(namespace, source, target)| {
        let source: IpAddr = source.parse().unwrap();
        Sender::open(namespace, (source, 0), target.parse().unwrap()).unwrap()
    });
    for sender in &mut senders {
        sender.send(500, &collectors).unwrap();
    }
    let sent_from: BTreeSet<SocketAddr> = senders.iter().map(|sender| sender.address().unwrap()).collect();
    let report = collectors.finish(&senders.each_ref()).unwrap();
    assert!(report.is_perfect(), "{report}");
    assert_eq!(report.counts(), [750; 2], "{report}");
    assert!(report.receivers.iter().all(|receiver| receiver.sources == sent_from), "{report}");
    check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(1_500)), PacketCounts::NOTHING);
    daemon.stop().unwrap();
    assert!(!attached(&lab.gateway, "eth0") && !attached(&lab.gateway, "out1"));
}

#[test]
fn netns_the_interfaces_of_default_routes_are_found_and_followed() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap();
    lab.gateway.ip("route add default via 10.0.0.2").unwrap();
    let mut daemon = start_wide(&lab, "interface = \"auto\"");
    daemon.wait_for_logged("attached TC eBPF program to ingress interface=\"eth0\"").unwrap();
    assert!(!attached(&lab.gateway, "out1"));
    let pod = [&lab.sites[1]].map(|site| (site.name.as_str(), lab.namespace_of(site), site.address));
    let collectors = Collectors::start_at(pod, Expect::OneOfThem).unwrap();
    let mut sender = Sender::in_lab(&lab).unwrap();
    sender.send(100, &collectors).unwrap();

    lab.gateway.ip("route replace default via 10.0.10.2").unwrap();
    daemon.wait_for_line("attached TC eBPF program to ingress interface=\"out1\"").unwrap();
    assert!(!attached(&lab.gateway, "eth0"));
    let other: IpAddr = "10.0.10.2".parse().unwrap();
    let target = "10.0.10.1:5514".parse().unwrap();
    let mut second = Sender::open(lab.namespace_of(&lab.sites[0]), (other, 0), target).unwrap();
    second.send(100, &collectors).unwrap();
    // The socket forwards what arrives on other interfaces.
    sender.send(50, &collectors).unwrap();
    let report = collectors.finish(&[&sender, &second]).unwrap();
    assert!(report.is_perfect(), "{report}");
    check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(200)), PacketCounts::forwarded(50));
}

/// Announces an address as a cluster's load balancer does: it answers ARP, but no interface has the address.
fn announce(lab: &Lab, vip: &str) {
    let mac = lab.gateway.link(INGRESS).unwrap().mac;
    lab.sender.ip(&format!("neigh add {vip} lladdr {mac} dev eth0 nud permanent")).unwrap();
}

#[test]
fn netns_an_address_that_no_interface_has_is_served_all_the_same() {
    for (ipv6, vip) in [(false, "10.0.0.200"), (true, "fd00:0:0:0::200")] {
        // As on a Kubernetes node, which forwards: what the program does not take would go back to the router.
        let lab = Lab::builder()
            .receivers([Place::Pod, Place::OtherInterface, Place::GatewayHost])
            .ip_forward(true)
            .ipv6(ipv6)
            .build()
            .unwrap();
        announce(&lab, vip);
        let target = SocketAddr::new(vip.parse().unwrap(), 5514);
        let mut config = DaemonConfig::for_lab(&lab, "tc_ebpf");
        config.listeners[0].bind = target.to_string();
        let mut daemon = start(&lab, &config);
        daemon.wait_for_logged(&format!("no interface of this host has {}", target.ip())).unwrap();
        let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
        let mut sender = Sender::open(&lab.sender, (lab.sender_address(), 0), target).unwrap();
        sender.send(3_000, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_perfect(), "{report}");
        assert_eq!(report.counts(), [1_000; 3]);
        check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(3_000)), PacketCounts::NOTHING);
        let (status, _, log) = daemon.stop().unwrap();
        assert!(status.success(), "{log}");
    }
}

/// The second listener of `k8s/example-metallb.yaml`: what kube-proxy translates from the load balancer's address to
/// the node's own, because the kernel program did not take it, arrives at a socket.
#[test]
fn netns_what_kube_proxy_translates_reaches_a_listener_on_the_nodes_own_addresses() {
    let lab = Lab::builder().receivers([Place::Pod, Place::OtherInterface]).ip_forward(true).build().unwrap();
    announce(&lab, "10.0.0.200");
    let rules = "table ip proxy {\n chain services {\n  type nat hook prerouting priority dstnat;\n  \
                 ip daddr 10.0.0.200 udp dport 5514 dnat to 10.0.0.1:5515\n }\n}\n";
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), rules).unwrap();
    lab.gateway.tool("nft", &format!("-f {}", file.path().display())).unwrap();

    let mut config = DaemonConfig::for_lab(&lab, "tc_ebpf");
    config.listeners[0].bind = "10.0.0.200:5514".into();
    let mut rest = config.listeners[0].clone();
    (rest.name, rest.bind, rest.mode) = ("rest".into(), "0.0.0.0:5515".into(), "userspace".into());
    config.listeners.push(rest);
    let daemon = start(&lab, &config);
    let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
    let target = "10.0.0.200:5514".parse().unwrap();
    let mut sender = Sender::open(&lab.sender, (Lab::SENDER, 0), target).unwrap();
    sender.send(1_000, &collectors).unwrap();
    // Longer than the egress MTU, which the kernel program passes.
    widen_ingress(&lab, 9_000);
    let mut large = Sender::open(&lab.sender, (Lab::SENDER, 0), target).unwrap().payload(4_000);
    large.send(100, &collectors).unwrap();
    let report = collectors.finish(&[&sender, &large]).unwrap();
    assert!(report.is_complete(), "{report}");
    let counted = |labels: &[(&str, &str)]| {
        daemon.metrics(&lab.gateway).unwrap().sum("udp_fanout_packets_forwarded_total", labels)
    };
    assert_eq!(counted(&[("mode", "tc_ebpf")]), 1_000);
    assert_eq!(counted(&[("listener", "rest"), ("mode", "userspace")]), 100);
}
