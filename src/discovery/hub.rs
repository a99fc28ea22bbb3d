//! Decides what is published when: takes what the watches found, answers with updates and things to say. No I/O.
//!
//! The hub knows every listener's request and the last good slices of every Service. `watch` feeds it and carries
//! out what [`Hub::flush`] returns.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use super::slices::{self, Outcome, Place, Rules, Slice, Source};
use super::{Locality, Request, ServiceRef, Update, advice};
use crate::model::{Downstream, DownstreamSet, ListenerId};

/// A Service; one watch serves all listeners that want it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    /// Its namespace, never a default.
    pub namespace: Arc<str>,
    /// Its name.
    pub service: Arc<str>,
}

impl ServiceKey {
    /// A Service by its two names.
    #[must_use]
    pub fn new(namespace: &str, service: &str) -> ServiceKey {
        ServiceKey { namespace: namespace.into(), service: service.into() }
    }
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.service)
    }
}

/// Something a watch has found out.
#[derive(Debug, Clone)]
pub enum Finding {
    /// All slices of a Service, from a complete list and what changed since.
    Slices(ServiceKey, Vec<Arc<Slice>>),
    /// A Service could not be listed, for now. What is known of it stays.
    Failed(ServiceKey),
    /// The node's zone, or that it cannot be known for now.
    Zone(Option<Arc<str>>),
}

/// Something to log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// A listener has its first set, or endpoints again after having had none.
    Discovered {
        /// Whose.
        listener: ListenerId,
        /// How many; not 0.
        endpoints: usize,
    },
    /// A listener's set has changed; of interest to those who look closely.
    Changed {
        /// Whose.
        listener: ListenerId,
        /// How many; not 0.
        endpoints: usize,
    },
    /// A listener has no endpoints, and had some or never had a set.
    Empty {
        /// Whose.
        listener: ListenerId,
        /// The likely cause.
        cause: String,
    },
    /// Something is wrong that was not wrong before.
    Warning {
        /// Where.
        listener: ListenerId,
        /// What, and the remedy.
        text: String,
    },
}

/// Everything known, and what has been published of it.
#[derive(Debug, Default)]
pub struct Hub {
    /// The namespace of services that name none.
    namespace: String,
    node: Option<String>,
    zone: Zone,
    services: BTreeMap<ServiceKey, Known>,
    listeners: BTreeMap<ListenerId, Listener>,
    /// The last generation given out. One count for all listeners, so that it also increases for a listener whose
    /// request has been replaced.
    generation: u64,
}

/// What is known of the node's zone.
#[derive(Debug, Default)]
enum Zone {
    /// Nobody has asked yet, or the answer is under way.
    #[default]
    Unasked,
    /// The Node object has told, or has no zone or may not be read.
    Told(Option<Arc<str>>),
}

/// What is known of one Service.
#[derive(Debug, Default)]
struct Known {
    /// From the last complete list on; none before the first.
    slices: Option<Vec<Arc<Slice>>>,
    /// True once there was any answer, or a failure to get one.
    answered: bool,
}

#[derive(Debug)]
struct Listener {
    request: Request,
    services: Vec<ServiceKey>,
    dirty: bool,
    published: Option<Vec<Downstream>>,
    /// Warnings that hold and have been given.
    warned: BTreeSet<String>,
}

impl Hub {
    /// A hub that knows nothing yet.
    #[must_use]
    pub fn new(namespace: &str, node: Option<String>) -> Hub {
        Hub { namespace: namespace.to_owned(), node, ..Hub::default() }
    }

    /// Replaces all requests. Services that nobody wants any more are forgotten.
    pub fn replace(&mut self, requests: Vec<Request>) {
        let mut old = std::mem::take(&mut self.listeners);
        for request in requests {
            let id = request.listener;
            let listener = match old.remove(&id) {
                Some(listener) if listener.request == request => listener,
                _ => Listener {
                    services: request.services.iter().map(|service| self.key(service)).collect(),
                    request,
                    dirty: true,
                    published: None,
                    warned: BTreeSet::new(),
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

    fn key(&self, service: &ServiceRef) -> ServiceKey {
        ServiceKey::new(service.namespace.as_deref().unwrap_or(&self.namespace), &service.service)
    }

    /// Every Service that some listener wants.
    pub fn wanted(&self) -> impl Iterator<Item = &ServiceKey> {
        self.services.keys()
    }

    /// True if some listener needs the node's zone and nobody has asked the API server for it.
    #[must_use]
    pub fn wants_zone(&self) -> bool {
        let zonal = |listener: &Listener| listener.request.locality == Locality::PreferZone;
        self.node.is_some() && matches!(self.zone, Zone::Unasked) && self.listeners.values().any(zonal)
    }

    /// Takes a finding in.
    pub fn take(&mut self, finding: Finding) {
        match finding {
            Finding::Slices(key, slices) => {
                if let Some(known) = self.services.get_mut(&key) {
                    *known = Known { slices: Some(slices), answered: true };
                    self.soil(&key);
                }
            }
            Finding::Failed(key) => {
                if let Some(known) = self.services.get_mut(&key)
                    && !std::mem::replace(&mut known.answered, true)
                {
                    self.soil(&key);
                }
            }
            Finding::Zone(zone) => {
                self.zone = Zone::Told(zone);
                self.listeners.values_mut().for_each(|listener| listener.dirty = true);
            }
        }
    }

    /// Marks the listeners that want this Service. A zone learnt from its slices concerns the others as well.
    fn soil(&mut self, key: &ServiceKey) {
        for listener in self.listeners.values_mut() {
            listener.dirty |= listener.services.contains(key) || listener.request.locality == Locality::PreferZone;
        }
    }

    /// The updates and messages that follow from all findings since the last call.
    pub fn flush(&mut self) -> (Vec<Update>, Vec<Note>) {
        let mut updates = Vec::new();
        let mut notes = Vec::new();
        if !self.listeners.values().any(|listener| listener.dirty) {
            return (updates, notes);
        }
        let zone = self.zone();
        let place = Place { node: self.node.as_deref(), zone: zone.as_deref() };
        for listener in self.listeners.values_mut().filter(|listener| listener.dirty) {
            listener.dirty = false;
            let waits_for_zone =
                listener.request.locality == Locality::PreferZone && place.zone.is_none() && self.node.is_some();
            if waits_for_zone && matches!(self.zone, Zone::Unasked) {
                continue;
            }
            let Some(outcome) = listener.compile(&self.services, &place) else { continue };
            listener.warn(&outcome, &place, &mut notes);
            if listener.published.as_ref() == Some(&outcome.downstreams) {
                continue;
            }
            self.generation += 1;
            notes.push(listener.note(&outcome, &place));
            listener.published = Some(outcome.downstreams.clone());
            updates.push(Update {
                listener: listener.request.listener,
                set: DownstreamSet { generation: self.generation, downstreams: outcome.downstreams },
            });
        }
        (updates, notes)
    }

    /// What the Node object says, else what an endpoint on this node says.
    fn zone(&self) -> Option<Arc<str>> {
        if let Zone::Told(Some(zone)) = &self.zone {
            return Some(zone.clone());
        }
        let node = self.node.as_deref()?;
        let zonal = |listener: &Listener| listener.request.locality == Locality::PreferZone;
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

impl Listener {
    /// None while there is nothing to go by: before each of its services has been listed or at least tried. A service
    /// that cannot be listed does not withhold the endpoints of the others, and never empties the set by itself.
    fn compile(&self, services: &BTreeMap<ServiceKey, Known>, place: &Place<'_>) -> Option<Outcome> {
        let known = || self.services.iter().filter_map(|key| services.get(key));
        if !known().all(|known| known.answered) || known().all(|known| known.slices.is_none()) {
            return None;
        }
        let slices_of = |key| services.get(key).and_then(|known: &Known| known.slices.as_deref()).unwrap_or_default();
        let pairs = self.services.iter().zip(&self.request.services);
        let sources: Vec<Source<'_>> =
            pairs.map(|(key, service)| Source { slices: slices_of(key), port: &service.port }).collect();
        Some(slices::compile(&sources, &self.rules(), place))
    }

    fn rules(&self) -> Rules {
        let Request { family, locality, terminating, .. } = self.request;
        Rules { family, locality, terminating }
    }

    fn note(&self, outcome: &Outcome, place: &Place<'_>) -> Note {
        let listener = self.request.listener;
        let had_some = self.published.as_ref().is_some_and(|published| !published.is_empty());
        match outcome.downstreams.len() {
            0 => Note::Empty { listener, cause: advice::empty(&self.rules(), &outcome.tally, place.node) },
            endpoints if had_some => Note::Changed { listener, endpoints },
            endpoints => Note::Discovered { listener, endpoints },
        }
    }

    /// Says what is wrong now and was not before. The texts hold no numbers that change with every pod.
    fn warn(&mut self, outcome: &Outcome, place: &Place<'_>, notes: &mut Vec<Note>) {
        let tally = &outcome.tally;
        let mut holding: BTreeSet<String> = BTreeSet::new();
        holding.extend(tally.unusable_types.iter().map(|name| advice::unusable_type(name)));
        holding.extend(tally.not_udp.iter().map(|port| advice::not_udp(port)));
        if place.node.is_none() && matches!(self.request.locality, Locality::PreferNode | Locality::PreferZone) {
            holding.insert(advice::node_unknown(self.request.locality));
        }
        let listener = self.request.listener;
        notes.extend(holding.difference(&self.warned).map(|text| Note::Warning { listener, text: text.clone() }));
        self.warned = holding;
    }
}

#[cfg(test)]
mod tests;
