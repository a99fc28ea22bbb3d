//! Plain values that describe a host. The netlink readers beside this file make them; tests write them by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::Serialize;

/// The link-layer address of an Ethernet device.
pub type Mac = [u8; 6];

/// A neighbour that packets are handed to: the interface's index and the neighbour's IP address.
pub type NextHop = (u32, IpAddr);

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Link {
    /// Unique within the network namespace.
    pub index: u32,
    /// Such as `eth0`.
    pub name: String,
    /// The driver (`IFLA_INFO_KIND`: `veth`, `vlan`, `wireguard` …). None for hardware.
    pub kind: Option<String>,
    /// Administratively up.
    pub up: bool,
    /// Administratively up, and has a carrier: a cable, or a peer that is up.
    pub running: bool,
    /// Carries Ethernet frames.
    pub ethernet: bool,
    /// Its own link-layer address. None unless it carries Ethernet frames.
    pub mac: Option<Mac>,
    /// A layer-3 device: transmits IP packets without a link-layer header (tun, WireGuard, IP tunnels).
    pub l3_device: bool,
    /// Received packets begin with the IP header (tun, WireGuard). False for the kernel's own IP tunnels, which may leave the
    /// outer header in front of it.
    pub l3_ingress: bool,
    /// Leads directly into another network namespace, as most CNI plugins connect pods: one end of a pair (veth, netkit) whose
    /// peer is in another namespace, both up, not enslaved to a bridge, and without a queueing discipline.
    pub direct_peer: bool,
    /// Is the loopback interface.
    pub loopback: bool,
    /// The largest IP packet it transmits, in bytes.
    pub mtu: u32,
}

/// An address of this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostAddress {
    /// The index of the interface that has it.
    pub link: u32,
    /// IPv4 or IPv6.
    pub address: IpAddr,
}

/// A neighbour whose link-layer address the kernel knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Neighbour {
    /// The interface's index.
    pub link: u32,
    /// Its IP address.
    pub address: IpAddr,
    /// Its link-layer address.
    pub mac: Mac,
}

/// Where the kernel would send a packet to some address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Route {
    /// The address is one of this host's.
    Local {
        /// True for loopback addresses. The kernel does not deliver packets from outside to them.
        loopback: bool,
    },
    /// Out of an interface.
    Via {
        /// The interface's index.
        link: u32,
        /// The router, or the destination itself if it is on the link.
        next_hop: IpAddr,
        /// The largest IP packet for this route, in bytes.
        mtu: u32,
    },
    /// Out of an interface, with an outer header that the route defines (MPLS, SRv6, or a tunnel without a remote address, as
    /// some CNI plugins use). Only the host's stack can add it.
    Encapsulated {
        /// The interface's index.
        link: u32,
    },
    /// There is no route, or one that rejects packets.
    Unreachable {
        /// Such as `Network is unreachable (os error 101)`.
        reason: String,
    },
}

/// The host's network at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct HostFacts {
    /// All interfaces, ordered by index.
    pub links: Vec<Link>,
    /// All addresses of the host, ordered by interface.
    pub addresses: Vec<HostAddress>,
    /// Indices of the interfaces that carry a default route (IPv4 or IPv6), best metric first.
    pub default_route_links: Vec<u32>,
    /// For each requested address, where the kernel would send a packet.
    pub routes: BTreeMap<IpAddr, Route>,
    /// Next hops of those routes whose link-layer addresses the kernel knows, ordered by link and address. Empty unless next
    /// hops are tracked (`HostNetwork::track_next_hops`).
    pub neighbours: Vec<Neighbour>,
    /// Of the interfaces that those routes use and that lead directly into another namespace: by index, the program, filter
    /// or chain that packets pass on egress, in words. Empty unless next hops are tracked.
    pub egress_hooks: BTreeMap<u32, String>,
}

impl HostFacts {
    /// The interface with this name.
    #[must_use]
    pub fn link_named(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }

    /// The interface with this index.
    #[must_use]
    pub fn link(&self, index: u32) -> Option<&Link> {
        self.links.binary_search_by_key(&index, |link| link.index).ok().map(|place| &self.links[place])
    }

    /// The link-layer address of a neighbour. None while the kernel does not know it.
    #[must_use]
    pub fn neighbour(&self, link: u32, address: IpAddr) -> Option<Mac> {
        let found = self.neighbours.binary_search_by_key(&(link, address), |seen| (seen.link, seen.address));
        found.ok().map(|place| self.neighbours[place].mac)
    }

    /// True if packets may be redirected to this interface's peer (`bpf_redirect_peer`), because nothing on this end would
    /// queue, filter or inspect them.
    #[must_use]
    pub fn can_redirect_to_peer(&self, link: u32) -> bool {
        self.link(link).is_some_and(|link| link.direct_peer) && !self.has_egress_hook(link)
    }

    /// True if a program, filter or chain sees packets on this interface's egress.
    #[must_use]
    pub fn has_egress_hook(&self, link: u32) -> bool {
        self.egress_hooks.contains_key(&link)
    }

    /// The addresses, of those with a route both now and later, whose path has changed so that they may have become
    /// unreachable or reachable: the interface, whether it is running, the next hop, or its link-layer address.
    #[must_use]
    pub fn changed_paths(&self, later: &HostFacts) -> Vec<IpAddr> {
        let (before, after) = (PathIndex::of(self), PathIndex::of(later));
        let both = self.routes.iter().filter_map(|(address, route)| Some((address, route, later.routes.get(address)?)));
        let changed = both.filter(|(_, route, later)| before.of_route(route) != after.of_route(later));
        changed.map(|(&address, ..)| address).collect()
    }
}

/// The facts that decide whether an address is reachable, by what routes refer to.
struct PathIndex {
    running: BTreeSet<u32>,
    macs: BTreeMap<NextHop, Mac>,
}

/// Of one route.
#[derive(PartialEq)]
enum PathState {
    Local,
    Out { link: u32, running: bool, next_hop: Option<IpAddr>, mac: Option<Mac> },
    Unreachable,
}

impl PathIndex {
    fn of(facts: &HostFacts) -> PathIndex {
        PathIndex {
            running: facts.links.iter().filter(|link| link.running).map(|link| link.index).collect(),
            macs: facts.neighbours.iter().map(|seen| ((seen.link, seen.address), seen.mac)).collect(),
        }
    }

    fn of_route(&self, route: &Route) -> PathState {
        match *route {
            Route::Local { .. } => PathState::Local,
            Route::Via { link, next_hop, .. } => {
                let mac = self.macs.get(&(link, next_hop)).copied();
                PathState::Out { link, running: self.running.contains(&link), next_hop: Some(next_hop), mac }
            }
            Route::Encapsulated { link } => {
                PathState::Out { link, running: self.running.contains(&link), next_hop: None, mac: None }
            }
            Route::Unreachable { .. } => PathState::Unreachable,
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
        let changed = facts().changed_paths(&later);
        assert_eq!(later.changed_paths(&facts()), changed, "the reverse is a change too");
        changed.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_path_changes_with_what_decides_whether_the_address_is_reachable() {
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
        // The MTU does not decide reachability, and a route must be known before and after.
        assert_eq!(changed(|facts| set(facts, via(2, "10.0.0.1", 900))), none);
        assert_eq!(changed(|facts| facts.links[0].mtu = 900), none);
        assert_eq!(changed(|facts| drop(facts.routes.remove(&"10.8.0.1".parse().unwrap()))), none);
    }
}
