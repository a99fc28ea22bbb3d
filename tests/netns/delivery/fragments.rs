//! Fragmented datagrams arrive whole at one receiver, or at every one, in any order of fragments and beside other
//! senders'.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use super::counters::{PacketCounts, check_counters, check_downstream_counters, start};
use super::wire::{Wire, gateway_mac};
use udp_fanout_lab::traffic::{Pinned, bind};
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Place, Sender};
use udp_fanout_testkit::kernel::packet::{Frame, fragmented};

/// All but the sender's network, whose switch would carry everything twice.
const PLACES: [Place; 4] = [Place::OtherInterface, Place::BehindRouter, Place::Pod, Place::GatewayHost];
const SIZES: [usize; 3] = [1_473, 5_000, 65_507];

fn fragments(lab: &Lab, daemon: &Daemon) -> (u64, u64) {
    let page = daemon.metrics(&lab.gateway).unwrap();
    (page.sum("udp_fanout_fragments_stray_total", &[]), page.sum("udp_fanout_fragments_lost_total", &[]))
}

#[test]
fn netns_datagrams_in_fragments_arrive_whole_and_keep_their_source() {
    for (ipv6, ip_forward) in [(false, false), (false, true), (true, false), (true, true)] {
        let lab = Lab::builder().receivers(PLACES).ipv6(ipv6).ip_forward(ip_forward).build().unwrap();
        let daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
        let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
        let mut senders = Vec::new();
        for payload in SIZES {
            let mut sender = Sender::in_lab(&lab).unwrap().payload(payload);
            sender.send(40, &collectors).unwrap();
            senders.push(sender);
        }
        let report = collectors.finish(&senders.iter().collect::<Vec<_>>()).unwrap();
        assert!(report.is_complete(), "{report}");
        assert_eq!(report.counts(), [30; 4], "{report}");
        assert!(report.all_from(lab.sender_address()), "{report}");
        check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(120)), PacketCounts::NOTHING);
        check_downstream_counters(&daemon, &lab.gateway, &report);
        assert_eq!(fragments(&lab, &daemon), (0, 0));
    }
}

#[test]
fn netns_datagrams_in_fragments_arrive_whole_from_the_socket() {
    for ipv6 in [false, true] {
        let lab = Lab::builder().receivers(PLACES).ipv6(ipv6).build().unwrap();
        let daemon = start(&lab, &DaemonConfig::for_lab(&lab, "userspace"));
        let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
        let mut sender = Sender::in_lab(&lab).unwrap().payload(5_000);
        sender.send(40, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_complete(), "{report}");
        check_counters(&daemon, &lab.gateway, None, PacketCounts::forwarded(40));
    }
}

#[test]
fn netns_every_downstream_gets_all_fragments_of_what_is_replicated() {
    for (ipv6, ip_forward) in [(false, false), (false, true), (true, false)] {
        let lab = Lab::builder().receivers(PLACES).ipv6(ipv6).ip_forward(ip_forward).build().unwrap();
        let config = DaemonConfig::for_lab(&lab, "tc_ebpf").extra("policy = \"replicate\"");
        let daemon = start(&lab, &config);
        let collectors = Collectors::start(&lab, Expect::EachOfThem).unwrap();
        let mut sender = Sender::in_lab(&lab).unwrap().payload(5_000);
        sender.send(60, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_complete(), "ip_forward={ip_forward}: {report}");
        check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(60)), PacketCounts::NOTHING);
        check_downstream_counters(&daemon, &lab.gateway, &report);
        assert_eq!(fragments(&lab, &daemon), (0, 0));
    }
}

#[test]
fn netns_a_sample_holds_whole_datagrams_or_nothing_of_them() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap();
    let mut config = DaemonConfig::for_lab(&lab, "tc_ebpf").extra("policy = \"replicate\"");
    config.listeners[0].samples = vec![("receiver-2".into(), 0.5)];
    let daemon = start(&lab, &config);
    let all = [&lab.sites[0]].map(|site| (site.name.as_str(), lab.namespace_of(site), site.address));
    let everything = Collectors::start_at(all, Expect::OneOfThem).unwrap();
    let some = [&lab.sites[1]].map(|site| (site.name.as_str(), lab.namespace_of(site), site.address));
    let sample = Collectors::start_at(some, Expect::OneOfThem).unwrap();
    let mut sender = Sender::in_lab(&lab).unwrap().payload(5_000);
    sender.send(200, &everything).unwrap();
    let report = everything.finish(&[&sender]).unwrap();
    assert!(report.is_complete(), "{report}");
    let report = sample.finish(&[&sender]).unwrap();
    // As many as the program has counted, each of them whole. For 200 coin flips, 50 is seven standard deviations.
    let arrived = report.receivers[0].received;
    assert!((50..150).contains(&arrived) && report.unexpected == 0, "{report}");
    let endpoint = lab.sites[1].address.to_string();
    let labels = [("endpoint", endpoint.as_str())];
    let page = daemon.metrics(&lab.gateway).unwrap();
    assert_eq!(page.sum("udp_fanout_downstream_packets_total", &labels), arrived);
}

/// Sends hand-made frames, and checks what arrives at the only receiver.
struct FrameSender<'a> {
    _pinned: Pinned,
    lab: &'a Lab,
    wire: Wire,
    receiver: UdpSocket,
}

impl FrameSender<'_> {
    fn new(lab: &Lab) -> FrameSender<'_> {
        let _pinned = Pinned::here().unwrap();
        let site = &lab.sites[0];
        let receiver = bind(lab.namespace_of(site), site.address).unwrap();
        receiver.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        FrameSender { _pinned, lab, wire: Wire::open(&lab.sender, "eth0").unwrap(), receiver }
    }

    /// The fragments of a datagram of this many bytes to a port of the listener's address.
    fn fragments(&self, port: u16, bytes: usize, number: u32) -> Vec<Vec<u8>> {
        let source = SocketAddr::new(self.lab.sender_address(), 4_000).to_string();
        let destination = SocketAddr::new(self.lab.listener().ip(), port).to_string();
        let payload: Vec<u8> = (0..bytes).map(|n| (n as u32 * 31 + number) as u8).collect();
        let mut frame = Frame::new(&source, &destination, &payload);
        frame.destination_mac = gateway_mac(self.lab);
        fragmented(&frame.bytes(), 1_400, number)
    }

    fn send(&self, frames: &[Vec<u8>]) {
        frames.iter().for_each(|frame| self.wire.send(frame).unwrap());
    }

    /// The next datagram to arrive must be this one.
    fn expect(&self, bytes: usize, number: u32) {
        let mut buffer = vec![0; 65_536];
        let length = self.receiver.recv(&mut buffer).unwrap_or_else(|error| panic!("number {number}: {error}"));
        assert_eq!(length, bytes, "number {number}");
        let right = buffer[..length].iter().enumerate().all(|(n, byte)| *byte == (n as u32 * 31 + number) as u8);
        assert!(right, "number {number} is damaged");
    }

    fn expect_nothing(&self) {
        self.receiver.set_nonblocking(true).unwrap();
        assert!(self.receiver.recv(&mut [0; 10]).is_err());
    }
}

#[test]
fn netns_in_whatever_order_fragments_come_the_datagram_arrives_whole() {
    for ipv6 in [false, true] {
        let lab = Lab::builder().receivers([Place::OtherInterface]).ipv6(ipv6).build().unwrap();
        let daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
        let frame_sender = FrameSender::new(&lab);
        let port = lab.listener().port();
        // Every order of four.
        let (mut in_order, mut others) = (0, 0);
        for number in 0..24u32 {
            let mut rest = frame_sender.fragments(port, 5_000, number);
            let mut shuffled = Vec::new();
            let mut choice = number;
            while !rest.is_empty() {
                let count = rest.len() as u32;
                shuffled.push(rest.remove((choice % count) as usize));
                choice /= count;
            }
            let first_comes_first = number % 4 == 0;
            frame_sender.send(&shuffled);
            frame_sender.expect(5_000, number);
            *(if first_comes_first { &mut in_order } else { &mut others }) += 1;
        }
        frame_sender.expect_nothing();
        let kernel = PacketCounts { received: 24, forwarded: in_order, dropped: 0, passed: others };
        check_counters(&daemon, &lab.gateway, Some(kernel), PacketCounts::forwarded(others));
        assert_eq!((in_order, fragments(&lab, &daemon)), (6, (18, 0)));
    }
}

#[test]
fn netns_fragments_for_others_on_this_host_reach_them() {
    for ipv6 in [false, true] {
        let lab = Lab::builder().receivers([Place::OtherInterface]).ipv6(ipv6).build().unwrap();
        let daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
        let frame_sender = FrameSender::new(&lab);
        let other = bind(&lab.gateway, SocketAddr::new(lab.listener().ip(), 2049)).unwrap();
        other.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        for number in 0..10u32 {
            // With the ID of one of the listener's datagrams that never became complete.
            let ours = frame_sender.fragments(lab.listener().port(), 5_000, number);
            frame_sender.send(&ours[..2]);
            let mut theirs = frame_sender.fragments(2049, 4_000, number);
            if number % 2 == 1 {
                // Out of order, and with another ID, since these could not be distinguished from the listener's.
                theirs = frame_sender.fragments(2049, 4_000, 1_000 + number);
                theirs.reverse();
            }
            frame_sender.send(&theirs);
            let mut buffer = vec![0; 65_536];
            assert_eq!(other.recv(&mut buffer).unwrap(), 4_000, "number {number}");
        }
        frame_sender.expect_nothing();
        check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(10)), PacketCounts::NOTHING);
    }
}

#[test]
fn netns_a_flood_of_fragments_loses_no_datagram() {
    let lab = Lab::builder().receivers([Place::OtherInterface]).build().unwrap();
    let daemon = start(&lab, &DaemonConfig::for_lab(&lab, "tc_ebpf"));
    let frame_sender = FrameSender::new(&lab);
    let port = lab.listener().port();
    // Later fragments of datagrams without a first one, more than the map holds.
    let stray = frame_sender.fragments(port, 2_000, 0).remove(1);
    let flood = |number: u32| {
        let mut frame = stray.clone();
        frame[18..20].copy_from_slice(&(number as u16).to_be_bytes());
        frame[26..30].copy_from_slice(&[198, 18, (number >> 16) as u8, 7]);
        frame[24..26].fill(0);
        let check = !udp_fanout_testkit::kernel::packet::sum(&frame[14..34], 0);
        frame[24..26].copy_from_slice(&check.to_be_bytes());
        frame
    };
    let mut sent = 0;
    for number in 0..100u32 {
        for frame in frame_sender.fragments(port, 5_000, number) {
            for _ in 0..60 {
                frame_sender.wire.send(&flood(sent)).unwrap();
                sent += 1;
            }
            frame_sender.wire.send(&frame).unwrap();
        }
        frame_sender.expect(5_000, number);
    }
    check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(100)), PacketCounts::NOTHING);
    assert_eq!(fragments(&lab, &daemon), (sent.into(), 0));
}
