//! EndpointSlices as the API server sends them, in both API versions, and their conversion to a [`Slice`].
//!
//! `discovery.k8s.io/v1` (since Kubernetes 1.21) comes as the type of k8s-openapi, `v1beta1` (1.17 to 1.24), which
//! that crate no longer has, as one of our own. Only `watch` uses these types.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::discovery::v1;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::Deserialize;

use super::Family;
use super::slices::{AddressType, EndpointReadiness, Slice, SliceEndpoint, SlicePort};
use crate::net::is_unicast;

/// The label that names the Service of a slice.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// The API group of EndpointSlices.
pub const GROUP: &str = "discovery.k8s.io";

/// The zone: a label of nodes, and a key of the v1beta1 topology.
pub const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// The node: a key of the v1beta1 topology.
const HOSTNAME_LABEL: &str = "kubernetes.io/hostname";

/// An EndpointSlice as the server sends it.
pub trait ApiSlice: Resource<DynamicType = (), Scope = NamespaceResourceScope> {
    /// Converts to the fields that selection needs.
    fn to_slice(&self) -> Slice;
}

impl ApiSlice for v1::EndpointSlice {
    fn to_slice(&self) -> Slice {
        let endpoints = self.endpoints.iter().map(|endpoint| EndpointFields {
            address: endpoint.addresses.first(),
            conditions: endpoint.conditions.as_ref(),
            node: endpoint.node_name.as_deref(),
            zone: endpoint.zone.as_deref(),
            target: endpoint.target_ref.as_ref(),
        });
        build_slice(&self.address_type, self.ports.as_deref(), endpoints)
    }
}

/// `discovery.k8s.io/v1beta1`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BetaEndpointSlice {
    /// Name, labels and resource version.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// `IPv4`, `IPv6` or `FQDN`.
    pub address_type: String,
    /// `null` in the placeholder slice of a Service without pods.
    pub endpoints: Option<Vec<BetaEndpoint>>,
    /// The same as in v1.
    pub ports: Option<Vec<v1::EndpointPort>>,
}

/// An endpoint of `discovery.k8s.io/v1beta1`: v1 has `zone` and `nodeName` where this has `topology`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BetaEndpoint {
    /// At least one.
    pub addresses: Option<Vec<String>>,
    /// The same as in v1.
    pub conditions: Option<v1::EndpointConditions>,
    /// Node and zone, under the names of node labels.
    pub topology: Option<BTreeMap<String, String>>,
    /// The node's name; servers from 1.20 on send it.
    pub node_name: Option<String>,
    /// The pod behind the endpoint.
    pub target_ref: Option<ObjectReference>,
}

impl Resource for BetaEndpointSlice {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        "EndpointSlice".into()
    }

    fn group((): &()) -> Cow<'_, str> {
        GROUP.into()
    }

    fn version((): &()) -> Cow<'_, str> {
        "v1beta1".into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        "endpointslices".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl ApiSlice for BetaEndpointSlice {
    fn to_slice(&self) -> Slice {
        let endpoints = self.endpoints.iter().flatten().map(|endpoint| {
            let topology = |key| endpoint.topology.as_ref().and_then(|topology| topology.get(key)).map(String::as_str);
            EndpointFields {
                address: endpoint.addresses.as_ref().and_then(|addresses| addresses.first()),
                conditions: endpoint.conditions.as_ref(),
                node: endpoint.node_name.as_deref().or_else(|| topology(HOSTNAME_LABEL)),
                zone: topology(ZONE_LABEL),
                target: endpoint.target_ref.as_ref(),
            }
        });
        build_slice(&self.address_type, self.ports.as_deref(), endpoints)
    }
}

/// The fields of an endpoint of either version.
struct EndpointFields<'a> {
    address: Option<&'a String>,
    conditions: Option<&'a v1::EndpointConditions>,
    node: Option<&'a str>,
    zone: Option<&'a str>,
    target: Option<&'a ObjectReference>,
}

fn build_slice<'a>(
    address_type: &str,
    ports: Option<&[v1::EndpointPort]>,
    endpoints: impl Iterator<Item = EndpointFields<'a>>,
) -> Slice {
    let addresses = match address_type {
        "IPv4" => AddressType::Ip(Family::V4),
        "IPv6" => AddressType::Ip(Family::V6),
        other => AddressType::Other(other.to_owned()),
    };
    let mut interner = StringInterner::default();
    let mut slice = Slice {
        ports: ports.unwrap_or_default().iter().map(port).collect(),
        endpoints: Vec::new(),
        invalid_addresses: 0,
        addresses,
    };
    if let AddressType::Ip(family) = slice.addresses {
        for fields in endpoints {
            match endpoint(&fields, family, &mut interner) {
                Some(endpoint) => slice.endpoints.push(endpoint),
                None => slice.invalid_addresses += 1,
            }
        }
    }
    slice
}

fn port(port: &v1::EndpointPort) -> SlicePort {
    SlicePort {
        name: port.name.clone().unwrap_or_default(),
        protocol: port.protocol.clone(),
        number: port.port.and_then(|number| u16::try_from(number).ok()),
    }
}

fn endpoint(fields: &EndpointFields<'_>, family: Family, interner: &mut StringInterner) -> Option<SliceEndpoint> {
    // The API server accepts multicast addresses, and IPv4 addresses in IPv6 notation.
    let address = fields.address?.parse::<IpAddr>().ok()?.to_canonical();
    if Family::of(address) != family || !is_unicast(address) {
        return None;
    }
    let conditions = fields.conditions;
    let pod = fields.target.filter(|target| target.kind.as_deref() == Some("Pod"));
    Some(SliceEndpoint {
        address,
        readiness: EndpointReadiness::from_conditions(
            conditions.and_then(|c| c.ready),
            conditions.and_then(|c| c.serving),
            conditions.and_then(|c| c.terminating),
        ),
        node: fields.node.map(|node| interner.intern(node)),
        zone: fields.zone.map(|zone| interner.intern(zone)),
        pod: pod.and_then(|pod| pod.name.as_deref()).map(Arc::from),
    })
}

/// Keeps each name once: the endpoints of a slice share few nodes and zones.
#[derive(Default)]
struct StringInterner(std::collections::HashMap<String, Arc<str>>);

impl StringInterner {
    fn intern(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.0.get(name) {
            return known.clone();
        }
        let shared: Arc<str> = name.into();
        self.0.insert(name.to_owned(), shared.clone());
        shared
    }
}
