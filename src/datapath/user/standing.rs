//! What a worker knows about its downstreams from the errors that came back.
//!
//! An ICMP error arrives after its datagram has been counted as forwarded. Counters never go down, so the worker notes
//! a debt instead, and the next datagram sent to the same downstream is counted under the error's reason in its stead:
//! over time the sums are exact. A downstream with a recent error is also *troubled*, and its datagrams take a sending
//! socket apart from everyone else's (see `lane`).

use std::time::{Duration, Instant};

use super::table::Table;
use crate::model::DropReason;

/// How long a downstream counts as troubled after an error. Longer than the three seconds after which the kernel gives
/// up asking for a dead neighbour's address and reports it.
const TROUBLE: Duration = Duration::from_secs(10);

/// The standing of every downstream of a table, by index.
#[derive(Debug)]
pub struct Standing {
    targets: Box<[Target]>,
    /// Debts of all downstreams.
    owed: u64,
    /// When the last of the troubled stops being so.
    troubled_until: Option<Instant>,
}

#[derive(Debug, Clone, Default)]
struct Target {
    owed: [u32; DropReason::COUNT],
    troubled_until: Option<Instant>,
}

impl Standing {
    /// Everyone in good standing.
    pub fn new(targets: usize) -> Self {
        Standing { targets: vec![Target::default(); targets].into(), owed: 0, troubled_until: None }
    }

    /// The standing under a new table of those who were in the old one.
    pub fn moved(&self, from: &Table, to: &Table) -> Self {
        let mut moved = Standing::new(to.addresses().len());
        if self.owed == 0 && self.troubled_until.is_none() {
            return moved;
        }
        for (target, address) in self.targets.iter().zip(from.addresses()) {
            if let Some(index) = to.target(&(address.ip(), address.port())) {
                moved.owed += target.owed.iter().map(|&n| u64::from(n)).sum::<u64>();
                moved.troubled_until = moved.troubled_until.max(target.troubled_until);
                moved.targets[index as usize] = target.clone();
            }
        }
        moved
    }

    /// Notes that one datagram, already counted as forwarded, was lost after all.
    pub fn charge(&mut self, target: u32, reason: DropReason, now: Instant) {
        let owed = &mut self.targets[target as usize].owed[reason as usize];
        if let Some(more) = owed.checked_add(1) {
            *owed = more;
            self.owed += 1;
        }
        self.trouble(target, now);
    }

    /// Notes an error.
    pub fn trouble(&mut self, target: u32, now: Instant) {
        let until = Some(now + TROUBLE);
        self.targets[target as usize].troubled_until = until;
        self.troubled_until = self.troubled_until.max(until);
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

    /// True while any downstream is troubled. Without trouble, nobody need read the clock.
    pub fn any_trouble(&self) -> bool {
        self.troubled_until.is_some()
    }

    /// Forgives those whose time is over, once all are.
    pub fn forgive(&mut self, now: Instant) {
        if self.troubled_until.is_some_and(|until| until <= now) {
            self.troubled_until = None;
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
        standing.charge(1, DropReason::Refused, now);
        standing.charge(1, DropReason::Unreachable, now);
        assert_eq!(standing.settle(0), None);
        assert_eq!(standing.settle(1), Some(DropReason::Unreachable));
        assert_eq!(standing.settle(1), Some(DropReason::Refused));
        assert_eq!(standing.settle(1), None);
    }

    #[test]
    fn trouble_passes() {
        let start = Instant::now();
        let mut standing = Standing::new(2);
        assert!(!standing.any_trouble());
        standing.trouble(0, start);
        let later = start + TROUBLE / 2;
        standing.trouble(1, later);
        assert!(standing.troubled(0, later) && standing.troubled(1, later));
        let over = start + TROUBLE;
        standing.forgive(over);
        assert!(!standing.troubled(0, over) && standing.troubled(1, over) && standing.any_trouble());
        standing.forgive(over + TROUBLE);
        assert!(!standing.any_trouble());
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
        standing.charge(0, DropReason::Refused, now);
        standing.charge(2, DropReason::Refused, now);
        let mut moved = standing.moved(&table(&[1, 2, 3]), &table(&[3, 2]));
        assert!(moved.troubled(0, now) && !moved.troubled(1, now));
        assert_eq!(moved.settle(0), Some(DropReason::Refused));
        assert_eq!((moved.settle(0), moved.settle(1), moved.owed), (None, None, 0));
    }
}
