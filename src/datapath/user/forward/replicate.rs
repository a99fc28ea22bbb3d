//! The way of a batch of which every downstream gets a copy.
//!
//! The copies are queued downstream by downstream, each of a batch's copies to one downstream in the order of their
//! arrival and through one lane, and a lane is flushed whenever it is full. A large batch thus goes out regrouped by
//! downstream; one datagram for many downstreams takes one system call.

use std::time::Instant;

use rand::Rng;
use rand::rngs::SmallRng;

use super::super::lane::{MAIN, TROUBLED};
use super::super::mmsg::LANES;
use super::{Forwarder, Queued};
use crate::model::{Downstream, DropReason, ListenerCounters};

/// What has become of a datagram's copies so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// There has been none: the datagram is in no downstream's sample.
    Unwanted,
    /// At least one is on its way.
    Sent,
    /// None of them could be sent; the last one for this reason.
    Failed(DropReason),
}

impl Fate {
    fn failed(&mut self, reason: DropReason) {
        if *self != Fate::Sent {
            *self = Fate::Failed(reason);
        }
    }
}

impl Forwarder {
    /// Sends every datagram of the batch to every downstream and accounts for it.
    pub(super) fn replicate(&mut self, received: usize, outcome: &mut ListenerCounters) {
        let targets = self.table.table.round().len();
        if targets == 0 {
            let whole = (0..received).filter(|&slot| self.batch.whole(slot).is_some()).count();
            outcome.dropped.add(DropReason::NoDownstream, whole as u64);
            return;
        }
        self.fates.clear();
        self.fates.resize(received, Fate::Unwanted);
        let now = self.standing.any_trouble().then(Instant::now);
        if let Some(now) = now {
            self.standing.forgive(now);
        }
        for index in 0..targets {
            let target = self.table.table.round()[index];
            let troubled = now.is_some_and(|now| self.standing.troubled(target, now));
            self.queue_copies(received, target, if troubled { TROUBLED } else { MAIN }, outcome);
        }
        for lane in 0..LANES {
            self.send_copies(lane, outcome);
        }
        for slot in 0..received {
            let Some(bytes) = self.batch.whole(slot) else { continue };
            match self.fates[slot] {
                Fate::Failed(reason) => outcome.dropped.add(reason, 1),
                Fate::Sent | Fate::Unwanted => {
                    outcome.packets_forwarded += 1;
                    outcome.bytes_forwarded += bytes as u64;
                }
            }
        }
    }

    /// Queues the copies for one downstream, and sends those that there is no room for any more.
    fn queue_copies(&mut self, received: usize, target: u32, lane: usize, outcome: &mut ListenerCounters) {
        let sample = self.table.table.sample(target);
        for slot in 0..received {
            let Some(bytes) = self.batch.whole(slot) else { continue };
            if !wanted(sample, &mut self.random) {
                continue;
            }
            if self.batch.full(lane) {
                self.send_copies(lane, outcome);
            }
            self.batch.queue(lane, slot, self.table.table.encoded(target));
            self.queued[lane].push(Queued { slot, target, bytes: bytes as u64, lost: None });
        }
    }

    /// Sends the copies that a lane holds, notes what became of them, and empties the lane.
    fn send_copies(&mut self, lane: usize, outcome: &mut ListenerCounters) {
        self.flush(lane);
        for copy in self.queued[lane].drain(..) {
            match copy.lost.or_else(|| self.standing.settle(copy.target)) {
                Some(reason) => {
                    outcome.copies_dropped.add(reason, 1);
                    self.fates[copy.slot].failed(reason);
                }
                None => {
                    self.table.cells[copy.target as usize].add(copy.bytes);
                    self.fates[copy.slot] = Fate::Sent;
                }
            }
        }
        self.batch.clear(lane);
    }
}

/// True if a downstream with this sample gets a copy of the next datagram, as in the TC program's `send_copy`.
fn wanted(sample: u32, random: &mut SmallRng) -> bool {
    sample == Downstream::ALL || random.next_u32() <= sample
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn a_sample_is_as_large_as_it_says_and_all_is_all() {
        let mut random = SmallRng::seed_from_u64(7);
        let mut of_100_000 = |sample| (0..100_000).filter(|_| wanted(sample, &mut random)).count();
        assert_eq!(of_100_000(Downstream::ALL), 100_000);
        // Five standard deviations of a binomial distribution: 95 at most.
        let tenth = of_100_000(u32::MAX / 10);
        assert!(tenth.abs_diff(10_000) < 475, "{tenth}");
        assert_eq!(of_100_000(0), 0);
    }

    #[test]
    fn one_copy_that_was_sent_outweighs_all_that_failed() {
        let mut fate = Fate::Unwanted;
        fate.failed(DropReason::Refused);
        fate.failed(DropReason::TooBig);
        assert_eq!(fate, Fate::Failed(DropReason::TooBig));
        fate = Fate::Sent;
        fate.failed(DropReason::Refused);
        assert_eq!(fate, Fate::Sent);
    }
}
