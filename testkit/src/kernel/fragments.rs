//! The oracle's predictions for fragments.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use udp_fanout::testing::plan::{Plan, PlanTarget};

use super::oracle::{
    Datagram, DeliveryPath, Fragment, History, Outcome, SHOT, UNSPEC, copies, delivery_path, find_listener, length,
    predict_datagram, sent,
};
use super::run::Gso;

/// Incomplete datagrams, by source address, destination address and IP identification.
pub type Incomplete = BTreeMap<(IpAddr, IpAddr, u32), FragmentState>;

/// State of an incomplete datagram.
#[derive(Debug, Clone, Default)]
pub struct FragmentState {
    /// UDP header and TTL of the first fragment; none until it has arrived.
    first: Option<([u8; 8], u8)>,
    /// The KiB of the datagram in which a fragment has started.
    begun: BTreeSet<usize>,
    /// Bytes of fragments that are not repeats.
    unique: usize,
    /// Bytes of all fragments.
    total: usize,
    /// Length of the datagram in bytes, once its last fragment has arrived.
    end: Option<usize>,
    fragment_verdict: FragmentVerdict,
}

/// What happens to the fragments of a datagram.
#[derive(Debug, Clone, Default)]
enum FragmentVerdict {
    #[default]
    Stack,
    Drop,
    Forward(PlanTarget),
    /// Copied to all downstreams of the listener with this ID.
    Replicate(u32),
}

impl FragmentState {
    /// Adds a fragment. True if the datagram is now complete.
    fn add(&mut self, fragment: Fragment) -> bool {
        if self.begun.insert(fragment.offset / 1024) {
            self.unique += fragment.length;
        }
        self.total += fragment.length;
        if !fragment.more {
            self.end = Some(fragment.offset + fragment.length);
        }
        self.end.is_some_and(|end| self.unique >= end)
    }
}

fn key(datagram: &Datagram, fragment: Fragment) -> (IpAddr, IpAddr, u32) {
    (datagram.source.ip(), datagram.destination.ip(), fragment.number)
}

fn is_listened_on(plan: &Plan, address: IpAddr) -> bool {
    plan.listeners.iter().any(|listener| listener.match_addresses.contains(&address))
}

/// Predicts the outcome for a first fragment, which has the UDP header.
pub fn predict_first(
    plan: &Plan,
    history: &mut History,
    datagram: &Datagram,
    fragment: Fragment,
    frame: &[u8],
) -> Outcome {
    let before = history.incomplete.get(&key(datagram, fragment)).cloned();
    let known_first = before.as_ref().and_then(|known| known.first);
    let out_of_order = before.as_ref().is_some_and(|known| known.first.is_none());
    let forwarded = before.as_ref().is_some_and(|known| {
        matches!(known.fragment_verdict, FragmentVerdict::Forward(_) | FragmentVerdict::Replicate(_))
    });
    let repeats = known_first == Some((fragment.udp_header, datagram.ttl)) && !(datagram.needs_socket && forwarded);
    let mut known = before.filter(|_| out_of_order).unwrap_or_default();
    let outcome = match find_listener(plan, datagram) {
        Some(_) if repeats => return predict_known(plan, history, datagram, fragment, frame),
        Some(listener) => {
            let (outcome, target) = predict_datagram(listener, history, datagram, frame, Gso::default(), out_of_order);
            known.fragment_verdict = match (&outcome, target) {
                (Outcome::Forwarded { .. }, Some(target)) => FragmentVerdict::Forward(target.clone()),
                (Outcome::Dropped { .. }, _) => FragmentVerdict::Drop,
                (Outcome::Copied { listener, .. }, _) => FragmentVerdict::Replicate(*listener),
                _ => FragmentVerdict::Stack,
            };
            outcome
        }
        None if is_listened_on(plan, datagram.destination.ip()) => Outcome::Foreign,
        None => return Outcome::Foreign,
    };
    known.first = Some((fragment.udp_header, datagram.ttl));
    if known.add(fragment) {
        history.incomplete.remove(&key(datagram, fragment));
    } else {
        history.incomplete.insert(key(datagram, fragment), known);
    }
    outcome
}

/// Predicts the outcome for a later fragment.
pub fn predict_later(
    plan: &Plan,
    history: &mut History,
    datagram: &Datagram,
    fragment: Fragment,
    frame: &[u8],
) -> Outcome {
    if history.incomplete.contains_key(&key(datagram, fragment)) {
        return predict_known(plan, history, datagram, fragment, frame);
    }
    if !is_listened_on(plan, datagram.destination.ip()) {
        return Outcome::Foreign;
    }
    history.incomplete.entry(key(datagram, fragment)).or_default().add(fragment);
    Outcome::Fragment { verdict: UNSPEC, packet: frame.to_vec(), stray: true, lost: false }
}

/// Predicts the outcome for a fragment of a datagram with known state.
fn predict_known(plan: &Plan, history: &mut History, datagram: &Datagram, fragment: Fragment, frame: &[u8]) -> Outcome {
    let outcome = |verdict, packet, lost| Outcome::Fragment { verdict, packet, stray: false, lost };
    let lost = || outcome(SHOT, frame.to_vec(), true);
    let known = history.incomplete.get_mut(&key(datagram, fragment)).unwrap();
    if !matches!(known.fragment_verdict, FragmentVerdict::Stack) && known.total + fragment.length > 2 * 65_535 {
        return lost();
    }
    let complete = known.add(fragment);
    let fragment_verdict = known.fragment_verdict.clone();
    if complete {
        history.incomplete.remove(&key(datagram, fragment));
    }
    match fragment_verdict {
        FragmentVerdict::Stack => outcome(UNSPEC, frame.to_vec(), false),
        FragmentVerdict::Drop => outcome(SHOT, frame.to_vec(), false),
        FragmentVerdict::Replicate(id) => {
            let listener = plan.listeners.iter().find(|listener| listener.id.0 == id).unwrap();
            match copies(listener, history, datagram, frame) {
                Ok(copies) => Outcome::Copied { listener: id, datagrams: 0, bytes: 0, copies },
                Err(_) => lost(),
            }
        }
        FragmentVerdict::Forward(target) => match delivery_path(&target, datagram, length(datagram)) {
            DeliveryPath::Send(verdict, ttl) => outcome(verdict, sent(frame, datagram, &target, verdict, ttl), false),
            DeliveryPath::TooLong | DeliveryPath::Drop(_) => lost(),
        },
    }
}
