//! Compares what receivers got with what was sent. Pure; `tests/unit/lab.rs` tests it on made-up data.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// Tells the datagrams of one [`super::Sender`] from all others.
pub type RunId = u64;

/// How many copies of each datagram should arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// One, at any of the receivers.
    OneOfThem,
    /// One at every receiver.
    EachOfThem,
}

/// What one receiver got of one sender's datagrams.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RunTally {
    /// How often each sequence number arrived, by number.
    copies: Vec<u32>,
    /// One more than the highest number seen.
    next: u64,
    /// Datagrams, repeats included.
    pub received: u64,
    /// Datagrams whose number had arrived at this receiver before.
    pub duplicated: u64,
    /// First arrivals with a number lower than one seen before, as RFC 4737 counts them.
    pub reordered: u64,
}

/// What one receiver got.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// The receiver's name.
    pub name: String,
    /// Where it listened.
    pub address: Option<SocketAddr>,
    /// By sender.
    pub runs: BTreeMap<RunId, RunTally>,
    /// Where the datagrams came from, as the receiver saw it.
    pub sources: BTreeSet<SocketAddr>,
    /// Datagrams that no sender of ours can have sent: wrong length or damaged.
    pub unexpected: u64,
    /// The first of those, in words.
    pub first_unexpected: Option<String>,
    /// Bytes of UDP payload, repeats included.
    pub bytes: u64,
}

/// Everything, reckoned up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Datagrams sent.
    pub sent: u64,
    /// Copies that should have arrived and have not.
    pub lost: u64,
    /// Copies that have arrived and should not.
    pub duplicated: u64,
    /// Sum of the receivers' reordered datagrams.
    pub reordered: u64,
    /// Datagrams that belong to no sender counted here, or are damaged.
    pub unexpected: u64,
    /// Each receiver's own.
    pub receivers: Vec<ReceiverReport>,
    /// The first sequence numbers that are missing, for a failure's message.
    pub missing: Vec<u64>,
}

/// One receiver's part of a [`Report`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiverReport {
    /// Its name.
    pub name: String,
    /// Where it listened.
    pub address: Option<SocketAddr>,
    /// Datagrams, repeats included.
    pub received: u64,
    /// The same for each sender.
    pub by_sender: BTreeMap<RunId, u64>,
    /// Repeats at this receiver.
    pub duplicated: u64,
    /// Datagrams that came after a later one.
    pub reordered: u64,
    /// Datagrams that belong to no sender counted here, or are damaged.
    pub unexpected: u64,
    /// Where the datagrams came from, as the receiver saw it.
    pub sources: BTreeSet<SocketAddr>,
    /// Bytes of UDP payload.
    pub bytes: u64,
}

impl RunTally {
    /// Notes the arrival of a sequence number.
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

    /// Datagrams with numbers that have never been sent.
    fn beyond(&self, sent: u64) -> u64 {
        let sent = usize::try_from(sent).unwrap_or(usize::MAX);
        self.copies.iter().skip(sent).map(|n| u64::from(*n)).sum()
    }
}

impl Tally {
    /// An empty tally of a receiver.
    pub fn new(name: &str, address: SocketAddr) -> Self {
        Tally { name: name.to_owned(), address: Some(address), ..Tally::default() }
    }

    /// Notes a datagram.
    pub fn note(&mut self, run: RunId, sequence: u64, source: SocketAddr, length: usize) {
        self.runs.entry(run).or_default().note(sequence);
        self.sources.insert(source);
        self.bytes += length as u64;
    }

    /// Notes a datagram that is not one of ours.
    pub fn note_unexpected(&mut self, source: SocketAddr, what: impl FnOnce() -> String) {
        self.unexpected += 1;
        self.sources.insert(source);
        self.first_unexpected.get_or_insert_with(what);
    }
}

impl Report {
    /// True if every receiver saw this address as the source of all it got.
    pub fn all_from(&self, address: IpAddr) -> bool {
        self.receivers.iter().all(|receiver| receiver.sources.iter().all(|source| source.ip() == address))
    }

    /// Compares what the receivers got with how many datagrams each sender has sent (numbers 0 to n - 1).
    pub fn new(sent: &BTreeMap<RunId, u64>, tallies: &[Tally], expect: Expect) -> Self {
        let receivers: Vec<_> = tallies.iter().map(|tally| ReceiverReport::new(sent, tally)).collect();
        let mut report = Report {
            sent: sent.values().sum(),
            lost: 0,
            duplicated: 0,
            reordered: receivers.iter().map(|r| r.reordered).sum(),
            unexpected: receivers.iter().map(|r| r.unexpected).sum(),
            receivers,
            missing: Vec::new(),
        };
        let nothing = RunTally::default();
        for (run, count) in sent {
            let runs: Vec<_> = tallies.iter().map(|tally| tally.runs.get(run).unwrap_or(&nothing)).collect();
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

    /// Takes up the number of copies of a datagram of which one should have come.
    fn judge(&mut self, sequence: u64, copies: u64) {
        if copies == 0 {
            self.lost += 1;
            if self.missing.len() < 10 {
                self.missing.push(sequence);
            }
        }
        self.duplicated += copies.saturating_sub(1);
    }

    /// Datagrams of one sender that each receiver got, in the receivers' order.
    pub fn counts_of(&self, sender: RunId) -> Vec<u64> {
        self.receivers.iter().map(|receiver| receiver.by_sender.get(&sender).copied().unwrap_or(0)).collect()
    }

    /// Datagrams each receiver got, in the receivers' order.
    pub fn counts(&self) -> Vec<u64> {
        self.receivers.iter().map(|receiver| receiver.received).collect()
    }

    /// Every datagram arrived as often as it should and in order, and nothing else did.
    pub fn is_perfect(&self) -> bool {
        self.is_complete() && self.reordered == 0
    }

    /// Every datagram arrived as often as it should, in whatever order, and nothing else did.
    pub fn is_complete(&self) -> bool {
        self.lost == 0 && self.duplicated == 0 && self.unexpected == 0
    }
}

impl ReceiverReport {
    fn new(sent: &BTreeMap<RunId, u64>, tally: &Tally) -> Self {
        let foreign = tally.runs.iter().map(|(run, seen)| match sent.get(run) {
            Some(count) => seen.beyond(*count),
            None => seen.received,
        });
        ReceiverReport {
            name: tally.name.clone(),
            address: tally.address,
            received: tally.runs.values().map(|run| run.received).sum(),
            by_sender: tally.runs.iter().map(|(run, seen)| (*run, seen.received)).collect(),
            duplicated: tally.runs.values().map(|run| run.duplicated).sum(),
            reordered: tally.runs.values().map(|run| run.reordered).sum(),
            unexpected: tally.unexpected + foreign.sum::<u64>(),
            sources: tally.sources.clone(),
            bytes: tally.bytes,
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
