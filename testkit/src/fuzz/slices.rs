//! `EndpointSlices` as an API server may send them, one per line, and the downstreams selected from them. (The crates `kube` and
//! `k8s-openapi` implement the framing of a watch and the types of `v1`.)

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use k8s_openapi::api::discovery::v1;
use udp_fanout::testing::discovery::slices::{
    AddressType, EndpointReadiness, EndpointRules, EndpointSelection, NodeLocation, ServiceSlices, Slice,
    select_endpoints,
};
use udp_fanout::testing::discovery::wire::{ApiSlice, BetaEndpointSlice};
use udp_fanout::testing::discovery::{Locality, PortRef, Terminating};
use udp_fanout::testing::net::Family;

const HERE: NodeLocation<'_> = NodeLocation { node: Some("here"), zone: Some("west") };

/// Parses the lines and selects downstreams by every combination of rules.
pub fn run(bytes: &[u8]) {
    let slices: Vec<Arc<Slice>> = bytes.split(|&byte| byte == b'\n').flat_map(read).map(Arc::new).collect();
    if slices.is_empty() {
        return;
    }
    for port in [PortRef::Number(9000), PortRef::Name("syslog".to_owned()), PortRef::Name(String::new())] {
        for family in [Family::V4, Family::V6] {
            for terminating in [Terminating::Never, Terminating::Fallback, Terminating::UntilGone] {
                let of = |locality| check(&slices, &port, EndpointRules { family, locality, terminating });
                let [all, node, preferred, zone] =
                    [Locality::Cluster, Locality::Node, Locality::PreferNode, Locality::PreferZone].map(of);
                assert_eq!((preferred.is_empty(), zone.is_empty()), (all.is_empty(), all.is_empty()));
                // With fallback, a terminating endpoint on this node may be selected instead of a ready one elsewhere.
                if terminating != Terminating::Fallback {
                    assert!(node.is_subset(&all) && preferred.is_subset(&all) && zone.is_subset(&all));
                }
            }
        }
    }
}

/// Parses a line as both API versions.
fn read(line: &[u8]) -> Vec<Slice> {
    let stable = serde_json::from_slice::<v1::EndpointSlice>(line).map(|slice| slice.to_slice());
    let beta = serde_json::from_slice::<BetaEndpointSlice>(line).map(|slice| slice.to_slice());
    stable.into_iter().chain(beta).collect()
}

/// The selected downstreams. Asserts that their addresses are valid destinations and do not depend on the order of the slices.
fn check(slices: &[Arc<Slice>], port: &PortRef, rules: EndpointRules) -> BTreeSet<SocketAddr> {
    let run = |slices: &[Arc<Slice>]| select_endpoints(&[ServiceSlices { slices, port }], &rules, &HERE);
    let outcome = run(slices);
    let backwards: Vec<_> = slices.iter().rev().cloned().collect();
    assert_eq!(run(&backwards), outcome);
    assert_eq!(run(&[slices, &backwards].concat()).downstreams, outcome.downstreams);
    assert!(outcome.downstreams.is_sorted_by(|one, next| one.address < next.address), "{outcome:?}");
    for downstream in &outcome.downstreams {
        let ip = downstream.address.ip();
        assert_eq!((Family::of(ip), Family::of(ip.to_canonical())), (rules.family, rules.family), "{downstream:?}");
        assert!(!ip.is_unspecified() && !ip.is_multicast(), "{downstream:?}");
        assert_ne!(downstream.address.port(), 0);
        assert!(best(slices, downstream.address, &rules) > EndpointReadiness::NotReady, "{downstream:?}");
    }
    check_stats(&outcome);
    outcome.downstreams.iter().map(|downstream| downstream.address).collect()
}

/// The best readiness of an endpoint in all slices.
fn best(slices: &[Arc<Slice>], address: SocketAddr, rules: &EndpointRules) -> EndpointReadiness {
    let of_family = slices.iter().filter(|slice| slice.addresses == AddressType::Ip(rules.family));
    let endpoints = of_family.flat_map(|slice| &slice.endpoints).filter(|endpoint| endpoint.address == address.ip());
    endpoints.map(|endpoint| endpoint.readiness).max().unwrap_or(EndpointReadiness::NotReady)
}

fn check_stats(outcome: &EndpointSelection) {
    let stats = &outcome.stats;
    assert!(stats.ready + stats.terminating <= stats.endpoints, "{stats:?}");
    assert!(outcome.downstreams.len() <= stats.ready + stats.terminating, "{stats:?}");
    assert!(!stats.other_nodes_only || outcome.downstreams.is_empty(), "{stats:?}");
}
