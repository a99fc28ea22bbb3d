//! Queues and sends datagrams with their sender's address (`preserve_source`), through the worker's raw socket.

use std::time::Instant;

use tracing::warn;

use super::super::mmsg::AddrPort;
use super::super::mmsg::incoming::Segment;
use super::super::preserve_source::{RawSendEntry, can_preserve_source};
use super::super::send_queue;
use super::super::table::ForwardingTable;
use super::Forwarder;
use super::replicate::CopyStatus;
use crate::model::{DropReason, ListenerCounters};

/// What the list holds, which decides how it is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RawListKind {
    /// Datagrams as received.
    Datagrams,
    /// Copies, under `replicate`.
    Copies,
}

impl Forwarder {
    /// The sender of a message, if its address is to be preserved.
    pub(super) fn source_to_preserve(&self, slot: usize) -> Option<AddrPort> {
        self.raw_socket.as_ref().and_then(|_| self.batch.sender(slot))
    }

    /// Queues a datagram, or a copy of the datagram number `original`, for the raw socket. False if this sender's
    /// address cannot be used towards that downstream. There must be room.
    pub(super) fn queue_preserving_source(
        &mut self,
        from: AddrPort,
        target: u32,
        original: usize,
        segment: Segment,
        table: &ForwardingTable,
    ) -> bool {
        let to = table.addresses()[target as usize];
        match &mut self.raw_socket {
            Some(raw_socket) if can_preserve_source(from.0, to.ip()) => {
                self.batch.push_raw(from, to, segment);
                raw_socket.add(RawSendEntry { target, original: original as u32, bytes: segment.length() });
                true
            }
            _ => false,
        }
    }

    /// Sends what is queued if there is no room for more.
    pub(super) fn flush_preserving_source_if_full(&mut self, totals: &mut ListenerCounters, list_kind: RawListKind) {
        if self.batch.raw_is_full() {
            self.flush_preserving_source(totals, list_kind);
        }
    }

    /// Sends what is queued, and counts it.
    pub(super) fn flush_preserving_source(&mut self, totals: &mut ListenerCounters, list_kind: RawListKind) {
        let Forwarder { listener, batch, raw_socket, table, copy_statuses, error_throttle, .. } = self;
        let Some(raw_socket) = raw_socket else { return };
        raw_socket.flush(batch, |RawSendEntry { target, original, bytes }, result| {
            let status = copy_statuses.get_mut(original as usize).filter(|_| list_kind == RawListKind::Copies);
            let Err(error) = result else {
                table.cells[target as usize].add(1, u64::from(bytes));
                match status {
                    Some(status) => *status = CopyStatus::Sent,
                    None => {
                        totals.packets_forwarded += 1;
                        totals.bytes_forwarded += u64::from(bytes);
                    }
                }
                return;
            };
            let reason = send_queue::drop_reason(error.raw_os_error().unwrap_or_default());
            match status {
                Some(status) => {
                    totals.copies_dropped.add(reason, 1);
                    status.failed(reason);
                }
                None => totals.dropped.add(reason, 1),
            }
            if reason == DropReason::SendFailed
                && let Some(unreported) = error_throttle.due(Instant::now())
            {
                let downstream = table.table.addresses()[target as usize];
                warn!(%listener, %downstream, %error, unreported, "cannot send to downstream with the sender's address");
            }
        });
    }
}
