//! The plain values that describe a host. Made by the netlink code beside this file, or by hand in tests.

use std::collections::BTreeMap;
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
    /// Carries Ethernet frames.
    pub ethernet: bool,
    /// Its own link-layer address, if it carries Ethernet frames.
    pub mac: Option<Mac>,
    /// Carries IP packets with no link-layer header in front (tun, WireGuard, IP tunnels).
    pub bare: bool,
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
}
