//! Datagrams of every size and state: longer than the egress MTU, with and without checksums, many in one
//! packet, from the gateway itself.

use std::os::fd::AsRawFd;
use std::time::Duration;

use super::counters::{PacketCounts, check_counters, check_downstream_counters, start};
use super::wire::{Wire, mac, udp_errors};
use udp_fanout_lab::traffic::bind;
use udp_fanout_lab::{Collectors, DaemonConfig, Expect, Lab, Place, Report, Sender};
use udp_fanout_lab::{INGRESS, Site};
use udp_fanout_testkit::kernel::packet::Frame;

/// Lets the sender send packets of up to this many bytes to the gateway.
pub fn widen_ingress(lab: &Lab, mtu: u32) {
    lab.sender.ip(&format!("link set eth0 mtu {mtu}")).unwrap();
    lab.gateway.ip(&format!("link set {INGRESS} mtu {mtu}")).unwrap();
}

/// Sends `count` datagrams of this size, all of which must arrive once.
fn send_all(lab: &Lab, payload: usize, count: u64) -> Report {
    let collectors = Collectors::start(lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::in_lab(lab).unwrap().payload(payload);
    sender.send(count, &collectors).unwrap();
    let report = collectors.finish(&[&sender]).unwrap();
    assert!(report.is_complete(), "{payload} bytes: {report}");
    report
}

#[test]
fn netns_datagrams_exceeding_the_egress_mtu_go_through_the_socket_whole() {
    for ipv6 in [false, true] {
        let places = [Place::OtherInterface, Place::Pod, Place::BehindRouter];
        let lab = Lab::builder().receivers(places).ipv6(ipv6).build().unwrap();
        widen_ingress(&lab, 9_000);
        let daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
        let fits = if ipv6 { 1_452 } else { 1_472 };
        for (payload, count) in [(fits, 300), (fits + 1, 30), (8_000, 30)] {
            let report = send_all(&lab, payload, count);
            assert_eq!(report.counts(), [count / 3; 3], "{payload} bytes: {report}");
        }
        // Several of them in one super-packet as well.
        let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
        let mut sender = Sender::in_lab(&lab).unwrap().payload(2_000).segments(10).window(20);
        sender.send(60, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_complete(), "{report}");
        assert_eq!(report.counts(), [20; 3], "{report}");
        let kernel = PacketCounts { received: 420, forwarded: 300, dropped: 0, passed: 120 };
        check_counters(&daemon, &lab.gateway, Some(kernel), PacketCounts::forwarded(120));
    }
}

/// The gateway is their destination, not a router: "do not fragment" ends there.
#[test]
fn netns_datagrams_exceeding_the_egress_mtu_arrive_whether_it_may_be_fragmented_or_not() {
    for ipv6 in [false, true] {
        let lab = Lab::builder().receiver(Place::BehindRouter).ipv6(ipv6).build().unwrap();
        widen_ingress(&lab, 9_000);
        let daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
        let receiver = bind(lab.namespace_of(&lab.sites[0]), lab.sites[0].address).unwrap();
        receiver.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let wire = Wire::open(&lab.sender, "eth0").unwrap();
        // In IPv6 only the sender may fragment.
        for dont_fragment in if ipv6 { &[0][..] } else { &[0, 0x4000] } {
            for bytes in [1_500, 4_000, 8_000] {
                let mut frame = wire.frame_to(&lab);
                (frame.payload, frame.fragment) = (vec![7; bytes], *dont_fragment);
                wire.send(&frame.bytes()).unwrap();
                let mut buffer = vec![0; 65_536];
                let length = receiver.recv(&mut buffer).unwrap();
                assert!(length == bytes && buffer[..length].iter().all(|byte| *byte == 7), "{length} of {bytes}");
            }
        }
        let count = if ipv6 { 3 } else { 6 };
        let kernel = PacketCounts { received: count, forwarded: 0, dropped: 0, passed: count };
        check_counters(&daemon, &lab.gateway, Some(kernel), PacketCounts::forwarded(count));
    }
}

#[test]
fn netns_datagrams_that_the_host_and_its_pods_send_go_through_the_socket() {
    let lab = Lab::builder().receivers(Place::ALL).build().unwrap();
    let daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
    let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
    let pod = lab.sites.iter().find(|site| site.place == Place::Pod).unwrap();
    let mut host = Sender::open(&lab.gateway, (Lab::GATEWAY, 0), lab.listener()).unwrap();
    let mut inside = Sender::open(lab.namespace_of(pod), (pod.address.ip(), 0), lab.listener()).unwrap();
    host.send(500, &collectors).unwrap();
    inside.send(500, &collectors).unwrap();
    let report = collectors.finish(&[&host, &inside]).unwrap();
    assert!(report.is_complete(), "{report}");
    assert_eq!(report.counts(), [200; 5]);
    check_counters(&daemon, &lab.gateway, Some(PacketCounts::NOTHING), PacketCounts::forwarded(1_000));
}

#[test]
fn netns_super_packets_count_as_the_datagrams_they_hold() {
    for ipv6 in [false, true] {
        let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).ipv6(ipv6).build().unwrap();
        let daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
        let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
        // The second half is segmented before the gateway, the first half after it.
        let mut sender = Sender::in_lab(&lab).unwrap().payload(200).segments(20).window(60);
        sender.send(2_000, &collectors).unwrap();
        lab.sender.ethtool("-K eth0 tx-udp-segmentation off").unwrap();
        sender.send(2_000, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_perfect(), "{report}");
        assert_eq!(report.counts(), [2_000; 2]);
        check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(4_000)), PacketCounts::NOTHING);
        check_downstream_counters(&daemon, &lab.gateway, &report);
    }
}

#[test]
fn netns_shares_follow_the_weights() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod, Place::GatewayHost]).build().unwrap();
    for mode in ["tc_ebpf", "userspace"] {
        let mut config = DaemonConfig::for_lab(&lab, mode);
        for (downstream, weight) in config.listeners[0].downstreams.iter_mut().zip([1, 2, 3]) {
            downstream.2 = weight;
        }
        let daemon = start(&lab, &config);
        let report = send_all(&lab, 100, 1_800);
        assert_eq!(report.counts(), [300, 600, 900], "{mode}: {report}");
        check_downstream_counters(&daemon, &lab.gateway, &report);
        daemon.stop().unwrap();
    }
}

/// The device by which the gateway reaches a receiver behind a link of its own.
pub fn device_to(site: &Site) -> String {
    let kind = if site.place == Place::Pod { "pod" } else { "out" };
    site.name.replace("receiver-", kind)
}

#[test]
fn netns_checksums_arrive_right_whoever_computes_them() {
    for ipv6 in [false, true] {
        let places = [Place::OtherInterface, Place::Pod, Place::GatewayHost];
        let lab = Lab::builder().receivers(places).ipv6(ipv6).build().unwrap();
        let _daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
        let errors = || -> Vec<u64> { lab.sites.iter().map(|site| udp_errors(lab.namespace_of(site))).collect() };

        // Never computed: CHECKSUM_PARTIAL on the whole path, which the receiver trusts.
        send_all(&lab, 100, 150);
        // Computed by the last device, from the kernel program's partial checksum.
        for site in &lab.sites[..2] {
            lab.gateway.ethtool(&format!("-K {} tx off", device_to(site))).unwrap();
        }
        send_all(&lab, 101, 150);
        // Computed by the sender, updated by the kernel program.
        lab.sender.ethtool("-K eth0 tx off").unwrap();
        send_all(&lab, 102, 150);
        assert_eq!(errors(), [0; 3]);

        // Receivers verify it: a wrong checksum stays wrong, and each of three receivers gets one.
        let wire = Wire::open(&lab.sender, "eth0").unwrap();
        let mut frame = wire.frame_to(&lab);
        frame.udp_checksum = udp_fanout_testkit::kernel::packet::Checksum::Wrong;
        for _ in 0..3 {
            wire.send(&frame.bytes()).unwrap();
        }
        // Sent after those, so that those have been verified when these arrive.
        send_all(&lab, 103, 3);
        assert_eq!(errors(), [1; 3]);
    }
}

/// Makes a socket send datagrams without checksums.
fn disable_checksums(sender: &Sender) {
    let on: libc::c_int = 1;
    // SAFETY: the descriptor is open for as long as the sender is, and the pointer and length are those of `on`.
    let result = unsafe {
        libc::setsockopt(
            sender.socket().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NO_CHECK,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    assert_eq!(result, 0);
}

#[test]
fn netns_datagrams_without_checksum_stay_without() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).port(9_000).build().unwrap();
    let daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
    let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
    let taps = lab.sites.iter().map(|site| Wire::open(lab.namespace_of(site), "eth0").unwrap());
    let taps: Vec<Wire> = taps.collect();
    let mut sender = Sender::in_lab(&lab).unwrap();
    disable_checksums(&sender);
    sender.send(20, &collectors).unwrap();
    let report = collectors.finish(&[&sender]).unwrap();
    assert!(report.is_perfect(), "{report}");
    for tap in taps {
        let frames = tap.udp_frames_to(9_000, 10).unwrap();
        assert!(frames.iter().all(|frame| frame[40..42] == [0, 0]), "{frames:02x?}");
    }
    check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(20)), PacketCounts::NOTHING);
}

/// The frame in which a router would forward a readdressed datagram to a receiver behind a link of its own.
pub fn routed_frame(sent: &Frame, lab: &Lab, site: &Site) -> Vec<u8> {
    let mut frame = sent.clone();
    frame.destination = site.address;
    frame.ttl -= 1;
    let mut bytes = frame.bytes();
    bytes[..6].copy_from_slice(&mac(lab.namespace_of(site), "eth0"));
    bytes[6..12].copy_from_slice(&mac(&lab.gateway, &device_to(site)));
    bytes
}

#[test]
fn netns_a_datagram_arrives_as_a_router_would_have_sent_it() {
    for (ipv6, ip_forward) in [(false, false), (false, true), (true, false), (true, true)] {
        let places = [Place::OtherInterface, Place::Pod];
        let lab = Lab::builder().receivers(places).port(9_000).ipv6(ipv6).ip_forward(ip_forward).build().unwrap();
        let _daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
        let wire = Wire::open(&lab.sender, "eth0").unwrap();
        let taps = lab.sites.iter().map(|site| Wire::open(lab.namespace_of(site), "eth0").unwrap());
        let taps: Vec<Wire> = taps.collect();
        let sent = wire.frame_to(&lab);
        // Enough to use the cached neighbour as well.
        for _ in 0..8 {
            wire.send(&sent.bytes()).unwrap();
        }
        for (tap, site) in taps.iter().zip(&lab.sites) {
            let expected = routed_frame(&sent, &lab, site);
            for frame in tap.udp_frames_to(9_000, 4).unwrap() {
                assert_eq!(frame, expected, "\n{frame:02x?}\n{expected:02x?}");
            }
        }
    }
}
