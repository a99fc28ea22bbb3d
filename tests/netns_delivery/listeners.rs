//! Several listeners, several interfaces, addresses and interfaces that the daemon finds out for itself.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::thread;

use crate::books::{Books, audit, audit_listener, filters, start};
use crate::support::{Collectors, Daemon, DaemonConfig, Expect, Lab, Namespace, Place, Sender};

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
        // Each sender stays on the CPU it began on, and each CPU's program keeps its own round.
        assert_eq!((first.counts(), second.counts()), (vec![1_000; 2], vec![1_000]), "{mode}: {first}{second}");
        for (listener, count) in [(("lab", 0), 2_000), (("second", 1), 1_000)] {
            let forwarded = Books::forwarded(count);
            match mode {
                "tc_ebpf" => audit_listener(&daemon, &lab.gateway, listener, Some(forwarded), Books::NOTHING),
                _ => audit_listener(&daemon, &lab.gateway, listener, None, forwarded),
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
    // The host's own address counts wherever a datagram comes in.
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
    audit(&daemon, &lab.gateway, Some(Books::forwarded(1_500)), Books::NOTHING);
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
    // What comes in elsewhere goes through the socket.
    sender.send(50, &collectors).unwrap();
    let report = collectors.finish(&[&sender, &second]).unwrap();
    assert!(report.is_perfect(), "{report}");
    audit(&daemon, &lab.gateway, Some(Books::forwarded(200)), Books::forwarded(50));
}
