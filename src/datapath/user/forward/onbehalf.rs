//! The way of datagrams that leave in their senders' names (`preserve_source`).

use std::time::Instant;

use tracing::warn;

use super::super::behalf::{Entry, can_keep};
use super::super::lane;
use super::super::mmsg::Endpoint;
use super::super::mmsg::incoming::Piece;
use super::super::table::Table;
use super::Forwarder;
use super::replicate::Fate;
use crate::model::{DropReason, ListenerCounters};

/// What the datagrams of the list are, which says how they are accounted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Those that were received.
    Whole,
    /// Copies of them.
    Copies,
}

impl Forwarder {
    /// The sender of a message, if its datagrams are to leave in its name.
    pub(super) fn name_to_keep(&self, slot: usize) -> Option<Endpoint> {
        self.behalf.as_ref().and_then(|_| self.batch.sender(slot))
    }

    /// Queues a datagram, or a copy of the one of this number, for leaving in its sender's name, if it can; there must be
    /// room.
    pub(super) fn queue_on_behalf(
        &mut self,
        from: Endpoint,
        target: u32,
        original: usize,
        piece: Piece,
        table: &Table,
    ) -> bool {
        let to = table.addresses()[target as usize];
        match &mut self.behalf {
            Some(behalf) if can_keep(from.0, to.ip()) => {
                self.batch.queue_on_behalf(from, to, piece);
                behalf.add(Entry { target, original: original as u32, bytes: piece.length() });
                true
            }
            _ => false,
        }
    }

    /// Sends what has been queued, if there is no room for more.
    pub(super) fn send_on_behalf_if_full(&mut self, outcome: &mut ListenerCounters, kind: Kind) {
        if self.batch.full_on_behalf() {
            self.send_on_behalf(outcome, kind);
        }
    }

    /// Sends what has been queued, and accounts for it.
    pub(super) fn send_on_behalf(&mut self, outcome: &mut ListenerCounters, kind: Kind) {
        let Forwarder { listener, batch, behalf, table, fates, complaints, .. } = self;
        let Some(behalf) = behalf else { return };
        behalf.flush(batch, |Entry { target, original, bytes }, result| {
            let fate = fates.get_mut(original as usize).filter(|_| kind == Kind::Copies);
            let Err(error) = result else {
                table.cells[target as usize].add(1, u64::from(bytes));
                match fate {
                    Some(fate) => *fate = Fate::Sent,
                    None => {
                        outcome.packets_forwarded += 1;
                        outcome.bytes_forwarded += u64::from(bytes);
                    }
                }
                return;
            };
            let reason = lane::reason(error.raw_os_error().unwrap_or_default());
            match fate {
                Some(fate) => {
                    outcome.copies_dropped.add(reason, 1);
                    fate.failed(reason);
                }
                None => outcome.dropped.add(reason, 1),
            }
            if reason == DropReason::SendFailed
                && let Some(unreported) = complaints.due(Instant::now())
            {
                let downstream = table.table.addresses()[target as usize];
                warn!(%listener, %downstream, %error, unreported, "cannot send to downstream in the sender's name");
            }
        });
    }
}
