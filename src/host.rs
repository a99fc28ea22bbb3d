//! Facts about this host: links, addresses, routes, and what the kernel and our privileges allow.
//!
//! Facts only: nothing here decides anything. The event loop collects [`HostFacts`] (at start, and whenever
//! [`Monitor`] says that something changed) and hands them to the controller, which decides. What the TC program
//! needs is found out once, by [`Ability::probe`], and judged by [`tc_ebpf_support`], which is a pure function.

mod addresses;
pub mod ahead;
pub mod decode;
pub mod facts;
pub mod filters;
mod guards;
mod links;
mod monitor;
pub mod neighbours;
mod netlink;
pub mod probe;
pub mod programs;
mod routes;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

use anyhow::Result;

pub use facts::{Address, HostFacts, Link, Mac, Neighbour, Route};
pub use monitor::Monitor;
use neighbours::Standing;
pub use probe::{Ability, Obstacle, tc_ebpf_support};

/// The host's network as the kernel tells it, in the network namespace in which this was opened.
pub struct Host {
    connection: netlink::Connection,
    follow: Follow,
    /// The ways out that the last facts were about, and who guarded them.
    ways: Ways,
    guarded: BTreeMap<u32, String>,
}

/// Whether the way from a route to its next hop is followed: the next hop's link-layer address, and who looks at packets
/// before they get there. The TC program wants to know; for a socket, the kernel sees to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Follow {
    /// No.
    #[default]
    Nothing,
    /// Yes, and the kernel is kept looking for next hops in other namespaces of this host. Those elsewhere are looked for
    /// by the traffic itself.
    Ways,
    /// Yes, and the kernel is kept looking for all next hops, because the traffic does not do it.
    WaysAndNeighbours,
}

/// The next hops of a set of routes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ways {
    /// Interface and next hop.
    pub hops: BTreeSet<(u32, IpAddr)>,
    /// Those of the interfaces that lead into other namespaces, pods usually.
    pub links: BTreeSet<u32>,
}

impl Host {
    /// Opens the connection to the kernel, in the network namespace of the calling thread. Needs no privileges.
    ///
    /// # Errors
    /// When the kernel refuses a netlink socket.
    pub fn open() -> Result<Self> {
        let connection = netlink::Connection::open()?;
        Ok(Self { connection, follow: Follow::Nothing, ways: Ways::default(), guarded: BTreeMap::new() })
    }

    /// Sets what facts to come are to hold beside the routes.
    pub fn follow(&mut self, follow: Follow) {
        self.follow = follow;
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
        let mut facts = HostFacts { links, addresses: own, default_route_links, routes, ..HostFacts::default() };
        if self.follow != Follow::Nothing {
            self.follow_ways(&mut facts)?;
        }
        Ok(facts)
    }

    /// The ways that the last facts were about, for [`Monitor::watch`].
    #[must_use]
    pub fn ways(&self) -> &Ways {
        &self.ways
    }

    fn follow_ways(&mut self, facts: &mut HostFacts) -> Result<()> {
        self.ways = Ways::of(facts);
        let mut seen = neighbours::list(&mut self.connection, &self.ways.hops)?;
        let known: BTreeSet<_> = seen.iter().filter(|seen| seen.mac.is_some()).map(|seen| seen.hop).collect();
        let unknown: BTreeSet<_> = self.looked_for().difference(&known).copied().collect();
        if !unknown.is_empty() {
            neighbours::remind(&mut self.connection, &unknown, &seen)?;
            // One on this very host has answered by now; of others the monitor will tell.
            seen = neighbours::list(&mut self.connection, &self.ways.hops)?;
        }
        facts.neighbours = neighbours::known(&seen);
        facts.guarded = self.find_guards(facts);
        self.guarded.clone_from(&facts.guarded);
        Ok(())
    }

    /// The next hops that the kernel would forget if nobody reminded it.
    fn looked_for(&self) -> BTreeSet<(u32, IpAddr)> {
        let all = self.follow == Follow::WaysAndNeighbours;
        self.ways.hops.iter().filter(|(link, _)| all || self.ways.links.contains(link)).copied().collect()
    }

    fn find_guards(&mut self, facts: &HostFacts) -> BTreeMap<u32, String> {
        let links: Vec<&Link> = self.ways.links.iter().filter_map(|&index| facts.link(index)).collect();
        guards::find(&mut self.connection, &links)
    }

    /// To be called every few seconds: has the kernel check up on the neighbours that no traffic of its own reminds it of,
    /// and looks for what it does not announce. True if the facts have changed: then take them anew.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn tend(&mut self) -> Result<bool> {
        if self.follow == Follow::Nothing || self.ways.hops.is_empty() {
            return Ok(false);
        }
        let hops = self.looked_for();
        let seen = neighbours::list(&mut self.connection, &hops)?;
        neighbours::remind(&mut self.connection, &hops, &seen)?;
        if self.ways.links.is_empty() {
            return Ok(false);
        }
        let links = links::list(&mut self.connection)?;
        let links = links.into_iter().map(|seen| seen.link).collect();
        let facts = HostFacts { links, ..HostFacts::default() };
        Ok(self.find_guards(&facts) != self.guarded)
    }
}

impl Host {
    /// Has the kernel look for these neighbours, as it would if there were a packet for each. That takes `CAP_NET_ADMIN`;
    /// without it nothing happens. [`Host::standings`] tells what has come of it: after three seconds of silence the kernel
    /// gives up.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn look_for(&mut self, hops: &BTreeSet<(u32, IpAddr)>) -> Result<()> {
        let seen = neighbours::list(&mut self.connection, hops)?;
        neighbours::remind(&mut self.connection, hops, &seen)
    }

    /// How far the kernel has got with finding these neighbours; those it has not heard of are not there.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn standings(&mut self, hops: &BTreeSet<(u32, IpAddr)>) -> Result<BTreeMap<(u32, IpAddr), Standing>> {
        let seen = neighbours::list(&mut self.connection, hops)?;
        Ok(seen.into_iter().map(|seen| (seen.hop, seen.standing)).collect())
    }

    /// Whether the host's stack would take a packet to `destination`, one of its own addresses, that comes in from
    /// `sender` by this link: source validation (`rp_filter`) may refuse it.
    ///
    /// # Errors
    /// When the kernel cannot be asked; inside, its refusal.
    pub fn accepts(&mut self, sender: IpAddr, link: u32, destination: IpAddr) -> Result<io::Result<()>> {
        routes::accepts(&mut self.connection, sender, link, destination)
    }
}

impl Ways {
    /// True if a way goes out of this interface. It need not lead into another namespace as things are: that may be
    /// about to change, as when a queue is taken away.
    #[must_use]
    pub fn pass(&self, link: u32) -> bool {
        let least = (link, IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED));
        self.hops.range(least..).next().is_some_and(|hop| hop.0 == link)
    }

    /// The ways that these facts' routes take.
    fn of(facts: &HostFacts) -> Ways {
        let hops: BTreeSet<_> = facts
            .routes
            .values()
            .filter_map(|route| match route {
                Route::Via { link, next_hop, .. } => Some((*link, *next_hop)),
                _ => None,
            })
            .filter(|&(link, _)| facts.link(link).is_some_and(|link| link.ethernet))
            .collect();
        let leads = |link: u32| facts.link(link).is_some_and(|link| link.into_namespace);
        let links = hops.iter().map(|&(link, _)| link).filter(|&link| leads(link)).collect();
        Ways { hops, links }
    }
}
