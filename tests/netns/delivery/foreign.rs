//! Frames that are not a whole, well-formed datagram of a listener: the gateway's stack must treat them alike whether
//! the daemon runs or not.

use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::time::Duration;

use serde_json::Value;

use super::counters::{PacketCounts, bpftool, check_listener_counters, start, stats_map_id};
use super::wire::{Wire, gateway_mac, snmp};
use udp_fanout_lab::traffic::{Pinned, bind};
use udp_fanout_lab::{DaemonConfig, Lab, ListenerSpec, Place};
use udp_fanout_testkit::kernel::packet::{Checksum, Frame, sum};

/// What happens to a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Foreign to the kernel program, and the stack does not deliver it to the listener's socket.
    Foreign,
    /// Foreign to the kernel program, but the stack delivers it to the listener's socket.
    Stack,
    /// The kernel program passes it to the socket, where it arrives.
    Passed,
    /// The kernel program passes it to the socket, but the stack refuses it.
    Refused,
    /// The kernel program forwards it.
    Forwarded,
    /// Its TTL has expired.
    Expired,
}

const LISTENERS: [(&str, &str); 2] = [("four", "10.0.0.1:5514"), ("six", "[fd00::1]:5514")];
const RECEIVERS: [&str; 2] = ["10.0.10.2:5514", "[fd00:0:0:a::2]:5514"];
/// Destination of the marker datagram, whose arrival shows that the frame before it has been processed.
const MARKER: &str = "10.0.0.1:7";

/// The counters of the gateway's stack that show what it did with a frame. IPv6 counters that neighbour discovery moves
/// are left out.
const STACK_COUNTERS: [&str; 19] = [
    "Ip.InReceives",
    "Ip.InHdrErrors",
    "Ip.InAddrErrors",
    "Ip.InUnknownProtos",
    "Ip.InDiscards",
    "Ip.InDelivers",
    "Ip.ReasmReqds",
    "Icmp.InMsgs",
    "Tcp.InSegs",
    "Tcp.InErrs",
    "Udp.NoPorts",
    "Udp.InErrors",
    "Udp.InCsumErrors",
    "Ip6InHdrErrors",
    "Ip6InTruncatedPkts",
    "Ip6ReasmReqds",
    "Udp6NoPorts",
    "Udp6InErrors",
    "Udp6InCsumErrors",
];

fn four(change: impl FnOnce(&mut Frame)) -> Vec<u8> {
    let mut frame = Frame::new("10.0.0.2:4000", LISTENERS[0].1, b"by hand, by hand, by hand");
    change(&mut frame);
    frame.bytes()
}

fn six(change: impl FnOnce(&mut Frame)) -> Vec<u8> {
    let mut frame = Frame::new("[fd00::2]:4000", LISTENERS[1].1, b"by hand");
    change(&mut frame);
    frame.bytes()
}

/// An IPv4 frame with changed bytes and a valid header checksum.
fn mangled(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut frame = four(|_| {});
    change(&mut frame);
    if frame.len() >= 34 {
        frame[24..26].fill(0);
        let check = !sum(&frame[14..34], 0);
        frame[24..26].copy_from_slice(&check.to_be_bytes());
    }
    frame
}

/// A frame with `tags` inserted after the hardware addresses.
fn tagged(mut frame: Vec<u8>, tags: &[u8]) -> Vec<u8> {
    frame.splice(12..12, tags.iter().copied());
    frame
}

/// An IPv6 frame with this extension header in front of the datagram.
fn extended(kind: u8, header: [u8; 8]) -> Vec<u8> {
    let mut frame = six(|_| {});
    frame[20] = kind;
    frame[19] += 8;
    frame.splice(54..54, header);
    frame
}

fn listeners_own() -> Vec<(&'static str, Outcome, Vec<u8>)> {
    vec![
        ("IPv4", Outcome::Forwarded, four(|_| {})),
        ("IPv6", Outcome::Forwarded, six(|_| {})),
        (
            "padded to the shortest Ethernet frame",
            Outcome::Forwarded,
            [four(|f| f.payload.clear()), vec![0; 18]].concat(),
        ),
        ("time to live 1", Outcome::Expired, four(|f| f.ttl = 1)),
        ("time to live 0", Outcome::Expired, four(|f| f.ttl = 0)),
        ("hop limit 1", Outcome::Expired, six(|f| f.ttl = 1)),
        ("with options", Outcome::Passed, four(|f| f.options = vec![1; 8])),
        ("source-routed", Outcome::Refused, four(|f| f.options = vec![131, 7, 4, 10, 0, 10, 2, 0])),
    ]
}

fn of_others() -> Vec<(&'static str, Outcome, Vec<u8>)> {
    let to = |address: &str| four(|f| f.destination = address.parse().unwrap());
    let from = |address: &str| four(|f| f.source = address.parse().unwrap());
    let mut broadcast = four(|_| {});
    broadcast[..6].fill(0xff);
    let mut elsewhere = four(|_| {});
    elsewhere[..6].copy_from_slice(&[2, 0, 0, 0, 0, 99]);
    vec![
        ("another port", Outcome::Foreign, to("10.0.0.1:5515")),
        ("another address of the gateway", Outcome::Foreign, to("10.0.10.1:5514")),
        ("a host behind the gateway", Outcome::Foreign, to("10.0.10.2:5514")),
        ("the loopback address", Outcome::Foreign, to("127.0.0.1:5514")),
        ("from the loopback address", Outcome::Foreign, from("127.0.0.1:4000")),
        ("from nowhere", Outcome::Foreign, from("0.0.0.0:4000")),
        ("from a multicast group", Outcome::Foreign, from("224.0.0.1:4000")),
        ("from everywhere", Outcome::Foreign, from("255.255.255.255:4000")),
        ("TCP", Outcome::Foreign, four(|f| f.protocol = 6)),
        ("ICMP", Outcome::Foreign, four(|f| f.protocol = 1)),
        ("an unknown protocol", Outcome::Foreign, four(|f| f.protocol = 253)),
        ("to another hardware address", Outcome::Foreign, elsewhere),
        ("to every hardware address", Outcome::Stack, broadcast),
        ("in VLAN 5", Outcome::Foreign, tagged(four(|_| {}), &[0x81, 0, 0, 5])),
        ("with a priority tag", Outcome::Stack, tagged(four(|_| {}), &[0x81, 0, 0x60, 0])),
        ("in two VLANs", Outcome::Foreign, tagged(four(|_| {}), &[0x88, 0xa8, 0, 5, 0x81, 0, 0, 6])),
        ("no IP at all", Outcome::Foreign, {
            let mut frame = four(|_| {});
            frame[12..14].copy_from_slice(&[0x88, 0xb5]);
            frame
        }),
    ]
}

fn malformed() -> Vec<(&'static str, Outcome, Vec<u8>)> {
    vec![
        ("the first fragment", Outcome::Foreign, four(|f| f.fragment = 0x2000)),
        ("a later fragment", Outcome::Foreign, four(|f| f.fragment = 5)),
        ("a wrong header checksum", Outcome::Foreign, four(|f| f.ip_checksum = Checksum::Wrong)),
        ("version 5", Outcome::Foreign, mangled(|f| f[14] = 0x55)),
        ("a header of 16 bytes", Outcome::Foreign, mangled(|f| f[14] = 0x44)),
        ("a header longer than the packet", Outcome::Foreign, mangled(|f| f[14] = 0x4f)),
        ("longer than it is", Outcome::Foreign, mangled(|f| f[16..18].copy_from_slice(&1_000_u16.to_be_bytes()))),
        ("too short for UDP", Outcome::Foreign, mangled(|f| f[16..18].copy_from_slice(&24_u16.to_be_bytes()))),
        ("UDP longer than IP", Outcome::Foreign, mangled(|f| f[38..40].copy_from_slice(&500_u16.to_be_bytes()))),
        ("UDP shorter than its header", Outcome::Foreign, mangled(|f| f[38..40].copy_from_slice(&7_u16.to_be_bytes()))),
        ("cut within IP", Outcome::Foreign, four(|_| {})[..30].to_vec()),
        ("cut within UDP", Outcome::Foreign, four(|_| {})[..38].to_vec()),
        ("nothing behind Ethernet", Outcome::Foreign, four(|_| {})[..14].to_vec()),
    ]
}

fn malformed_or_special_six() -> Vec<(&'static str, Outcome, Vec<u8>)> {
    let from = |address: &str| six(|f| f.source = address.parse().unwrap());
    vec![
        ("IPv6 without checksum", Outcome::Foreign, six(|f| f.udp_checksum = Checksum::Zero)),
        ("IPv6 from the loopback address", Outcome::Foreign, from("[::1]:4000")),
        ("IPv6 from a multicast group", Outcome::Foreign, from("[ff02::1]:4000")),
        ("IPv6 longer than it is", Outcome::Foreign, {
            let mut frame = six(|_| {});
            frame[18] = 4;
            frame
        }),
        ("IPv6 of version 4", Outcome::Foreign, {
            let mut frame = six(|_| {});
            frame[14] = 0x45;
            frame
        }),
        ("hop-by-hop options", Outcome::Stack, extended(0, [17, 0, 1, 4, 0, 0, 0, 0])),
        ("destination options", Outcome::Stack, extended(60, [17, 0, 1, 4, 0, 0, 0, 0])),
        ("a fragment that is the whole", Outcome::Stack, extended(44, [17, 0, 0, 0, 0, 0, 0, 1])),
        ("a fragment of more", Outcome::Foreign, extended(44, [17, 0, 0, 1, 0, 0, 0, 2])),
    ]
}

/// The sender's wire, and a marker that shows that what was sent on it has been processed.
struct Probe<'a> {
    /// Packets sent on one CPU stay in order.
    _pinned: Pinned,
    lab: &'a Lab,
    wire: Wire,
    mac: [u8; 6],
    marker: UdpSocket,
}

impl Probe<'_> {
    fn new(lab: &Lab) -> Probe<'_> {
        let marker = bind(&lab.gateway, MARKER.parse().unwrap()).unwrap();
        marker.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let _pinned = Pinned::here().unwrap();
        Probe { _pinned, lab, wire: Wire::open(&lab.sender, "eth0").unwrap(), mac: gateway_mac(lab), marker }
    }

    /// Sends a frame after others, each to the gateway's hardware address unless it has one. Returns the changes that
    /// they caused in the [`STACK_COUNTERS`].
    fn send(&self, others: &[Vec<u8>], frame: &[u8]) -> BTreeMap<&'static str, u64> {
        let address = |frame: &[u8]| {
            let mut frame = frame.to_vec();
            if frame[..6] == [0; 6] {
                frame[..6].copy_from_slice(&self.mac);
            }
            frame
        };
        let before = snmp(&self.lab.gateway);
        others.iter().for_each(|other| self.wire.send(&address(other)).unwrap());
        self.wire.send(&address(frame)).unwrap();
        self.wire.send(&address(&Frame::new("10.0.0.2:4000", MARKER, b"marker").bytes())).unwrap();
        self.marker.recv(&mut [0; 16]).unwrap();
        let after = snmp(&self.lab.gateway);
        STACK_COUNTERS
            .iter()
            .map(|&name| (name, after[name] - before[name]))
            .filter(|(_, change)| *change > 0)
            .collect()
    }
}

/// The listeners of the daemon, each with one receiver.
fn config(lab: &Lab) -> DaemonConfig {
    let mut config = DaemonConfig::for_lab(lab, "tc_ebpf");
    let listener = config.listeners.remove(0);
    config.listeners = LISTENERS
        .iter()
        .zip(RECEIVERS)
        .map(|(&(name, bind), receiver)| ListenerSpec {
            name: name.into(),
            bind: bind.into(),
            downstreams: vec![("receiver".into(), receiver.parse().unwrap(), 1)],
            ..listener.clone()
        })
        .collect();
    config
}

#[test]
fn netns_what_is_not_a_listeners_datagram_passes_as_if_nothing_were_there() {
    let lab = Lab::builder().receiver(Place::OtherInterface).ipv6(true).build().unwrap();
    let receiver = lab.namespace_of(&lab.sites[0]);
    let receivers = RECEIVERS.map(|address| bind(receiver, address.parse().unwrap()).unwrap());
    let probe = Probe::new(&lab);
    let cases = [listeners_own(), of_others(), malformed(), malformed_or_special_six()].concat();

    let sockets = LISTENERS.map(|(_, address)| bind(&lab.gateway, address.parse().unwrap()).unwrap());
    let without: Vec<_> = cases.iter().map(|(_, _, frame)| probe.send(&[], frame)).collect();
    drop(sockets);

    let daemon = start(&lab, &config(&lab));
    let map = stats_map_id(&daemon);
    let counted = || -> [PacketCounts; 2] {
        let dump: Value = bpftool(&["map", "dump", "id", &map]);
        [0, 1].map(|id| PacketCounts::of_dump(&dump, id))
    };
    let (mut kernel, mut socket) = ([PacketCounts::NOTHING; 2], [0; 2]);
    // The program has to know the receivers' neighbours when a frame comes, so that nothing else stops the frame.
    let ours = [four(|_| {}), six(|_| {})];
    for ((name, outcome, frame), without) in cases.iter().zip(without) {
        let with = probe.send(&ours, frame);
        for counts in &mut kernel {
            counts.forwarded += 1;
            counts.received += 1;
        }
        let family = usize::from(frame[12..14] == [0x86, 0xdd]);
        let counts = &mut kernel[family];
        match outcome {
            Outcome::Foreign | Outcome::Stack => {}
            Outcome::Passed | Outcome::Refused => counts.passed += 1,
            Outcome::Forwarded => counts.forwarded += 1,
            Outcome::Expired => counts.dropped += 1,
        }
        counts.received = counts.forwarded + counts.dropped + counts.passed;
        socket[family] += u64::from(matches!(outcome, Outcome::Stack | Outcome::Passed));
        assert_eq!(counted(), kernel, "{name}");
        if !matches!(outcome, Outcome::Forwarded | Outcome::Expired) {
            assert_eq!(with, without, "{name}");
        }
    }
    for (id, (name, _)) in (0..).zip(LISTENERS) {
        let (kernel, socket) = (kernel[id], socket[id]);
        check_listener_counters(
            &daemon,
            &lab.gateway,
            (name, id as u64),
            Some(kernel),
            PacketCounts::forwarded(socket),
        );
        for _ in 0..kernel.forwarded + socket {
            receivers[id].recv(&mut [0; 100]).unwrap();
        }
        receivers[id].set_nonblocking(true).unwrap();
        assert!(receivers[id].recv(&mut [0; 100]).is_err(), "{name}: more than was forwarded");
    }
    let page = daemon.metrics(&lab.gateway).unwrap();
    assert_eq!(page.sum("udp_fanout_packets_dropped_total", &[("reason", "ttl_expired")]), 3);
}
