//! Facts about this host: links, addresses, routes, neighbours, and what the kernel and our privileges allow.
//!
//! Nothing here decides anything. The event loop collects [`HostFacts`] through [`HostNetwork`], at start and whenever
//! [`HostMonitor`] reports a change, and hands them to the controller (`Event::Host`), which decides. So an interface that
//! disappears or returns is a netlink message in [`HostMonitor::drain`], then new facts, then a new plan.
//!
//! - [`links`], [`addresses`], [`routes`], [`neighbours`]: one reader for each kind of netlink object. [`netlink`] sends
//!   the requests and splits the replies.
//! - [`egress_hooks`]: programs and chains on the egress of a pod's interface, which a redirect to the peer would skip.
//! - [`preceding_programs`]: foreign programs that see an interface's packets before ours does.
//! - [`unix_sockets`]: abstract sockets, by which daemons claim interfaces.
//! - [`probe`]: kernel features and privileges, found once by [`HostFeatures::probe`] and judged by [`tc_ebpf_support`].

mod addresses;
pub mod decode;
mod egress_hooks;
pub mod facts;
pub mod filters;
mod links;
mod monitor;
pub mod neighbours;
mod netlink;
pub mod preceding_programs;
pub mod probe;
pub mod programs;
mod routes;
pub mod unix_sockets;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use anyhow::Result;

pub use facts::{HostAddress, HostFacts, Link, Mac, Neighbour, NextHop, Route};
pub use monitor::HostMonitor;
use neighbours::NeighbourResolution;
pub use probe::{HostFeatures, TcUnsupported, tc_ebpf_support};

/// The host's network as netlink describes it, in the network namespace in which this was opened.
pub struct HostNetwork {
    socket: netlink::NetlinkSocket,
    tracking: NextHopTracking,
}

/// Whether the facts include the next hops of routes: their link-layer addresses, and the egress hooks before them. The TC
/// program needs both. For a socket, the kernel resolves the neighbour itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NextHopTracking {
    /// No.
    #[default]
    Off,
    /// Yes. The kernel is kept resolving next hops in other namespaces of this host; traffic makes it resolve the others.
    ResolvePods,
    /// Yes. The kernel is kept resolving all next hops, because the traffic does not make it.
    ResolveAll,
}

/// The next hops of a set of routes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NextHops {
    /// All next hops on Ethernet links.
    pub hops: BTreeSet<NextHop>,
    /// Those of their interfaces that lead directly into another namespace, usually a pod's.
    pub pod_links: BTreeSet<u32>,
}

impl HostNetwork {
    /// Opens the netlink socket, in the network namespace of the calling thread. Needs no privileges.
    ///
    /// # Errors
    /// When the kernel refuses a netlink socket.
    pub fn open() -> Result<Self> {
        Ok(Self { socket: netlink::NetlinkSocket::open()?, tracking: NextHopTracking::Off })
    }

    /// Sets what [`HostNetwork::facts`] collects about next hops from now on.
    pub fn track_next_hops(&mut self, tracking: NextHopTracking) {
        self.tracking = tracking;
    }

    /// Collects all facts, with the routes to `addresses`. A route is the one that a packet of this host would take; for
    /// multipath routes, the path of one flow.
    ///
    /// The parts are read one after the other. If the host changes in between, they may disagree until [`HostMonitor`]
    /// reports that change and the facts are collected again.
    ///
    /// # Errors
    /// When netlink fails, or the host changes during every attempt to list something. An address without a route is no
    /// error but a fact ([`Route::Unreachable`]).
    pub fn facts(&mut self, addresses: &BTreeSet<IpAddr>) -> Result<HostFacts> {
        let links = links::list(&mut self.socket)?;
        let own = addresses::list(&mut self.socket)?;
        let default_route_links = routes::default_links(&mut self.socket)?;
        let routes = routes::look_up(&mut self.socket, addresses, &links)?;
        let links = links.into_iter().map(|seen| seen.link).collect();
        let mut facts = HostFacts { links, addresses: own, default_route_links, routes, ..HostFacts::default() };
        if self.tracking != NextHopTracking::Off {
            self.collect_next_hops(&mut facts)?;
        }
        Ok(facts)
    }

    fn collect_next_hops(&mut self, facts: &mut HostFacts) -> Result<()> {
        let next_hops = NextHops::of(facts);
        let mut seen = neighbours::list(&mut self.socket, &next_hops.hops)?;
        let known: BTreeSet<_> = seen.iter().filter(|seen| seen.mac.is_some()).map(|seen| seen.hop).collect();
        let unknown: BTreeSet<_> = self.hops_to_resolve(&next_hops).difference(&known).copied().collect();
        if !unknown.is_empty() {
            neighbours::request_resolution(&mut self.socket, &unknown, &seen)?;
            // A neighbour on this host has replied by now. The monitor reports the replies of others.
            seen = neighbours::list(&mut self.socket, &next_hops.hops)?;
        }
        facts.neighbours = neighbours::known(&seen);
        facts.egress_hooks = self.find_egress_hooks(&next_hops, facts);
        Ok(())
    }

    /// The next hops that the kernel would forget without reminders.
    fn hops_to_resolve(&self, next_hops: &NextHops) -> BTreeSet<NextHop> {
        let all = self.tracking == NextHopTracking::ResolveAll;
        next_hops.hops.iter().filter(|(link, _)| all || next_hops.pod_links.contains(link)).copied().collect()
    }

    fn find_egress_hooks(&mut self, next_hops: &NextHops, facts: &HostFacts) -> BTreeMap<u32, String> {
        let links: Vec<&Link> = next_hops.pod_links.iter().filter_map(|&index| facts.link(index)).collect();
        egress_hooks::find(&mut self.socket, &links)
    }

    /// Keeps the next hops of these facts, the last ones collected, up to date. To be called every few seconds: makes the
    /// kernel resolve neighbours again that no traffic of its own reminds it of, and looks for egress hooks, which netlink
    /// does not announce. True if the facts have changed and must be collected again.
    ///
    /// # Errors
    /// When netlink fails.
    pub fn maintain(&mut self, facts: &HostFacts) -> Result<bool> {
        let next_hops = NextHops::of(facts);
        if self.tracking == NextHopTracking::Off || next_hops.hops.is_empty() {
            return Ok(false);
        }
        let hops = self.hops_to_resolve(&next_hops);
        let seen = neighbours::list(&mut self.socket, &hops)?;
        neighbours::request_resolution(&mut self.socket, &hops, &seen)?;
        if next_hops.pod_links.is_empty() {
            return Ok(false);
        }
        let links = links::list(&mut self.socket)?.into_iter().map(|seen| seen.link).collect();
        let now = HostFacts { links, ..HostFacts::default() };
        Ok(self.find_egress_hooks(&next_hops, &now) != facts.egress_hooks)
    }
}

impl HostNetwork {
    /// Makes the kernel resolve these neighbours, as if it had a packet for each. Needs `CAP_NET_ADMIN`; without it, nothing
    /// happens. [`HostNetwork::neighbour_resolution`] returns the result; the kernel gives up after three seconds.
    ///
    /// # Errors
    /// When netlink fails.
    pub fn resolve_neighbours(&mut self, hops: &BTreeSet<NextHop>) -> Result<()> {
        let seen = neighbours::list(&mut self.socket, hops)?;
        neighbours::request_resolution(&mut self.socket, hops, &seen)
    }

    /// How far the kernel is with resolving these neighbours. Those without an entry in its table are left out.
    ///
    /// # Errors
    /// When netlink fails.
    pub fn neighbour_resolution(&mut self, hops: &BTreeSet<NextHop>) -> Result<BTreeMap<NextHop, NeighbourResolution>> {
        let seen = neighbours::list(&mut self.socket, hops)?;
        Ok(seen.into_iter().map(|seen| (seen.hop, seen.resolution)).collect())
    }

    /// Whether the host's stack would accept a packet from `sender` to `destination`, one of its own addresses, that arrives
    /// on this link. Source validation (`rp_filter`) may refuse it.
    ///
    /// # Errors
    /// Outside, when netlink fails; inside, the kernel's reason for refusing the packet.
    pub fn validate_source(&mut self, sender: IpAddr, link: u32, destination: IpAddr) -> Result<io::Result<()>> {
        routes::validate_source(&mut self.socket, sender, link, destination)
    }
}

impl NextHops {
    /// The next hops of these facts' routes.
    #[must_use]
    pub fn of(facts: &HostFacts) -> NextHops {
        let hops: BTreeSet<_> = facts
            .routes
            .values()
            .filter_map(|route| match route {
                Route::Via { link, next_hop, .. } => Some((*link, *next_hop)),
                _ => None,
            })
            .filter(|&(link, _)| facts.link(link).is_some_and(|link| link.ethernet))
            .collect();
        let pod = |link: u32| facts.link(link).is_some_and(|link| link.direct_peer);
        let pod_links = hops.iter().map(|&(link, _)| link).filter(|&link| pod(link)).collect();
        NextHops { hops, pod_links }
    }

    /// True if one of the next hops is on this interface, whether or not it leads directly into another namespace now: a
    /// change may make it do so, such as the removal of a queueing discipline.
    #[must_use]
    pub fn use_link(&self, link: u32) -> bool {
        let least = (link, IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        self.hops.range(least..).next().is_some_and(|hop| hop.0 == link)
    }
}
