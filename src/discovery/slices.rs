//! Selects a listener's downstreams from the EndpointSlices of its Services: address family, port, readiness (a terminating
//! endpoint is left out in [`choose_endpoints`]), locality.
//!
//! Pure, without Kubernetes types: `wire` makes [`Slice`]s from what the API server sends, `aggregator` calls [`select_endpoints`].
//! The result depends only on the slices' content, never on their order or history.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::{Family, Locality, PortRef, Terminating};
use crate::model::Downstream;

/// An EndpointSlice without the fields that selection does not need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    /// The kind of its addresses.
    pub addresses: AddressType,
    /// The ports of each of its endpoints.
    pub ports: Vec<SlicePort>,
    /// Its endpoints with a usable address.
    pub endpoints: Vec<SliceEndpoint>,
    /// Number of endpoints left out because their address is malformed or not unicast.
    pub invalid_addresses: usize,
}

/// The `addressType` of a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AddressType {
    /// IP addresses of this family.
    Ip(Family),
    /// No IP addresses: `FQDN`, or a type of a later Kubernetes version.
    Other(String),
}

/// A port of a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlicePort {
    /// The Service port's name; empty where it has none.
    pub name: String,
    /// `UDP`, `TCP` or `SCTP`; none where the server did not say.
    pub protocol: Option<String>,
    /// None means any port, so there is no number to send to.
    pub number: Option<u16>,
}

/// One endpoint of a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// The first address. The API gives further ones no meaning ("No semantics are defined for additional addresses
    /// beyond the first, and kube-proxy does not look at them"); using them could double the endpoint's share.
    pub address: IpAddr,
    /// Whether it takes traffic.
    pub readiness: EndpointReadiness,
    /// The node it runs on.
    pub node: Option<Arc<str>>,
    /// The zone it runs in.
    pub zone: Option<Arc<str>>,
    /// The pod's name.
    pub pod: Option<Arc<str>>,
}

/// Whether an endpoint accepts traffic, from worst to best.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EndpointReadiness {
    /// Accepts no traffic.
    NotReady,
    /// Shutting down, and still serving.
    Terminating,
    /// Accepts traffic.
    Ready,
}

impl EndpointReadiness {
    /// From an endpoint's conditions, by the rules of the API: an unknown `ready` is to be taken as true, an unknown
    /// `serving` as what `ready` says, an unknown `terminating` as false. `ready` alone decides where it is true,
    /// because a Service with `publishNotReadyAddresses` keeps it true even while an endpoint terminates.
    #[must_use]
    pub fn from_conditions(ready: Option<bool>, serving: Option<bool>, terminating: Option<bool>) -> EndpointReadiness {
        if ready.unwrap_or(true) {
            EndpointReadiness::Ready
        } else if terminating.unwrap_or(false) && serving.unwrap_or(false) {
            EndpointReadiness::Terminating
        } else {
            EndpointReadiness::NotReady
        }
    }
}

/// One Service of a listener: its slices, and the port to send to.
#[derive(Debug, Clone, Copy)]
pub struct ServiceSlices<'a> {
    /// All slices with the Service's label.
    pub slices: &'a [Arc<Slice>],
    /// The port on each endpoint.
    pub port: &'a PortRef,
}

/// Which endpoints a listener uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndpointRules {
    /// Its own address family.
    pub family: Family,
    /// Preference by node or zone.
    pub locality: Locality,
    /// Use of endpoints that are shutting down.
    pub terminating: Terminating,
}

/// The node and zone of this daemon, as far as known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NodeLocation<'a> {
    /// The name of the node.
    pub node: Option<&'a str>,
    /// The name of the zone.
    pub zone: Option<&'a str>,
}

/// The result of [`select_endpoints`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EndpointSelection {
    /// Each address and port once, sorted by address: a change of one endpoint moves no other one, whatever the order in which
    /// the server sends them.
    pub downstreams: Vec<Downstream>,
    /// Counts and reasons of the endpoints left out.
    pub stats: SelectionStats,
}

/// What was examined and left out, for [`messages`](super::messages).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SelectionStats {
    /// Slices examined.
    pub slices: usize,
    /// Endpoints of the listener's family that have the port, duplicates merged.
    pub endpoints: usize,
    /// How many of these are ready.
    pub ready: usize,
    /// How many of these are shutting down and still serve.
    pub terminating: usize,
    /// Endpoints left out because they are of the other family.
    pub other_family: usize,
    /// Endpoints left out because their slice has no port of the configured name.
    pub without_port: usize,
    /// Endpoints left out because their address is malformed or not unicast.
    pub invalid_addresses: usize,
    /// Address types other than IPv4 and IPv6, as the server spells them.
    pub unsupported_types: BTreeSet<String>,
    /// Configured port names that slices with endpoints do not have.
    pub missing_ports: BTreeSet<String>,
    /// Names of the ports that those slices have instead.
    pub available_ports: BTreeSet<String>,
    /// Configured ports that are not UDP, as `name/PROTOCOL`.
    pub non_udp_ports: BTreeSet<String>,
    /// True if there are usable endpoints, but none on this node, which `locality = "node"` demands.
    pub other_nodes_only: bool,
}

/// An endpoint with its port, merged from all slices that hold it.
struct Candidate<'a> {
    address: SocketAddr,
    readiness: EndpointReadiness,
    on_node: bool,
    in_zone: bool,
    pod: Option<&'a Arc<str>>,
}

/// Selects a listener's downstreams.
///
/// The same address can be in several slices while the controller moves it ("clients must be able to handle the
/// situation where the same endpoint appears in more than one slice"). The best readiness and locality among them count, so
/// the result does not depend on the order of the slices.
#[must_use]
pub fn select_endpoints(
    sources: &[ServiceSlices<'_>],
    rules: &EndpointRules,
    location: &NodeLocation<'_>,
) -> EndpointSelection {
    let mut stats = SelectionStats::default();
    let mut candidates = Vec::new();
    for source in sources {
        for slice in source.slices {
            collect_candidates(slice, source.port, rules.family, location, &mut candidates, &mut stats);
        }
    }
    let candidates = merge_duplicates(candidates);
    stats.endpoints = candidates.len();
    stats.ready = candidates.iter().filter(|c| c.readiness == EndpointReadiness::Ready).count();
    stats.terminating = candidates.iter().filter(|c| c.readiness == EndpointReadiness::Terminating).count();
    let chosen = choose_endpoints(&candidates, rules, location);
    stats.other_nodes_only = chosen.is_empty()
        && !choose_endpoints(&candidates, &EndpointRules { locality: Locality::Cluster, ..*rules }, location)
            .is_empty();
    EndpointSelection { downstreams: name_downstreams(&chosen), stats }
}

/// Adds the endpoints of one slice that are of the listener's family and have the port.
fn collect_candidates<'a>(
    slice: &'a Slice,
    port: &PortRef,
    family: Family,
    location: &NodeLocation<'_>,
    candidates: &mut Vec<Candidate<'a>>,
    stats: &mut SelectionStats,
) {
    stats.slices += 1;
    match &slice.addresses {
        AddressType::Ip(other) if *other == family => {}
        AddressType::Ip(_) => return stats.other_family += slice.endpoints.len(),
        AddressType::Other(name) => {
            stats.unsupported_types.insert(name.clone());
            return;
        }
    }
    stats.invalid_addresses += slice.invalid_addresses;
    let Some(port) = resolve_port(slice, port, stats) else {
        return stats.without_port += slice.endpoints.len();
    };
    let is = |a: &Option<Arc<str>>, b: Option<&str>| a.is_some() && a.as_deref() == b;
    candidates.extend(slice.endpoints.iter().map(|endpoint| Candidate {
        address: SocketAddr::new(endpoint.address, port),
        readiness: endpoint.readiness,
        on_node: is(&endpoint.node, location.node),
        in_zone: is(&endpoint.zone, location.zone),
        pod: endpoint.pod.as_ref(),
    }));
}

/// The port number on the endpoints of this slice, if the slice has the port.
fn resolve_port(slice: &Slice, port: &PortRef, stats: &mut SelectionStats) -> Option<u16> {
    let wanted = match port {
        PortRef::Number(number) => return Some(*number),
        PortRef::Name(name) => name,
    };
    let found = slice.ports.iter().find(|port| port.name == *wanted);
    let Some((port, number)) = found.and_then(|port| Some((port, port.number.filter(|n| *n != 0)?))) else {
        // The placeholder slice of a Service without pods has no ports and no endpoints: the name may still be right.
        if !slice.endpoints.is_empty() {
            stats.missing_ports.insert(wanted.clone());
            stats.available_ports.extend(slice.ports.iter().map(|port| port.name.clone()));
        }
        return None;
    };
    if let Some(protocol) = port.protocol.as_deref().filter(|protocol| *protocol != "UDP") {
        stats.non_udp_ports.insert(format!("{wanted}/{protocol}"));
    }
    Some(number)
}

/// The UDP ports, number and name, that all slices with endpoints list, if none is the configured number. None if the number is
/// right, or if a slice does not tell: it lists no UDP port, or one without a number.
#[must_use]
pub fn other_udp_ports(source: &ServiceSlices<'_>) -> Option<BTreeSet<(u16, String)>> {
    let PortRef::Number(configured) = source.port else { return None };
    let mut others = BTreeSet::new();
    for slice in source.slices.iter().filter(|slice| !slice.endpoints.is_empty()) {
        let mut udp = slice.ports.iter().filter(|port| port.protocol.as_deref() == Some("UDP")).peekable();
        udp.peek()?;
        for port in udp {
            others.insert((port.number.filter(|number| number != configured)?, port.name.clone()));
        }
    }
    (!others.is_empty()).then_some(others)
}

fn merge_duplicates(mut candidates: Vec<Candidate<'_>>) -> Vec<Candidate<'_>> {
    candidates.sort_by_key(|candidate| candidate.address);
    candidates.dedup_by(|next, kept| {
        let same = next.address == kept.address;
        if same {
            kept.readiness = kept.readiness.max(next.readiness);
            kept.on_node |= next.on_node;
            kept.in_zone |= next.in_zone;
            kept.pod = match (kept.pod, next.pod) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
        same
    });
    candidates
}

/// Applies readiness, then locality: a ready endpoint on another node is better than a terminating one on this node. A
/// terminating endpoint is left out here, unless `terminating` lets it in.
fn choose_endpoints<'c, 'a>(
    candidates: &'c [Candidate<'a>],
    rules: &EndpointRules,
    location: &NodeLocation<'_>,
) -> Vec<&'c Candidate<'a>> {
    let tiers: &[&[EndpointReadiness]] = match rules.terminating {
        Terminating::Never => &[&[EndpointReadiness::Ready]],
        Terminating::Fallback => &[&[EndpointReadiness::Ready], &[EndpointReadiness::Terminating]],
        Terminating::UntilGone => &[&[EndpointReadiness::Ready, EndpointReadiness::Terminating]],
    };
    for tier in tiers {
        let usable = || candidates.iter().filter(|candidate| tier.contains(&candidate.readiness));
        let (preferred, strict): (Vec<_>, bool) = match rules.locality {
            Locality::Cluster => (usable().collect(), false),
            Locality::Node => (usable().filter(|c| c.on_node).collect(), true),
            Locality::PreferNode if location.node.is_some() => (usable().filter(|c| c.on_node).collect(), false),
            Locality::PreferZone if location.zone.is_some() => (usable().filter(|c| c.in_zone).collect(), false),
            Locality::PreferNode | Locality::PreferZone => (usable().collect(), false),
        };
        let chosen = if preferred.is_empty() && !strict { usable().collect() } else { preferred };
        if !chosen.is_empty() {
            return chosen;
        }
    }
    Vec::new()
}

/// Names each downstream after its pod if that name is unique in the set, else after its address.
fn name_downstreams(chosen: &[&Candidate<'_>]) -> Vec<Downstream> {
    let mut uses: HashMap<&Arc<str>, u32> = HashMap::with_capacity(chosen.len());
    for pod in chosen.iter().filter_map(|candidate| candidate.pod) {
        *uses.entry(pod).or_default() += 1;
    }
    chosen
        .iter()
        .map(|candidate| {
            let unique = candidate.pod.filter(|pod| uses.get(pod) == Some(&1));
            let name = unique.map_or_else(|| candidate.address.to_string().into(), Arc::clone);
            Downstream { name, address: candidate.address, weight: 1, sample: Downstream::ALL }
        })
        .collect()
}

#[cfg(test)]
mod tests;
