//! Maps targets to the listeners that use them: turns a target's state change into an entry of the [`HealthMap`] and a log line.
//! No I/O except the log.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::model::{HealthState, ProbeTarget, StateChange, TargetStatus};
use super::monitor::HealthMonitor;
use super::settings::{HealthSettings, ProbeSettings};
use super::weights::{HealthMap, HealthMark};
use crate::model::ListenerId;

/// The health checks of one listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerCheck {
    /// The listener's number.
    pub listener: ListenerId,
    /// The listener's name, for the log.
    pub name: Arc<str>,
    /// All its downstreams.
    pub downstreams: Vec<SocketAddr>,
    /// Protocol, intervals and thresholds.
    pub settings: HealthSettings,
}

/// The health of a listener's downstream.
#[derive(Debug, Clone, Copy)]
pub struct DownstreamHealth<'a> {
    /// The listener's number.
    pub listener: ListenerId,
    /// The downstream's address.
    pub downstream: SocketAddr,
    /// The state of its target.
    pub status: &'a TargetStatus,
}

/// Counts of state changes of a listener's downstreams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Transitions {
    /// To unhealthy.
    pub failed: u64,
    /// Back to healthy.
    pub recovered: u64,
}

/// All listeners that have health checks.
#[derive(Debug, Default)]
pub struct CheckedListeners {
    listeners: BTreeMap<ListenerId, ListenerHealthState>,
    /// The listeners and downstreams that each target stands for.
    users: HashMap<ProbeTarget, Vec<(ListenerId, SocketAddr)>>,
    map: HealthMap,
    /// The map has changed since [`take_change`](Self::take_change).
    changed: bool,
}

#[derive(Debug)]
struct ListenerHealthState {
    name: Arc<str>,
    settings: Arc<ProbeSettings>,
    fail_open: bool,
    downstreams: BTreeSet<SocketAddr>,
    /// How many of them are unhealthy.
    unhealthy: usize,
    /// All of them are unhealthy, and that is logged.
    all_unhealthy: bool,
    transitions: Transitions,
}

impl CheckedListeners {
    /// Replaces all listeners and returns their targets. Pass these to the monitor, then call [`sync_with`](Self::sync_with).
    pub(super) fn replace_checks(&mut self, checks: &[ListenerCheck]) -> Vec<ProbeTarget> {
        let mut before = std::mem::take(&mut self.listeners);
        self.users.clear();
        for check in checks {
            let settings = Arc::new(check.settings.probe.clone());
            let downstreams: BTreeSet<SocketAddr> = check.downstreams.iter().copied().collect();
            for &downstream in &downstreams {
                let users = self.users.entry(ProbeTarget::new(downstream, &settings)).or_default();
                users.push((check.listener, downstream));
            }
            let before = before.remove(&check.listener);
            let listener = ListenerHealthState {
                name: Arc::clone(&check.name),
                settings,
                fail_open: check.settings.fail_open,
                downstreams,
                unhealthy: 0,
                all_unhealthy: before.as_ref().is_some_and(|before| before.all_unhealthy),
                transitions: before.map(|before| before.transitions).unwrap_or_default(),
            };
            self.listeners.insert(check.listener, listener);
        }
        self.users.keys().cloned().collect()
    }

    /// Rebuilds the map from the monitor, which keeps the state of known targets.
    pub(super) fn sync_with(&mut self, monitor: &HealthMonitor) {
        let map: HealthMap = self
            .downstreams(monitor)
            .filter_map(|seen| Some(((seen.listener, seen.downstream), mark(seen.status)?)))
            .collect();
        self.changed |= map != self.map;
        self.map = map;
        for (&id, listener) in &mut self.listeners {
            let out =
                |downstream: &&SocketAddr| matches!(self.map.get(id, **downstream), Some(HealthMark::Unhealthy(_)));
            listener.unhealthy = listener.downstreams.iter().filter(out).count();
            listener.report_if_all_unhealthy();
        }
    }

    /// Logs a target's new state for each listener that uses it, and enters it in the map.
    pub(super) fn handle_change(&mut self, target: &ProbeTarget, change: &StateChange) {
        let protocol = target.settings.protocol.kind().name();
        let mark = mark(&change.status);
        for &(id, downstream) in self.users.get(target).map(Vec::as_slice).unwrap_or_default() {
            let Some(listener) = self.listeners.get_mut(&id) else { continue };
            let name = &*listener.name;
            self.changed |= self.map.set(id, downstream, mark);
            match (change.from, change.status.state) {
                (_, HealthState::Unhealthy) => {
                    let reason = change.status.failure.as_ref().map(|failure| &*failure.reason).unwrap_or_default();
                    tracing::warn!(%downstream, listener = name, protocol, reason, "health check failed");
                    listener.unhealthy += 1;
                    listener.transitions.failed += 1;
                }
                (HealthState::Unhealthy, _) => {
                    // Rounded to milliseconds for the log.
                    let unhealthy_for =
                        Duration::from_millis(u64::try_from(change.lasted.as_millis()).unwrap_or_default());
                    tracing::info!(%downstream, listener = name, protocol, ?unhealthy_for, "health check passed again");
                    listener.unhealthy = listener.unhealthy.saturating_sub(1);
                    listener.transitions.recovered += 1;
                }
                (HealthState::Unknown | HealthState::Healthy, _) => {
                    tracing::debug!(%downstream, listener = name, protocol, "health check passed");
                }
            }
            listener.report_if_all_unhealthy();
        }
    }

    pub(super) fn take_change(&mut self) -> Option<HealthMap> {
        std::mem::take(&mut self.changed).then(|| self.map.clone())
    }

    pub(super) fn map(&self) -> &HealthMap {
        &self.map
    }

    pub(super) fn downstreams<'a>(&'a self, monitor: &'a HealthMonitor) -> impl Iterator<Item = DownstreamHealth<'a>> {
        self.listeners.iter().flat_map(move |(&id, listener)| {
            listener.downstreams.iter().filter_map(move |&downstream| {
                let status = monitor.status(&ProbeTarget::new(downstream, &listener.settings))?;
                Some(DownstreamHealth { listener: id, downstream, status })
            })
        })
    }

    /// The listeners with only unhealthy downstreams: their names, and what happens to their datagrams.
    pub(super) fn all_unhealthy(&self) -> impl Iterator<Item = (&str, &'static str)> {
        self.listeners
            .values()
            .filter(|listener| listener.all_unhealthy)
            .map(|listener| (&*listener.name, listener.fallback()))
    }

    pub(super) fn transitions(&self) -> impl Iterator<Item = (ListenerId, Transitions)> + '_ {
        self.listeners.iter().map(|(&id, listener)| (id, listener.transitions))
    }
}

impl ListenerHealthState {
    /// What happens to its datagrams while all downstreams are unhealthy.
    fn fallback(&self) -> &'static str {
        if self.fail_open {
            "still sending to all of them, since fail_open = true"
        } else {
            "dropping all datagrams, since fail_open = false"
        }
    }

    /// Logs at level error when the last downstream becomes unhealthy, and at level info when the first one recovers.
    fn report_if_all_unhealthy(&mut self) {
        let all_unhealthy = !self.downstreams.is_empty() && self.unhealthy == self.downstreams.len();
        if all_unhealthy == self.all_unhealthy {
            return;
        }
        self.all_unhealthy = all_unhealthy;
        let (listener, downstreams) = (&*self.name, self.downstreams.len());
        if !all_unhealthy {
            tracing::info!(listener, downstreams, "not all downstreams are unhealthy any more");
        } else {
            let fallback = self.fallback();
            tracing::error!(listener, downstreams, "the health checks of all downstreams failed: {fallback}");
        }
    }
}

fn mark(status: &TargetStatus) -> Option<HealthMark> {
    match status.state {
        HealthState::Unhealthy => Some(HealthMark::Unhealthy(status.since)),
        HealthState::Healthy if status.recovered => Some(HealthMark::Recovering(status.since)),
        HealthState::Healthy | HealthState::Unknown => None,
    }
}

#[cfg(test)]
mod tests;
