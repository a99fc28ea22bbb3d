//! Merges what the watches report into one set of downstreams per listener, and decides when to publish it. No I/O.
//!
//! The aggregator knows every listener's request and the last good slices of every Service. `watch` feeds it and carries
//! out what [`Aggregator::flush`] returns.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::service_key::ServiceKey;
use super::slices::{self, EndpointRules, EndpointSelection, NodeLocation, ServiceSlices, Slice};
use super::status::DiscoveryProblems;
use super::{DiscoveryRequest, DiscoveryUpdate, Locality, PortRef, ServiceRef, messages};
use crate::model::{Downstream, DownstreamSet, ListenerId};

/// What a watch, or the query for the zone, reports.
#[derive(Debug, Clone)]
pub enum WatchEvent {
    /// All current slices of a Service: a complete list and the changes since.
    Slices(ServiceKey, Vec<Arc<Slice>>),
    /// The Service cannot be listed or watched at the moment. Its last known slices stay in use.
    Failed(ServiceKey),
    /// Why the Service has no slices. Applies until it has some.
    Absent(ServiceKey, String),
    /// The zone of this node; none while it is unknown.
    Zone(Option<Arc<str>>),
}

/// A log line. `watch` chooses its level.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiscoveryNotice {
    /// The listener has its first endpoints, or endpoints again after none.
    Discovered {
        /// The listener that the line is about.
        listener: ListenerId,
        /// Number of endpoints, from 1.
        endpoints: usize,
    },
    /// The listener's endpoints have changed. Logged at level debug.
    Changed {
        /// The listener that the line is about.
        listener: ListenerId,
        /// Number of endpoints, from 1.
        endpoints: usize,
    },
    /// The listener has no endpoints, and had some before, this is its first set, or the cause has changed.
    Empty {
        /// The listener that the line is about.
        listener: ListenerId,
        /// The likely cause, from [`messages::no_endpoints`].
        cause: String,
    },
    /// A new problem.
    Warning {
        /// The listener that the line is about.
        listener: ListenerId,
        /// The problem and its remedy.
        text: String,
    },
}

/// The last known slices of every Service, and what was published from them.
#[derive(Debug, Default)]
pub struct Aggregator {
    /// The namespace of Services whose configuration names none.
    namespace: String,
    node: Option<String>,
    zone: ZoneState,
    services: BTreeMap<ServiceKey, KnownService>,
    listeners: BTreeMap<ListenerId, FollowedListener>,
    /// The last generation used. All listeners share one count, so it also increases for a listener whose request was
    /// replaced.
    generation: u64,
}

/// What is known of the node's zone.
#[derive(Debug, Default)]
enum ZoneState {
    /// Not queried, or not answered yet.
    #[default]
    Pending,
    /// Answered. None if the Node has no zone or RBAC denies reading it.
    Resolved(Option<Arc<str>>),
}

/// What is known of one Service.
#[derive(Debug, Default)]
struct KnownService {
    /// None before the first complete list.
    slices: Option<Vec<Arc<Slice>>>,
    /// True after the first list or the first failure.
    answered: bool,
    /// Why there are no slices, once that is known.
    absence: Option<String>,
}

#[derive(Debug)]
struct FollowedListener {
    request: DiscoveryRequest,
    services: Vec<ServiceKey>,
    dirty: bool,
    published: Option<Vec<Downstream>>,
    /// Warnings that are logged and still apply.
    warned: BTreeSet<String>,
    /// Services whose endpoints do not have the configured port.
    mismatched: BTreeSet<ServiceKey>,
    /// Why the set is empty; none while it is not.
    empty_cause: Option<String>,
}

impl Aggregator {
    /// An aggregator without requests. `namespace` is the default namespace, `node` the name of this node.
    #[must_use]
    pub fn new(namespace: &str, node: Option<String>) -> Aggregator {
        Aggregator { namespace: namespace.to_owned(), node, ..Aggregator::default() }
    }

    /// Replaces all requests. Services that no request names any more are forgotten.
    pub fn replace_requests(&mut self, requests: Vec<DiscoveryRequest>) {
        let mut old = std::mem::take(&mut self.listeners);
        for request in requests {
            let id = request.listener;
            let listener = match old.remove(&id) {
                Some(listener) if listener.request == request => listener,
                _ => FollowedListener {
                    services: request.services.iter().map(|service| self.service_key(service)).collect(),
                    request,
                    dirty: true,
                    published: None,
                    warned: BTreeSet::new(),
                    mismatched: BTreeSet::new(),
                    empty_cause: None,
                },
            };
            self.listeners.insert(id, listener);
        }
        let wanted: BTreeSet<ServiceKey> =
            self.listeners.values().flat_map(|listener| &listener.services).cloned().collect();
        self.services.retain(|key, _| wanted.contains(key));
        for key in wanted {
            self.services.entry(key).or_default();
        }
    }

    fn service_key(&self, service: &ServiceRef) -> ServiceKey {
        ServiceKey::new(service.namespace.as_deref().unwrap_or(&self.namespace), &service.service)
    }

    /// Every Service that a listener follows.
    pub fn wanted_services(&self) -> impl Iterator<Item = &ServiceKey> {
        self.services.keys()
    }

    /// True if a listener needs the node's zone and it is not known yet.
    #[must_use]
    pub fn needs_zone(&self) -> bool {
        let zonal = |listener: &FollowedListener| listener.request.locality == Locality::PreferZone;
        self.node.is_some() && matches!(self.zone, ZoneState::Pending) && self.listeners.values().any(zonal)
    }

    /// Stores what was reported and marks the affected listeners; [`flush`](Self::flush) publishes.
    pub fn handle_event(&mut self, event: WatchEvent) {
        match event {
            WatchEvent::Slices(key, slices) => {
                if let Some(known) = self.services.get_mut(&key) {
                    let absence = known.absence.take().filter(|_| slices.is_empty());
                    *known = KnownService { slices: Some(slices), answered: true, absence };
                    self.mark_dirty(&key);
                }
            }
            WatchEvent::Failed(key) => {
                if let Some(known) = self.services.get_mut(&key)
                    && !std::mem::replace(&mut known.answered, true)
                {
                    self.mark_dirty(&key);
                }
            }
            WatchEvent::Absent(key, text) => {
                if let Some(known) = self.services.get_mut(&key) {
                    known.absence = Some(text);
                }
            }
            WatchEvent::Zone(zone) => {
                self.zone = ZoneState::Resolved(zone);
                self.listeners.values_mut().for_each(|listener| listener.dirty = true);
            }
        }
    }

    /// Marks the listeners that follow this Service, and those that prefer their zone, since any Service's slices can show it.
    fn mark_dirty(&mut self, key: &ServiceKey) {
        for listener in self.listeners.values_mut() {
            listener.dirty |= listener.services.contains(key) || listener.request.locality == Locality::PreferZone;
        }
    }

    /// Recomputes the marked listeners. Returns the sets that have changed and the lines to log.
    pub fn flush(&mut self) -> (Vec<DiscoveryUpdate>, Vec<DiscoveryNotice>) {
        let mut updates = Vec::new();
        let mut notices = Vec::new();
        if !self.listeners.values().any(|listener| listener.dirty) {
            return (updates, notices);
        }
        let zone = self.zone();
        let location = NodeLocation { node: self.node.as_deref(), zone: zone.as_deref() };
        for listener in self.listeners.values_mut().filter(|listener| listener.dirty) {
            listener.dirty = false;
            let waits_for_zone =
                listener.request.locality == Locality::PreferZone && location.zone.is_none() && self.node.is_some();
            if waits_for_zone && matches!(self.zone, ZoneState::Pending) {
                continue;
            }
            let Some(outcome) = listener.select_endpoints(&self.services, &location) else { continue };
            listener.warn(&outcome, &self.services, &location, &mut notices);
            let new_cause = listener.update_empty_cause(&outcome, &location);
            if listener.published.as_ref() == Some(&outcome.downstreams) {
                if new_cause {
                    notices.push(listener.notice(&outcome));
                }
                continue;
            }
            self.generation += 1;
            notices.push(listener.notice(&outcome));
            listener.published = Some(outcome.downstreams.clone());
            updates.push(DiscoveryUpdate {
                listener: listener.request.listener,
                set: DownstreamSet { generation: self.generation, downstreams: outcome.downstreams },
            });
        }
        (updates, notices)
    }

    /// The problems that apply now: those of each listener, and the Services whose endpoints do not have the configured port.
    #[must_use]
    pub fn problems(&self) -> DiscoveryProblems {
        let listeners = self.listeners.iter();
        DiscoveryProblems {
            texts: listeners
                .flat_map(|(id, listener)| listener.problems(&self.services).into_iter().map(|text| (*id, text)))
                .collect(),
            mismatched: self.listeners.values().flat_map(|listener| &listener.mismatched).cloned().collect(),
        }
    }

    /// The zone from the Node object, or else from an endpoint on this node.
    fn zone(&self) -> Option<Arc<str>> {
        if let ZoneState::Resolved(Some(zone)) = &self.zone {
            return Some(zone.clone());
        }
        let node = self.node.as_deref()?;
        let zonal = |listener: &FollowedListener| listener.request.locality == Locality::PreferZone;
        if !self.listeners.values().any(zonal) {
            return None;
        }
        let endpoints =
            self.services.values().flat_map(|known| known.slices.iter().flatten()).flat_map(|s| &s.endpoints);
        endpoints
            .filter(|endpoint| endpoint.node.as_deref() == Some(node))
            .filter_map(|endpoint| endpoint.zone.clone())
            .min()
    }
}

impl FollowedListener {
    /// None until each Service has been listed or has failed, and one has been listed. A Service that cannot be listed does not
    /// withhold the endpoints of the others, and never empties the set.
    fn select_endpoints(
        &self,
        services: &BTreeMap<ServiceKey, KnownService>,
        location: &NodeLocation<'_>,
    ) -> Option<EndpointSelection> {
        let known = || self.services.iter().filter_map(|key| services.get(key));
        if !known().all(|known| known.answered) || known().all(|known| known.slices.is_none()) {
            return None;
        }
        let sources: Vec<ServiceSlices<'_>> = self.sources(services).map(|(_, source)| source).collect();
        Some(slices::select_endpoints(&sources, &self.rules(), location))
    }

    /// The known slices of each Service, none before its first list.
    fn sources<'a>(
        &'a self,
        services: &'a BTreeMap<ServiceKey, KnownService>,
    ) -> impl Iterator<Item = (&'a ServiceKey, ServiceSlices<'a>)> {
        let slices_of = |key| services.get(key).and_then(|known| known.slices.as_deref()).unwrap_or_default();
        let pairs = self.services.iter().zip(&self.request.services);
        pairs.map(move |(key, service)| (key, ServiceSlices { slices: slices_of(key), port: &service.port }))
    }

    fn rules(&self) -> EndpointRules {
        let DiscoveryRequest { family, locality, terminating, .. } = self.request;
        EndpointRules { family, locality, terminating }
    }

    /// The problems that apply now. The cause of an empty set is that of each absent Service where that is known.
    fn problems(&self, services: &BTreeMap<ServiceKey, KnownService>) -> Vec<String> {
        let mut problems: Vec<String> = self.warned.iter().cloned().collect();
        let absent: Vec<String> = self.services.iter().filter_map(|key| services.get(key)?.absence.clone()).collect();
        let explained = self.services.len() == absent.len();
        problems.extend(absent);
        if let Some(cause) = self.empty_cause.as_ref().filter(|_| !explained) {
            problems.push(format!("no usable endpoints: {cause}"));
        }
        problems
    }

    /// Stores why the set is empty. Returns true if the set is empty for another reason than before; changed numbers are none.
    fn update_empty_cause(&mut self, outcome: &EndpointSelection, location: &NodeLocation<'_>) -> bool {
        let cause = outcome
            .downstreams
            .is_empty()
            .then(|| messages::no_endpoints(&self.rules(), &outcome.stats, location.node));
        let words =
            |cause: &Option<String>| cause.as_ref().map(|cause| cause.replace(|c: char| c.is_ascii_digit(), ""));
        let changed = cause.is_some() && words(&cause) != words(&self.empty_cause);
        self.empty_cause = cause;
        changed
    }

    fn notice(&self, outcome: &EndpointSelection) -> DiscoveryNotice {
        let listener = self.request.listener;
        let had_some = self.published.as_ref().is_some_and(|published| !published.is_empty());
        match outcome.downstreams.len() {
            0 => DiscoveryNotice::Empty { listener, cause: self.empty_cause.clone().unwrap_or_default() },
            endpoints if had_some => DiscoveryNotice::Changed { listener, endpoints },
            endpoints => DiscoveryNotice::Discovered { listener, endpoints },
        }
    }

    /// Adds a warning for each new problem. The texts hold no numbers that change with every pod, so none repeats.
    fn warn(
        &mut self,
        outcome: &EndpointSelection,
        services: &BTreeMap<ServiceKey, KnownService>,
        location: &NodeLocation<'_>,
        notices: &mut Vec<DiscoveryNotice>,
    ) {
        let stats = &outcome.stats;
        let mut holding: BTreeSet<String> = BTreeSet::new();
        holding.extend(stats.unsupported_types.iter().map(|name| messages::unsupported_type(name)));
        holding.extend(stats.non_udp_ports.iter().map(|port| messages::port_not_udp(port)));
        if location.node.is_none() && matches!(self.request.locality, Locality::PreferNode | Locality::PreferZone) {
            holding.insert(messages::node_name_unknown(self.request.locality));
        }
        let mut mismatched = BTreeSet::new();
        for (key, source) in self.sources(services) {
            if let (PortRef::Number(port), Some(listed)) = (source.port, slices::other_udp_ports(&source)) {
                holding.insert(messages::port_mismatch(key, *port, &listed));
                mismatched.insert(key.clone());
            }
        }
        self.mismatched = mismatched;
        let listener = self.request.listener;
        notices.extend(
            holding.difference(&self.warned).map(|text| DiscoveryNotice::Warning { listener, text: text.clone() }),
        );
        self.warned = holding;
    }
}

#[cfg(test)]
mod tests;
