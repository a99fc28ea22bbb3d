//! Records which downstream each message of a send queue's list is for, and what becomes of its datagrams.

use std::ops::Range;

use super::super::downstream_errors::DownstreamErrors;
use super::super::mmsg::Batch;
use crate::model::DropReason;

/// What is known about a send queue's list besides the list itself. Allocates its memory once.
#[derive(Debug)]
pub struct QueuedMessages {
    /// For each message, its downstream. Messages for one downstream are adjacent.
    targets: Vec<u32>,
    /// For each datagram, the original that it is a copy of; empty if none is a copy.
    originals: Vec<u32>,
    /// Datagrams that could not be sent, and why, in the order of their numbers.
    lost: Vec<(u32, DropReason)>,
    /// For each downstream, the first of its messages without an error report. Valid only while `reports_begun` is set,
    /// and if that message is for this downstream.
    unreported: Vec<u32>,
    reports_begun: bool,
}

/// What became of datagrams.
#[derive(Debug, PartialEq, Eq)]
pub enum SendOutcome {
    /// They were sent.
    Sent {
        /// The downstream.
        target: u32,
        /// Their numbers in the list.
        datagrams: Range<usize>,
        /// UDP payload in bytes.
        bytes: u64,
    },
    /// One counts as lost: it could not be sent, or takes the place of an earlier datagram to the same downstream that
    /// was lost after it had been counted as sent.
    Lost {
        /// Its number in the list.
        datagram: usize,
        /// The reason it is counted under.
        reason: DropReason,
    },
}

impl QueuedMessages {
    /// For lists of this many datagrams.
    pub fn new(datagrams: usize, downstreams: usize) -> Self {
        QueuedMessages {
            targets: Vec::with_capacity(datagrams),
            originals: Vec::with_capacity(datagrams),
            lost: Vec::with_capacity(datagrams),
            unreported: vec![0; downstreams],
            reports_begun: false,
        }
    }

    /// Changes the number of downstreams.
    pub fn resize(&mut self, downstreams: usize) {
        self.unreported.resize(downstreams, 0);
    }

    /// The messages added since the last call are for this downstream. `messages` is the length of the list.
    pub fn add_messages(&mut self, messages: usize, target: u32) {
        self.targets.resize(messages, target);
    }

    /// The datagram just added is a copy of this original.
    pub fn add_copy(&mut self, original: usize) {
        self.originals.push(original as u32);
    }

    /// The original that a datagram is a copy of.
    pub fn original(&self, datagram: usize) -> usize {
        self.originals[datagram] as usize
    }

    /// The downstream of a message.
    pub fn target(&self, message: usize) -> u32 {
        self.targets[message]
    }

    /// Records that a datagram could not be sent.
    pub fn lose(&mut self, datagram: usize, reason: DropReason) {
        self.lost.push((datagram as u32, reason));
    }

    /// Forgets the list.
    pub fn clear(&mut self) {
        self.targets.clear();
        self.originals.clear();
        self.lost.clear();
        self.reports_begun = false;
    }

    /// How many datagrams an error report about this downstream stands for.
    ///
    /// On this host, an undeliverable message causes one report, in the order of sending and before the send returns. A
    /// report from another host is attributed to the message that was just sent, if there is one: its datagrams left
    /// together and have the same fate. Otherwise it stands for one datagram.
    pub fn reported(&mut self, batch: &Batch, queue: usize, target: u32) -> u32 {
        if !self.reports_begun {
            self.reports_begun = true;
            for (message, &target) in self.targets.iter().enumerate().rev() {
                self.unreported[target as usize] = message as u32;
            }
        }
        let message = self.unreported[target as usize] as usize;
        if self.targets.get(message) != Some(&target) {
            return 1;
        }
        self.unreported[target as usize] += 1;
        batch.datagrams(queue, message).len() as u32
    }

    /// Reports what became of every datagram in the list, and accounts for pending losses.
    pub fn outcomes(
        &self,
        batch: &Batch,
        queue: usize,
        downstream_errors: &mut DownstreamErrors,
        mut say: impl FnMut(SendOutcome),
    ) {
        let mut lost = self.lost.iter().copied().peekable();
        for (message, &target) in self.targets.iter().enumerate() {
            let datagrams = batch.datagrams(queue, message);
            let all_sent = lost.peek().is_none_or(|&(datagram, _)| datagram as usize >= datagrams.end);
            if all_sent && !downstream_errors.has_pending_losses() {
                say(SendOutcome::Sent { target, datagrams, bytes: batch.bytes(queue, message) });
                continue;
            }
            for datagram in datagrams {
                let failed = lost.next_if(|&(lost, _)| lost as usize == datagram).map(|(_, reason)| reason);
                say(match failed.or_else(|| downstream_errors.take_pending_loss(target)) {
                    Some(reason) => SendOutcome::Lost { datagram, reason },
                    None => {
                        let bytes = batch.length(queue, datagram) as u64;
                        SendOutcome::Sent { target, datagrams: datagram..datagram + 1, bytes }
                    }
                });
            }
        }
    }
}
