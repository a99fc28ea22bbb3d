//! The plan: what every datapath must do, as a value.
//!
//! Compiled by pure code from the configuration, the downstream sets and the host's facts. Policy ends here: a
//! listener's policy has become a table, and a datapath only computes an index into it.

pub mod compile;
pub mod hash;
pub mod maglev;
pub mod table;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::Serialize;

use crate::admission::{Meter, Sources};
use crate::config::{AttachConfig, UserspaceSettings};
use crate::host::Mac;
use crate::model::{Downstream, ListenerId, Mode, Policy};

/// What all datapaths must do.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Plan {
    /// Ordered by id.
    pub listeners: Vec<ListenerPlan>,
    /// How the TC program is attached.
    pub attach: AttachConfig,
}

/// What to do with one listener's datagrams.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ListenerPlan {
    /// The listener's number.
    pub id: ListenerId,
    /// Its name, for logs.
    pub name: Arc<str>,
    /// Which datapath carries it. The userspace datapath serves both modes.
    pub mode: Mode,
    /// The address of the listener's ordinary socket. A group that is another one on each link names its link.
    pub bind: SocketAddr,
    /// The addresses the TC program matches: `bind`, or the host's addresses where that is a wildcard.
    /// Empty in userspace mode.
    pub match_addresses: Vec<IpAddr>,
    /// The interfaces the TC program must be attached to. Empty in userspace mode.
    pub links: Vec<LinkRef>,
    /// Those of them, by index, by which packets come in without a header before the IP header. In rising order.
    pub headerless: Vec<u32>,
    /// The interfaces on which the group that `bind` is must be joined. Empty where it is no multicast group.
    pub joins: Vec<LinkRef>,
    /// How the index into the table is computed.
    pub policy: Policy,
    /// Who may send.
    pub sources: Arc<Sources>,
    /// How fast each sender may send, if there is a limit.
    pub meter: Option<Meter>,
    /// Why the TC program must leave all of this listener's datagrams to the socket, if it must.
    pub socket_only: Option<String>,
    /// The downstreams, each once.
    pub targets: Arc<[Target]>,
    /// Indices into `targets` in the order of the round. Empty exactly if `targets` is.
    pub table: Arc<[u32]>,
    /// UserspaceSettings of the userspace datapath.
    pub settings: UserspaceSettings,
}

/// An interface: the kernel's number for it, and the name for people.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct LinkRef {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
}

/// A downstream, and how the TC program gets a datagram there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Target {
    /// Who.
    pub downstream: Downstream,
    /// How.
    pub delivery: Delivery,
}

/// How the TC program gets a datagram to a downstream. The userspace datapath ignores this: its sockets route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Delivery {
    /// Up this host's own stack, to a socket on it.
    Local,
    /// To a neighbour on a link.
    Neighbour {
        /// Index of the outgoing interface.
        link: u32,
        /// The neighbour's address.
        next_hop: IpAddr,
        /// The largest IP packet that may go this way, in bytes.
        mtu: u32,
        /// The link-layer addresses, where the neighbour's is known.
        macs: Option<Macs>,
        /// The link is one end of a pair whose other end is in a pod, to which packets may be handed directly.
        into_pod: bool,
    },
    /// Out of a link that carries IP packets bare, on which there are no neighbours.
    Bare {
        /// Index of the outgoing interface.
        link: u32,
        /// The largest IP packet that may go this way, in bytes.
        mtu: u32,
    },
    /// Not at all, for lack of a route: its datagrams are dropped and counted.
    Unreachable,
}

/// The link-layer addresses of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Macs {
    /// Where it is going.
    pub neighbour: Mac,
    /// The link's own.
    pub own: Mac,
}

impl Delivery {
    /// The same way, with nothing known of the neighbour at its end.
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
