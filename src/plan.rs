//! The plan: what every datapath must do, as a value.
//!
//! [`compile`] builds it from the configuration, the downstream sets and the host's facts, without I/O. It turns each
//! listener's policy into a table of indices, so a datapath only computes a slot: [`round_robin`] and [`maglev`] fill
//! the tables, [`hash`] computes the slot. The controller compiles plans; both datapaths apply them.

pub mod compile;
pub mod hash;
pub mod maglev;
pub mod round_robin;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::Serialize;

use crate::admission::{Meter, SourceRules};
use crate::config::{AttachConfig, UserspaceSettings};
use crate::host::Mac;
use crate::model::{Downstream, ListenerId, Mode, Policy};

/// What all datapaths must do.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Plan {
    /// Ordered by id. The controller and the datapaths share each one.
    pub listeners: Vec<Arc<ListenerPlan>>,
    /// How the TC program is attached.
    pub attach: AttachConfig,
}

impl From<Vec<ListenerPlan>> for Plan {
    fn from(listeners: Vec<ListenerPlan>) -> Plan {
        Plan { listeners: listeners.into_iter().map(Arc::new).collect(), attach: AttachConfig::default() }
    }
}

/// What to do with one listener's datagrams.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ListenerPlan {
    /// The listener's number.
    pub id: ListenerId,
    /// The listener's name, for logs.
    pub name: Arc<str>,
    /// Which datapath carries it. The userspace datapath serves both modes.
    pub mode: Mode,
    /// The address of the listener's socket. A link-scoped multicast address has its link as scope id.
    pub bind: SocketAddr,
    /// The addresses that the TC program matches: `bind`, or the host's addresses if that is a wildcard. Empty in
    /// userspace mode.
    pub match_addresses: Vec<IpAddr>,
    /// The interfaces the TC program must be attached to. Empty in userspace mode.
    pub links: Vec<LinkRef>,
    /// Indices of those `links` whose packets begin with the IP header, without a link-layer header. Ascending.
    pub l3_ingress: Vec<u32>,
    /// The interfaces on which to join the multicast group `bind`. Empty if `bind` is unicast.
    pub joins: Vec<LinkRef>,
    /// How the slot in the table is computed.
    pub policy: Policy,
    /// Which senders may send.
    pub sources: Arc<SourceRules>,
    /// Each sender's rate limit, if there is one.
    pub meter: Option<Meter>,
    /// Why the TC program must pass all of this listener's datagrams to its socket; none if it need not.
    pub socket_only: Option<String>,
    /// The downstreams, each once.
    pub targets: Arc<[PlanTarget]>,
    /// Indices into `targets` in the order of the round. Empty only if `targets` is.
    pub table: Arc<[u32]>,
    /// Settings of the userspace datapath.
    pub settings: UserspaceSettings,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct LinkRef {
    /// The kernel's interface index.
    pub index: u32,
    /// The interface's name, for logs.
    pub name: String,
}

/// A downstream, and how the TC program delivers to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlanTarget {
    /// Name, address, weight and sample.
    pub downstream: Downstream,
    /// The route to it, as the TC program uses it.
    pub delivery: Delivery,
}

/// How the TC program delivers a datagram to a downstream. The userspace datapath ignores this: the kernel routes what
/// its sockets send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Delivery {
    /// Up this host's own stack, to a socket on this host.
    Local,
    /// To a neighbour on a link.
    Neighbour {
        /// Index of the egress interface.
        link: u32,
        /// The neighbour's address.
        next_hop: IpAddr,
        /// The largest IP packet on this path, in bytes.
        mtu: u32,
        /// The link-layer addresses; none while the neighbour's is unknown.
        macs: Option<MacPair>,
        /// The egress interface is one end of a veth or netkit pair whose other end is in a pod, and packets may be
        /// redirected to that end.
        into_pod: bool,
    },
    /// Out of a layer 3 device, which has no link-layer header and no neighbours.
    L3Device {
        /// Index of the egress interface.
        link: u32,
        /// The largest IP packet on this path, in bytes.
        mtu: u32,
    },
    /// There is no route: its datagrams are dropped and counted.
    Unreachable,
}

/// The link-layer addresses of an outgoing frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MacPair {
    /// The neighbour's address: the frame's destination.
    pub neighbour: Mac,
    /// The egress interface's own address: the frame's source.
    pub own: Mac,
}

impl Delivery {
    /// The same path with nothing known about the neighbour.
    #[must_use]
    pub fn without_neighbour(self) -> Delivery {
        match self {
            Delivery::Neighbour { link, next_hop, mtu, .. } => {
                Delivery::Neighbour { link, next_hop, mtu, macs: None, into_pod: false }
            }
            other => other,
        }
    }
}
