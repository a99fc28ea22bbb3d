//! Counters without locks: each worker writes its own cells, and the main thread sums them.
//!
//! A cell has one writer, so adding is a load and a store. It has its own cache lines, so workers do not slow each
//! other down. When a worker ends, [`CounterSet`] folds its cells into a base, so that no counter decreases.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::model::{DownstreamCounters, DropReason, Drops, ListenerCounters};

/// The counters of one worker. Aligned to two cache lines, because processors fetch lines in pairs.
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

/// What one worker sent to one downstream.
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
    /// Adds the result of one batch, received in `messages` messages. The number of received datagrams is not stored
    /// but summed from the results, so every reading balances.
    pub fn publish(&self, batch: &ListenerCounters, messages: u64) {
        add(&self.messages, messages);
        // In this order. A reader goes the other way, and so never sees more bytes forwarded than received.
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
    /// Adds `packets` datagrams of `bytes` bytes in all.
    pub fn add(&self, packets: u64, bytes: u64) {
        add(&self.packets, packets);
        add(&self.bytes, bytes);
    }

    fn add_to(&self, sum: &mut DownstreamCounters) {
        sum.packets += self.packets.load(Ordering::Acquire);
        sum.bytes += self.bytes.load(Ordering::Acquire);
    }
}

/// What workers have received.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReceivedTotals {
    /// Datagrams.
    pub datagrams: u64,
    /// Messages as the kernel delivered them; each holds at least one datagram (`UDP_GRO`).
    pub messages: u64,
}

/// Identifies a worker among all that the listener ever had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct WorkerKey(u64);

/// All counters of one listener.
#[derive(Debug, Default)]
pub struct CounterSet {
    next_key: u64,
    /// The counters of ended workers, and what the kernel dropped before a worker received it.
    base: ListenerCounters,
    workers: BTreeMap<WorkerKey, Arc<WorkerCells>>,
    downstreams: BTreeMap<SocketAddr, DownstreamCounts>,
}

#[derive(Debug, Default)]
struct DownstreamCounts {
    base: DownstreamCounters,
    cells: BTreeMap<WorkerKey, Arc<DownstreamCells>>,
}

impl CounterSet {
    /// Adds the cells of a new worker.
    pub fn add_worker(&mut self) -> (WorkerKey, Arc<WorkerCells>) {
        let key = WorkerKey(self.next_key);
        self.next_key += 1;
        let cells = Arc::new(WorkerCells::default());
        self.workers.insert(key, Arc::clone(&cells));
        (key, cells)
    }

    /// Folds the cells of a worker that has ended.
    pub fn fold_worker(&mut self, key: WorkerKey) {
        if let Some(cells) = self.workers.remove(&key) {
            self.base.merge(&cells.read());
        }
        for counts in self.downstreams.values_mut() {
            if let Some(cells) = counts.cells.remove(&key) {
                cells.add_to(&mut counts.base);
            }
        }
    }

    /// Folds the cells of all workers except these.
    pub fn fold_all_but(&mut self, keep: impl Iterator<Item = WorkerKey>) {
        let keep: BTreeSet<WorkerKey> = keep.collect();
        let gone: Vec<WorkerKey> = self.workers.keys().filter(|key| !keep.contains(key)).copied().collect();
        gone.into_iter().for_each(|key| self.fold_worker(key));
    }

    /// Adds another set, whose workers have all ended: the totals, and the counters of downstreams that are in both.
    pub fn import(&mut self, mut other: CounterSet) {
        other.fold_all_but(std::iter::empty());
        self.base.merge(&other.base);
        for (address, counts) in &mut self.downstreams {
            if let Some(earlier) = other.downstreams.get(address) {
                counts.base.packets += earlier.base.packets;
                counts.base.bytes += earlier.base.bytes;
            }
        }
    }

    /// What the current workers have received since they started.
    pub fn received_totals(&self) -> ReceivedTotals {
        let mut sum = ReceivedTotals::default();
        for cells in self.workers.values() {
            // In this order, there are never more messages than datagrams.
            let messages = cells.messages.load(Ordering::Acquire);
            let datagrams = cells.read().packets_received;
            sum = ReceivedTotals {
                datagrams: sum.datagrams + datagrams,
                messages: sum.messages + messages.min(datagrams),
            };
        }
        sum
    }

    /// Datagrams that a worker has received.
    pub fn received_by(&self, key: WorkerKey) -> u64 {
        self.workers.get(&key).map_or(0, |cells| cells.read().packets_received)
    }

    /// A worker's cells for these downstreams, in this order. Existing cells are kept.
    pub fn downstream_cells(&mut self, key: WorkerKey, addresses: &[SocketAddr]) -> Box<[Arc<DownstreamCells>]> {
        let mut cells =
            |address| Arc::clone(self.downstreams.entry(address).or_default().cells.entry(key).or_default());
        addresses.iter().map(|&address| cells(address)).collect()
    }

    /// Drops the counters of all downstreams except these.
    pub fn retain_downstreams(&mut self, addresses: &[SocketAddr]) {
        let keep: BTreeSet<&SocketAddr> = addresses.iter().collect();
        self.downstreams.retain(|address, _| keep.contains(address));
        for &address in addresses {
            self.downstreams.entry(address).or_default();
        }
    }

    /// Counts datagrams that were lost before a worker received them. Their bytes are unknown and not counted.
    pub fn record_drops(&mut self, reason: DropReason, packets: u64) {
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

    /// The counters of each downstream of the current plan.
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

    /// The counters must equal those of a plain map, whatever comes and goes.
    fn run(steps: Vec<Step>) -> Result<(), TestCaseError> {
        let mut counters = CounterSet::default();
        let mut workers = Vec::new();
        let mut current: Vec<SocketAddr> = vec![address(1)];
        let mut expected: BTreeMap<SocketAddr, DownstreamCounters> = BTreeMap::from([(address(1), Default::default())]);
        let (mut received, mut forwarded, mut copies_dropped) = (0, 0, 0);
        counters.retain_downstreams(&current);
        for step in steps {
            match step {
                Step::Open => workers.push(counters.add_worker()),
                Step::Close(n) if n < workers.len() => counters.fold_worker(workers.remove(n).0),
                Step::Absorb => {
                    workers.clear();
                    let old = std::mem::take(&mut counters);
                    counters.retain_downstreams(&current);
                    counters.import(old);
                }
                Step::Forward { worker, downstream, bytes } if worker < workers.len() => {
                    let (key, cells) = &workers[worker];
                    let at = downstream % current.len();
                    counters.downstream_cells(*key, &current)[at].add(1, bytes);
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
                    counters.record_drops(DropReason::ReceiveQueueFull, n);
                    received += n;
                }
                Step::Retain(ports) => {
                    current = ports.into_iter().map(address).collect::<BTreeSet<_>>().into_iter().collect();
                    expected.retain(|address, _| current.contains(address));
                    for &address in &current {
                        expected.entry(address).or_default();
                    }
                    counters.retain_downstreams(&current);
                }
                _ => {}
            }
            let totals = counters.totals();
            prop_assert!(totals.balanced());
            prop_assert_eq!((totals.packets_received, totals.packets_forwarded), (received, forwarded));
            prop_assert_eq!(totals.copies_dropped.total(), copies_dropped);
            prop_assert_eq!(counters.per_downstream().collect::<BTreeMap<_, _>>(), expected.clone());
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
