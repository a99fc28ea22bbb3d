//! Downstreams given by DNS name: resolves the names again and again into sets of addresses.
//!
//! ```text
//! requests ─► cache::NameCache (pure) ─► hosts that are due ─► lookup (threads, getaddrinfo) ─► event loop
//!                    └─► Update ─► controller           └──────── answers ◄──────────┘
//! ```
//!
//! The event loop owns both parts. [`cache`] decides which name is looked up when, and what the results change; [`lookup`] runs
//! `getaddrinfo` on threads of its own, since a silent name server blocks it for seconds.
//!
//! Only addresses change a set. A name that cannot be resolved keeps its last addresses: the resolver cannot tell an outage
//! from a deleted name, and datagrams need a destination.

pub mod cache;
pub mod lookup;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use crate::model::ListenerId;
use crate::net::Family;

/// The address of a downstream as configured.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DownstreamAddress {
    /// An address.
    Ip(SocketAddr),
    /// A DNS name; each of its addresses becomes a downstream.
    Name {
        /// The name, in lower case.
        host: Arc<str>,
        /// The port, on each address.
        port: u16,
    },
}

/// In the syntax of the configuration file.
impl fmt::Display for DownstreamAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DownstreamAddress::Ip(address) => address.fmt(f),
            DownstreamAddress::Name { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// A configured downstream: one, or as many as its name has addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DownstreamEntry {
    /// The downstream's name in logs.
    pub name: Arc<str>,
    /// An address, or a DNS name to resolve.
    pub address: DownstreamAddress,
    /// See [`Downstream::weight`](crate::model::Downstream::weight); each address gets all of it.
    pub weight: u32,
    /// See [`Downstream::sample`](crate::model::Downstream::sample).
    pub sample: u32,
}

/// The downstreams of a listener that has names among them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ResolveRequest {
    /// The listener that gets the downstreams.
    pub listener: ListenerId,
    /// The listener's name, for the log.
    pub name: Arc<str>,
    /// The listener's address family; addresses of the other one are left out.
    pub family: Family,
    /// In the order of the configuration.
    pub entries: Vec<DownstreamEntry>,
    /// The time from a successful lookup to the next one.
    pub interval: Duration,
}
