//! The state machine of names: what is known of each, when it is asked for again, and the sets that come of it. No I/O but
//! the log.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use super::{DownstreamAddress, DownstreamEntry, ResolveRequest};
use crate::model::{Downstream, ListenerId};
use crate::net::{Family, is_unicast};

/// After the first failure a name is asked for again after this long, and after twice as long with each further one, up to
/// the interval.
const FIRST_RETRY: Duration = Duration::from_secs(1);

/// All names, what they stand for, and who wants to know.
#[derive(Debug, Default)]
pub struct NameCache {
    listeners: BTreeMap<ListenerId, NamedListener>,
    hosts: BTreeMap<Arc<str>, CachedName>,
    /// There may be updates to take.
    changed: bool,
}

#[derive(Debug)]
struct NamedListener {
    request: ResolveRequest,
    published: Option<Vec<Downstream>>,
}

/// A name.
#[derive(Debug, Default)]
struct CachedName {
    /// The shortest of those who want to know.
    interval: Duration,
    /// The last good ones, in order.
    v4: Vec<IpAddr>,
    v6: Vec<IpAddr>,
    /// None while it is being asked for.
    due: Option<Duration>,
    /// In a row.
    failures: u32,
    /// Families that have been missed in an answer, of which the operator knows.
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

    /// When [`due`](Self::due) has something to say, or at once if [`take_updates`](Self::take_updates) may have; none while
    /// nothing is due that is not being asked for.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        if self.changed {
            return Some(Duration::ZERO);
        }
        self.hosts.values().filter_map(|host| host.due).min()
    }

    /// The names to be asked for now. A name is due again only after [`handle_lookup_result`](Self::handle_lookup_result).
    pub fn due(&mut self, now: Duration) -> Vec<Arc<str>> {
        let due = self.hosts.iter_mut().filter(|(_, host)| host.due.is_some_and(|due| due <= now));
        due.map(|(name, host)| {
            host.due = None;
            Arc::clone(name)
        })
        .collect()
    }

    /// Takes an answer in: the addresses, or why there are none.
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
                // A resolver answers also if it has reached the servers for only one of the two.
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

    /// Who wants to know about a name: each listener's name, and the family it can use.
    fn users(&self, name: &str) -> Vec<(Arc<str>, Family)> {
        let uses = |request: &ResolveRequest| hosts(&request.entries).any(|host| **host == *name);
        let users = self.listeners.values().map(|listener| &listener.request).filter(|request| uses(request));
        users.map(|request| (Arc::clone(&request.name), request.family)).collect()
    }

    /// The sets that have changed since the last call. A listener of which nothing is known yet has none.
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

    /// The names that cannot be resolved at the moment, in order.
    pub fn unresolved(&self) -> impl Iterator<Item = &Arc<str>> {
        self.hosts.iter().filter(|(_, host)| host.failures > 0).map(|(name, _)| name)
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
                    "cannot resolve the name of a downstream: the listener waits for it; asking again"
                );
            } else {
                tracing::warn!(
                    listener,
                    name,
                    reason,
                    "cannot resolve the name of a downstream: the last known addresses stay in use; asking again"
                );
            }
        }
    }

    /// Says it once when a name has no address that a listener could use.
    fn report_missing_family(&mut self, name: &str, users: &[(Arc<str>, Family)]) {
        for (listener, family) in users {
            let listener: &str = listener;
            if !self.addresses(*family).is_empty() {
                self.missing_families.remove(family);
            } else if self.missing_families.insert(*family) {
                tracing::warn!(
                    listener,
                    name,
                    "the name of a downstream has no {family} address, as the listener needs"
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

/// All that is known of a listener's downstreams, in the order of its entries and each address once.
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
