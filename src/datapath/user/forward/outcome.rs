//! Whom the messages of a lane's list are for, and what becomes of the datagrams in them.

use std::ops::Range;

use super::super::mmsg::Batch;
use super::super::standing::Standing;
use crate::model::DropReason;

/// What is known about a lane's list besides what the list itself holds. Its memory is set aside once.
#[derive(Debug)]
pub struct Queue {
    /// For each message, its downstream; messages for one downstream are side by side.
    targets: Vec<u32>,
    /// For each datagram, which of those to replicate it is a copy of; empty if none is.
    originals: Vec<u32>,
    /// Datagrams that could not be sent, and why, in the order of their numbers.
    lost: Vec<(u32, DropReason)>,
    /// For each downstream, the first of its messages about which nothing has come back. Only good while
    /// `reports_begun`, and where that message is for this downstream.
    unreported: Vec<u32>,
    reports_begun: bool,
}

/// What has become of datagrams.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// They have been sent.
    Sent {
        /// To this downstream.
        target: u32,
        /// Their numbers in the list.
        datagrams: Range<usize>,
        /// Their bytes.
        bytes: u64,
    },
    /// One counts as lost: it could not be sent, or one that was sent to its downstream earlier was lost.
    Lost {
        /// Its number in the list.
        datagram: usize,
        /// Why.
        reason: DropReason,
    },
}

impl Queue {
    /// For lists of so many datagrams.
    pub fn new(datagrams: usize, downstreams: usize) -> Self {
        Queue {
            targets: Vec::with_capacity(datagrams),
            originals: Vec::with_capacity(datagrams),
            lost: Vec::with_capacity(datagrams),
            unreported: vec![0; downstreams],
            reports_begun: false,
        }
    }

    /// For another number of downstreams.
    pub fn resize(&mut self, downstreams: usize) {
        self.unreported.resize(downstreams, 0);
    }

    /// Notes that the messages added since the last call, up to so many in all, are for this downstream.
    pub fn add_messages(&mut self, messages: usize, target: u32) {
        self.targets.resize(messages, target);
    }

    /// Notes that the datagram just added is a copy of this original.
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

    /// Notes that a datagram could not be sent.
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

    /// How many datagrams a report that has come back from a downstream stands for.
    ///
    /// On this host, a message that could not be delivered brings one report, in the order of sending and before the send
    /// returns. One that comes from afar and finds a message just sent is taken for that message's: datagrams that leave
    /// together have the same fate. Otherwise it stands for one datagram.
    pub fn reported(&mut self, batch: &Batch, lane: usize, target: u32) -> u32 {
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
        batch.datagrams(lane, message).len() as u32
    }

    /// Says of every datagram in the list what has become of it. Debts are paid.
    pub fn verdicts(&self, batch: &Batch, lane: usize, standing: &mut Standing, mut say: impl FnMut(Verdict)) {
        let mut lost = self.lost.iter().copied().peekable();
        for (message, &target) in self.targets.iter().enumerate() {
            let datagrams = batch.datagrams(lane, message);
            let all_sent = lost.peek().is_none_or(|&(datagram, _)| datagram as usize >= datagrams.end);
            if all_sent && !standing.owes() {
                say(Verdict::Sent { target, datagrams, bytes: batch.bytes(lane, message) });
                continue;
            }
            for datagram in datagrams {
                let failed = lost.next_if(|&(lost, _)| lost as usize == datagram).map(|(_, reason)| reason);
                say(match failed.or_else(|| standing.settle(target)) {
                    Some(reason) => Verdict::Lost { datagram, reason },
                    None => {
                        let bytes = batch.length(lane, datagram) as u64;
                        Verdict::Sent { target, datagrams: datagram..datagram + 1, bytes }
                    }
                });
            }
        }
    }
}
