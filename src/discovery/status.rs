//! The state of each watch, for metrics, readiness and doctor: the thread `fo-kube` writes, any thread reads.
//!
//! Each value is independent and no decision depends on it, so relaxed atomics suffice.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::service_key::ServiceKey;
use crate::model::ListenerId;

/// Why a request to the API server failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ErrorKind {
    /// Connection refused or broken, or no reply in time.
    Connect,
    /// The server's certificate is not trusted.
    Tls,
    /// The server rejected the daemon's token or certificate (401).
    Unauthorized,
    /// An RBAC rule is missing (403).
    Forbidden,
    /// The server does not serve EndpointSlices (404).
    NotServed,
    /// The version to resume from is too old (410); a fresh list follows.
    Expired,
    /// The server throttles requests (429).
    Throttled,
    /// Server error (5xx).
    Server,
    /// An open watch brought no event or bookmark in time.
    Stalled,
    /// The reply is malformed or unexpected.
    Protocol,
    /// A bug in the daemon.
    Internal,
}

impl ErrorKind {
    /// Every kind, in numeric order.
    pub const ALL: [ErrorKind; 11] = [
        ErrorKind::Connect,
        ErrorKind::Tls,
        ErrorKind::Unauthorized,
        ErrorKind::Forbidden,
        ErrorKind::NotServed,
        ErrorKind::Expired,
        ErrorKind::Throttled,
        ErrorKind::Server,
        ErrorKind::Stalled,
        ErrorKind::Protocol,
        ErrorKind::Internal,
    ];

    /// The value of the label `kind` in metrics.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            ErrorKind::Connect => "connect",
            ErrorKind::Tls => "tls",
            ErrorKind::Unauthorized => "unauthorized",
            ErrorKind::Forbidden => "forbidden",
            ErrorKind::NotServed => "not_served",
            ErrorKind::Expired => "expired",
            ErrorKind::Throttled => "throttled",
            ErrorKind::Server => "server",
            ErrorKind::Stalled => "stalled",
            ErrorKind::Protocol => "protocol",
            ErrorKind::Internal => "internal",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// The state of one Service's watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceStatus {
    /// The Service's namespace.
    pub namespace: String,
    /// The Service's name.
    pub service: String,
    /// True while a complete list is held and the watch that keeps it current is open.
    pub synced: bool,
    /// Time since the last event or bookmark; none before the first.
    pub last_event_age: Option<Duration>,
    /// Watches opened after the first one. Servers end each after some minutes.
    pub watch_restarts: u64,
    /// True while a listener sends to a port number that is none of the UDP ports of the Service's endpoints.
    pub port_mismatch: bool,
    /// Failures, one number for each of [`ErrorKind::ALL`].
    pub errors: Vec<(ErrorKind, u64)>,
}

/// A handle on the counters of all watches: cheap to clone, readable from any thread, also after discovery has ended.
#[derive(Debug, Clone)]
pub struct DiscoveryStatus(Arc<SharedStatus>);

#[derive(Debug, Default)]
struct SharedStatus {
    services: Mutex<BTreeMap<ServiceKey, Arc<WatchCounters>>>,
    problems: Mutex<DiscoveryProblems>,
}

/// The problems that apply now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiscoveryProblems {
    /// The problem and its remedy in one line, by listener.
    pub texts: Vec<(ListenerId, String)>,
    /// Services whose endpoints do not have the port that a listener sends to.
    pub mismatched: BTreeSet<ServiceKey>,
}

impl DiscoveryStatus {
    pub(super) fn new() -> DiscoveryStatus {
        DiscoveryStatus(Arc::default())
    }

    /// Every watched Service, by namespace and name.
    #[must_use]
    pub fn services(&self) -> Vec<ServiceStatus> {
        let mismatched = self.lock_problems().mismatched.clone();
        let services = self.lock();
        services.iter().map(|(key, counters)| counters.snapshot(key, mismatched.contains(key))).collect()
    }

    /// The problems of each listener that apply now, a line each.
    #[must_use]
    pub fn problems(&self) -> Vec<(ListenerId, String)> {
        self.lock_problems().texts.clone()
    }

    pub(super) fn set_problems(&self, problems: DiscoveryProblems) {
        *self.lock_problems() = problems;
    }

    /// A poisoned lock is usable: the problems are only replaced as a whole.
    fn lock_problems(&self) -> MutexGuard<'_, DiscoveryProblems> {
        self.0.problems.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&self, key: &ServiceKey) -> Arc<WatchCounters> {
        self.lock().entry(key.clone()).or_default().clone()
    }

    pub(super) fn remove(&self, key: &ServiceKey) {
        self.lock().remove(key);
    }

    /// A poisoned lock is usable: no update leaves the map half changed.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<ServiceKey, Arc<WatchCounters>>> {
        self.0.services.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The counters of one watch.
#[derive(Debug)]
pub(super) struct WatchCounters {
    epoch: Instant,
    synced: AtomicBool,
    /// Milliseconds since `epoch`, plus one; 0 means never.
    last_activity: AtomicU64,
    watches: AtomicU64,
    errors: [AtomicU64; ErrorKind::ALL.len()],
}

impl Default for WatchCounters {
    fn default() -> WatchCounters {
        WatchCounters {
            epoch: Instant::now(),
            synced: AtomicBool::new(false),
            last_activity: AtomicU64::new(0),
            watches: AtomicU64::new(0),
            errors: Default::default(),
        }
    }
}

impl WatchCounters {
    pub(super) fn set_synced(&self, synced: bool) {
        self.synced.store(synced, Relaxed);
    }

    pub(super) fn record_activity(&self) {
        let ms = u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX - 1);
        self.last_activity.store(ms + 1, Relaxed);
    }

    pub(super) fn count_watch(&self) {
        self.watches.fetch_add(1, Relaxed);
    }

    pub(super) fn count_error(&self, kind: ErrorKind) {
        self.errors[kind as usize].fetch_add(1, Relaxed);
    }

    fn snapshot(&self, key: &ServiceKey, port_mismatch: bool) -> ServiceStatus {
        let last_activity = self.last_activity.load(Relaxed).checked_sub(1).map(Duration::from_millis);
        ServiceStatus {
            namespace: key.namespace.to_string(),
            service: key.service.to_string(),
            synced: self.synced.load(Relaxed),
            last_event_age: last_activity.map(|at| self.epoch.elapsed().saturating_sub(at)),
            watch_restarts: self.watches.load(Relaxed).saturating_sub(1),
            port_mismatch,
            errors: ErrorKind::ALL.iter().map(|&kind| (kind, self.errors[kind as usize].load(Relaxed))).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_numbered_in_order_and_have_distinct_labels() {
        let mut labels = std::collections::BTreeSet::new();
        for (i, kind) in ErrorKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, i);
            assert!(labels.insert(kind.label()));
        }
    }

    #[test]
    fn a_snapshot_shows_what_was_counted() {
        let status = DiscoveryStatus::new();
        let key = ServiceKey::new("logging", "vector");
        let counters = status.add(&key);
        assert_eq!(status.services()[0].last_event_age, None);
        counters.set_synced(true);
        counters.record_activity();
        counters.count_watch();
        assert_eq!(status.services()[0].watch_restarts, 0);
        counters.count_watch();
        counters.count_error(ErrorKind::Stalled);
        let seen = status.services().remove(0);
        assert_eq!((seen.namespace.as_str(), seen.service.as_str()), ("logging", "vector"));
        assert!(seen.synced && seen.last_event_age.is_some());
        assert_eq!(seen.watch_restarts, 1);
        assert_eq!(seen.errors.iter().filter(|(_, n)| *n > 0).collect::<Vec<_>>(), [&(ErrorKind::Stalled, 1)]);
        status.remove(&key);
        assert_eq!(status.services(), []);
    }
}
