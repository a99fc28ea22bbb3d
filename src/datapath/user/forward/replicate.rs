//! Forwards a batch under `replicate`: one copy to each downstream.
//!
//! Copies are queued downstream by downstream, in the order of arrival, and a send queue is flushed when it is full. So
//! a large batch is sent grouped by downstream, and one datagram for many downstreams takes one system call.

use rand::Rng;
use rand::rngs::SmallRng;

use super::super::mmsg::incoming::Segment;
use super::super::mmsg::{AddrPort, SEND_QUEUES};
use super::super::table::ForwardingTable;
use super::{Forwarder, RawListKind, SEND_LIST_CAPACITY, SendOutcome};
use crate::model::{Downstream, DropReason, ListenerCounters};

/// A datagram to replicate.
#[derive(Debug, Clone, Copy)]
pub struct Original {
    segment: Segment,
    /// The sender, if copies are to be sent with its address.
    from: Option<AddrPort>,
}

/// The status of a datagram's copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyStatus {
    /// There is no copy: the datagram is in no downstream's sample.
    NotSampled,
    /// At least one was sent.
    Sent,
    /// None could be sent; the last one failed for this reason.
    Failed(DropReason),
}

impl CopyStatus {
    pub(super) fn failed(&mut self, reason: DropReason) {
        if *self != CopyStatus::Sent {
            *self = CopyStatus::Failed(reason);
        }
    }
}

impl Forwarder {
    /// Sends every datagram of the batch to every downstream and counts it.
    pub(super) fn replicate(&mut self, received: usize, table: &ForwardingTable, totals: &mut ListenerCounters) {
        for slot in 0..received {
            let from = self.source_to_preserve(slot);
            for (number, segment) in self.batch.message(slot).segments().enumerate() {
                if self.filter_mask.is_filtered(slot, number) {
                    continue;
                }
                match segment {
                    None => totals.dropped.add(DropReason::Truncated, 1),
                    Some(_) if table.round().is_empty() => totals.dropped.add(DropReason::NoDownstream, 1),
                    Some(segment) => {
                        if self.originals.len() == SEND_LIST_CAPACITY {
                            self.send_to_all(table, totals);
                        }
                        self.originals.push(Original { segment, from });
                    }
                }
            }
        }
        self.send_to_all(table, totals);
    }

    /// Sends the gathered datagrams to every downstream, and counts them.
    fn send_to_all(&mut self, table: &ForwardingTable, totals: &mut ListenerCounters) {
        self.copy_statuses.clear();
        self.copy_statuses.resize(self.originals.len(), CopyStatus::NotSampled);
        let now = self.now_if_errors();
        for &target in table.round() {
            let queue = self.select_queue(target, table, now);
            self.queue_copies(target, queue, table, totals);
        }
        for queue in 0..SEND_QUEUES {
            self.send_copies(queue, totals);
        }
        self.flush_preserving_source(totals, RawListKind::Copies);
        for (Original { segment, .. }, status) in self.originals.drain(..).zip(&self.copy_statuses) {
            match status {
                CopyStatus::Failed(reason) => totals.dropped.add(*reason, 1),
                CopyStatus::Sent | CopyStatus::NotSampled => {
                    totals.packets_forwarded += 1;
                    totals.bytes_forwarded += u64::from(segment.length());
                }
            }
        }
    }

    /// Queues the copies for one downstream; sends whenever the queue is full.
    fn queue_copies(&mut self, target: u32, queue: usize, table: &ForwardingTable, totals: &mut ListenerCounters) {
        let sample = table.sample(target);
        for original in 0..self.originals.len() {
            if !wanted(sample, &mut self.random) {
                continue;
            }
            let Original { segment, from } = self.originals[original];
            if from.is_some_and(|from| self.queue_preserving_source(from, target, original, segment, table)) {
                self.flush_preserving_source_if_full(totals, RawListKind::Copies);
                continue;
            }
            if self.batch.full(queue) {
                self.queued[queue].add_messages(self.batch.messages(queue), target);
                self.send_copies(queue, totals);
            }
            self.batch.push(queue, segment);
            self.queued[queue].add_copy(original);
        }
        self.queued[queue].add_messages(self.batch.messages(queue), target);
    }

    /// Sends the queued copies, records their status, and empties the queue.
    fn send_copies(&mut self, queue: usize, totals: &mut ListenerCounters) {
        self.flush(queue);
        let (cells, copy_statuses, queued) = (&self.table.cells, &mut self.copy_statuses, &self.queued[queue]);
        queued.outcomes(&self.batch, queue, &mut self.downstream_errors, |verdict| match verdict {
            SendOutcome::Sent { target, datagrams, bytes } => {
                cells[target as usize].add(datagrams.len() as u64, bytes);
                datagrams.for_each(|copy| copy_statuses[queued.original(copy)] = CopyStatus::Sent);
            }
            SendOutcome::Lost { datagram, reason } => {
                totals.copies_dropped.add(reason, 1);
                copy_statuses[queued.original(datagram)].failed(reason);
            }
        });
        self.empty(queue);
    }
}

/// True if a downstream with this sample gets a copy of the next datagram. Agrees with the TC program's `send_copy`.
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
        let mut status = CopyStatus::NotSampled;
        status.failed(DropReason::Refused);
        status.failed(DropReason::TooBig);
        assert_eq!(status, CopyStatus::Failed(DropReason::TooBig));
        status = CopyStatus::Sent;
        status.failed(DropReason::Refused);
        assert_eq!(status, CopyStatus::Sent);
    }
}
