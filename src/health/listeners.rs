//! Whose downstreams the targets are: turns what becomes of a target into what that means for listeners, and says so in
//! the log. No I/O but the log.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::model::{Change, State, Status, Target};
use super::settings::{HealthSettings, ProbeSettings, ProtocolKind};
use super::share::{HealthMap, Standing};
use super::state::Monitor;
use crate::model::ListenerId;

/// A listener that has health checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watch {
    /// Its number.
    pub listener: ListenerId,
    /// Its name, for the log.
    pub name: Arc<str>,
    /// All its downstreams.
    pub downstreams: Vec<SocketAddr>,
    /// How they are checked.
    pub settings: HealthSettings,
}

/// What is known of a downstream of a listener.
#[derive(Debug, Clone, Copy)]
pub struct DownstreamHealth<'a> {
    /// The listener's number.
    pub listener: ListenerId,
    /// The downstream's address.
    pub downstream: SocketAddr,
    /// How it is probed.
    pub protocol: ProtocolKind,
    /// What has come of it.
    pub status: &'a Status,
}

/// How often downstreams of a listener have changed their state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Transitions {
    /// To unhealthy.
    pub failed: u64,
    /// Back to healthy.
    pub recovered: u64,
}

/// All listeners that have health checks.
#[derive(Debug, Default)]
pub struct Listeners {
    listeners: BTreeMap<ListenerId, Listener>,
    /// Whose downstream each target is.
    users: HashMap<Target, Vec<(ListenerId, SocketAddr)>>,
    map: HealthMap,
    /// The map is not the one last taken.
    changed: bool,
}

#[derive(Debug)]
struct Listener {
    name: Arc<str>,
    settings: Arc<ProbeSettings>,
    fail_open: bool,
    downstreams: BTreeSet<SocketAddr>,
    /// How many of them are out.
    out: usize,
    /// All of them are out, and that has been said.
    all_out: bool,
    transitions: Transitions,
}

impl Listeners {
    /// Replaces all listeners and returns their targets. [`settle`](Self::settle) is to follow when the monitor has them.
    pub(super) fn replace(&mut self, watches: &[Watch]) -> Vec<Target> {
        let mut before = std::mem::take(&mut self.listeners);
        self.users.clear();
        for watch in watches {
            let settings = Arc::new(watch.settings.probe.clone());
            let downstreams: BTreeSet<SocketAddr> = watch.downstreams.iter().copied().collect();
            for &downstream in &downstreams {
                let users = self.users.entry(Target::new(downstream, &settings)).or_default();
                users.push((watch.listener, downstream));
            }
            let before = before.remove(&watch.listener);
            let listener = Listener {
                name: Arc::clone(&watch.name),
                settings,
                fail_open: watch.settings.fail_open,
                downstreams,
                out: 0,
                all_out: before.as_ref().is_some_and(|before| before.all_out),
                transitions: before.map(|before| before.transitions).unwrap_or_default(),
            };
            self.listeners.insert(watch.listener, listener);
        }
        self.users.keys().cloned().collect()
    }

    /// Takes the standing of every downstream from the monitor, which knows those that it knew before.
    pub(super) fn settle(&mut self, monitor: &Monitor) {
        let map: HealthMap = self
            .downstreams(monitor)
            .filter_map(|seen| Some(((seen.listener, seen.downstream), standing(seen.status)?)))
            .collect();
        self.changed |= map != self.map;
        self.map = map;
        for (&id, listener) in &mut self.listeners {
            let out = |downstream: &&SocketAddr| matches!(self.map.get(id, **downstream), Some(Standing::Out(_)));
            listener.out = listener.downstreams.iter().filter(out).count();
            listener.tell_if_all_out();
        }
    }

    /// A target's state is another.
    pub(super) fn changed(&mut self, target: &Target, change: &Change) {
        let protocol = target.settings.protocol.kind().name();
        let standing = standing(&change.status);
        for &(id, downstream) in self.users.get(target).map(Vec::as_slice).unwrap_or_default() {
            let Some(listener) = self.listeners.get_mut(&id) else { continue };
            let name = &*listener.name;
            self.changed |= self.map.set(id, downstream, standing);
            match (change.from, change.status.state) {
                (_, State::Unhealthy) => {
                    let reason = change.status.failure.as_ref().map(|failure| &*failure.reason).unwrap_or_default();
                    tracing::warn!(%downstream, listener = name, protocol, reason, "health check failed");
                    listener.out += 1;
                    listener.transitions.failed += 1;
                }
                (State::Unhealthy, _) => {
                    // Whole milliseconds are fine enough for people.
                    let unhealthy_for =
                        Duration::from_millis(u64::try_from(change.lasted.as_millis()).unwrap_or_default());
                    tracing::info!(%downstream, listener = name, protocol, ?unhealthy_for, "health check passed again");
                    listener.out = listener.out.saturating_sub(1);
                    listener.transitions.recovered += 1;
                }
                (State::Unknown | State::Healthy, _) => {
                    tracing::debug!(%downstream, listener = name, protocol, "health check passed");
                }
            }
            listener.tell_if_all_out();
        }
    }

    pub(super) fn take_change(&mut self) -> Option<HealthMap> {
        std::mem::take(&mut self.changed).then(|| self.map.clone())
    }

    pub(super) fn map(&self) -> &HealthMap {
        &self.map
    }

    pub(super) fn downstreams<'a>(&'a self, monitor: &'a Monitor) -> impl Iterator<Item = DownstreamHealth<'a>> {
        self.listeners.iter().flat_map(move |(&id, listener)| {
            listener.downstreams.iter().filter_map(move |&downstream| {
                let status = monitor.status(&Target::new(downstream, &listener.settings))?;
                let protocol = listener.settings.protocol.kind();
                Some(DownstreamHealth { listener: id, downstream, protocol, status })
            })
        })
    }

    /// Those all of whose downstreams are unhealthy, and what is done with their datagrams.
    pub(super) fn all_out(&self) -> impl Iterator<Item = (&str, &'static str)> {
        self.listeners.values().filter(|listener| listener.all_out).map(|listener| (&*listener.name, listener.fate()))
    }

    pub(super) fn transitions(&self) -> impl Iterator<Item = (ListenerId, Transitions)> + '_ {
        self.listeners.iter().map(|(&id, listener)| (id, listener.transitions))
    }
}

impl Listener {
    /// What becomes of its datagrams while all downstreams are out.
    fn fate(&self) -> &'static str {
        if self.fail_open {
            "still sending to all of them, since fail_open = true"
        } else {
            "dropping all datagrams, since fail_open = false"
        }
    }

    /// Says it loudly when the last downstream goes out, and when the first is back.
    fn tell_if_all_out(&mut self) {
        let all_out = !self.downstreams.is_empty() && self.out == self.downstreams.len();
        if all_out == self.all_out {
            return;
        }
        self.all_out = all_out;
        let (listener, downstreams) = (&*self.name, self.downstreams.len());
        if !all_out {
            tracing::info!(listener, downstreams, "not all downstreams are unhealthy any more");
        } else {
            let fate = self.fate();
            tracing::error!(listener, downstreams, "the health checks of all downstreams failed: {fate}");
        }
    }
}

fn standing(status: &Status) -> Option<Standing> {
    match status.state {
        State::Unhealthy => Some(Standing::Out(status.since)),
        State::Healthy if status.recovered => Some(Standing::Back(status.since)),
        State::Healthy | State::Unknown => None,
    }
}

#[cfg(test)]
mod tests;
