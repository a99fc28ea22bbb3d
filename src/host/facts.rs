//! The plain values that describe a host. Made by the netlink code beside this file, or by hand in tests.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Serialize;

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
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
        self.links.iter().find(|link| link.index == index)
    }
}
