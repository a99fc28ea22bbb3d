//! The history of one Service's connection to the API server: activity, failures, and which of them are logged.
//!
//! Shared by the HTTP client, which sees bytes and requests, and by the task that follows the Service, which sees
//! events and errors: the kube crate's watcher between them hides bookmarks and resumptions.

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
    /// When the current or last watch was opened.
    opened: Option<Instant>,
    /// Consecutive short watches.
    short: u32,
    /// Consecutive stalls: timeouts of an open watch without activity in between.
    stalls: u32,
    /// Consecutive failures.
    failures: u32,
    outage: Option<Outage>,
}

/// A period without a working watch.
#[derive(Debug)]
struct Outage {
    since: Instant,
    /// The kinds of failure that are logged; each is logged once per outage.
    reported: BTreeSet<ErrorKind>,
}

impl ConnectionState {
    pub(super) fn new(key: ServiceKey, counters: Arc<WatchCounters>) -> ConnectionState {
        ConnectionState { key, counters, history: Mutex::default() }
    }

    /// A poisoned lock is usable: no update leaves the history half changed. Never held across an await.
    fn history(&self) -> MutexGuard<'_, ConnectionHistory> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Call before each watch. Returns how many consecutive watches before it were shorter than `short`.
    pub(super) fn count_short_watches(&self, short: Duration) -> u32 {
        let mut history = self.history();
        match history.opened.take() {
            Some(opened) if opened.elapsed() < short => history.short += 1,
            Some(_) => history.short = 0,
            // No watch was opened since the last call; `record_failure` counts that.
            None => {}
        }
        history.short
    }

    /// The server has accepted a watch: the known slices are current from now on.
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

    /// The open watch has sent data.
    pub(super) fn record_activity(&self) {
        self.counters.record_activity();
        self.history().stalls = 0;
    }

    /// The open watch has timed out.
    pub(super) fn record_stall(&self) {
        self.history().stalls += 1;
    }

    /// The number of stalls since the last activity.
    pub(super) fn stalls(&self) -> u32 {
        self.history().stalls
    }

    /// Counts a failure and returns the number of consecutive ones. A watch that was open for at least `short` resets the
    /// count; one that breaks at once does not.
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

    /// True for the first failure of this kind in the current outage, which is the one to log.
    pub(super) fn is_first_of_outage(&self, kind: ErrorKind) -> bool {
        let mut history = self.history();
        let outage = history.outage.get_or_insert_with(|| Outage { since: Instant::now(), reported: BTreeSet::new() });
        outage.reported.insert(kind)
    }
}
