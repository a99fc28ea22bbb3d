//! The score of one Service's connection to the API server: what was heard when, what failed, what has been said.
//!
//! Shared by the HTTP client, which sees bytes and requests, and by the task that follows the Service, which sees
//! events and errors; the kube crate's watcher between them shows neither bookmarks nor its resumptions.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::super::hub::ServiceKey;
use super::super::status::{Counters, ErrorKind};

#[derive(Debug)]
pub(super) struct Link {
    key: ServiceKey,
    counters: Arc<Counters>,
    score: Mutex<Score>,
}

#[derive(Debug, Default)]
struct Score {
    /// When the watch that is open, or was last, was opened.
    opened: Option<Instant>,
    /// Watches in a row that did not live long.
    short: u32,
    /// Silences in a row that were taken for the end of a watch.
    stalls: u32,
    /// Failures in a row.
    failures: u32,
    outage: Option<Outage>,
}

/// A time during which nothing new could be learnt.
#[derive(Debug)]
struct Outage {
    since: Instant,
    /// What the operator has been told of; each kind of failure once.
    told: BTreeSet<ErrorKind>,
}

impl Link {
    pub(super) fn new(key: ServiceKey, counters: Arc<Counters>) -> Link {
        Link { key, counters, score: Mutex::default() }
    }

    /// The score is whole at every moment, and held only between two awaits.
    fn score(&self) -> MutexGuard<'_, Score> {
        self.score.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A watch is about to be asked for: how many before it, in a row, lived less than `short`.
    pub(super) fn before_watch(&self, short: Duration) -> u32 {
        let mut score = self.score();
        match score.opened.take() {
            Some(opened) if opened.elapsed() < short => score.short += 1,
            Some(_) => score.short = 0,
            // The last request did not get as far as a watch, which is counted as a failure.
            None => {}
        }
        score.short
    }

    /// The server has accepted a watch: what is known is current from here on.
    pub(super) fn watch_opened(&self) {
        self.counters.count_watch();
        self.counters.note_heard();
        self.counters.set_synced(true);
        let mut score = self.score();
        score.opened = Some(Instant::now());
        if let Some(outage) = score.outage.take() {
            let after = outage.since.elapsed();
            tracing::info!("endpoints of {} are being followed again, after {:.1} s", self.key, after.as_secs_f64());
        }
    }

    /// The open watch has brought something.
    pub(super) fn heard(&self) {
        self.counters.note_heard();
        self.score().stalls = 0;
    }

    /// The open watch has been silent for too long.
    pub(super) fn watch_stalled(&self) {
        self.score().stalls += 1;
    }

    /// How many silences there have been since the last sign of life.
    pub(super) fn stalls(&self) -> u32 {
        self.score().stalls
    }

    /// Counts a failure and says how many in a row it makes. A watch that was open for as long as `short` in between
    /// starts the count anew; one that is accepted and at once broken does not.
    pub(super) fn failed(&self, kind: ErrorKind, short: Duration) -> u32 {
        self.counters.count_error(kind);
        self.counters.set_synced(false);
        let mut score = self.score();
        if score.opened.is_some_and(|opened| opened.elapsed() >= short) {
            score.failures = 0;
        }
        score.failures = score.failures.saturating_add(1);
        score.failures
    }

    /// True if the operator has not been told of this kind of failure since the last time all was well.
    pub(super) fn is_news(&self, kind: ErrorKind) -> bool {
        let mut score = self.score();
        let outage = score.outage.get_or_insert_with(|| Outage { since: Instant::now(), told: BTreeSet::new() });
        outage.told.insert(kind)
    }
}
