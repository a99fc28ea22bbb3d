//! A plain-Rust model of the TC program: predicts the verdict, the packet and the counters for a frame. Written from the design,
//! not from the C source.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use udp_fanout::testing::admission::{Prefix, SourceRules};
use udp_fanout::testing::model::Policy;
use udp_fanout::testing::plan::{Delivery, ListenerPlan, MacPair, Plan, PlanTarget, hash};

use super::fragments::{self, Incomplete};
use super::packet::sum;
use super::run::Gso;

pub const UNSPEC: i32 = -1;
pub const SHOT: i32 = 2;
pub const REDIRECT: i32 = 7;

/// The predicted outcome for a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Foreign traffic: unchanged and not counted.
    Foreign,
    /// A listener's datagram, passed unchanged to its socket.
    Passed { listener: u32, datagrams: u64, bytes: u64 },
    /// A listener's datagram, dropped for this reason.
    Dropped { listener: u32, datagrams: u64, bytes: u64, reason: &'static str },
    /// A listener's datagram, forwarded: up the stack or out of an interface.
    Forwarded { listener: u32, datagrams: u64, bytes: u64, to: SocketAddr, verdict: i32, packet: Vec<u8> },
    /// A listener's datagram, copied to every downstream whose sample includes it. A later fragment counts 0 datagrams and 0 bytes.
    Copied { listener: u32, datagrams: u64, bytes: u64, copies: Copies },
    /// A later fragment. No listener counts it: the first fragment has counted the datagram.
    Fragment { verdict: i32, packet: Vec<u8>, stray: bool, lost: bool },
}

/// The copies of a datagram, in the order in which they are sent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Copies {
    /// Receivers of all copies, the last one's included.
    pub to: Vec<SocketAddr>,
    /// Clones sent out of their egress interface.
    pub out: Vec<Vec<u8>>,
    /// Clones reinjected into the ingress of the interface that the datagram arrived on.
    pub reinjected: Vec<Vec<u8>>,
    /// The original packet, which carries the last copy. None if the last downstream gets no copy.
    pub last: Option<Vec<u8>>,
    /// Copies without a route to their downstream.
    pub unreachable: u64,
}

/// A parsed datagram, or a parsed fragment of one.
pub struct Datagram {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub l4: usize,
    pub ttl: u8,
    /// Needs the socket path: it has IP options, or a link-local source, which must not be forwarded.
    pub needs_socket: bool,
    /// Bytes of payload according to the UDP header; 0 for a later fragment.
    pub payload: usize,
    /// Bytes after the UDP header in this packet.
    pub in_packet: usize,
    pub fragment: Option<Fragment>,
}

/// A fragment's position in its datagram.
#[derive(Debug, Clone, Copy)]
pub struct Fragment {
    pub number: u32,
    pub offset: usize,
    pub more: bool,
    /// Bytes after the IP headers.
    pub length: usize,
    /// Zeros except for a first fragment.
    pub udp_header: [u8; 8],
}

/// State left by earlier datagrams.
#[derive(Debug, Default, Clone)]
pub struct History {
    /// The next round-robin slot, by listener. No entry until the first datagram has shown where the kernel started.
    pub round_robin: BTreeMap<u32, usize>,
    /// Tokens taken from senders' buckets. They refill so slowly that no token returns during a test.
    pub spent: BTreeMap<(u32, IpAddr), u64>,
    /// Incomplete datagrams. During a test, none expires and none is evicted.
    pub incomplete: Incomplete,
}

/// Predicts the outcome for the packet of a test run. It arrives on the loopback device, which the plan may declare an L3 device.
pub fn predict(plan: &Plan, history: &mut History, shown: &[u8], gso: Gso) -> Outcome {
    let loopback = |listener: &ListenerPlan| listener.l3_ingress.contains(&1);
    match framed(shown).filter(|_| plan.listeners.iter().any(|listener| loopback(listener))) {
        Some(frame) => predict_frame(plan, history, &frame, gso).without_frame(),
        None => predict_frame(plan, history, shown, gso),
    }
}

/// Adds an Ethernet header to a packet that begins with an IP header. A test run reads the protocol where an Ethernet frame has it. The
/// MAC addresses are those that a frame with this packet would have.
pub fn framed(shown: &[u8]) -> Option<Vec<u8>> {
    let protocol = shown.get(12..14)?;
    let (version, is_multicast) = match protocol {
        [0x08, 0x00] => (4, shown.get(16)? >> 4 == 14),
        [0x86, 0xdd] => (6, *shown.get(24)? == 0xff),
        _ => return None,
    };
    let mut addresses = [0; 12];
    addresses[0] = u8::from(is_multicast);
    (shown[0] >> 4 == version).then(|| [&addresses, protocol, shown].concat())
}

impl Outcome {
    /// The same outcome for a packet without an Ethernet header. A packet sent to an Ethernet device has got one.
    fn without_frame(mut self) -> Outcome {
        if let Outcome::Forwarded { verdict, packet, .. } | Outcome::Fragment { verdict, packet, .. } = &mut self
            && *verdict != REDIRECT
        {
            packet.drain(..14);
        }
        if let Outcome::Copied { copies, .. } = &mut self {
            // The added Ethernet header has no addresses.
            copies.reinjected.iter_mut().for_each(|packet| packet[..12].fill(0));
        }
        self
    }
}

fn predict_frame(plan: &Plan, history: &mut History, frame: &[u8], gso: Gso) -> Outcome {
    let Some(datagram) = read(frame) else { return Outcome::Foreign };
    match datagram.fragment {
        None => match find_listener(plan, &datagram) {
            Some(listener) => predict_datagram(listener, history, &datagram, frame, gso, false).0,
            None => Outcome::Foreign,
        },
        Some(fragment) if fragment.offset > 0 => fragments::predict_later(plan, history, &datagram, fragment, frame),
        Some(fragment) => fragments::predict_first(plan, history, &datagram, fragment, frame),
    }
}

/// The listener that a datagram is addressed to.
pub fn find_listener<'a>(plan: &'a Plan, datagram: &Datagram) -> Option<&'a ListenerPlan> {
    let to = datagram.destination;
    let is_for =
        |listener: &&ListenerPlan| listener.bind.port() == to.port() && listener.match_addresses.contains(&to.ip());
    plan.listeners.iter().map(AsRef::as_ref).find(is_for)
}

/// Predicts the outcome for a listener's datagram, whole or its first fragment, and the target chosen for it. `out_of_order` is true if
/// later fragments have gone up the stack before it.
pub fn predict_datagram<'a>(
    listener: &'a ListenerPlan,
    history: &mut History,
    datagram: &Datagram,
    frame: &[u8],
    gso: Gso,
    out_of_order: bool,
) -> (Outcome, Option<&'a PlanTarget>) {
    let id = listener.id.0;
    let bytes = datagram.payload as u64;
    let datagrams = match gso {
        Gso { size: 0, .. } => 1,
        Gso { segments: 0, size } => bytes.div_ceil(u64::from(size)).max(1),
        Gso { segments, .. } => u64::from(segments),
    };
    let dropped = |reason| (Outcome::Dropped { listener: id, datagrams, bytes, reason }, None);
    let passed = (Outcome::Passed { listener: id, datagrams, bytes }, None);
    if let Some(reason) = admission_verdict(listener, history, datagram.source.ip(), datagrams) {
        return dropped(reason);
    }
    if datagram.needs_socket || out_of_order || listener.socket_only.is_some() {
        return passed;
    }
    if listener.table.is_empty() {
        return dropped("no_downstream");
    }
    if listener.policy == Policy::Replicate {
        return match copies(listener, history, datagram, frame) {
            Ok(copies) => (Outcome::Copied { listener: id, datagrams, bytes, copies }, None),
            Err(DeliveryPath::TooLong) => passed,
            Err(_) => dropped("ttl_expired"),
        };
    }
    let target = &listener.targets[listener.table[choose_slot(listener, history, datagram, frame)] as usize];
    let longest = match gso.size {
        0 => length(datagram),
        size => datagram.l4 - 14 + 8 + datagram.payload.min(size as usize),
    };
    match delivery_path(target, datagram, longest) {
        DeliveryPath::Send(verdict, ttl) => {
            let packet = sent(frame, datagram, target, verdict, ttl);
            let to = target.downstream.address;
            (Outcome::Forwarded { listener: id, datagrams, bytes, to, verdict, packet }, Some(target))
        }
        DeliveryPath::TooLong => passed,
        DeliveryPath::Drop(reason) => dropped(reason),
    }
}

/// The copies of a datagram to all downstreams, or why there are none.
pub fn copies(
    listener: &ListenerPlan,
    history: &mut History,
    datagram: &Datagram,
    frame: &[u8],
) -> Result<Copies, DeliveryPath> {
    let is_multicast = datagram.destination.ip().is_multicast();
    let ttl = if is_multicast { 64 } else { datagram.ttl.saturating_sub(1) };
    if datagram.ttl <= 1 && !is_multicast {
        return Err(DeliveryPath::Drop("ttl_expired"));
    }
    let narrowest = listener.targets.iter().filter_map(|target| match target.delivery {
        Delivery::Neighbour { mtu, .. } | Delivery::L3Device { mtu, .. } => Some(mtu as usize),
        Delivery::Local | Delivery::Unreachable => None,
    });
    if narrowest.min().is_some_and(|mtu| length(datagram) > mtu) {
        return Err(DeliveryPath::TooLong);
    }
    let slots = listener.table.len();
    let start = next_slot(listener, history);
    let mut copies = Copies::default();
    for nth in 0..slots {
        let target = &listener.targets[listener.table[(start + nth) % slots] as usize];
        match target.delivery {
            _ if target.downstream.sample == 0 => continue,
            Delivery::Unreachable => {
                copies.unreachable += 1;
                continue;
            }
            _ => copies.to.push(target.downstream.address),
        }
        let mut packet = rewritten(frame, datagram, target.downstream.address, ttl);
        match target.delivery {
            _ if nth + 1 == slots => copies.last = Some(packet),
            Delivery::Neighbour { macs: Some(MacPair { neighbour, own }), .. } => {
                packet[..6].copy_from_slice(&neighbour);
                packet[6..12].copy_from_slice(&own);
                copies.out.push(packet);
            }
            // The kernel resolves the neighbour.
            _ => copies.reinjected.push(packet),
        }
    }
    Ok(copies)
}

/// True if the packet of a test run is for a listener that replicates.
pub fn is_replicated(plan: &Plan, shown: &[u8]) -> bool {
    let frame = framed(shown).unwrap_or_else(|| shown.to_vec());
    let datagram = read(&frame);
    let listener = datagram.as_ref().and_then(|datagram| find_listener(plan, datagram));
    listener.is_some_and(|listener| listener.policy == Policy::Replicate)
}

/// Takes the next round-robin slot of a listener.
fn next_slot(listener: &ListenerPlan, history: &mut History) -> usize {
    let slot = history.round_robin.entry(listener.id.0).or_default();
    std::mem::replace(slot, (*slot + 1) % listener.table.len())
}

/// The IP packet's length.
pub fn length(datagram: &Datagram) -> usize {
    match datagram.fragment {
        Some(Fragment { offset: 1.., length, .. }) => datagram.l4 - 14 + length,
        _ => datagram.l4 - 14 + 8 + datagram.in_packet,
    }
}

/// How a packet reaches a target.
pub enum DeliveryPath {
    /// Sent with this verdict and time to live.
    Send(i32, u8),
    /// Longer than the MTU.
    TooLong,
    /// Dropped for this reason.
    Drop(&'static str),
}

/// The delivery path of a packet. `length` is that of its longest segment.
pub fn delivery_path(target: &PlanTarget, datagram: &Datagram, length: usize) -> DeliveryPath {
    // The TTL of a multicast datagram limits the scope of its group, not the distance of a receiver.
    let is_multicast = datagram.destination.ip().is_multicast();
    match target.delivery {
        Delivery::Unreachable => DeliveryPath::Drop("no_route"),
        Delivery::Local => DeliveryPath::Send(UNSPEC, datagram.ttl),
        Delivery::Neighbour { .. } | Delivery::L3Device { .. } if datagram.ttl <= 1 && !is_multicast => {
            DeliveryPath::Drop("ttl_expired")
        }
        Delivery::Neighbour { mtu, .. } | Delivery::L3Device { mtu, .. } if length > mtu as usize => {
            DeliveryPath::TooLong
        }
        Delivery::Neighbour { .. } | Delivery::L3Device { .. } if is_multicast => DeliveryPath::Send(REDIRECT, 64),
        Delivery::Neighbour { .. } | Delivery::L3Device { .. } => DeliveryPath::Send(REDIRECT, datagram.ttl - 1),
    }
}

/// The table slot that the policy selects.
fn choose_slot(listener: &ListenerPlan, history: &mut History, datagram: &Datagram, frame: &[u8]) -> usize {
    let slots = listener.table.len();
    let hashed = |hash| hash::table_slot(hash, slots as u32) as usize;
    match listener.policy {
        Policy::RoundRobin => next_slot(listener, history),
        Policy::Hash(on) => hashed(hash::flow_hash(on, datagram.source, datagram.destination)),
        Policy::Replicate => unreachable!("replication uses every slot"),
        Policy::GelfMessage => match gelf_message(&frame[datagram.l4 + 8..][..datagram.in_packet]) {
            Some(message) => hashed(hash::message_hash(message)),
            None => next_slot(listener, history),
        },
    }
}

/// The reason why the sender's datagrams are dropped, if they are.
fn admission_verdict(
    listener: &ListenerPlan,
    history: &mut History,
    sender: IpAddr,
    datagrams: u64,
) -> Option<&'static str> {
    if !may_send(&listener.sources, sender) {
        return Some("source_denied");
    }
    let meter = listener.meter.as_ref()?;
    let spent = history.spent.entry((listener.id.0, first_bits(sender, meter.prefix))).or_default();
    if *spent >= meter.depth / meter.interval {
        return Some("rate_limited");
    }
    *spent += datagrams;
    None
}

/// The longest matching prefix decides; deny wins between equal ones. If none matches, a sender is allowed unless an allow list
/// exists.
fn may_send(sources: &SourceRules, sender: IpAddr) -> bool {
    let longest = |list: &[Prefix]| {
        let fits = |prefix: &&Prefix| first_bits(sender, prefix.length()) == prefix.address();
        list.iter().filter(fits).map(|prefix| prefix.length()).max()
    };
    match (longest(&sources.allow), longest(&sources.deny)) {
        (None, None) => sources.allow.is_empty(),
        (allow, deny) => allow > deny,
    }
}

/// Clears every bit of an address after its first `count`.
fn first_bits(address: IpAddr, count: u8) -> IpAddr {
    let cut = |octets: &mut [u8]| {
        for bit in usize::from(count)..octets.len() * 8 {
            octets[bit / 8] &= !(0x80 >> (bit % 8));
        }
    };
    match address {
        IpAddr::V4(v4) => {
            let mut octets = v4.octets();
            cut(&mut octets);
            octets.into()
        }
        IpAddr::V6(v6) => {
            let mut octets = v6.octets();
            cut(&mut octets);
            octets.into()
        }
    }
}

/// The message ID of a GELF chunk.
fn gelf_message(payload: &[u8]) -> Option<[u8; 8]> {
    payload.strip_prefix(&[0x1e, 0x0f])?.first_chunk().copied()
}

fn read(frame: &[u8]) -> Option<Datagram> {
    // As eth_type_trans: a frame is for this host if it has the MAC address of the receiving device (loopback: all zeros) or a group's.
    let mac = frame.get(..6)?;
    let to_multicast = mac[0] & 1 != 0;
    if mac != [0; 6] && !to_multicast {
        return None;
    }
    let datagram = match frame.get(12..14)? {
        [0x08, 0x00] => read_v4(frame),
        [0x86, 0xdd] => read_v6(frame),
        _ => None,
    };
    datagram.filter(|datagram| datagram.destination.ip().is_multicast() == to_multicast)
}

fn read_v4(frame: &[u8]) -> Option<Datagram> {
    let ip = &frame[14..];
    let header = ip.get(..20)?;
    let word = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    let ihl = usize::from(header[0] & 15) * 4;
    let total = usize::from(word(2));
    let source = Ipv4Addr::new(header[12], header[13], header[14], header[15]);
    let destination = Ipv4Addr::new(header[16], header[17], header[18], header[19]);
    let well_formed = header[0] >> 4 == 4
        && header[9] == 17
        && ihl >= 20
        && total >= ihl
        && total <= ip.len()
        && (ihl > 20 || sum(header, 0) == 0xffff);
    let martian = source.octets()[0] == 0 || source.is_loopback() || source.octets()[0] >= 224;
    if !well_formed || martian {
        return None;
    }
    let length = total - ihl;
    let (offset, more) = (usize::from(word(6) & 0x1fff) * 8, word(6) & 0x2000 != 0);
    let fragment = if offset > 0 || more { Some(parse_fragment(word(4).into(), offset, more, length)?) } else { None };
    let ends = (source.into(), destination.into());
    read_udp(
        frame,
        14 + ihl,
        length,
        Datagram { needs_socket: ihl > 20, ..without_udp_header(ends, header[8], fragment) },
    )
}

fn read_v6(frame: &[u8]) -> Option<Datagram> {
    let ip = &frame[14..];
    let header = ip.get(..48)?;
    let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
    let address = |at: usize| Ipv6Addr::from(<[u8; 16]>::try_from(&header[at..at + 16]).unwrap());
    let (source, destination) = (address(8), address(24));
    // Unspecified, loopback, and IPv4-mapped.
    let is_reserved = |address: Ipv6Addr| address.segments()[..4] == [0; 4];
    let well_formed = header[0] >> 4 == 6 && 40 + length <= ip.len();
    if !well_formed || source.is_multicast() || is_reserved(source) || is_reserved(destination) {
        return None;
    }
    let ends = (source.into(), destination.into());
    // A packet with a link-local source must not leave its link (RFC 4291).
    let bound = |datagram| Datagram { needs_socket: source.is_unicast_link_local(), ..datagram };
    match header[6] {
        17 => read_udp(frame, 54, length, bound(without_udp_header(ends, header[7], None))),
        44 if header[40] == 17 && length >= 8 => {
            let field = u16::from_be_bytes([header[42], header[43]]);
            let number = u32::from_be_bytes([header[44], header[45], header[46], header[47]]);
            let (offset, more) = (usize::from(field & 0xfff8), field & 1 != 0);
            // An atomic fragment (RFC 6946) is a whole datagram.
            let fragment = (offset > 0 || more).then(|| parse_fragment(number, offset, more, length - 8))??;
            read_udp(frame, 62, length - 8, bound(without_udp_header(ends, header[7], Some(fragment))))
        }
        _ => None,
    }
}

fn parse_fragment(number: u32, offset: usize, more: bool, length: usize) -> Option<Fragment> {
    let well_formed = length > 0 && offset + length <= 65_535 && (!more || length.is_multiple_of(8));
    well_formed.then_some(Fragment { number, offset, more, length, udp_header: [0; 8] })
}

/// A datagram whose UDP header has not been read.
fn without_udp_header((source, destination): (IpAddr, IpAddr), ttl: u8, fragment: Option<Fragment>) -> Datagram {
    Datagram {
        source: SocketAddr::new(source, 0),
        destination: SocketAddr::new(destination, 0),
        l4: 0,
        ttl,
        needs_socket: false,
        payload: 0,
        in_packet: 0,
        fragment,
    }
}

fn read_udp(frame: &[u8], l4: usize, room: usize, mut datagram: Datagram) -> Option<Datagram> {
    datagram.l4 = l4;
    if datagram.fragment.is_some_and(|fragment| fragment.offset > 0) {
        return Some(datagram);
    }
    let udp: [u8; 8] = frame.get(l4..l4 + 8)?.try_into().unwrap();
    let word = |at: usize| u16::from_be_bytes([udp[at], udp[at + 1]]);
    let length = usize::from(word(4));
    let ends_here = length <= room;
    if room < 8 || length < 8 || ends_here == datagram.fragment.is_some() {
        return None;
    }
    if datagram.source.is_ipv6() && word(6) == 0 {
        return None;
    }
    datagram.source.set_port(word(0));
    datagram.destination.set_port(word(2));
    datagram.payload = length - 8;
    datagram.in_packet = length.min(room) - 8;
    if let Some(fragment) = &mut datagram.fragment {
        fragment.udp_header = udp;
    }
    Some(datagram)
}

/// The frame as sent to a target.
pub fn sent(frame: &[u8], datagram: &Datagram, target: &PlanTarget, verdict: i32, ttl: u8) -> Vec<u8> {
    let mut packet = rewritten(frame, datagram, target.downstream.address, ttl);
    if let Delivery::Neighbour { macs: Some(MacPair { neighbour, own }), into_pod: true, .. } = target.delivery {
        packet[..6].copy_from_slice(&neighbour);
        packet[6..12].copy_from_slice(&own);
    } else if verdict == REDIRECT && datagram.destination.ip().is_multicast() {
        // The kernel resolves no neighbour for a frame to a group address.
        packet[..12].fill(0);
    }
    packet
}

/// The frame with its new destination. Checksums are updated incrementally, not recomputed: a receiver must still detect that a
/// datagram was damaged before it arrived.
fn rewritten(frame: &[u8], datagram: &Datagram, to: SocketAddr, ttl: u8) -> Vec<u8> {
    let mut packet = frame.to_vec();
    match to.ip() {
        IpAddr::V4(v4) => {
            packet[30..34].copy_from_slice(&v4.octets());
            packet[22] = ttl;
            // The checksummed words that changed: TTL with protocol, and the address.
            let changed = |frame: &[u8]| [&frame[22..24], &frame[30..34]].concat();
            let check = updated_checksum([frame[24], frame[25]], &changed(frame), &changed(&packet));
            packet[24..26].copy_from_slice(&check.to_be_bytes());
        }
        IpAddr::V6(v6) => {
            packet[38..54].copy_from_slice(&v6.octets());
            packet[21] = ttl;
        }
    }
    if datagram.fragment.is_some_and(|fragment| fragment.offset > 0) {
        return packet;
    }
    let at = datagram.l4;
    packet[at + 2..at + 4].copy_from_slice(&to.port().to_be_bytes());
    if packet[at + 6..at + 8] != [0, 0] {
        let covered = |to: SocketAddr| {
            let octets = match to.ip() {
                IpAddr::V4(v4) => v4.octets().to_vec(),
                IpAddr::V6(v6) => v6.octets().to_vec(),
            };
            [octets, to.port().to_be_bytes().to_vec()].concat()
        };
        let check = [packet[at + 6], packet[at + 7]];
        let check = match updated_checksum(check, &covered(datagram.destination), &covered(to)) {
            0 => 0xffff,
            check => check,
        };
        packet[at + 6..at + 8].copy_from_slice(&check.to_be_bytes());
    }
    packet
}

/// Updates a checksum after a change of the data it covers (RFC 1624).
fn updated_checksum(check: [u8; 2], before: &[u8], after: &[u8]) -> u16 {
    let words = [!u16::from_be_bytes(check), !sum(before, 0), sum(after, 0)];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
    !sum(&bytes, 0)
}
