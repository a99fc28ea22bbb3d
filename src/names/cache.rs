//! The last known addresses of each name, the time of its next lookup, and the sets that follow. No I/O except the log.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use super::{DownstreamAddress, DownstreamEntry, ResolveRequest};
use crate::model::{Downstream, ListenerId};
use crate::net::{Family, is_unicast};

/// The wait after the first failed lookup. It doubles with each further failure, up to the interval.
const FIRST_RETRY: Duration = Duration::from_secs(1);

/// All names, their addresses, and the listeners that use them.
#[derive(Debug, Default)]
pub struct NameCache {
    listeners: BTreeMap<ListenerId, NamedListener>,
    hosts: BTreeMap<Arc<str>, CachedName>,
    /// [`take_updates`](NameCache::take_updates) may return something.
    changed: bool,
}

#[derive(Debug)]
struct NamedListener {
    request: ResolveRequest,
    published: Option<Vec<Downstream>>,
}

/// One name.
#[derive(Debug, Default)]
struct CachedName {
    /// The shortest interval of the listeners that use the name.
    interval: Duration,
    /// The last known IPv4 addresses, sorted.
    v4: Vec<IpAddr>,
    v6: Vec<IpAddr>,
    /// The time of the next lookup; none while one is running.
    due: Option<Duration>,
    /// Consecutive failed lookups.
    failures: u32,
    /// Families without an address for a listener that needs one; logged.
    missing_families: BTreeSet<Family>,
}

impl CachedName {
    fn addresses(&self, family: Family) -> &[IpAddr] {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    fn retry_delay(&self) -> Duration {
        let doublings = self.failures.saturating_sub(1).min(16);
        (FIRST_RETRY * (1 << doublings)).min(self.interval)
    }
}

impl NameCache {
    /// Replaces all requests. Names that are still wanted stay known, and a listener whose request is unchanged gets no
    /// set from this.
    pub fn replace_requests(&mut self, requests: Vec<ResolveRequest>, now: Duration) {
        self.changed = true;
        let mut before = std::mem::take(&mut self.listeners);
        for request in requests {
            let known = before.remove(&request.listener).filter(|known| known.request == request);
            let listener = known.unwrap_or(NamedListener { request, published: None });
            self.listeners.insert(listener.request.listener, listener);
        }
        let mut wanted: BTreeMap<Arc<str>, Duration> = BTreeMap::new();
        for NamedListener { request, .. } in self.listeners.values() {
            for host in hosts(&request.entries) {
                let shortest = wanted.entry(Arc::clone(host)).or_insert(request.interval);
                *shortest = request.interval.min(*shortest);
            }
        }
        self.hosts.retain(|host, _| wanted.contains_key(host));
        for (host, interval) in wanted {
            let host = self.hosts.entry(host).or_insert_with(|| CachedName { due: Some(now), ..CachedName::default() });
            host.interval = interval;
            host.due = host.due.map(|due| due.min(now + interval));
        }
    }

    /// When to call [`due`](Self::due): the next lookup, or at once if [`take_updates`](Self::take_updates) may return
    /// something. None while there is nothing to wait for but running lookups.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        if self.changed {
            return Some(Duration::ZERO);
        }
        self.hosts.values().filter_map(|host| host.due).min()
    }

    /// The names to look up now. A name is due again only after [`handle_lookup_result`](Self::handle_lookup_result).
    pub fn due(&mut self, now: Duration) -> Vec<Arc<str>> {
        let due = self.hosts.iter_mut().filter(|(_, host)| host.due.is_some_and(|due| due <= now));
        due.map(|(name, host)| {
            host.due = None;
            Arc::clone(name)
        })
        .collect()
    }

    /// Stores the result of a lookup: the addresses, or the resolver's error.
    pub fn handle_lookup_result(&mut self, name: &str, answer: Result<Vec<IpAddr>, String>, now: Duration) {
        let users = self.users(name);
        let Some(host) = self.hosts.get_mut(name) else { return };
        self.changed = true;
        match answer {
            Ok(addresses) => {
                let usable: BTreeSet<IpAddr> = addresses.into_iter().filter(|ip| is_unicast(*ip)).collect();
                let (v4, v6): (Vec<_>, Vec<_>) = usable.into_iter().partition(IpAddr::is_ipv4);
                if host.failures > 0 {
                    tracing::info!(name, "name can be resolved again");
                }
                host.failures = 0;
                host.due = Some(now + host.interval);
                // A resolver may succeed with one family although the query for the other one failed.
                for (known, new) in [(&mut host.v4, v4), (&mut host.v6, v6)] {
                    if !new.is_empty() {
                        *known = new;
                    }
                }
                host.report_missing_family(name, &users);
            }
            Err(reason) => {
                host.failures += 1;
                host.due = Some(now + host.retry_delay());
                if host.failures == 1 {
                    host.report_failure(name, &users, &reason);
                } else {
                    tracing::debug!(name, reason, "name still cannot be resolved");
                }
            }
        }
    }

    /// The listeners that use a name: their names and families.
    fn users(&self, name: &str) -> Vec<(Arc<str>, Family)> {
        let uses = |request: &ResolveRequest| hosts(&request.entries).any(|host| **host == *name);
        let users = self.listeners.values().map(|listener| &listener.request).filter(|request| uses(request));
        users.map(|request| (Arc::clone(&request.name), request.family)).collect()
    }

    /// The sets that have changed since the last call. A listener without any known address has none.
    pub fn take_updates(&mut self) -> Vec<(ListenerId, Vec<Downstream>)> {
        let mut updates = Vec::new();
        if !std::mem::take(&mut self.changed) {
            return updates;
        }
        for (&id, listener) in &mut self.listeners {
            let set = downstreams(&listener.request, &self.hosts);
            if set.is_empty() || listener.published.as_ref() == Some(&set) {
                continue;
            }
            listener.published = Some(set.clone());
            updates.push((id, set));
        }
        updates
    }
}

impl CachedName {
    fn report_failure(&self, name: &str, users: &[(Arc<str>, Family)], reason: &str) {
        for (listener, family) in users {
            let listener: &str = listener;
            if self.addresses(*family).is_empty() {
                tracing::warn!(
                    listener,
                    name,
                    reason,
                    "cannot resolve the name of a downstream: the listener waits for it; retrying"
                );
            } else {
                tracing::warn!(
                    listener,
                    name,
                    reason,
                    "cannot resolve the name of a downstream: the last known addresses stay in use; retrying"
                );
            }
        }
    }

    /// Logs once that a name has no address of the family that a listener needs.
    fn report_missing_family(&mut self, name: &str, users: &[(Arc<str>, Family)]) {
        for (listener, family) in users {
            let listener: &str = listener;
            if !self.addresses(*family).is_empty() {
                self.missing_families.remove(family);
            } else if self.missing_families.insert(*family) {
                tracing::warn!(
                    listener,
                    name,
                    "the name of a downstream has no {family} address, which this listener needs"
                );
            }
        }
    }
}

fn hosts(entries: &[DownstreamEntry]) -> impl Iterator<Item = &Arc<str>> {
    entries.iter().filter_map(|entry| match &entry.address {
        DownstreamAddress::Ip(_) => None,
        DownstreamAddress::Name { host, .. } => Some(host),
    })
}

/// A listener's known downstreams in the order of its entries, each address once.
fn downstreams(request: &ResolveRequest, hosts: &BTreeMap<Arc<str>, CachedName>) -> Vec<Downstream> {
    let mut seen = HashSet::new();
    let mut set = Vec::new();
    for entry in &request.entries {
        let addresses: Vec<SocketAddr> = match &entry.address {
            DownstreamAddress::Ip(address) => vec![*address],
            DownstreamAddress::Name { host, port } => {
                let known = hosts.get(host).map_or(&[][..], |host| host.addresses(request.family));
                known.iter().map(|&ip| SocketAddr::new(ip, *port)).collect()
            }
        };
        for address in addresses.into_iter().filter(|address| seen.insert(*address)) {
            let DownstreamEntry { name, weight, sample, .. } = entry;
            set.push(Downstream { name: Arc::clone(name), address, weight: *weight, sample: *sample });
        }
    }
    set
}

#[cfg(test)]
mod tests;
