//! Downstreams known by DNS names: from the names of a listener's downstreams to a set of addresses, again and again.
//!
//! ```text
//! requests ─► cache::NameCache (pure) ─► hosts that are due ─► lookup (threads, getaddrinfo) ─► event loop
//!                    └─► Update ─► controller           └──────── answers ◄──────────┘
//! ```
//!
//! The event loop owns both parts. [`cache`] decides what is asked when and what follows from answers; [`lookup`] asks,
//! away from the main thread, since a name server that is silent keeps whoever asks it waiting for long.
//!
//! Only addresses change a set: a name that cannot be resolved any more, for whatever reason, keeps the addresses that it
//! had last, because the resolver cannot tell an outage from a name that has gone, and datagrams must go somewhere.

pub mod cache;
pub mod lookup;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use crate::model::ListenerId;
use crate::net::Family;

/// Where a downstream of a configuration is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DownstreamAddress {
    /// Here.
    Ip(SocketAddr),
    /// At each of the addresses that this name has.
    Name {
        /// The name.
        host: Arc<str>,
        /// The port, on each.
        port: u16,
    },
}

/// As it is written in a configuration.
impl fmt::Display for DownstreamAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DownstreamAddress::Ip(address) => address.fmt(f),
            DownstreamAddress::Name { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// A downstream of a configuration, which stands for as many downstreams as its name has addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DownstreamEntry {
    /// Its name in logs.
    pub name: Arc<str>,
    /// Where it is.
    pub address: DownstreamAddress,
    /// See [`Downstream::weight`](crate::model::Downstream::weight); of each.
    pub weight: u32,
    /// See [`Downstream::sample`](crate::model::Downstream::sample); of each.
    pub sample: u32,
}

/// What is to be found out for a listener.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ResolveRequest {
    /// Whose downstreams they are.
    pub listener: ListenerId,
    /// Its name, for the log.
    pub name: Arc<str>,
    /// Its own IP version; addresses of the other one are left out.
    pub family: Family,
    /// In the order of the round.
    pub entries: Vec<DownstreamEntry>,
    /// How long an answer is believed.
    pub interval: Duration,
}
