//! Forwards one batch: receives it, filters by sender, selects a downstream for each datagram, sends, counts.
//!
//! A received message holds one or more datagrams of one sender (`UDP_GRO`). Each datagram is treated by itself:
//! admission, downstream, counters. Then datagrams are grouped by downstream and sent in one message each
//! (`UDP_SEGMENT`).

mod filter_mask;
mod grouping;
mod preserve_source;
mod queued_messages;
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

use self::filter_mask::FilterMask;
use self::grouping::Grouping;
use self::preserve_source::RawListKind;
use self::queued_messages::{QueuedMessages, SendOutcome};
use self::replicate::{CopyStatus, Original};
use super::counters::WorkerCells;
use super::downstream_errors::DownstreamErrors;
use super::mmsg::incoming::Segment;
use super::mmsg::{Batch, SEND_QUEUES};
use super::preserve_source::PreserveSourceSocket;
use super::send_queue::{self, DEGRADED, MAIN, SendEvent, SendQueue};
use super::table::{ForwardingTable, RoundCursor, WorkerTable};
use crate::config::UserspaceSettings;
use crate::model::{DropReason, ListenerCounters, Policy};
use crate::net::Family;
use crate::plan::hash;

/// The minimum interval between two log lines about failed sends, per worker.
const ERROR_LOG_INTERVAL: Duration = Duration::from_secs(10);
/// The maximum number of datagrams grouped and sent together.
const SEND_LIST_CAPACITY: usize = 1024;

/// Everything a worker does with datagrams except waiting for them.
#[derive(Debug)]
pub struct Forwarder {
    listener: Arc<str>,
    batch: Batch,
    /// Which of the batch's datagrams are dropped by the listener's `sources` and `rate_limit`.
    filter_mask: FilterMask,
    send_queues: [SendQueue; SEND_QUEUES],
    /// The socket for sending with the senders' addresses; only with `preserve_source`.
    raw_socket: Option<PreserveSourceSocket>,
    /// Datagrams that have a downstream and are not queued yet.
    grouping: Grouping,
    /// What each send queue's list in `batch` holds.
    queued: [QueuedMessages; SEND_QUEUES],
    /// The datagrams to replicate, and the status of each one's copies.
    originals: Vec<Original>,
    copy_statuses: Vec<CopyStatus>,
    /// For samples.
    random: SmallRng,
    table: WorkerTable,
    downstream_errors: DownstreamErrors,
    /// The listener's position in the endless round, shared by all its workers.
    cursor: Arc<AtomicU64>,
    cells: Arc<WorkerCells>,
    error_throttle: SendErrorThrottle,
}

/// How the downstreams of a message's datagrams are selected.
#[derive(Debug, Clone, Copy)]
enum Placement {
    /// Each datagram goes to the next downstream of the round.
    Round,
    /// All go to this one: they come from one sender.
    Fixed(u32),
    /// GELF chunks go to the downstream that their message ID selects; all others to the next of the round.
    Message,
}

impl Forwarder {
    /// Opens the sending sockets and allocates all memory.
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
        let mut batch = Batch::new(count, max_length, SEND_LIST_CAPACITY)
            .with_context(|| format!("no memory for {count} messages; lower batch_size"))?;
        batch.want_addresses(table.table.needs_addresses());
        let downstreams = table.table.addresses().len();
        let raw_socket =
            settings.preserve_source.then(|| PreserveSourceSocket::open(family, SEND_LIST_CAPACITY)).transpose()?;
        if raw_socket.is_some() {
            batch.reserve_raw(SEND_LIST_CAPACITY);
        }
        Ok(Forwarder {
            listener,
            batch,
            filter_mask: FilterMask::default(),
            send_queues: [SendQueue::open(MAIN, family)?, SendQueue::open(DEGRADED, family)?],
            raw_socket,
            grouping: Grouping::new(SEND_LIST_CAPACITY, downstreams),
            queued: std::array::from_fn(|_| QueuedMessages::new(SEND_LIST_CAPACITY, downstreams)),
            originals: Vec::with_capacity(SEND_LIST_CAPACITY),
            copy_statuses: Vec::with_capacity(SEND_LIST_CAPACITY),
            random: rand::make_rng(),
            downstream_errors: DownstreamErrors::new(downstreams),
            table,
            cursor,
            cells,
            error_throttle: SendErrorThrottle::default(),
        })
    }

    /// Uses another table for the current batch and all later ones.
    pub fn set_table(&mut self, table: WorkerTable) {
        self.batch.want_addresses(table.table.needs_addresses());
        self.downstream_errors = self.downstream_errors.carried_over(&self.table.table, &table.table);
        let downstreams = table.table.addresses().len();
        self.grouping.resize(downstreams);
        self.queued.iter_mut().for_each(|queued| queued.resize(downstreams));
        self.table = table;
    }

    /// Receives a batch and returns its number of messages.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` if the socket is empty.
    pub fn receive(&mut self, socket: &Socket) -> io::Result<usize> {
        self.batch.receive(socket.as_fd())
    }

    /// Forwards the batch that was just received. Every one of its datagrams is counted when this returns.
    pub fn forward(&mut self, received: usize) {
        let mut totals = ListenerCounters {
            bytes_received: (0..received).map(|slot| self.batch.message(slot).length()).sum(),
            ..Default::default()
        };
        // Held for the whole batch, so the batch follows one table.
        let table = Arc::clone(&self.table.table);
        self.admit(received, &table, &mut totals);
        if table.policy() == Policy::Replicate {
            self.replicate(received, &table, &mut totals);
        } else {
            self.balance(received, &table, &mut totals);
        }
        self.cells.publish(&totals, received as u64);
    }

    /// Marks datagrams of denied senders and of senders beyond their rate limit, and counts them as dropped. A GRO
    /// message is charged datagram by datagram.
    fn admit(&mut self, received: usize, table: &ForwardingTable, totals: &mut ListenerCounters) {
        self.filter_mask.clear();
        let admission = table.admission();
        if admission.admits_all() {
            return;
        }
        let now = admission.now();
        for slot in 0..received {
            let sender = self.batch.sender(slot);
            let count = self.batch.message(slot).count();
            if admission.denies(sender) {
                totals.dropped.add(DropReason::SourceDenied, count as u64);
                self.filter_mask.push_message((0..count).map(|_| true));
            } else {
                let limited = |_| {
                    let limited = admission.exceeds_rate(sender, now);
                    totals.dropped.add(DropReason::RateLimited, u64::from(limited));
                    limited
                };
                self.filter_mask.push_message((0..count).map(limited));
            }
        }
    }

    /// Selects a downstream for each datagram that is not dropped, and sends them.
    fn balance(&mut self, received: usize, table: &ForwardingTable, totals: &mut ListenerCounters) {
        // One shared cursor, moved once per batch, keeps the round exact across all workers.
        let turns_taken: usize = (0..received).map(|slot| self.round_turns(slot, table)).sum();
        let position = self.cursor.fetch_add(turns_taken as u64, Ordering::Relaxed);
        let mut round = table.round_from(position);
        for slot in 0..received {
            let message = self.batch.message(slot);
            let placement = self.placement(slot, table);
            let from = self.source_to_preserve(slot);
            for (number, segment) in message.segments().enumerate() {
                if self.filter_mask.is_filtered(slot, number) {
                    continue;
                }
                match (segment, &mut round) {
                    (None, _) => totals.dropped.add(DropReason::Truncated, 1),
                    (Some(_), None) => totals.dropped.add(DropReason::NoDownstream, 1),
                    (Some(segment), Some(round)) => {
                        let target = self.target(segment, placement, table, round);
                        if from.is_some_and(|from| self.queue_preserving_source(from, target, 0, segment, table)) {
                            self.flush_preserving_source_if_full(totals, RawListKind::Datagrams);
                            continue;
                        }
                        if self.grouping.full() {
                            self.send_grouped(table, totals);
                        }
                        self.grouping.add(target, segment);
                    }
                }
            }
        }
        self.send_grouped(table, totals);
        self.flush_preserving_source(totals, RawListKind::Datagrams);
    }

    /// How the downstreams of a message's datagrams are selected. Agrees with `bpf/select.h`.
    fn placement(&self, slot: usize, table: &ForwardingTable) -> Placement {
        match table.policy() {
            Policy::RoundRobin | Policy::Replicate => Placement::Round,
            Policy::GelfMessage => Placement::Message,
            Policy::Hash(on) => {
                // The batch was received before the policy changed and has no addresses: it still goes round robin.
                let Some(source) = self.batch.sender(slot) else { return Placement::Round };
                let listener = table.listener();
                let destination = self.batch.destination(slot).unwrap_or(listener.ip());
                let hash = hash::flow_hash(on, source.into(), SocketAddr::new(destination, listener.port()));
                table.target_of_hash(hash).map_or(Placement::Round, Placement::Fixed)
            }
        }
    }

    /// How many of a message's datagrams take a turn of the round.
    fn round_turns(&self, slot: usize, table: &ForwardingTable) -> usize {
        let message = self.batch.message(slot);
        let placement = self.placement(slot, table);
        let is_turn = |(number, segment): (usize, Option<Segment>)| {
            let left = segment.filter(|_| !self.filter_mask.is_filtered(slot, number));
            left.is_some_and(|segment| matches!(placement, Placement::Round) || self.message_hash(segment).is_none())
        };
        match placement {
            Placement::Fixed(_) => 0,
            Placement::Round if self.filter_mask.filters_none() && message.all_fit() => message.count(),
            Placement::Round | Placement::Message => {
                message.segments().enumerate().filter(|&each| is_turn(each)).count()
            }
        }
    }

    fn target(
        &self,
        segment: Segment,
        placement: Placement,
        table: &ForwardingTable,
        round: &mut RoundCursor<'_>,
    ) -> u32 {
        match placement {
            Placement::Fixed(target) => target,
            Placement::Round => round.step(),
            Placement::Message => {
                self.message_hash(segment).and_then(|hash| table.target_of_hash(hash)).unwrap_or_else(|| round.step())
            }
        }
    }

    /// The hash of the message ID if the datagram is a GELF chunk.
    fn message_hash(&self, segment: Segment) -> Option<u32> {
        match self.batch.first_bytes(segment)? {
            // A chunk: two magic bytes, then the message ID.
            [0x1e, 0x0f, a, b, c, d, e, f, g, h] => Some(hash::message_hash([a, b, c, d, e, f, g, h])),
            _ => None,
        }
    }

    /// The time, if any downstream has recent errors; reading the clock is unnecessary otherwise.
    fn now_if_errors(&mut self) -> Option<Instant> {
        let now = self.downstream_errors.any_active().then(Instant::now)?;
        self.downstream_errors.expire(now);
        Some(now)
    }

    /// Selects the send queue for what follows to this downstream, and addresses it.
    fn select_queue(&mut self, target: u32, table: &ForwardingTable, now: Option<Instant>) -> usize {
        let degraded = now.is_some_and(|now| self.downstream_errors.is_degraded(target, now));
        let max_segment = now.map_or(u32::MAX, |now| self.downstream_errors.max_segment(target, now));
        let queue = if degraded { DEGRADED } else { MAIN };
        self.batch.address(queue, table.encoded(target), max_segment);
        queue
    }

    /// Sends what has been grouped, and counts it.
    fn send_grouped(&mut self, table: &ForwardingTable, totals: &mut ListenerCounters) {
        let now = self.now_if_errors();
        for index in 0..self.grouping.downstreams().len() {
            let target = self.grouping.downstreams()[index];
            let queue = self.select_queue(target, table, now);
            for segment in self.grouping.segments(target) {
                self.batch.push(queue, segment);
            }
            self.queued[queue].add_messages(self.batch.messages(queue), target);
        }
        self.grouping.clear();
        for queue in 0..SEND_QUEUES {
            self.flush(queue);
            let cells = &self.table.cells;
            self.queued[queue].outcomes(&self.batch, queue, &mut self.downstream_errors, |verdict| match verdict {
                SendOutcome::Sent { target, datagrams, bytes } => {
                    let packets = datagrams.len() as u64;
                    totals.packets_forwarded += packets;
                    totals.bytes_forwarded += bytes;
                    cells[target as usize].add(packets, bytes);
                }
                SendOutcome::Lost { reason, .. } => totals.dropped.add(reason, 1),
            });
            self.empty(queue);
        }
    }

    fn empty(&mut self, queue: usize) {
        self.batch.clear(queue);
        self.queued[queue].clear();
    }

    fn flush(&mut self, number: usize) {
        let Forwarder { listener, batch, send_queues, queued, table, downstream_errors, error_throttle, .. } = self;
        let (queue, queued) = (&mut send_queues[number], &mut queued[number]);
        queue.flush(batch, |event| match event {
            SendEvent::Unsegmented { message, each, .. } => {
                downstream_errors.mark_unsegmented(queued.target(message), each - 1, Instant::now())
            }
            SendEvent::Lost { message, datagram, error } => {
                let (target, reason) =
                    (queued.target(message), send_queue::drop_reason(error.raw_os_error().unwrap_or_default()));
                queued.lose(datagram, reason);
                if reason != DropReason::SendBufferFull {
                    downstream_errors.mark_degraded(target, Instant::now());
                }
                if reason == DropReason::SendFailed
                    && let Some(unreported) = error_throttle.due(Instant::now())
                {
                    let downstream = table.table.addresses()[target as usize];
                    warn!(%listener, %downstream, %error, unreported, "cannot send to downstream");
                }
            }
        });
        for report in queue.reports() {
            if let Some(target) = table.table.target(&report.to) {
                let datagrams = queued.reported(batch, number, target);
                downstream_errors.record_loss(target, datagrams, send_queue::drop_reason(report.errno), Instant::now());
            }
        }
    }
}

/// Keeps repeated send errors from flooding the log.
#[derive(Debug, Default)]
struct SendErrorThrottle {
    next: Option<Instant>,
    unreported: u64,
}

impl SendErrorThrottle {
    /// If a log line is due: the number of errors since the last one.
    fn due(&mut self, now: Instant) -> Option<u64> {
        if self.next.is_some_and(|next| now < next) {
            self.unreported += 1;
            return None;
        }
        self.next = Some(now + ERROR_LOG_INTERVAL);
        Some(std::mem::take(&mut self.unreported))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_spaced_and_lose_no_count() {
        let start = Instant::now();
        let mut error_throttle = SendErrorThrottle::default();
        assert_eq!(error_throttle.due(start), Some(0));
        assert_eq!(error_throttle.due(start), None);
        assert_eq!(error_throttle.due(start + ERROR_LOG_INTERVAL / 2), None);
        assert_eq!(error_throttle.due(start + ERROR_LOG_INTERVAL), Some(2));
        assert_eq!(error_throttle.due(start + ERROR_LOG_INTERVAL * 2), Some(0));
    }
}
