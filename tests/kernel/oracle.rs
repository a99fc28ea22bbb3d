//! A plain-Rust model of the TC program: what must become of a frame. Written from the design, not from the C.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use udp_fanout::admission::{Prefix, Sources};
use udp_fanout::model::Policy;
use udp_fanout::plan::{Delivery, ListenerPlan, Plan, hash};

use crate::packet::{pseudo_sum, sum};
use crate::run::Gso;

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
}

/// A datagram as the oracle reads it.
struct Datagram {
    source: SocketAddr,
    destination: SocketAddr,
    l4: usize,
    ttl: u8,
    has_options: bool,
    payload: usize,
}

/// What earlier datagrams have left behind.
#[derive(Debug, Default, Clone)]
pub struct History {
    /// Which place of a listener's round is next. None until the first datagram has shown where it started.
    pub rounds: BTreeMap<u32, usize>,
    /// What senders have taken out of their buckets, which are so slow that no token comes back during a test.
    pub spent: BTreeMap<(u32, IpAddr), u64>,
}

pub fn fate(plan: &Plan, history: &mut History, frame: &[u8], gso: Gso) -> Fate {
    let Some(datagram) = read(frame) else { return Fate::Foreign };
    let Some(listener) = plan.listeners.iter().find(|listener| matches(listener, datagram.destination)) else {
        return Fate::Foreign;
    };
    let id = listener.id.0;
    let bytes = datagram.payload as u64;
    let datagrams = match gso {
        Gso { size: 0, .. } => 1,
        Gso { segments: 0, size } => bytes.div_ceil(u64::from(size)).max(1),
        Gso { segments, .. } => u64::from(segments),
    };
    let dropped = |reason| Fate::Dropped { listener: id, datagrams, bytes, reason };
    if let Some(reason) = refusal(listener, history, datagram.source.ip(), datagrams) {
        return dropped(reason);
    }
    if datagram.has_options || listener.socket_only.is_some() {
        return Fate::Passed { listener: id, datagrams, bytes };
    }
    if listener.table.is_empty() {
        return dropped("no_downstream");
    }
    let slots = listener.table.len();
    let mut turn = || {
        let place = history.rounds.entry(id).or_default();
        std::mem::replace(place, (*place + 1) % slots)
    };
    let hashed = |hash| hash::place(hash, slots as u32) as usize;
    let place = match listener.policy {
        Policy::RoundRobin => turn(),
        Policy::Hash(on) => hashed(hash::flow_hash(on, datagram.source, datagram.destination)),
        // Copies go out as clones, which a test run cannot show; namespaces test them.
        Policy::Replicate => unreachable!("no replicating listener in these plans"),
        Policy::GelfMessage => match gelf_message(&frame[datagram.l4 + 8..][..datagram.payload]) {
            Some(message) => hashed(hash::message_hash(message)),
            None => turn(),
        },
    };
    let target = &listener.targets[listener.table[place] as usize];
    let to = target.downstream.address;
    let (verdict, hop) = match target.delivery {
        Delivery::Unreachable => return dropped("no_route"),
        Delivery::Local => (UNSPEC, 0),
        Delivery::Neighbour { mtu, .. } | Delivery::Bare { mtu, .. } => {
            if datagram.ttl <= 1 {
                return dropped("ttl_expired");
            }
            let carried = if gso.size > 0 { datagram.payload.min(gso.size as usize) } else { datagram.payload };
            if datagram.l4 - 14 + 8 + carried > mtu as usize {
                return Fate::Passed { listener: id, datagrams, bytes };
            }
            (REDIRECT, 1)
        }
    };
    let packet = rewritten(frame, &datagram, to, hop);
    Fate::Forwarded { listener: id, datagrams, bytes, to, verdict, packet }
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
fn may_send(sources: &Sources, sender: IpAddr) -> bool {
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

fn matches(listener: &ListenerPlan, destination: SocketAddr) -> bool {
    listener.bind.port() == destination.port() && listener.match_addresses.contains(&destination.ip())
}

fn read(frame: &[u8]) -> Option<Datagram> {
    // eth_type_trans: addressed to the receiving device (the loopback one, all zeros), else not for this host.
    if frame.get(..6)? != [0; 6] {
        return None;
    }
    match frame.get(12..14)? {
        [0x08, 0x00] => read_v4(frame),
        [0x86, 0xdd] => read_v6(frame),
        _ => None,
    }
}

fn read_v4(frame: &[u8]) -> Option<Datagram> {
    let ip = &frame[14..];
    let header = ip.get(..20)?;
    let ihl = usize::from(header[0] & 15) * 4;
    let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff;
    let source = Ipv4Addr::new(header[12], header[13], header[14], header[15]);
    let destination = Ipv4Addr::new(header[16], header[17], header[18], header[19]);
    let well_formed = header[0] >> 4 == 4
        && header[9] == 17
        && ihl >= 20
        && total >= ihl + 8
        && total <= ip.len()
        && fragment == 0
        && (ihl > 20 || sum(header, 0) == 0xffff);
    let martian = source.octets()[0] == 0 || source.is_loopback() || source.octets()[0] >= 224;
    if !well_formed || martian {
        return None;
    }
    read_udp(frame, 14 + ihl, total - ihl, header[8], source.into(), destination.into(), ihl > 20)
}

fn read_v6(frame: &[u8]) -> Option<Datagram> {
    let ip = &frame[14..];
    let header = ip.get(..40)?;
    let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
    let address = |at: usize| Ipv6Addr::from(<[u8; 16]>::try_from(&header[at..at + 16]).unwrap());
    let (source, destination) = (address(8), address(24));
    let well_formed = header[0] >> 4 == 6 && header[6] == 17 && length >= 8 && 40 + length <= ip.len();
    if !well_formed || source.is_multicast() || source.is_loopback() || source.is_unspecified() {
        return None;
    }
    if ip[46..48] == [0, 0] {
        return None;
    }
    read_udp(frame, 54, length, header[7], source.into(), destination.into(), false)
}

fn read_udp(
    frame: &[u8],
    l4: usize,
    room: usize,
    ttl: u8,
    source: IpAddr,
    destination: IpAddr,
    has_options: bool,
) -> Option<Datagram> {
    let udp = frame.get(l4..l4 + 8)?;
    let word = |at: usize| u16::from_be_bytes([udp[at], udp[at + 1]]);
    let length = usize::from(word(4));
    if length < 8 || length > room {
        return None;
    }
    Some(Datagram {
        source: SocketAddr::new(source, word(0)),
        destination: SocketAddr::new(destination, word(2)),
        l4,
        ttl,
        has_options,
        payload: length - 8,
    })
}

/// The frame with its new destination. Checksums are moved by the difference, not made right: a datagram that was
/// damaged on its way must still be recognised as damaged by its receiver.
fn rewritten(frame: &[u8], datagram: &Datagram, to: SocketAddr, hop: u8) -> Vec<u8> {
    let mut packet = frame.to_vec();
    let udp_len = datagram.payload + 8;
    let old = pseudo_sum(datagram.source.ip(), datagram.destination.ip(), udp_len);
    let new = pseudo_sum(datagram.source.ip(), to.ip(), udp_len);
    match to.ip() {
        IpAddr::V4(v4) => {
            packet[30..34].copy_from_slice(&v4.octets());
            packet[22] -= hop;
            packet[24..26].fill(0);
            let check = !sum(&packet[14..34], 0);
            packet[24..26].copy_from_slice(&check.to_be_bytes());
        }
        IpAddr::V6(v6) => {
            packet[38..54].copy_from_slice(&v6.octets());
            packet[21] -= hop;
        }
    }
    let at = datagram.l4;
    packet[at + 2..at + 4].copy_from_slice(&to.port().to_be_bytes());
    let check = u16::from_be_bytes([packet[at + 6], packet[at + 7]]);
    if check != 0 {
        let words = [!check, !sum(&[], old), sum(&[], new), !datagram.destination.port(), to.port()];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        let moved = match !sum(&bytes, 0) {
            0 => 0xffff,
            check => check,
        };
        packet[at + 6..at + 8].copy_from_slice(&moved.to_be_bytes());
    }
    packet
}
