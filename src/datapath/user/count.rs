//! Counting without locks: each worker writes cells of its own, the main thread sums them.
//!
//! A cell has one writer, so adding is a load and a store; it has its cache lines to itself, so workers do not slow
//! each other down. What a worker has counted outlives it: the [`Ledger`] folds the cells of a worker that has gone
//! into a base, so that no count ever decreases.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::model::{DownstreamCounters, DropReason, Drops, ListenerCounters};

/// What one worker has counted. Two cache lines apart from anything else, because processors fetch lines in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct WorkerCells {
    messages: AtomicU64,
    packets_forwarded: AtomicU64,
    bytes_received: AtomicU64,
    bytes_forwarded: AtomicU64,
    dropped: [AtomicU64; DropReason::COUNT],
    copies_dropped: [AtomicU64; DropReason::COUNT],
}

/// What one worker has handed to one downstream.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct DownstreamCells {
    packets: AtomicU64,
    bytes: AtomicU64,
}

/// Adds to a cell that no other thread writes.
fn add(cell: &AtomicU64, n: u64) {
    if n > 0 {
        cell.store(cell.load(Ordering::Relaxed) + n, Ordering::Release);
    }
}

impl WorkerCells {
    /// Adds what became of one batch. How many were received is not stored: it is what became of them, summed, and so
    /// every reading balances. `messages` is how many messages held the datagrams when the kernel handed them over.
    pub fn publish(&self, batch: &ListenerCounters, messages: u64) {
        add(&self.messages, messages);
        // In this order, so that a reader who goes the other way never sees more bytes forwarded than received.
        add(&self.bytes_received, batch.bytes_received);
        add(&self.packets_forwarded, batch.packets_forwarded);
        add(&self.bytes_forwarded, batch.bytes_forwarded);
        for (cells, drops) in [(&self.dropped, &batch.dropped), (&self.copies_dropped, &batch.copies_dropped)] {
            if drops.total() > 0 {
                cells.iter().zip(drops.iter()).for_each(|(cell, (_, packets))| add(cell, packets));
            }
        }
    }

    /// What has been published so far.
    pub fn read(&self) -> ListenerCounters {
        let bytes_forwarded = self.bytes_forwarded.load(Ordering::Acquire);
        let packets_forwarded = self.packets_forwarded.load(Ordering::Acquire);
        let bytes_received = self.bytes_received.load(Ordering::Acquire);
        let read = |cells: &[AtomicU64; DropReason::COUNT]| {
            let mut drops = Drops::default();
            for (reason, cell) in DropReason::ALL.into_iter().zip(cells) {
                drops.add(reason, cell.load(Ordering::Acquire));
            }
            drops
        };
        let dropped = read(&self.dropped);
        ListenerCounters {
            packets_received: packets_forwarded + dropped.total(),
            packets_forwarded,
            packets_passed: 0,
            bytes_received,
            bytes_forwarded,
            dropped,
            copies_dropped: read(&self.copies_dropped),
        }
    }
}

impl DownstreamCells {
    /// Adds datagrams of this many bytes together.
    pub fn add(&self, packets: u64, bytes: u64) {
        add(&self.packets, packets);
        add(&self.bytes, bytes);
    }

    fn add_to(&self, sum: &mut DownstreamCounters) {
        sum.packets += self.packets.load(Ordering::Acquire);
        sum.bytes += self.bytes.load(Ordering::Acquire);
    }
}

/// What workers have taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Taken {
    /// Datagrams.
    pub datagrams: u64,
    /// Messages that the kernel handed over, of which each holds at least one datagram.
    pub messages: u64,
}

/// Tells the workers of one listener apart, also those that have gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct WorkerKey(u64);

/// All counts of one listener.
#[derive(Debug, Default)]
pub struct Ledger {
    next_key: u64,
    /// Of workers that have gone, and what the kernel dropped before any worker saw it.
    base: ListenerCounters,
    workers: BTreeMap<WorkerKey, Arc<WorkerCells>>,
    downstreams: BTreeMap<SocketAddr, DownstreamCounts>,
}

#[derive(Debug, Default)]
struct DownstreamCounts {
    base: DownstreamCounters,
    cells: BTreeMap<WorkerKey, Arc<DownstreamCells>>,
}

impl Ledger {
    /// Opens the cells of a new worker.
    pub fn open(&mut self) -> (WorkerKey, Arc<WorkerCells>) {
        let key = WorkerKey(self.next_key);
        self.next_key += 1;
        let cells = Arc::new(WorkerCells::default());
        self.workers.insert(key, Arc::clone(&cells));
        (key, cells)
    }

    /// Folds the cells of a worker that counts no more.
    pub fn close(&mut self, key: WorkerKey) {
        if let Some(cells) = self.workers.remove(&key) {
            self.base.merge(&cells.read());
        }
        for counts in self.downstreams.values_mut() {
            if let Some(cells) = counts.cells.remove(&key) {
                cells.add_to(&mut counts.base);
            }
        }
    }

    /// Folds the cells of all workers but these.
    pub fn close_all_but(&mut self, keep: impl Iterator<Item = WorkerKey>) {
        let keep: BTreeSet<WorkerKey> = keep.collect();
        let gone: Vec<WorkerKey> = self.workers.keys().filter(|key| !keep.contains(key)).copied().collect();
        gone.into_iter().for_each(|key| self.close(key));
    }

    /// Takes over the counts of a ledger whose workers have all gone: the totals, and those of downstreams in both.
    pub fn absorb(&mut self, mut other: Ledger) {
        other.close_all_but(std::iter::empty());
        self.base.merge(&other.base);
        for (address, counts) in &mut self.downstreams {
            if let Some(earlier) = other.downstreams.get(address) {
                counts.base.packets += earlier.base.packets;
                counts.base.bytes += earlier.base.bytes;
            }
        }
    }

    /// How many datagrams and messages the present workers have taken since they started.
    pub fn taken(&self) -> Taken {
        let mut sum = Taken::default();
        for cells in self.workers.values() {
            // In this order, there are never more messages than datagrams.
            let messages = cells.messages.load(Ordering::Acquire);
            let datagrams = cells.read().packets_received;
            sum = Taken { datagrams: sum.datagrams + datagrams, messages: sum.messages + messages.min(datagrams) };
        }
        sum
    }

    /// Datagrams that a worker has taken.
    pub fn taken_by(&self, key: WorkerKey) -> u64 {
        self.workers.get(&key).map_or(0, |cells| cells.read().packets_received)
    }

    /// The cells in which a worker counts for these downstreams, in this order. Those that it has already stay.
    pub fn downstreams(&mut self, key: WorkerKey, addresses: &[SocketAddr]) -> Box<[Arc<DownstreamCells>]> {
        let mut cells =
            |address| Arc::clone(self.downstreams.entry(address).or_default().cells.entry(key).or_default());
        addresses.iter().map(|&address| cells(address)).collect()
    }

    /// Forgets all downstreams but these.
    pub fn retain(&mut self, addresses: &[SocketAddr]) {
        let keep: BTreeSet<&SocketAddr> = addresses.iter().collect();
        self.downstreams.retain(|address, _| keep.contains(address));
        for &address in addresses {
            self.downstreams.entry(address).or_default();
        }
    }

    /// Counts datagrams that were lost before a worker could take them. Their bytes are unknown and not counted.
    pub fn lost(&mut self, reason: DropReason, packets: u64) {
        self.base.packets_received += packets;
        self.base.dropped.add(reason, packets);
    }

    /// The listener's totals.
    pub fn totals(&self) -> ListenerCounters {
        let mut sum = self.base;
        for cells in self.workers.values() {
            sum.merge(&cells.read());
        }
        sum
    }

    /// Per downstream of the current plan, what was handed to it.
    pub fn per_downstream(&self) -> impl Iterator<Item = (SocketAddr, DownstreamCounters)> + '_ {
        self.downstreams.iter().map(|(&address, counts)| {
            let mut sum = counts.base;
            counts.cells.values().for_each(|cells| cells.add_to(&mut sum));
            (address, sum)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn address(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    fn one_forwarded(bytes: u64) -> ListenerCounters {
        ListenerCounters { packets_forwarded: 1, bytes_received: bytes, bytes_forwarded: bytes, ..Default::default() }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Open,
        Close(usize),
        Absorb,
        Forward { worker: usize, downstream: usize, bytes: u64 },
        Drop { worker: usize, reason: usize },
        Lose(u64),
        Retain(Vec<u16>),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            Just(Step::Open),
            (0usize..8).prop_map(Step::Close),
            Just(Step::Absorb),
            (0usize..8, 0usize..8, 0u64..2000).prop_map(|(worker, downstream, bytes)| Step::Forward {
                worker,
                downstream,
                bytes
            }),
            (0usize..8, 0..DropReason::COUNT).prop_map(|(worker, reason)| Step::Drop { worker, reason }),
            (0u64..5).prop_map(Step::Lose),
            prop::collection::vec(1u16..6, 1..4).prop_map(Step::Retain),
        ];
        prop::collection::vec(step, 0..200)
    }

    /// The ledger's counts must be those of a plain map, whatever comes and goes.
    fn run(steps: Vec<Step>) -> Result<(), TestCaseError> {
        let mut ledger = Ledger::default();
        let mut workers = Vec::new();
        let mut current: Vec<SocketAddr> = vec![address(1)];
        let mut expected: BTreeMap<SocketAddr, DownstreamCounters> = BTreeMap::from([(address(1), Default::default())]);
        let (mut received, mut forwarded, mut copies_dropped) = (0, 0, 0);
        ledger.retain(&current);
        for step in steps {
            match step {
                Step::Open => workers.push(ledger.open()),
                Step::Close(n) if n < workers.len() => ledger.close(workers.remove(n).0),
                Step::Absorb => {
                    workers.clear();
                    let old = std::mem::take(&mut ledger);
                    ledger.retain(&current);
                    ledger.absorb(old);
                }
                Step::Forward { worker, downstream, bytes } if worker < workers.len() => {
                    let (key, cells) = &workers[worker];
                    let at = downstream % current.len();
                    ledger.downstreams(*key, &current)[at].add(1, bytes);
                    cells.publish(&one_forwarded(bytes), 1);
                    let sum = expected.get_mut(&current[at]).unwrap();
                    *sum = DownstreamCounters { packets: sum.packets + 1, bytes: sum.bytes + bytes };
                    (received, forwarded) = (received + 1, forwarded + 1);
                }
                Step::Drop { worker, reason } if worker < workers.len() => {
                    let mut batch = ListenerCounters::default();
                    batch.dropped.add(DropReason::ALL[reason], 1);
                    batch.copies_dropped.add(DropReason::ALL[reason], 3);
                    copies_dropped += 3;
                    workers[worker].1.publish(&batch, 1);
                    received += 1;
                }
                Step::Lose(n) => {
                    ledger.lost(DropReason::ReceiveQueueFull, n);
                    received += n;
                }
                Step::Retain(ports) => {
                    current = ports.into_iter().map(address).collect::<BTreeSet<_>>().into_iter().collect();
                    expected.retain(|address, _| current.contains(address));
                    for &address in &current {
                        expected.entry(address).or_default();
                    }
                    ledger.retain(&current);
                }
                _ => {}
            }
            let totals = ledger.totals();
            prop_assert!(totals.balanced());
            prop_assert_eq!((totals.packets_received, totals.packets_forwarded), (received, forwarded));
            prop_assert_eq!(totals.copies_dropped.total(), copies_dropped);
            prop_assert_eq!(ledger.per_downstream().collect::<BTreeMap<_, _>>(), expected.clone());
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn counts_survive_workers_and_tables(steps in steps()) {
            run(steps)?;
        }
    }
}
