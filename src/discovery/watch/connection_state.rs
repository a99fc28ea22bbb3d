//! The history of one Service's connection to the API server: what was heard when, what failed, what has been said.
//!
//! Shared by the HTTP client, which sees bytes and requests, and by the task that follows the Service, which sees
//! events and errors; the kube crate's watcher between them shows neither bookmarks nor its resumptions.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::super::service_key::ServiceKey;
use super::super::status::{ErrorKind, WatchCounters};

#[derive(Debug)]
pub(super) struct ConnectionState {
    key: ServiceKey,
    counters: Arc<WatchCounters>,
    history: Mutex<ConnectionHistory>,
}

#[derive(Debug, Default)]
struct ConnectionHistory {
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
    reported: BTreeSet<ErrorKind>,
}

impl ConnectionState {
    pub(super) fn new(key: ServiceKey, counters: Arc<WatchCounters>) -> ConnectionState {
        ConnectionState { key, counters, history: Mutex::default() }
    }

    /// The history is whole at every moment, and held only between two awaits.
    fn history(&self) -> MutexGuard<'_, ConnectionHistory> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A watch is about to be asked for: how many before it, in a row, lived less than `short`.
    pub(super) fn count_short_watches(&self, short: Duration) -> u32 {
        let mut history = self.history();
        match history.opened.take() {
            Some(opened) if opened.elapsed() < short => history.short += 1,
            Some(_) => history.short = 0,
            // The last request did not get as far as a watch, which is counted as a failure.
            None => {}
        }
        history.short
    }

    /// The server has accepted a watch: what is known is current from here on.
    pub(super) fn watch_opened(&self) {
        self.counters.count_watch();
        self.counters.record_activity();
        self.counters.set_synced(true);
        let mut history = self.history();
        history.opened = Some(Instant::now());
        if let Some(outage) = history.outage.take() {
            let after = outage.since.elapsed();
            tracing::info!("endpoints of {} are being followed again, after {:.1} s", self.key, after.as_secs_f64());
        }
    }

    /// The open watch has brought something.
    pub(super) fn record_activity(&self) {
        self.counters.record_activity();
        self.history().stalls = 0;
    }

    /// The open watch has been silent for too long.
    pub(super) fn record_stall(&self) {
        self.history().stalls += 1;
    }

    /// How many silences there have been since the last sign of life.
    pub(super) fn stalls(&self) -> u32 {
        self.history().stalls
    }

    /// Counts a failure and says how many in a row it makes. A watch that was open for as long as `short` in between
    /// starts the count anew; one that is accepted and at once broken does not.
    pub(super) fn record_failure(&self, kind: ErrorKind, short: Duration) -> u32 {
        self.counters.count_error(kind);
        self.counters.set_synced(false);
        let mut history = self.history();
        if history.opened.is_some_and(|opened| opened.elapsed() >= short) {
            history.failures = 0;
        }
        history.failures = history.failures.saturating_add(1);
        history.failures
    }

    /// True if the operator has not been told of this kind of failure since the last time all was well.
    pub(super) fn is_first_of_outage(&self, kind: ErrorKind) -> bool {
        let mut history = self.history();
        let outage = history.outage.get_or_insert_with(|| Outage { since: Instant::now(), reported: BTreeSet::new() });
        outage.reported.insert(kind)
    }
}
