//! The way of one batch: taken from the listener's socket, each datagram given a downstream, sent, accounted for.
//!
//! The kernel hands datagrams over joined, several of one sender in a message. They are told apart, dealt out one by one
//! as the policy says, sorted by downstream, and given back joined again, for each downstream its own.

mod deal;
mod onbehalf;
mod outcome;
mod replicate;
mod screen;

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

use self::deal::Deal;
use self::onbehalf::Kind;
use self::outcome::{Queue, Verdict};
use self::replicate::{Fate, Original};
use self::screen::Screen;
use super::behalf::Behalf;
use super::count::WorkerCells;
use super::lane::{self, Event, Lane, MAIN, TROUBLED};
use super::mmsg::incoming::Piece;
use super::mmsg::{Batch, LANES};
use super::standing::Standing;
use super::table::{Round, Table, WorkerTable};
use crate::config::UserspaceSettings;
use crate::model::{DropReason, ListenerCounters, Policy};
use crate::net::Family;
use crate::plan::hash;

/// Shortest time between two log lines about failed sends of one worker.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(10);
/// Most datagrams sorted and sent together. Messages can hold more of them than a batch has room for messages.
const TOGETHER: usize = 1024;

/// What a worker does with datagrams, apart from waiting for them.
#[derive(Debug)]
pub struct Forwarder {
    listener: Arc<str>,
    batch: Batch,
    /// What is left of the batch's datagrams by who may send, and how fast.
    screen: Screen,
    lanes: [Lane; LANES],
    /// For datagrams that leave in their senders' names, if they are to.
    behalf: Option<Behalf>,
    /// Datagrams that have been given a downstream, and wait for being queued.
    deal: Deal,
    /// What each lane's list in `batch` holds.
    queues: [Queue; LANES],
    /// The datagrams to replicate, and for each what has become of its copies.
    originals: Vec<Original>,
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

/// How the downstreams of the datagrams in one message are found.
#[derive(Debug, Clone, Copy)]
enum Choice {
    /// Each is the next of the round.
    Round,
    /// All have this one: they come from one sender.
    Fixed(u32),
    /// Chunks of a GELF message have the one that belongs to its ID, the others are the next of the round.
    Message,
}

impl Forwarder {
    /// Opens the sending sockets and sets the memory aside.
    ///
    /// # Errors
    /// When the kernel refuses either.
    pub fn new(
        listener: Arc<str>,
        settings: &UserspaceSettings,
        table: WorkerTable,
        cursor: Arc<AtomicU64>,
        cells: Arc<WorkerCells>,
    ) -> Result<Self> {
        let count = settings.batch_size.max(1) as usize;
        let max_length = settings.max_packet_size.max(1) as usize;
        let family = Family::of(table.table.listener().ip());
        let mut batch = Batch::new(count, max_length, TOGETHER)
            .with_context(|| format!("no memory for {count} messages; lower batch_size"))?;
        batch.want_addresses(table.table.needs_addresses());
        let downstreams = table.table.addresses().len();
        let behalf = settings.preserve_source.then(|| Behalf::open(family, TOGETHER)).transpose()?;
        if behalf.is_some() {
            batch.make_room_on_behalf(TOGETHER);
        }
        Ok(Forwarder {
            listener,
            batch,
            screen: Screen::default(),
            lanes: [Lane::open(MAIN, family)?, Lane::open(TROUBLED, family)?],
            behalf,
            deal: Deal::new(TOGETHER, downstreams),
            queues: std::array::from_fn(|_| Queue::new(TOGETHER, downstreams)),
            originals: Vec::with_capacity(TOGETHER),
            fates: Vec::with_capacity(TOGETHER),
            random: rand::make_rng(),
            standing: Standing::new(downstreams),
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
        let downstreams = table.table.addresses().len();
        self.deal.resize(downstreams);
        self.queues.iter_mut().for_each(|queue| queue.resize(downstreams));
        self.table = table;
    }

    /// Takes a batch from the socket and says how many messages it holds.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` if the socket is empty.
    pub fn receive(&mut self, socket: &Socket) -> io::Result<usize> {
        self.batch.receive(socket.as_fd())
    }

    /// Forwards the batch just taken. Every one of its datagrams is counted when this returns.
    pub fn forward(&mut self, received: usize) {
        let mut outcome = ListenerCounters {
            bytes_received: (0..received).map(|slot| self.batch.message(slot).length()).sum(),
            ..Default::default()
        };
        // Kept for the whole batch, which thus follows one table.
        let table = Arc::clone(&self.table.table);
        self.admit(received, &table, &mut outcome);
        if table.policy() == Policy::Replicate {
            self.replicate(received, &table, &mut outcome);
        } else {
            self.balance(received, &table, &mut outcome);
        }
        self.cells.publish(&outcome, received as u64);
    }

    /// Takes out what comes from senders who may not send or send too fast.
    fn admit(&mut self, received: usize, table: &Table, outcome: &mut ListenerCounters) {
        self.screen.clear();
        let gate = table.gate();
        if gate.is_open() {
            return;
        }
        let now = gate.now();
        for slot in 0..received {
            let sender = self.batch.sender(slot);
            let count = self.batch.message(slot).count();
            if gate.denies(sender) {
                outcome.dropped.add(DropReason::SourceDenied, count as u64);
                self.screen.message((0..count).map(|_| true));
            } else {
                let limited = |_| {
                    let limited = gate.limits(sender, now);
                    outcome.dropped.add(DropReason::RateLimited, u64::from(limited));
                    limited
                };
                self.screen.message((0..count).map(limited));
            }
        }
    }

    /// Gives every datagram that can be forwarded a downstream, and sends them.
    fn balance(&mut self, received: usize, table: &Table, outcome: &mut ListenerCounters) {
        // One shared cursor, moved once per batch, keeps the round exact across all workers.
        let in_the_round: usize = (0..received).map(|slot| self.turns(slot, table)).sum();
        let position = self.cursor.fetch_add(in_the_round as u64, Ordering::Relaxed);
        let mut round = table.round_from(position);
        for slot in 0..received {
            let message = self.batch.message(slot);
            let choice = self.choice(slot, table);
            let from = self.name_to_keep(slot);
            for (number, piece) in message.pieces().enumerate() {
                if self.screen.takes_out(slot, number) {
                    continue;
                }
                match (piece, &mut round) {
                    (None, _) => outcome.dropped.add(DropReason::Truncated, 1),
                    (Some(_), None) => outcome.dropped.add(DropReason::NoDownstream, 1),
                    (Some(piece), Some(round)) => {
                        let target = self.target(piece, choice, table, round);
                        if from.is_some_and(|from| self.queue_on_behalf(from, target, 0, piece, table)) {
                            self.send_on_behalf_if_full(outcome, Kind::Whole);
                            continue;
                        }
                        if self.deal.full() {
                            self.send_dealt(table, outcome);
                        }
                        self.deal.add(target, piece);
                    }
                }
            }
        }
        self.send_dealt(table, outcome);
        self.send_on_behalf(outcome, Kind::Whole);
    }

    /// How the downstreams of a message's datagrams are found: the same as in the TC program's `place`.
    fn choice(&self, slot: usize, table: &Table) -> Choice {
        match table.policy() {
            Policy::RoundRobin | Policy::Replicate => Choice::Round,
            Policy::GelfMessage => Choice::Message,
            Policy::Hash(on) => {
                // Taken before the policy changed, a batch has no addresses: it still goes round.
                let Some(source) = self.batch.sender(slot) else { return Choice::Round };
                let listener = table.listener();
                let destination = self.batch.destination(slot).unwrap_or(listener.ip());
                let hash = hash::flow_hash(on, source.into(), SocketAddr::new(destination, listener.port()));
                table.placed(hash).map_or(Choice::Round, Choice::Fixed)
            }
        }
    }

    /// How many of a message's datagrams are the round's turn.
    fn turns(&self, slot: usize, table: &Table) -> usize {
        let message = self.batch.message(slot);
        let choice = self.choice(slot, table);
        let is_turn = |(number, piece): (usize, Option<Piece>)| {
            let left = piece.filter(|_| !self.screen.takes_out(slot, number));
            left.is_some_and(|piece| matches!(choice, Choice::Round) || self.message_hash(piece).is_none())
        };
        match choice {
            Choice::Fixed(_) => 0,
            Choice::Round if self.screen.is_clear() && message.all_whole() => message.count(),
            Choice::Round | Choice::Message => message.pieces().enumerate().filter(|&each| is_turn(each)).count(),
        }
    }

    fn target(&self, piece: Piece, choice: Choice, table: &Table, round: &mut Round<'_>) -> u32 {
        match choice {
            Choice::Fixed(target) => target,
            Choice::Round => round.step(),
            Choice::Message => {
                self.message_hash(piece).and_then(|hash| table.placed(hash)).unwrap_or_else(|| round.step())
            }
        }
    }

    /// The hash of the GELF message that a datagram is a chunk of, if it is one.
    fn message_hash(&self, piece: Piece) -> Option<u32> {
        match self.batch.first_bytes(piece)? {
            // A chunk: two bytes of magic, then its message's ID.
            [0x1e, 0x0f, a, b, c, d, e, f, g, h] => Some(hash::message_hash([a, b, c, d, e, f, g, h])),
            _ => None,
        }
    }

    /// The time, if anything is noted about any downstream.
    fn time_if_needed(&mut self) -> Option<Instant> {
        let now = self.standing.any_note().then(Instant::now)?;
        self.standing.forgive(now);
        Some(now)
    }

    /// What follows goes to this downstream, by the lane returned.
    fn turn_to(&mut self, target: u32, table: &Table, now: Option<Instant>) -> usize {
        let troubled = now.is_some_and(|now| self.standing.troubled(target, now));
        let most_joined = now.map_or(u32::MAX, |now| self.standing.most_joined(target, now));
        let lane = if troubled { TROUBLED } else { MAIN };
        self.batch.address(lane, table.encoded(target), most_joined);
        lane
    }

    /// Sends what has been dealt out, and accounts for it.
    fn send_dealt(&mut self, table: &Table, outcome: &mut ListenerCounters) {
        let now = self.time_if_needed();
        for index in 0..self.deal.downstreams().len() {
            let target = self.deal.downstreams()[index];
            let lane = self.turn_to(target, table, now);
            for piece in self.deal.pieces(target) {
                self.batch.queue(lane, piece);
            }
            self.queues[lane].add_messages(self.batch.messages(lane), target);
        }
        self.deal.clear();
        for lane in 0..LANES {
            self.flush(lane);
            let cells = &self.table.cells;
            self.queues[lane].verdicts(&self.batch, lane, &mut self.standing, |verdict| match verdict {
                Verdict::Sent { target, datagrams, bytes } => {
                    let packets = datagrams.len() as u64;
                    outcome.packets_forwarded += packets;
                    outcome.bytes_forwarded += bytes;
                    cells[target as usize].add(packets, bytes);
                }
                Verdict::Lost { reason, .. } => outcome.dropped.add(reason, 1),
            });
            self.empty(lane);
        }
    }

    fn empty(&mut self, lane: usize) {
        self.batch.clear(lane);
        self.queues[lane].clear();
    }

    fn flush(&mut self, number: usize) {
        let Forwarder { listener, batch, lanes, queues, table, standing, complaints, .. } = self;
        let (lane, queue) = (&mut lanes[number], &mut queues[number]);
        lane.flush(batch, |event| match event {
            Event::Apart { message, each, .. } => standing.keep_apart(queue.target(message), each - 1, Instant::now()),
            Event::Lost { message, datagram, error } => {
                let (target, reason) = (queue.target(message), lane::reason(error.raw_os_error().unwrap_or_default()));
                queue.lose(datagram, reason);
                if reason != DropReason::SendBufferFull {
                    standing.trouble(target, Instant::now());
                }
                if reason == DropReason::SendFailed
                    && let Some(unreported) = complaints.due(Instant::now())
                {
                    let downstream = table.table.addresses()[target as usize];
                    warn!(%listener, %downstream, %error, unreported, "cannot send to downstream");
                }
            }
        });
        for report in lane.reports() {
            if let Some(target) = table.table.target(&report.to) {
                let datagrams = queue.reported(batch, number, target);
                standing.charge(target, datagrams, lane::reason(report.errno), Instant::now());
            }
        }
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
