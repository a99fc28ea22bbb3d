//! The way of a batch of which every downstream gets a copy.
//!
//! The copies are queued downstream by downstream, each of a batch's copies to one downstream in the order of their
//! arrival and through one lane, and a lane is flushed whenever it is full. A large batch thus goes out regrouped by
//! downstream; one datagram for many downstreams takes one system call.

use rand::Rng;
use rand::rngs::SmallRng;

use super::super::mmsg::incoming::Piece;
use super::super::mmsg::{Endpoint, LANES};
use super::super::table::Table;
use super::{Forwarder, Kind, TOGETHER, Verdict};
use crate::model::{Downstream, DropReason, ListenerCounters};

/// A datagram to replicate.
#[derive(Debug, Clone, Copy)]
pub struct Original {
    piece: Piece,
    /// In whose name copies are to leave.
    from: Option<Endpoint>,
}

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
    pub(super) fn failed(&mut self, reason: DropReason) {
        if *self != Fate::Sent {
            *self = Fate::Failed(reason);
        }
    }
}

impl Forwarder {
    /// Sends every datagram of the batch to every downstream and accounts for it.
    pub(super) fn replicate(&mut self, received: usize, table: &Table, outcome: &mut ListenerCounters) {
        for slot in 0..received {
            let from = self.name_to_keep(slot);
            for (number, piece) in self.batch.message(slot).pieces().enumerate() {
                if self.screen.takes_out(slot, number) {
                    continue;
                }
                match piece {
                    None => outcome.dropped.add(DropReason::Truncated, 1),
                    Some(_) if table.round().is_empty() => outcome.dropped.add(DropReason::NoDownstream, 1),
                    Some(piece) => {
                        if self.originals.len() == TOGETHER {
                            self.send_to_all(table, outcome);
                        }
                        self.originals.push(Original { piece, from });
                    }
                }
            }
        }
        self.send_to_all(table, outcome);
    }

    /// Sends what has been gathered to every downstream, and accounts for it.
    fn send_to_all(&mut self, table: &Table, outcome: &mut ListenerCounters) {
        self.fates.clear();
        self.fates.resize(self.originals.len(), Fate::Unwanted);
        let now = self.time_if_needed();
        for &target in table.round() {
            let lane = self.turn_to(target, table, now);
            self.queue_copies(target, lane, table, outcome);
        }
        for lane in 0..LANES {
            self.send_copies(lane, outcome);
        }
        self.send_on_behalf(outcome, Kind::Copies);
        for (Original { piece, .. }, fate) in self.originals.drain(..).zip(&self.fates) {
            match fate {
                Fate::Failed(reason) => outcome.dropped.add(*reason, 1),
                Fate::Sent | Fate::Unwanted => {
                    outcome.packets_forwarded += 1;
                    outcome.bytes_forwarded += u64::from(piece.length());
                }
            }
        }
    }

    /// Queues the copies for one downstream, and sends those that there is no room for any more.
    fn queue_copies(&mut self, target: u32, lane: usize, table: &Table, outcome: &mut ListenerCounters) {
        let sample = table.sample(target);
        for original in 0..self.originals.len() {
            if !wanted(sample, &mut self.random) {
                continue;
            }
            let Original { piece, from } = self.originals[original];
            if from.is_some_and(|from| self.queue_on_behalf(from, target, original, piece, table)) {
                self.send_on_behalf_if_full(outcome, Kind::Copies);
                continue;
            }
            if self.batch.full(lane) {
                self.queues[lane].add_messages(self.batch.messages(lane), target);
                self.send_copies(lane, outcome);
            }
            self.batch.queue(lane, piece);
            self.queues[lane].add_copy(original);
        }
        self.queues[lane].add_messages(self.batch.messages(lane), target);
    }

    /// Sends the copies that a lane holds, notes what became of them, and empties the lane.
    fn send_copies(&mut self, lane: usize, outcome: &mut ListenerCounters) {
        self.flush(lane);
        let (cells, fates, queue) = (&self.table.cells, &mut self.fates, &self.queues[lane]);
        queue.verdicts(&self.batch, lane, &mut self.standing, |verdict| match verdict {
            Verdict::Sent { target, datagrams, bytes } => {
                cells[target as usize].add(datagrams.len() as u64, bytes);
                datagrams.for_each(|copy| fates[queue.original(copy)] = Fate::Sent);
            }
            Verdict::Lost { datagram, reason } => {
                outcome.copies_dropped.add(reason, 1);
                fates[queue.original(datagram)].failed(reason);
            }
        });
        self.empty(lane);
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
