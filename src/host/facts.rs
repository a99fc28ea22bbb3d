//! The plain values that describe a host. Made by the netlink code beside this file, or by hand in tests.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::Serialize;

/// The link-layer address of an Ethernet device.
pub type Mac = [u8; 6];

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Link {
    /// The kernel's number for it, unique within the namespace.
    pub index: u32,
    /// Its name, such as `eth0`.
    pub name: String,
    /// The driver family that netlink names (`veth`, `vlan`, `wireguard` …); none for plain hardware.
    pub kind: Option<String>,
    /// Administratively up.
    pub up: bool,
    /// Administratively up, and with a carrier: a cable, or the other end of a pair that is up.
    pub running: bool,
    /// Carries Ethernet frames.
    pub ethernet: bool,
    /// Its own link-layer address, if it carries Ethernet frames.
    pub mac: Option<Mac>,
    /// Carries IP packets with no link-layer header in front (tun, WireGuard, IP tunnels).
    pub bare: bool,
    /// What comes in by it begins with the IP header (tun, WireGuard). Not so for the kernel's own IP tunnels, which may leave
    /// the outer header in front of it.
    pub headerless: bool,
    /// Nothing is between it and another network namespace: it is up, one end of a pair (veth, netkit) whose other end is
    /// there and up, belongs to no bridge, and its packets wait in no queue. So pods are connected by most plugins.
    pub into_namespace: bool,
    /// The loopback interface.
    pub loopback: bool,
    /// The largest IP packet it carries, in bytes.
    pub mtu: u32,
}

/// An address of this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Address {
    /// The interface that has it.
    pub link: u32,
    /// The address.
    pub address: IpAddr,
}

/// A neighbour whose link-layer address the kernel knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Neighbour {
    /// The interface it is reached by.
    pub link: u32,
    /// Its IP address.
    pub address: IpAddr,
    /// Its link-layer address.
    pub mac: Mac,
}

/// Where the kernel would send a packet for some address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Route {
    /// The address is this host's own.
    Local {
        /// True for loopback addresses, to which the kernel will not deliver a packet that came from outside.
        loopback: bool,
    },
    /// Out of an interface.
    Via {
        /// The interface's index.
        link: u32,
        /// The neighbour to hand it to: the router, or the destination itself when it is on the link.
        next_hop: IpAddr,
        /// The largest IP packet the route carries, in bytes.
        mtu: u32,
    },
    /// Out of an interface, wrapped into another header that the route fills in (MPLS, SRv6, a tunnel without a far end
    /// of its own, as some CNIs use). Only the host's stack can do that.
    Encapsulated {
        /// The interface's index.
        link: u32,
    },
    /// The kernel has no route, or one that refuses.
    Unreachable {
        /// The kernel's words, such as `Network is unreachable (os error 101)`.
        reason: String,
    },
}

/// What is known about the host at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct HostFacts {
    /// All interfaces, ordered by index.
    pub links: Vec<Link>,
    /// All addresses of the host, ordered by interface.
    pub addresses: Vec<Address>,
    /// Indices of the interfaces that carry a default route (IPv4 or IPv6), best metric first.
    pub default_route_links: Vec<u32>,
    /// For each downstream address asked about, where the kernel would send to.
    pub routes: BTreeMap<IpAddr, Route>,
    /// The next hops of those routes whose link-layer addresses the kernel knows, ordered by link and address; only if
    /// asked for.
    pub neighbours: Vec<Neighbour>,
    /// Of the interfaces that lead into other namespaces and that those routes use: the ones on whose way out somebody
    /// looks at packets, and who. Only if asked for.
    pub guarded: BTreeMap<u32, String>,
}

impl HostFacts {
    /// The interface of this name.
    #[must_use]
    pub fn link_named(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }

    /// The interface of this index.
    #[must_use]
    pub fn link(&self, index: u32) -> Option<&Link> {
        self.links.binary_search_by_key(&index, |link| link.index).ok().map(|place| &self.links[place])
    }

    /// The link-layer address of a neighbour, if the kernel knows it.
    #[must_use]
    pub fn neighbour(&self, link: u32, address: IpAddr) -> Option<Mac> {
        let found = self.neighbours.binary_search_by_key(&(link, address), |seen| (seen.link, seen.address));
        found.ok().map(|place| self.neighbours[place].mac)
    }

    /// True if a packet may be handed straight to the other end of this interface's pair: nothing on this end would
    /// queue it, hold it back or look at it.
    #[must_use]
    pub fn straight_into_namespace(&self, link: u32) -> bool {
        self.link(link).is_some_and(|link| link.into_namespace) && !self.guarded.contains_key(&link)
    }

    /// Of the addresses whose routes are known both now and later: those on the way to which something has changed that
    /// may mean that they can no longer be reached, or can be again. That is the interface, whether it runs, the next hop
    /// and its link-layer address.
    #[must_use]
    pub fn changed_ways(&self, later: &HostFacts) -> Vec<IpAddr> {
        let (before, after) = (Ways::of(self), Ways::of(later));
        let both = self.routes.iter().filter_map(|(address, route)| Some((address, route, later.routes.get(address)?)));
        let changed = both.filter(|(_, route, later)| before.of_route(route) != after.of_route(later));
        changed.map(|(&address, ..)| address).collect()
    }
}

/// What matters of the ways to downstreams, by what routes name.
struct Ways {
    running: BTreeSet<u32>,
    macs: BTreeMap<(u32, IpAddr), Mac>,
}

/// What matters of one.
#[derive(PartialEq)]
enum Way {
    Local,
    Out { link: u32, running: bool, next_hop: Option<IpAddr>, mac: Option<Mac> },
    Unreachable,
}

impl Ways {
    fn of(facts: &HostFacts) -> Ways {
        Ways {
            running: facts.links.iter().filter(|link| link.running).map(|link| link.index).collect(),
            macs: facts.neighbours.iter().map(|seen| ((seen.link, seen.address), seen.mac)).collect(),
        }
    }

    fn of_route(&self, route: &Route) -> Way {
        match *route {
            Route::Local { .. } => Way::Local,
            Route::Via { link, next_hop, .. } => {
                let mac = self.macs.get(&(link, next_hop)).copied();
                Way::Out { link, running: self.running.contains(&link), next_hop: Some(next_hop), mac }
            }
            Route::Encapsulated { link } => {
                Way::Out { link, running: self.running.contains(&link), next_hop: None, mac: None }
            }
            Route::Unreachable { .. } => Way::Unreachable,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> HostFacts {
        let link = |index| Link { index, up: true, running: true, ..Link::default() };
        let via = |link, next_hop: &str| Route::Via { link, next_hop: next_hop.parse().unwrap(), mtu: 1500 };
        let routes = [
            ("10.0.0.1", via(2, "10.0.0.1")),
            ("10.9.0.1", via(3, "10.1.0.9")),
            ("10.9.0.2", via(3, "10.1.0.9")),
            ("10.8.0.1", Route::Unreachable { reason: "none".into() }),
            ("127.0.0.1", Route::Local { loopback: true }),
        ];
        let routes = routes.into_iter().map(|(address, route)| (address.parse().unwrap(), route)).collect();
        let neighbours = vec![Neighbour { link: 3, address: "10.1.0.9".parse().unwrap(), mac: [2; 6] }];
        HostFacts { links: vec![link(2), link(3)], routes, neighbours, ..HostFacts::default() }
    }

    fn changed(change: impl FnOnce(&mut HostFacts)) -> Vec<String> {
        let mut later = facts();
        change(&mut later);
        let changed = facts().changed_ways(&later);
        assert_eq!(later.changed_ways(&facts()), changed, "back again is as much of a change");
        changed.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_may_reach_or_not_reach_an_address_changes_the_way_to_it() {
        let via = |link, next_hop: &str, mtu| Route::Via { link, next_hop: next_hop.parse().unwrap(), mtu };
        let set = |facts: &mut HostFacts, route| drop(facts.routes.insert("10.0.0.1".parse().unwrap(), route));
        let none: [&str; 0] = [];
        assert_eq!(changed(|_| {}), none);
        assert_eq!(changed(|facts| facts.links[0].running = false), ["10.0.0.1"]);
        assert_eq!(changed(|facts| facts.links.truncate(1)), ["10.9.0.1", "10.9.0.2"]);
        assert_eq!(changed(|facts| facts.neighbours.clear()), ["10.9.0.1", "10.9.0.2"]);
        assert_eq!(changed(|facts| facts.neighbours[0].mac = [4; 6]), ["10.9.0.1", "10.9.0.2"]);
        assert_eq!(changed(|facts| set(facts, via(2, "10.0.0.254", 1500))), ["10.0.0.1"]);
        assert_eq!(changed(|facts| set(facts, Route::Unreachable { reason: "gone".into() })), ["10.0.0.1"]);
        // What does not decide about reaching it, and what is about nobody known before.
        assert_eq!(changed(|facts| set(facts, via(2, "10.0.0.1", 900))), none);
        assert_eq!(changed(|facts| facts.links[0].mtu = 900), none);
        assert_eq!(changed(|facts| drop(facts.routes.remove(&"10.8.0.1".parse().unwrap()))), none);
    }
}
