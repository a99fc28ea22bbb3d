//! The history of one Service's connection to the API server: activity, failures, and which of them are logged.
//!
//! Shared by the HTTP client, which sees bytes and requests, and by the task that follows the Service, which sees
//! events and errors: the kube crate's watcher between them hides bookmarks and resumptions.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::super::DiscoveryTimeouts;
use super::super::service_key::ServiceKey;
use super::super::status::{ErrorKind, WatchCounters};
use super::backoff::{FORBIDDEN_ATTEMPTS, FailureCounts};

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
    /// Failures since the last watch that was not short.
    failures: FailureCounts,
    /// The `Retry-After` header of the last reply, which the kube crate drops.
    retry_after: Option<Duration>,
    /// True from a complete list, or a resumed watch that has worked, until the next failure.
    current: bool,
    outage: Option<Outage>,
}

impl ConnectionHistory {
    /// The watch, if one was open, has ended. Returns true if it was shorter than `short`; a longer one ends the backoff of
    /// earlier failures.
    fn close_watch(&mut self, short: Duration) -> bool {
        match self.opened.take() {
            Some(opened) if opened.elapsed() < short => true,
            Some(_) => {
                self.short = 0;
                self.failures.reset();
                false
            }
            None => false,
        }
    }
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
        // A watch that has failed has its own wait.
        if history.close_watch(short) {
            history.short += 1;
        }
        history.short
    }

    /// The server has accepted a watch. A watch that follows a complete list works. A resumed one may still be answered 410 in its
    /// first event: [`confirm_watch`](Self::confirm_watch) tells that it works.
    pub(super) fn watch_opened(&self) {
        self.counters.count_watch();
        self.counters.record_activity();
        let mut history = self.history();
        history.opened = Some(Instant::now());
        let current = history.current;
        drop(history);
        if current {
            self.confirm_watch();
        }
    }

    /// A complete list has been received.
    pub(super) fn list_completed(&self) {
        self.history().current = true;
    }

    /// The open watch works: the known slices are current from now on. Ends an outage.
    pub(super) fn confirm_watch(&self) {
        self.counters.set_synced(true);
        let mut history = self.history();
        history.current = true;
        if let Some(outage) = history.outage.take().filter(|outage| !outage.reported.is_empty()) {
            let after = outage.since.elapsed();
            tracing::info!("endpoints of {} are being followed again, after {:.1} s", self.key, after.as_secs_f64());
        }
    }

    /// The server has asked for a pause in the header of a reply.
    pub(super) fn set_retry_after(&self, wait: Option<Duration>) {
        self.history().retry_after = wait;
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

    /// Counts a failure and returns the wait before the next attempt. `retry_after` is the pause that the server asks for in the
    /// reply's body.
    pub(super) fn record_failure(
        &self,
        kind: ErrorKind,
        retry_after: Option<Duration>,
        limits: &DiscoveryTimeouts,
    ) -> Duration {
        self.counters.count_error(kind);
        self.counters.set_synced(false);
        let mut history = self.history();
        history.current = false;
        history.close_watch(limits.short_watch);
        let asked = history.retry_after.take().max(retry_after);
        history.failures.next_wait(kind, asked, limits, &mut rand::rng())
    }

    /// True for the failure of this kind to log: the first one in the current outage. A 403 is logged once it has lasted for
    /// [`FORBIDDEN_ATTEMPTS`], since an API server that starts also denies what its rules allow.
    pub(super) fn is_first_of_outage(&self, kind: ErrorKind) -> bool {
        let mut history = self.history();
        let denials = history.failures.of(ErrorKind::Forbidden);
        let outage = history.outage.get_or_insert_with(|| Outage { since: Instant::now(), reported: BTreeSet::new() });
        let early = kind == ErrorKind::Forbidden && denials < FORBIDDEN_ATTEMPTS;
        !early && outage.reported.insert(kind)
    }
}
