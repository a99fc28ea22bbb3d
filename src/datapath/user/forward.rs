//! The way of one batch: taken from the listener's socket, each datagram given a downstream, sent, accounted for.

mod replicate;

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rand::rngs::SmallRng;
use socket2::Socket;
use tracing::warn;

use self::replicate::Fate;
use super::count::WorkerCells;
use super::lane::{self, Lane, MAIN, TROUBLED};
use super::mmsg::{Batch, Family, LANES};
use super::standing::Standing;
use super::table::WorkerTable;
use crate::config::Settings;
use crate::model::{DropReason, ListenerCounters, Policy};
use crate::plan::hash;

/// Shortest time between two log lines about failed sends of one worker.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(10);

/// What a worker does with datagrams, apart from waiting for them.
#[derive(Debug)]
pub struct Forwarder {
    listener: Arc<str>,
    batch: Batch,
    lanes: [Lane; LANES],
    /// For each whole datagram of the batch, the hash that gives it its place, or none if the round does.
    hashes: Vec<Option<u32>>,
    /// What each lane's list in `batch` holds, position by position.
    queued: [Vec<Queued>; LANES],
    /// For each datagram of the batch, what has become of its copies; empty unless the policy is to replicate.
    fates: Vec<Fate>,
    /// Draws samples.
    random: SmallRng,
    table: WorkerTable,
    standing: Standing,
    /// How many datagrams of this listener have been given a downstream, by all its workers.
    cursor: Arc<AtomicU64>,
    cells: Arc<WorkerCells>,
    complaints: Complaints,
}

#[derive(Debug)]
struct Queued {
    slot: usize,
    target: u32,
    bytes: u64,
    lost: Option<DropReason>,
}

impl Forwarder {
    /// Opens the sending sockets and sets the memory aside.
    ///
    /// # Errors
    /// When the kernel refuses either.
    pub fn new(
        listener: Arc<str>,
        settings: &Settings,
        table: WorkerTable,
        cursor: Arc<AtomicU64>,
        cells: Arc<WorkerCells>,
    ) -> Result<Self> {
        let count = settings.batch_size.max(1) as usize;
        let max_length = settings.max_packet_size.max(1) as usize;
        let family = Family::of(table.table.listener());
        let mut batch = Batch::new(count, max_length).with_context(|| {
            format!("no memory for {count} datagrams of {max_length} bytes; lower batch_size or max_packet_size")
        })?;
        batch.want_addresses(table.table.needs_addresses());
        Ok(Forwarder {
            listener,
            batch,
            hashes: Vec::with_capacity(count),
            lanes: [Lane::open(MAIN, family)?, Lane::open(TROUBLED, family)?],
            queued: std::array::from_fn(|_| Vec::with_capacity(count)),
            fates: Vec::with_capacity(count),
            random: rand::make_rng(),
            standing: Standing::new(table.table.addresses().len()),
            table,
            cursor,
            cells,
            complaints: Complaints::default(),
        })
    }

    /// Uses another table for the batch at hand and all that follow.
    pub fn set_table(&mut self, table: WorkerTable) {
        self.batch.want_addresses(table.table.needs_addresses());
        self.standing = self.standing.moved(&self.table.table, &table.table);
        self.table = table;
    }

    /// Takes a batch from the socket and says how many datagrams it holds.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` if the socket is empty.
    pub fn receive(&mut self, socket: &Socket) -> io::Result<usize> {
        self.queued.iter_mut().for_each(Vec::clear);
        self.batch.receive(socket.as_fd())
    }

    /// Forwards the batch just taken. Every one of its datagrams is counted when this returns.
    pub fn forward(&mut self, received: usize) {
        let mut outcome = ListenerCounters {
            bytes_received: (0..received).map(|slot| self.batch.length(slot) as u64).sum(),
            ..Default::default()
        };
        self.screen(received, &mut outcome);
        if self.table.table.policy() == Policy::Replicate {
            self.replicate(received, &mut outcome);
        } else {
            self.choose(received, &mut outcome);
            for lane in 0..LANES {
                self.flush(lane);
            }
            self.account(&mut outcome);
        }
        self.cells.publish(&outcome);
    }

    /// Sets aside what is not to be forwarded: from senders who may not send or send too fast, and what does not fit.
    fn screen(&mut self, received: usize, outcome: &mut ListenerCounters) {
        let gate = self.table.table.gate();
        if !gate.is_open() {
            let now = gate.now();
            for slot in 0..received {
                if let Some(reason) = gate.refusal(self.batch.sender(slot), now) {
                    outcome.dropped.add(reason, 1);
                    self.batch.discard(slot);
                }
            }
        }
        let truncated = (0..received).filter(|&slot| self.batch.truncated(slot)).count();
        outcome.dropped.add(DropReason::Truncated, truncated as u64);
    }

    /// Gives every datagram that can be forwarded a downstream and a lane.
    fn choose(&mut self, received: usize, outcome: &mut ListenerCounters) {
        let table = &self.table.table;
        self.hashes.clear();
        for slot in (0..received).filter(|&slot| self.batch.whole(slot).is_some()) {
            self.hashes.push(hash_of(&self.batch, slot, table.policy(), table.listener()));
        }
        // One shared cursor, moved once per batch, keeps the round exact across all workers.
        let in_the_round = self.hashes.iter().filter(|hash| hash.is_none()).count();
        let position = self.cursor.fetch_add(in_the_round as u64, Ordering::Relaxed);
        let Some(mut round) = table.round_from(position) else {
            outcome.dropped.add(DropReason::NoDownstream, self.hashes.len() as u64);
            return;
        };
        let now = self.standing.any_trouble().then(Instant::now);
        if let Some(now) = now {
            self.standing.forgive(now);
        }
        let mut hashes = self.hashes.iter();
        for slot in 0..received {
            let Some(bytes) = self.batch.whole(slot) else { continue };
            let placed = hashes.next().copied().flatten().and_then(|hash| table.placed(hash));
            let target = placed.unwrap_or_else(|| round.step());
            let troubled = now.is_some_and(|now| self.standing.troubled(target, now));
            let lane = if troubled { TROUBLED } else { MAIN };
            self.batch.queue(lane, slot, table.encoded(target));
            self.queued[lane].push(Queued { slot, target, bytes: bytes as u64, lost: None });
        }
    }

    fn flush(&mut self, number: usize) {
        let Forwarder { listener, batch, lanes, queued, table, standing, complaints, .. } = self;
        let lane = &mut lanes[number];
        lane.flush(batch, |position, error| {
            let datagram = &mut queued[number][position];
            let reason = lane::reason(error.raw_os_error().unwrap_or_default());
            datagram.lost = Some(reason);
            if reason != DropReason::SendBufferFull {
                standing.trouble(datagram.target, Instant::now());
            }
            if reason == DropReason::SendFailed
                && let Some(unreported) = complaints.due(Instant::now())
            {
                let downstream = table.table.addresses()[datagram.target as usize];
                warn!(%listener, %downstream, %error, unreported, "cannot send to downstream");
            }
        });
        for report in lane.reports() {
            if let Some(target) = table.table.target(&report.to) {
                standing.charge(target, lane::reason(report.errno), Instant::now());
            }
        }
    }

    /// Sums up what became of the datagrams that had a downstream.
    fn account(&mut self, outcome: &mut ListenerCounters) {
        for datagram in self.queued.iter().flatten() {
            match datagram.lost.or_else(|| self.standing.settle(datagram.target)) {
                Some(reason) => outcome.dropped.add(reason, 1),
                None => {
                    outcome.packets_forwarded += 1;
                    outcome.bytes_forwarded += datagram.bytes;
                    self.table.cells[datagram.target as usize].add(datagram.bytes);
                }
            }
        }
    }
}

/// The hash that gives a datagram its place in the table, or none if it is the round's turn: the same as in the TC
/// program's `place`.
fn hash_of(batch: &Batch, slot: usize, policy: Policy, listener: SocketAddr) -> Option<u32> {
    match policy {
        Policy::RoundRobin | Policy::Replicate => None,
        Policy::Hash(on) => {
            // Taken before the policy changed, a batch has no addresses: it still goes round.
            let source = batch.sender(slot)?;
            let destination = batch.destination(slot).unwrap_or(listener.ip());
            Some(hash::flow_hash(on, source.into(), SocketAddr::new(destination, listener.port())))
        }
        Policy::GelfMessage => match batch.first_bytes(slot)? {
            // A chunk: two bytes of magic, then its message's ID.
            [0x1e, 0x0f, a, b, c, d, e, f, g, h] => Some(hash::message_hash([a, b, c, d, e, f, g, h])),
            _ => None,
        },
    }
}

/// Keeps a failure that repeats with every datagram from flooding the log.
#[derive(Debug, Default)]
struct Complaints {
    next: Option<Instant>,
    unreported: u64,
}

impl Complaints {
    /// If it is time for another line: how many failures there were since the last.
    fn due(&mut self, now: Instant) -> Option<u64> {
        if self.next.is_some_and(|next| now < next) {
            self.unreported += 1;
            return None;
        }
        self.next = Some(now + COMPLAINT_INTERVAL);
        Some(std::mem::take(&mut self.unreported))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_spaced_and_lose_no_count() {
        let start = Instant::now();
        let mut complaints = Complaints::default();
        assert_eq!(complaints.due(start), Some(0));
        assert_eq!(complaints.due(start), None);
        assert_eq!(complaints.due(start + COMPLAINT_INTERVAL / 2), None);
        assert_eq!(complaints.due(start + COMPLAINT_INTERVAL), Some(2));
        assert_eq!(complaints.due(start + COMPLAINT_INTERVAL * 2), Some(0));
    }
}
