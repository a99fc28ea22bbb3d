//! Facts about this host: links, addresses, routes, and what the kernel and our privileges allow.
//!
//! Facts only: nothing here decides anything. The event loop collects [`HostFacts`] (at start, and whenever
//! [`Monitor`] says that something changed) and hands them to the controller, which decides. What the TC program
//! needs is found out once, by [`Ability::probe`], and judged by [`tc_ebpf_support`], which is a pure function.

mod addresses;
pub mod facts;
pub mod filters;
mod links;
mod monitor;
mod netlink;
pub mod probe;
mod routes;

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::Result;

pub use facts::{Address, HostFacts, Link, Route};
pub use monitor::Monitor;
pub use probe::{Ability, Obstacle, tc_ebpf_support};

/// The host's network as the kernel tells it, in the network namespace in which this was opened.
pub struct Host {
    connection: netlink::Connection,
}

impl Host {
    /// Opens the connection to the kernel, in the network namespace of the calling thread. Needs no privileges.
    ///
    /// # Errors
    /// When the kernel refuses a netlink socket.
    pub fn open() -> Result<Self> {
        Ok(Self { connection: netlink::Connection::open()? })
    }

    /// Takes all facts, with the routes to `addresses`: where a packet of this host's own would be sent, which for
    /// multipath routes is the path of one flow.
    ///
    /// The parts are read one after the other; where the host changes in between, they may disagree until the facts
    /// are taken again, which [`Monitor`] will call for.
    ///
    /// # Errors
    /// When the kernel cannot be asked, or does nothing but change while it is. That an address cannot be reached is
    /// a fact ([`Route::Unreachable`]).
    pub fn facts(&mut self, addresses: &BTreeSet<IpAddr>) -> Result<HostFacts> {
        let links = links::list(&mut self.connection)?;
        let own = addresses::list(&mut self.connection)?;
        let default_route_links = routes::default_links(&mut self.connection)?;
        let routes = routes::look_up(&mut self.connection, addresses, &links)?;
        let links = links.into_iter().map(|seen| seen.link).collect();
        Ok(HostFacts { links, addresses: own, default_route_links, routes })
    }
}
