//! A plain-Rust model of the TC program: what must become of a frame. Written from the design, not from the C.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use udp_fanout::testing::admission::{Prefix, SourceRules};
use udp_fanout::testing::model::Policy;
use udp_fanout::testing::plan::{Delivery, ListenerPlan, MacPair, Plan, PlanTarget, hash};

use super::packet::sum;
use super::pieces::{self, Incomplete};
use super::run::Gso;

pub const UNSPEC: i32 = -1;
pub const SHOT: i32 = 2;
pub const REDIRECT: i32 = 7;

/// What must happen to a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// Not ours: untouched, uncounted.
    Foreign,
    /// Ours, left to the socket: untouched.
    Passed { listener: u32, datagrams: u64, bytes: u64 },
    /// Ours, dropped for this reason.
    Dropped { listener: u32, datagrams: u64, bytes: u64, reason: &'static str },
    /// Ours, forwarded: up the stack or out.
    Forwarded { listener: u32, datagrams: u64, bytes: u64, to: SocketAddr, verdict: i32, packet: Vec<u8> },
    /// Ours, copied to every downstream whose sample it is in. A later fragment has no datagrams and no bytes.
    Copied { listener: u32, datagrams: u64, bytes: u64, copies: Copies },
    /// A fragment of which the first has been counted for the datagram: in no listener's books.
    Fragment { verdict: i32, packet: Vec<u8>, stray: bool, lost: bool },
}

/// The copies of a datagram, in the order in which they are sent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Copies {
    /// Receivers of all copies, the last one's included.
    pub to: Vec<SocketAddr>,
    /// Clones that leave by their link.
    pub out: Vec<Vec<u8>>,
    /// Clones that are sent into the ingress of the link that the datagram arrived on.
    pub reinjected: Vec<Vec<u8>>,
    /// The packet itself, unless its downstream gets no copy.
    pub last: Option<Vec<u8>>,
    /// Copies that no route leads to.
    pub unreachable: u64,
}

/// A datagram as the oracle reads it, or a fragment of one.
pub struct Datagram {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub l4: usize,
    pub ttl: u8,
    /// Only the socket can do it justice: it has options, or a source that must not be forwarded.
    pub has_options: bool,
    /// As the UDP header says; of a later fragment 0.
    pub payload: usize,
    /// Bytes behind the UDP header in this packet.
    pub here: usize,
    pub piece: Option<Piece>,
}

/// Which part of a datagram a fragment is.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    pub number: u32,
    pub offset: usize,
    pub more: bool,
    /// Bytes behind the IP headers.
    pub length: usize,
    /// Of a first fragment.
    pub udp_header: [u8; 8],
}

/// What earlier datagrams have left behind.
#[derive(Debug, Default, Clone)]
pub struct History {
    /// Which place of a listener's round is next. None until the first datagram has shown where it started.
    pub rounds: BTreeMap<u32, usize>,
    /// What senders have taken out of their buckets, which are so slow that no token comes back during a test.
    pub spent: BTreeMap<(u32, IpAddr), u64>,
    /// Datagrams of which more fragments are to come. Nothing is forgotten for lack of time or room during a test.
    pub incomplete: Incomplete,
}

/// What must become of what a test run shows the program. It comes by the loopback device, which the plan may say has no frames.
pub fn fate(plan: &Plan, history: &mut History, shown: &[u8], gso: Gso) -> Fate {
    let loopback = |listener: &ListenerPlan| listener.l3_ingress.contains(&1);
    match framed(shown).filter(|_| plan.listeners.iter().any(|listener| loopback(listener))) {
        Some(frame) => fate_of_frame(plan, history, &frame, gso).without_frame(),
        None => fate_of_frame(plan, history, shown, gso),
    }
}

/// A frame around what begins like an IP packet. A test run takes the protocol from where it is in a frame. The addresses are
/// such as the frame of such a packet would have.
pub fn framed(shown: &[u8]) -> Option<Vec<u8>> {
    let protocol = shown.get(12..14)?;
    let (version, group) = match protocol {
        [0x08, 0x00] => (4, shown.get(16)? >> 4 == 14),
        [0x86, 0xdd] => (6, *shown.get(24)? == 0xff),
        _ => return None,
    };
    let mut addresses = [0; 12];
    addresses[0] = u8::from(group);
    (shown[0] >> 4 == version).then(|| [&addresses, protocol, shown].concat())
}

impl Fate {
    /// The same for a packet that came without a frame. What is sent out of a link that wants one has got one.
    fn without_frame(mut self) -> Fate {
        if let Fate::Forwarded { verdict, packet, .. } | Fate::Fragment { verdict, packet, .. } = &mut self
            && *verdict != REDIRECT
        {
            packet.drain(..14);
        }
        if let Fate::Copied { copies, .. } = &mut self {
            // The frame that it has got has no addresses, whoever it is for.
            copies.reinjected.iter_mut().for_each(|packet| packet[..12].fill(0));
        }
        self
    }
}

fn fate_of_frame(plan: &Plan, history: &mut History, frame: &[u8], gso: Gso) -> Fate {
    let Some(datagram) = read(frame) else { return Fate::Foreign };
    match datagram.piece {
        None => match owner(plan, &datagram) {
            Some(listener) => judge(listener, history, &datagram, frame, gso, false).0,
            None => Fate::Foreign,
        },
        Some(piece) if piece.offset > 0 => pieces::later(plan, history, &datagram, piece, frame),
        Some(piece) => pieces::first(plan, history, &datagram, piece, frame),
    }
}

/// The listener whose a datagram is.
pub fn owner<'a>(plan: &'a Plan, datagram: &Datagram) -> Option<&'a ListenerPlan> {
    let to = datagram.destination;
    let is_for =
        |listener: &&ListenerPlan| listener.bind.port() == to.port() && listener.match_addresses.contains(&to.ip());
    plan.listeners.iter().map(AsRef::as_ref).find(is_for)
}

/// What becomes of a listener's datagram, whole or its first fragment, and the target chosen for it. `disordered` if other
/// fragments have gone up the stack before it.
pub fn judge<'a>(
    listener: &'a ListenerPlan,
    history: &mut History,
    datagram: &Datagram,
    frame: &[u8],
    gso: Gso,
    disordered: bool,
) -> (Fate, Option<&'a PlanTarget>) {
    let id = listener.id.0;
    let bytes = datagram.payload as u64;
    let datagrams = match gso {
        Gso { size: 0, .. } => 1,
        Gso { segments: 0, size } => bytes.div_ceil(u64::from(size)).max(1),
        Gso { segments, .. } => u64::from(segments),
    };
    let dropped = |reason| (Fate::Dropped { listener: id, datagrams, bytes, reason }, None);
    let passed = (Fate::Passed { listener: id, datagrams, bytes }, None);
    if let Some(reason) = refusal(listener, history, datagram.source.ip(), datagrams) {
        return dropped(reason);
    }
    if datagram.has_options || disordered || listener.socket_only.is_some() {
        return passed;
    }
    if listener.table.is_empty() {
        return dropped("no_downstream");
    }
    if listener.policy == Policy::Replicate {
        return match copies(listener, history, datagram, frame) {
            Ok(copies) => (Fate::Copied { listener: id, datagrams, bytes, copies }, None),
            Err(Way::TooLong) => passed,
            Err(_) => dropped("ttl_expired"),
        };
    }
    let target = &listener.targets[listener.table[place(listener, history, datagram, frame)] as usize];
    let longest = match gso.size {
        0 => length(datagram),
        size => datagram.l4 - 14 + 8 + datagram.payload.min(size as usize),
    };
    match way(target, datagram, longest) {
        Way::Out(verdict, ttl) => {
            let packet = sent(frame, datagram, target, verdict, ttl);
            let to = target.downstream.address;
            (Fate::Forwarded { listener: id, datagrams, bytes, to, verdict, packet }, Some(target))
        }
        Way::TooLong => passed,
        Way::Nowhere(reason) => dropped(reason),
    }
}

/// The copies of a datagram to all downstreams, or why there are none.
pub fn copies(
    listener: &ListenerPlan,
    history: &mut History,
    datagram: &Datagram,
    frame: &[u8],
) -> Result<Copies, Way> {
    let group = datagram.destination.ip().is_multicast();
    let ttl = if group { 64 } else { datagram.ttl.saturating_sub(1) };
    if datagram.ttl <= 1 && !group {
        return Err(Way::Nowhere("ttl_expired"));
    }
    let narrowest = listener.targets.iter().filter_map(|target| match target.delivery {
        Delivery::Neighbour { mtu, .. } | Delivery::L3Device { mtu, .. } => Some(mtu as usize),
        Delivery::Local | Delivery::Unreachable => None,
    });
    if narrowest.min().is_some_and(|mtu| length(datagram) > mtu) {
        return Err(Way::TooLong);
    }
    let slots = listener.table.len();
    let start = turn(listener, history);
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
            // The kernel is to find the neighbour.
            _ => copies.reinjected.push(packet),
        }
    }
    Ok(copies)
}

/// True if what a test run shows the program is for a listener that replicates.
pub fn is_replicated(plan: &Plan, shown: &[u8]) -> bool {
    let frame = framed(shown).unwrap_or_else(|| shown.to_vec());
    let datagram = read(&frame);
    let listener = datagram.as_ref().and_then(|datagram| owner(plan, datagram));
    listener.is_some_and(|listener| listener.policy == Policy::Replicate)
}

/// The next place of a listener's round.
fn turn(listener: &ListenerPlan, history: &mut History) -> usize {
    let place = history.rounds.entry(listener.id.0).or_default();
    std::mem::replace(place, (*place + 1) % listener.table.len())
}

/// The IP packet's length.
pub fn length(datagram: &Datagram) -> usize {
    match datagram.piece {
        Some(Piece { offset: 1.., length, .. }) => datagram.l4 - 14 + length,
        _ => datagram.l4 - 14 + 8 + datagram.here,
    }
}

/// How a packet gets to a target.
pub enum Way {
    /// With this verdict and time to live.
    Out(i32, u8),
    TooLong,
    Nowhere(&'static str),
}

/// The way of a packet of which the longest part has this length.
pub fn way(target: &PlanTarget, datagram: &Datagram, length: usize) -> Way {
    // How far a group reaches says nothing about a single receiver.
    let group = datagram.destination.ip().is_multicast();
    match target.delivery {
        Delivery::Unreachable => Way::Nowhere("no_route"),
        Delivery::Local => Way::Out(UNSPEC, datagram.ttl),
        Delivery::Neighbour { .. } | Delivery::L3Device { .. } if datagram.ttl <= 1 && !group => {
            Way::Nowhere("ttl_expired")
        }
        Delivery::Neighbour { mtu, .. } | Delivery::L3Device { mtu, .. } if length > mtu as usize => Way::TooLong,
        Delivery::Neighbour { .. } | Delivery::L3Device { .. } if group => Way::Out(REDIRECT, 64),
        Delivery::Neighbour { .. } | Delivery::L3Device { .. } => Way::Out(REDIRECT, datagram.ttl - 1),
    }
}

/// The place in the table that the policy says.
fn place(listener: &ListenerPlan, history: &mut History, datagram: &Datagram, frame: &[u8]) -> usize {
    let slots = listener.table.len();
    let hashed = |hash| hash::table_slot(hash, slots as u32) as usize;
    match listener.policy {
        Policy::RoundRobin => turn(listener, history),
        Policy::Hash(on) => hashed(hash::flow_hash(on, datagram.source, datagram.destination)),
        Policy::Replicate => unreachable!("all places get a copy"),
        Policy::GelfMessage => match gelf_message(&frame[datagram.l4 + 8..][..datagram.here]) {
            Some(message) => hashed(hash::message_hash(message)),
            None => turn(listener, history),
        },
    }
}

/// Why the sender's datagrams are not taken.
fn refusal(listener: &ListenerPlan, history: &mut History, sender: IpAddr, datagrams: u64) -> Option<&'static str> {
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

/// The rule in words: the longest prefix decides, of two alike the one that denies; without any, everybody may send
/// unless some are allowed to.
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

/// The address with zeros behind its first bits.
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
    // eth_type_trans: addressed to the receiving device (the loopback one, all zeros) or a group, else not for this host.
    let mac = frame.get(..6)?;
    let to_group = mac[0] & 1 != 0;
    if mac != [0; 6] && !to_group {
        return None;
    }
    let datagram = match frame.get(12..14)? {
        [0x08, 0x00] => read_v4(frame),
        [0x86, 0xdd] => read_v6(frame),
        _ => None,
    };
    datagram.filter(|datagram| datagram.destination.ip().is_multicast() == to_group)
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
    let piece = if offset > 0 || more { Some(piece(word(4).into(), offset, more, length)?) } else { None };
    let ends = (source.into(), destination.into());
    read_udp(frame, 14 + ihl, length, Datagram { has_options: ihl > 20, ..headless(ends, header[8], piece) })
}

fn read_v6(frame: &[u8]) -> Option<Datagram> {
    let ip = &frame[14..];
    let header = ip.get(..48)?;
    let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
    let address = |at: usize| Ipv6Addr::from(<[u8; 16]>::try_from(&header[at..at + 16]).unwrap());
    let (source, destination) = (address(8), address(24));
    // Unspecified, loopback, and IPv4 in IPv6 notation.
    let not_of_the_wire = |address: Ipv6Addr| address.segments()[..4] == [0; 4];
    let well_formed = header[0] >> 4 == 6 && 40 + length <= ip.len();
    if !well_formed || source.is_multicast() || not_of_the_wire(source) || not_of_the_wire(destination) {
        return None;
    }
    let ends = (source.into(), destination.into());
    // An address that means nothing beyond its link must not leave it.
    let bound = |datagram| Datagram { has_options: source.is_unicast_link_local(), ..datagram };
    match header[6] {
        17 => read_udp(frame, 54, length, bound(headless(ends, header[7], None))),
        44 if header[40] == 17 && length >= 8 => {
            let field = u16::from_be_bytes([header[42], header[43]]);
            let number = u32::from_be_bytes([header[44], header[45], header[46], header[47]]);
            let (offset, more) = (usize::from(field & 0xfff8), field & 1 != 0);
            // One that is the whole is no fragment to follow.
            let piece = (offset > 0 || more).then(|| piece(number, offset, more, length - 8))??;
            read_udp(frame, 62, length - 8, bound(headless(ends, header[7], Some(piece))))
        }
        _ => None,
    }
}

fn piece(number: u32, offset: usize, more: bool, length: usize) -> Option<Piece> {
    let well_formed = length > 0 && offset + length <= 65_535 && (!more || length.is_multiple_of(8));
    well_formed.then_some(Piece { number, offset, more, length, udp_header: [0; 8] })
}

/// What is known without the UDP header.
fn headless((source, destination): (IpAddr, IpAddr), ttl: u8, piece: Option<Piece>) -> Datagram {
    Datagram {
        source: SocketAddr::new(source, 0),
        destination: SocketAddr::new(destination, 0),
        l4: 0,
        ttl,
        has_options: false,
        payload: 0,
        here: 0,
        piece,
    }
}

fn read_udp(frame: &[u8], l4: usize, room: usize, mut datagram: Datagram) -> Option<Datagram> {
    datagram.l4 = l4;
    if datagram.piece.is_some_and(|piece| piece.offset > 0) {
        return Some(datagram);
    }
    let udp: [u8; 8] = frame.get(l4..l4 + 8)?.try_into().unwrap();
    let word = |at: usize| u16::from_be_bytes([udp[at], udp[at + 1]]);
    let length = usize::from(word(4));
    let ends_here = length <= room;
    if room < 8 || length < 8 || ends_here == datagram.piece.is_some() {
        return None;
    }
    if datagram.source.is_ipv6() && word(6) == 0 {
        return None;
    }
    datagram.source.set_port(word(0));
    datagram.destination.set_port(word(2));
    datagram.payload = length - 8;
    datagram.here = length.min(room) - 8;
    if let Some(piece) = &mut datagram.piece {
        piece.udp_header = udp;
    }
    Some(datagram)
}

/// The frame as it goes to a target.
pub fn sent(frame: &[u8], datagram: &Datagram, target: &PlanTarget, verdict: i32, ttl: u8) -> Vec<u8> {
    let mut packet = rewritten(frame, datagram, target.downstream.address, ttl);
    if let Delivery::Neighbour { macs: Some(MacPair { neighbour, own }), into_pod: true, .. } = target.delivery {
        packet[..6].copy_from_slice(&neighbour);
        packet[6..12].copy_from_slice(&own);
    } else if verdict == REDIRECT && datagram.destination.ip().is_multicast() {
        // The kernel, which fills in a neighbour's address, does so for no frame to a group.
        packet[..12].fill(0);
    }
    packet
}

/// The frame with its new destination. Checksums are moved by the difference, not made right: a datagram that was
/// damaged on its way must still be recognised as damaged by its receiver.
fn rewritten(frame: &[u8], datagram: &Datagram, to: SocketAddr, ttl: u8) -> Vec<u8> {
    let mut packet = frame.to_vec();
    match to.ip() {
        IpAddr::V4(v4) => {
            packet[30..34].copy_from_slice(&v4.octets());
            packet[22] = ttl;
            // All that has changed: time to live and protocol, and the address.
            let changed = |frame: &[u8]| [&frame[22..24], &frame[30..34]].concat();
            let check = moved([frame[24], frame[25]], &changed(frame), &changed(&packet));
            packet[24..26].copy_from_slice(&check.to_be_bytes());
        }
        IpAddr::V6(v6) => {
            packet[38..54].copy_from_slice(&v6.octets());
            packet[21] = ttl;
        }
    }
    if datagram.piece.is_some_and(|piece| piece.offset > 0) {
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
        let check = match moved(check, &covered(datagram.destination), &covered(to)) {
            0 => 0xffff,
            check => check,
        };
        packet[at + 6..at + 8].copy_from_slice(&check.to_be_bytes());
    }
    packet
}

/// A checksum after what it covers has changed (RFC 1624).
fn moved(check: [u8; 2], before: &[u8], after: &[u8]) -> u16 {
    let words = [!u16::from_be_bytes(check), !sum(before, 0), sum(after, 0)];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
    !sum(&bytes, 0)
}
