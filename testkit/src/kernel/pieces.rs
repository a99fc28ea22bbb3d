//! The oracle's part about fragments.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use udp_fanout::testing::plan::{Plan, PlanTarget};

use super::oracle::{Datagram, Fate, History, Piece, SHOT, UNSPEC, Way, copies, judge, length, owner, sent, way};
use super::run::Gso;

/// Datagrams of which more fragments are to come, by sender, destination and number.
pub type Incomplete = BTreeMap<(IpAddr, IpAddr, u32), Known>;

/// What is known of one of them.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// The UDP header and the time to live, once the first fragment has come.
    first: Option<([u8; 8], u8)>,
    /// In which KiB fragments have begun.
    begun: BTreeSet<usize>,
    fresh: usize,
    all: usize,
    end: Option<usize>,
    destiny: Destiny,
}

/// Where its fragments go.
#[derive(Debug, Clone, Default)]
enum Destiny {
    #[default]
    Stack,
    Nowhere,
    To(PlanTarget),
    /// Copied to all downstreams of this listener.
    All(u32),
}

impl Known {
    /// Notes a fragment. True if it makes the datagram complete.
    fn note(&mut self, piece: Piece) -> bool {
        if self.begun.insert(piece.offset / 1024) {
            self.fresh += piece.length;
        }
        self.all += piece.length;
        if !piece.more {
            self.end = Some(piece.offset + piece.length);
        }
        self.end.is_some_and(|end| self.fresh >= end)
    }
}

fn key(datagram: &Datagram, piece: Piece) -> (IpAddr, IpAddr, u32) {
    (datagram.source.ip(), datagram.destination.ip(), piece.number)
}

fn is_listened_on(plan: &Plan, address: IpAddr) -> bool {
    plan.listeners.iter().any(|listener| listener.match_addresses.contains(&address))
}

/// A fragment with the ports.
pub fn first(plan: &Plan, history: &mut History, datagram: &Datagram, piece: Piece, frame: &[u8]) -> Fate {
    let before = history.incomplete.get(&key(datagram, piece)).cloned();
    let known_first = before.as_ref().and_then(|known| known.first);
    let disordered = before.as_ref().is_some_and(|known| known.first.is_none());
    let forwarded = before.as_ref().is_some_and(|known| matches!(known.destiny, Destiny::To(_) | Destiny::All(_)));
    let repeats = known_first == Some((piece.udp_header, datagram.ttl)) && !(datagram.has_options && forwarded);
    let mut known = before.filter(|_| disordered).unwrap_or_default();
    let fate = match owner(plan, datagram) {
        Some(_) if repeats => return follow(plan, history, datagram, piece, frame),
        Some(listener) => {
            let (fate, target) = judge(listener, history, datagram, frame, Gso::default(), disordered);
            known.destiny = match (&fate, target) {
                (Fate::Forwarded { .. }, Some(target)) => Destiny::To(target.clone()),
                (Fate::Dropped { .. }, _) => Destiny::Nowhere,
                (Fate::Copied { listener, .. }, _) => Destiny::All(*listener),
                _ => Destiny::Stack,
            };
            fate
        }
        None if is_listened_on(plan, datagram.destination.ip()) => Fate::Foreign,
        None => return Fate::Foreign,
    };
    known.first = Some((piece.udp_header, datagram.ttl));
    if known.note(piece) {
        history.incomplete.remove(&key(datagram, piece));
    } else {
        history.incomplete.insert(key(datagram, piece), known);
    }
    fate
}

/// A fragment without.
pub fn later(plan: &Plan, history: &mut History, datagram: &Datagram, piece: Piece, frame: &[u8]) -> Fate {
    if history.incomplete.contains_key(&key(datagram, piece)) {
        return follow(plan, history, datagram, piece, frame);
    }
    if !is_listened_on(plan, datagram.destination.ip()) {
        return Fate::Foreign;
    }
    history.incomplete.entry(key(datagram, piece)).or_default().note(piece);
    Fate::Fragment { verdict: UNSPEC, packet: frame.to_vec(), stray: true, lost: false }
}

fn follow(plan: &Plan, history: &mut History, datagram: &Datagram, piece: Piece, frame: &[u8]) -> Fate {
    let fate = |verdict, packet, lost| Fate::Fragment { verdict, packet, stray: false, lost };
    let lost = || fate(SHOT, frame.to_vec(), true);
    let known = history.incomplete.get_mut(&key(datagram, piece)).unwrap();
    if !matches!(known.destiny, Destiny::Stack) && known.all + piece.length > 2 * 65_535 {
        return lost();
    }
    let complete = known.note(piece);
    let destiny = known.destiny.clone();
    if complete {
        history.incomplete.remove(&key(datagram, piece));
    }
    match destiny {
        Destiny::Stack => fate(UNSPEC, frame.to_vec(), false),
        Destiny::Nowhere => fate(SHOT, frame.to_vec(), false),
        Destiny::All(id) => {
            let listener = plan.listeners.iter().find(|listener| listener.id.0 == id).unwrap();
            match copies(listener, history, datagram, frame) {
                Ok(copies) => Fate::Copied { listener: id, datagrams: 0, bytes: 0, copies },
                Err(_) => lost(),
            }
        }
        Destiny::To(target) => match way(&target, datagram, length(datagram)) {
            Way::Out(verdict, ttl) => fate(verdict, sent(frame, datagram, &target, verdict, ttl), false),
            Way::TooLong | Way::Nowhere(_) => lost(),
        },
    }
}
