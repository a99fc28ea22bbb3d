//! Compares the datagrams received with those sent. Pure; `tests/unit/lab.rs` tests it with synthetic data.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// Identifies the datagrams of one [`super::Sender`].
pub type RunId = u64;

/// How many copies of each datagram should arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// One copy, at any receiver.
    OneOfThem,
    /// One copy at every receiver.
    EachOfThem,
}

/// Datagrams of one sender that one receiver got.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RunStats {
    /// Number of arrivals, by sequence number.
    copies: Vec<u32>,
    /// One more than the highest number seen.
    next: u64,
    /// Datagrams, duplicates included.
    pub received: u64,
    /// Datagrams with a sequence number that had already arrived at this receiver.
    pub duplicated: u64,
    /// First arrivals with a lower sequence number than an earlier arrival (RFC 4737).
    pub reordered: u64,
}

/// All datagrams that one receiver got.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReceiverStats {
    /// The receiver's name.
    pub name: String,
    /// The address that the receiver listened on.
    pub address: Option<SocketAddr>,
    /// Statistics by sender.
    pub runs: BTreeMap<RunId, RunStats>,
    /// Source addresses of the datagrams, as the receiver saw them.
    pub sources: BTreeSet<SocketAddr>,
    /// Datagrams that no [`super::Sender`] can have sent: wrong length or damaged.
    pub unexpected: u64,
    /// Description of the first of those.
    pub first_unexpected: Option<String>,
    /// Bytes of UDP payload, duplicates included.
    pub bytes: u64,
}

/// Totals of all senders and receivers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Datagrams sent.
    pub sent: u64,
    /// Copies that should have arrived but did not.
    pub lost: u64,
    /// Copies that arrived but should not have.
    pub duplicated: u64,
    /// Sum of the receivers' reordered datagrams.
    pub reordered: u64,
    /// Datagrams of senders that this report does not count, and damaged ones.
    pub unexpected: u64,
    /// Statistics of each receiver.
    pub receivers: Vec<ReceiverReport>,
    /// The first missing sequence numbers, for a failure's message.
    pub missing: Vec<u64>,
}

/// One receiver's part of a [`Report`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiverReport {
    /// The receiver's name.
    pub name: String,
    /// The address that the receiver listened on.
    pub address: Option<SocketAddr>,
    /// Datagrams, duplicates included.
    pub received: u64,
    /// Datagrams by sender, duplicates included.
    pub by_sender: BTreeMap<RunId, u64>,
    /// Duplicates at this receiver.
    pub duplicated: u64,
    /// Datagrams that arrived after a later one.
    pub reordered: u64,
    /// Datagrams of senders that this report does not count, and damaged ones.
    pub unexpected: u64,
    /// Source addresses of the datagrams, as the receiver saw them.
    pub sources: BTreeSet<SocketAddr>,
    /// Bytes of UDP payload.
    pub bytes: u64,
}

impl RunStats {
    /// Records the arrival of a sequence number.
    pub fn note(&mut self, sequence: u64) {
        self.received += 1;
        let index = usize::try_from(sequence).unwrap_or(usize::MAX);
        if index >= self.copies.len() {
            self.copies.resize(index + 1, 0);
        }
        self.copies[index] += 1;
        if self.copies[index] > 1 {
            self.duplicated += 1;
        } else if sequence < self.next {
            self.reordered += 1;
        }
        self.next = self.next.max(sequence + 1);
    }

    fn copies_of(&self, sequence: u64) -> u64 {
        let copies = usize::try_from(sequence).ok().and_then(|index| self.copies.get(index));
        copies.copied().unwrap_or(0).into()
    }

    /// Datagrams with sequence numbers that were never sent.
    fn beyond(&self, sent: u64) -> u64 {
        let sent = usize::try_from(sent).unwrap_or(usize::MAX);
        self.copies.iter().skip(sent).map(|n| u64::from(*n)).sum()
    }
}

impl ReceiverStats {
    /// Empty statistics of a receiver.
    pub fn new(name: &str, address: SocketAddr) -> Self {
        ReceiverStats { name: name.to_owned(), address: Some(address), ..ReceiverStats::default() }
    }

    /// Records a datagram.
    pub fn note(&mut self, run: RunId, sequence: u64, source: SocketAddr, length: usize) {
        self.runs.entry(run).or_default().note(sequence);
        self.sources.insert(source);
        self.bytes += length as u64;
    }

    /// Records a datagram that no [`super::Sender`] can have sent.
    pub fn note_unexpected(&mut self, source: SocketAddr, what: impl FnOnce() -> String) {
        self.unexpected += 1;
        self.sources.insert(source);
        self.first_unexpected.get_or_insert_with(what);
    }
}

impl Report {
    /// True if every receiver saw only this source address.
    pub fn all_from(&self, address: IpAddr) -> bool {
        self.receivers.iter().all(|receiver| receiver.sources.iter().all(|source| source.ip() == address))
    }

    /// Compares the datagrams received with the number n that each sender has sent (sequence numbers 0 to n - 1).
    pub fn new(sent: &BTreeMap<RunId, u64>, all_stats: &[ReceiverStats], expect: Expect) -> Self {
        let receivers: Vec<_> = all_stats.iter().map(|stats| ReceiverReport::new(sent, stats)).collect();
        let mut report = Report {
            sent: sent.values().sum(),
            lost: 0,
            duplicated: 0,
            reordered: receivers.iter().map(|r| r.reordered).sum(),
            unexpected: receivers.iter().map(|r| r.unexpected).sum(),
            receivers,
            missing: Vec::new(),
        };
        let nothing = RunStats::default();
        for (run, count) in sent {
            let runs: Vec<_> = all_stats.iter().map(|stats| stats.runs.get(run).unwrap_or(&nothing)).collect();
            for sequence in 0..*count {
                let copies = runs.iter().map(|run| run.copies_of(sequence));
                match expect {
                    Expect::OneOfThem => report.judge(sequence, copies.sum()),
                    Expect::EachOfThem => copies.for_each(|copies| report.judge(sequence, copies)),
                }
            }
        }
        report
    }

    /// Counts the copies of a datagram that should have arrived once.
    fn judge(&mut self, sequence: u64, copies: u64) {
        if copies == 0 {
            self.lost += 1;
            if self.missing.len() < 10 {
                self.missing.push(sequence);
            }
        }
        self.duplicated += copies.saturating_sub(1);
    }

    /// Datagrams of one sender at each receiver, in the order of receivers.
    pub fn counts_of(&self, sender: RunId) -> Vec<u64> {
        self.receivers.iter().map(|receiver| receiver.by_sender.get(&sender).copied().unwrap_or(0)).collect()
    }

    /// Datagrams at each receiver, in the order of receivers.
    pub fn counts(&self) -> Vec<u64> {
        self.receivers.iter().map(|receiver| receiver.received).collect()
    }

    /// True if every expected copy arrived once and in order, and nothing else arrived.
    pub fn is_perfect(&self) -> bool {
        self.is_complete() && self.reordered == 0
    }

    /// True if every expected copy arrived once, in any order, and nothing else arrived.
    pub fn is_complete(&self) -> bool {
        self.lost == 0 && self.duplicated == 0 && self.unexpected == 0
    }
}

impl ReceiverReport {
    fn new(sent: &BTreeMap<RunId, u64>, stats: &ReceiverStats) -> Self {
        let foreign = stats.runs.iter().map(|(run, seen)| match sent.get(run) {
            Some(count) => seen.beyond(*count),
            None => seen.received,
        });
        ReceiverReport {
            name: stats.name.clone(),
            address: stats.address,
            received: stats.runs.values().map(|run| run.received).sum(),
            by_sender: stats.runs.iter().map(|(run, seen)| (*run, seen.received)).collect(),
            duplicated: stats.runs.values().map(|run| run.duplicated).sum(),
            reordered: stats.runs.values().map(|run| run.reordered).sum(),
            unexpected: stats.unexpected + foreign.sum::<u64>(),
            sources: stats.sources.clone(),
            bytes: stats.bytes,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "sent {}, lost {}, duplicated {}, reordered {}, unexpected {}",
            self.sent, self.lost, self.duplicated, self.reordered, self.unexpected
        )?;
        if !self.missing.is_empty() {
            writeln!(f, "  first missing: {:?}", self.missing)?;
        }
        for receiver in &self.receivers {
            writeln!(
                f,
                "  {}: received {}, duplicated {}, reordered {}, unexpected {}, from {:?}",
                receiver.name,
                receiver.received,
                receiver.duplicated,
                receiver.reordered,
                receiver.unexpected,
                receiver.sources
            )?;
        }
        Ok(())
    }
}
