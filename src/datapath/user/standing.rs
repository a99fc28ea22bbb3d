//! What a worker knows about its downstreams from the errors that came back.
//!
//! An ICMP error arrives after its datagram has been counted as forwarded. Counters never go down, so the worker notes
//! a debt instead, and the next datagram sent to the same downstream is counted under the error's reason in its stead:
//! over time the sums are exact. A downstream with a recent error is also *troubled*, and its datagrams take a sending
//! socket apart from everyone else's (see `lane`).
//!
//! A route may not take messages that the kernel is to cut apart: its device cannot, or each of the datagrams is longer
//! than its MTU. What is sent to that downstream then goes out one by one for a while.

use std::time::{Duration, Instant};

use super::table::Table;
use crate::model::DropReason;

/// How long a downstream counts as troubled after an error. Longer than the three seconds after which the kernel gives
/// up asking for a dead neighbour's address and reports it.
const TROUBLE: Duration = Duration::from_secs(10);
/// How long a downstream's datagrams go out one by one before it is tried again whether they need to.
const APART: Duration = Duration::from_secs(10);

/// The standing of every downstream of a table, by index.
#[derive(Debug)]
pub struct Standing {
    targets: Box<[Target]>,
    /// Debts of all downstreams.
    owed: u64,
    /// When the last of what is noted, apart from debts, is over.
    noted_until: Option<Instant>,
}

#[derive(Debug, Clone, Default)]
struct Target {
    owed: [u32; DropReason::COUNT],
    troubled_until: Option<Instant>,
    /// The longest datagrams that can share a message, and until when longer ones are not tried.
    apart: Option<(u32, Instant)>,
}

impl Standing {
    /// Everyone in good standing.
    pub fn new(targets: usize) -> Self {
        Standing { targets: vec![Target::default(); targets].into(), owed: 0, noted_until: None }
    }

    /// The standing under a new table of those who were in the old one.
    pub fn moved(&self, from: &Table, to: &Table) -> Self {
        let mut moved = Standing::new(to.addresses().len());
        if self.owed == 0 && self.noted_until.is_none() {
            return moved;
        }
        for (target, address) in self.targets.iter().zip(from.addresses()) {
            if let Some(index) = to.target(&(address.ip(), address.port())) {
                moved.owed += target.owed.iter().map(|&n| u64::from(n)).sum::<u64>();
                let apart_until = target.apart.map(|(_, until)| until);
                moved.noted_until = moved.noted_until.max(target.troubled_until).max(apart_until);
                moved.targets[index as usize] = target.clone();
            }
        }
        moved
    }

    /// Notes that so many datagrams, already counted as forwarded, were lost after all.
    pub fn charge(&mut self, target: u32, datagrams: u32, reason: DropReason, now: Instant) {
        let owed = &mut self.targets[target as usize].owed[reason as usize];
        if let Some(more) = owed.checked_add(datagrams) {
            *owed = more;
            self.owed += u64::from(datagrams);
        }
        self.trouble(target, now);
    }

    /// True if any downstream has a debt.
    pub fn owes(&self) -> bool {
        self.owed > 0
    }

    /// Notes an error.
    pub fn trouble(&mut self, target: u32, now: Instant) {
        let until = Some(now + TROUBLE);
        self.targets[target as usize].troubled_until = until;
        self.noted_until = self.noted_until.max(until);
    }

    /// Notes that datagrams of more than `most` bytes cannot share a message on their way to this downstream.
    pub fn keep_apart(&mut self, target: u32, most: u32, now: Instant) {
        let until = now + APART;
        self.targets[target as usize].apart = Some((most, until));
        self.noted_until = self.noted_until.max(Some(until));
    }

    /// The longest datagrams for a downstream that can share a message, in bytes.
    pub fn most_joined(&self, target: u32, now: Instant) -> u32 {
        self.targets[target as usize].apart.filter(|&(_, until)| now < until).map_or(u32::MAX, |(most, _)| most)
    }

    /// Pays one debt of a downstream, if it has any: the datagram just sent is to be counted under this reason.
    pub fn settle(&mut self, target: u32) -> Option<DropReason> {
        if self.owed == 0 {
            return None;
        }
        let owed = &mut self.targets[target as usize].owed;
        let reason = DropReason::ALL.into_iter().find(|&reason| owed[reason as usize] > 0)?;
        owed[reason as usize] -= 1;
        self.owed -= 1;
        Some(reason)
    }

    /// True while anything but debts is noted about any downstream. Otherwise nobody need read the clock.
    pub fn any_note(&self) -> bool {
        self.noted_until.is_some()
    }

    /// Forgets what is over, once all is.
    pub fn forgive(&mut self, now: Instant) {
        if self.noted_until.is_some_and(|until| until <= now) {
            self.noted_until = None;
        }
    }

    /// True if the downstream is troubled.
    pub fn troubled(&self, target: u32, now: Instant) -> bool {
        self.targets[target as usize].troubled_until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::plan;
    use super::*;
    use std::net::SocketAddr;

    #[test]
    fn each_debt_is_paid_once_by_the_downstream_that_has_it() {
        let now = Instant::now();
        let mut standing = Standing::new(2);
        assert_eq!(standing.settle(1), None);
        standing.charge(1, 2, DropReason::Refused, now);
        standing.charge(1, 1, DropReason::Unreachable, now);
        assert!(standing.owes());
        assert_eq!(standing.settle(0), None);
        assert_eq!(standing.settle(1), Some(DropReason::Unreachable));
        assert_eq!(standing.settle(1), Some(DropReason::Refused));
        assert_eq!(standing.settle(1), Some(DropReason::Refused));
        assert_eq!(standing.settle(1), None);
        assert!(!standing.owes());
    }

    #[test]
    fn datagrams_are_kept_apart_for_a_while_if_they_are_too_long_to_share() {
        let start = Instant::now();
        let mut standing = Standing::new(2);
        standing.keep_apart(1, 1400, start);
        assert!(standing.any_note());
        assert_eq!((standing.most_joined(0, start), standing.most_joined(1, start)), (u32::MAX, 1400));
        assert_eq!(standing.most_joined(1, start + APART), u32::MAX);
        standing.forgive(start + APART);
        assert!(!standing.any_note());
    }

    #[test]
    fn trouble_passes() {
        let start = Instant::now();
        let mut standing = Standing::new(2);
        assert!(!standing.any_note());
        standing.trouble(0, start);
        let later = start + TROUBLE / 2;
        standing.trouble(1, later);
        assert!(standing.troubled(0, later) && standing.troubled(1, later));
        let over = start + TROUBLE;
        standing.forgive(over);
        assert!(!standing.troubled(0, over) && standing.troubled(1, over) && standing.any_note());
        standing.forgive(over + TROUBLE);
        assert!(!standing.any_note());
    }

    #[test]
    fn a_new_table_keeps_the_standing_of_those_who_stay() {
        let address = |port| SocketAddr::from(([192, 0, 2, 1], port));
        let table = |ports: &[u16]| {
            let downstreams: Vec<_> = ports.iter().map(|&port| (address(port), 1)).collect();
            Table::new(&plan(address(514), &downstreams), address(514)).unwrap()
        };
        let now = Instant::now();
        let mut standing = Standing::new(3);
        standing.charge(0, 1, DropReason::Refused, now);
        standing.charge(2, 1, DropReason::Refused, now);
        standing.keep_apart(1, 9, now);
        let mut moved = standing.moved(&table(&[1, 2, 3]), &table(&[3, 2]));
        assert!(moved.troubled(0, now) && !moved.troubled(1, now) && moved.any_note());
        assert_eq!((moved.most_joined(0, now), moved.most_joined(1, now)), (u32::MAX, 9));
        assert_eq!(moved.settle(0), Some(DropReason::Refused));
        assert_eq!((moved.settle(0), moved.settle(1), moved.owed), (None, None, 0));
    }
}
