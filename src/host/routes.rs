//! Routes: the default routes, and the route to each of a set of addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use netlink_packet_core::{Emitable, parse_ip, parse_u16, parse_u32};
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteType, RouteVia};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::facts::Route;
use super::links;
use super::netlink::{NetlinkSocket, after_header, attributes};

const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_METRICS: u16 = 8;
const RTA_MULTIPATH: u16 = 9;
const RTA_TABLE: u16 = 15;
const RTA_VIA: u16 = 18;
const RTA_ENCAP: u16 = 22;
const RTAX_MTU: u16 = 2;

/// Bytes of `struct rtnexthop`, which starts each next hop of a multipath route.
const NEXT_HOP_HEADER: usize = 8;

/// A default route, out of one or more interfaces.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct DefaultRoute {
    metric: u32,
    links: Vec<u32>,
}

/// Indices of the interfaces that carry a default route of the main table, IPv4 or IPv6, best metric first, each once.
///
/// A default route through a next-hop object is included only if `net.ipv4.nexthop_compat_mode` is on, which is the default:
/// then the kernel also lists its interface.
///
/// # Errors
/// When netlink fails.
pub(super) fn default_links(socket: &mut NetlinkSocket) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        // Since Linux 4.20, the kernel then lists this table only.
        request.header.table = RouteHeader::RT_TABLE_MAIN;
        match socket.dump("routes", &RouteNetlinkMessage::GetRoute(request), read_default) {
            Ok(routes) => found.extend(routes),
            // The main table does not exist before its first route.
            Err(error) if errno(&error) == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    found.sort_by_key(|route| route.metric);
    let mut seen = BTreeSet::new();
    Ok(found.into_iter().flat_map(|route| route.links).filter(|&link| seen.insert(link)).collect())
}

/// For each address, where the kernel would send a packet of this host.
///
/// # Errors
/// When netlink fails. A missing route is no error.
pub(super) fn look_up(
    socket: &mut NetlinkSocket,
    addresses: &BTreeSet<IpAddr>,
    links: &[links::ObservedLink],
) -> Result<BTreeMap<IpAddr, Route>> {
    let links: BTreeMap<u32, &links::ObservedLink> = links.iter().map(|seen| (seen.link.index, seen)).collect();
    let mut routes = BTreeMap::new();
    let mut requested = Vec::with_capacity(addresses.len());
    for &address in addresses {
        if matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()) {
            let reason = "a link-local address needs an interface, which a downstream cannot name".to_owned();
            routes.insert(address, Route::Unreachable { reason });
        } else {
            requested.push(address);
        }
    }
    let requests: Vec<_> = requested.iter().map(|&address| request_for(address)).collect();
    socket
        .query(&requests, |index, reply| {
            let address = requested[index];
            let route = match reply {
                Ok(payload) => read_route(payload, address, &links)?,
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::ENOBUFS)) => bail!(error),
                Err(error) => Route::Unreachable { reason: refusal(&error) },
            };
            routes.insert(address, route);
            Ok(())
        })
        .context("cannot read the routes to the downstreams")?;
    Ok(routes)
}

/// The request for the route to `address`.
pub(super) fn request_for(address: IpAddr) -> RouteNetlinkMessage {
    let mut request = RouteMessage::default();
    (request.header.address_family, request.header.destination_prefix_length) = match address {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    request.attributes.push(RouteAttribute::Destination(address.into()));
    RouteNetlinkMessage::GetRoute(request)
}

/// Requests the route for a packet from `sender` that arrives on `link`. The kernel refuses if source validation would.
pub(super) fn validate_source(
    socket: &mut NetlinkSocket,
    sender: IpAddr,
    link: u32,
    destination: IpAddr,
) -> Result<io::Result<()>> {
    let RouteNetlinkMessage::GetRoute(mut request) = request_for(destination) else {
        bail!("not a route request");
    };
    request.header.source_prefix_length = request.header.destination_prefix_length;
    request.attributes.push(RouteAttribute::Source(sender.into()));
    request.attributes.push(RouteAttribute::Iif(link));
    let mut outcome = Ok(());
    socket.query(&[RouteNetlinkMessage::GetRoute(request)], |_, reply| {
        outcome = reply.map(drop);
        Ok(())
    })?;
    Ok(outcome)
}

/// The kernel's error, with an explanation of the two that mislead.
fn refusal(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EINVAL) => format!("{error}: the kernel's error for a blackhole route"),
        Some(libc::EACCES) => format!("{error}: the kernel's error for a prohibit route or rule"),
        _ => error.to_string(),
    }
}

/// Reads the payload of the `RTM_NEWROUTE` that replies to the request for `destination`.
pub(super) fn read_route(
    payload: &[u8],
    destination: IpAddr,
    links: &BTreeMap<u32, &links::ObservedLink>,
) -> Result<Route> {
    let header = RouteHeader::parse(payload)?;
    let (mut link, mut next_hop, mut mtu, mut encapsulated) = (None, destination, None, false);
    for attribute in attributes(after_header(payload, header.buffer_len())?) {
        let (kind, value) = attribute?;
        match kind {
            RTA_OIF => link = Some(parse_u32(value)?),
            RTA_GATEWAY => next_hop = parse_ip(value)?,
            RTA_VIA => match RouteVia::parse(value)? {
                RouteVia::Inet(address) => next_hop = address.into(),
                RouteVia::Inet6(address) => next_hop = address.into(),
                other => {
                    return Ok(Route::Unreachable { reason: format!("its gateway is not an IP address: {other:?}") });
                }
            },
            RTA_METRICS => mtu = metric_mtu(value)?,
            RTA_ENCAP => encapsulated = true,
            _ => {}
        }
    }
    let unreachable = |reason: &str| Ok(Route::Unreachable { reason: reason.to_owned() });
    match header.kind {
        RouteType::Unicast | RouteType::Multicast => {}
        RouteType::Local | RouteType::Anycast => return Ok(Route::Local { loopback: destination.is_loopback() }),
        RouteType::Broadcast => return unreachable("it is a broadcast address"),
        RouteType::BlackHole => return unreachable("a blackhole route"),
        RouteType::Unreachable => return unreachable("an unreachable route"),
        RouteType::Prohibit => return unreachable("a prohibit route"),
        other => return Ok(Route::Unreachable { reason: format!("a route of type {other:?}") }),
    }
    let Some(link) = link else {
        return unreachable("a route without an interface");
    };
    let Some(out) = links.get(&link) else {
        // Created after the interfaces were listed. The monitor reports it, and the facts are collected again.
        return Ok(Route::Unreachable { reason: format!("interface {link} was created a moment ago") });
    };
    if encapsulated || out.routed_tunnel {
        return Ok(Route::Encapsulated { link });
    }
    Ok(Route::Via { link, next_hop, mtu: mtu.unwrap_or(out.link.mtu) })
}

fn metric_mtu(metrics: &[u8]) -> Result<Option<u32>> {
    for attribute in attributes(metrics) {
        let (kind, value) = attribute?;
        if kind == RTAX_MTU {
            return Ok(Some(parse_u32(value)?));
        }
    }
    Ok(None)
}

/// Reads the payload of an `RTM_NEWROUTE` of a dump. None unless it is a default route of the main table.
pub(super) fn read_default(payload: &[u8]) -> Result<Option<DefaultRoute>> {
    let header = RouteHeader::parse(payload)?;
    let ip = matches!(header.address_family, AddressFamily::Inet | AddressFamily::Inet6);
    if !ip || header.destination_prefix_length != 0 || header.kind != RouteType::Unicast {
        return Ok(None);
    }
    let mut route = DefaultRoute { metric: 0, links: Vec::new() };
    let mut table = u32::from(header.table);
    for attribute in attributes(after_header(payload, header.buffer_len())?) {
        let (kind, value) = attribute?;
        match kind {
            RTA_OIF => route.links.push(parse_u32(value)?),
            RTA_MULTIPATH => route.links.extend(next_hop_links(value)?),
            RTA_PRIORITY => route.metric = parse_u32(value)?,
            RTA_TABLE => table = parse_u32(value)?,
            _ => {}
        }
    }
    let main = table == u32::from(RouteHeader::RT_TABLE_MAIN);
    Ok((main && !route.links.is_empty()).then_some(route))
}

/// The interfaces of a multipath route's next hops.
fn next_hop_links(mut bytes: &[u8]) -> Result<Vec<u32>> {
    let mut links = Vec::new();
    while bytes.len() >= NEXT_HOP_HEADER {
        let length = usize::from(parse_u16(&bytes[..2])?);
        if length < NEXT_HOP_HEADER {
            bail!("a next hop of {length} bytes, shorter than its header");
        }
        links.push(parse_u32(&bytes[4..NEXT_HOP_HEADER])?);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(links)
}

fn errno(error: &anyhow::Error) -> Option<i32> {
    error.chain().find_map(|cause| cause.downcast_ref::<io::Error>()?.raw_os_error())
}

/// True for the payload of a route message about the kernel's cache, such as a learned path MTU, not about a table.
pub(super) fn is_cached(payload: &[u8]) -> bool {
    RouteHeader::parse(payload).is_ok_and(|header| header.flags.contains(RouteFlags::Cloned))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::facts::Link;
    use netlink_packet_core::DefaultNla;
    use netlink_packet_route::route::{RouteMetric, RouteNextHop};
    use proptest::prelude::*;

    const DESTINATION: &str = "10.9.0.7";

    fn bytes(message: &RouteMessage) -> Vec<u8> {
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        bytes
    }

    fn message(kind: RouteType, attributes: Vec<RouteAttribute>) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.header.destination_prefix_length = 32;
        message.header.kind = kind;
        message.attributes = attributes;
        message
    }

    /// Link 3 is an Ethernet link, link 4 a tunnel without a remote address.
    fn route(kind: RouteType, attributes: Vec<RouteAttribute>) -> Route {
        let link = |index| links::ObservedLink {
            link: Link {
                index,
                name: format!("link{index}"),
                up: true,
                ethernet: index == 3,
                mtu: 1500,
                ..Link::default()
            },
            routed_tunnel: index == 4,
        };
        let (ethernet, tunnel) = (link(3), link(4));
        let links = BTreeMap::from([(3, &ethernet), (4, &tunnel)]);
        read_route(&bytes(&message(kind, attributes)), DESTINATION.parse().unwrap(), &links).unwrap()
    }

    fn via(next_hop: &str, mtu: u32) -> Route {
        Route::Via { link: 3, next_hop: next_hop.parse().unwrap(), mtu }
    }

    #[test]
    fn the_next_hop_is_the_destination_or_a_gateway_of_either_family() {
        let out = RouteAttribute::Oif(3);
        let gateway = RouteAttribute::Gateway("10.0.0.1".parse::<IpAddr>().unwrap().into());
        let gateway6 = RouteAttribute::Via("fe80::1".parse::<IpAddr>().unwrap().into());
        assert_eq!(route(RouteType::Unicast, vec![out.clone()]), via(DESTINATION, 1500));
        assert_eq!(route(RouteType::Unicast, vec![out.clone(), gateway]), via("10.0.0.1", 1500));
        assert_eq!(route(RouteType::Unicast, vec![out, gateway6]), via("fe80::1", 1500));
    }

    #[test]
    fn a_routes_own_mtu_overrides_the_links() {
        let metrics = RouteAttribute::Metrics(vec![RouteMetric::Advmss(1340), RouteMetric::Mtu(1380)]);
        assert_eq!(route(RouteType::Unicast, vec![RouteAttribute::Oif(3), metrics]), via(DESTINATION, 1380));
    }

    #[test]
    fn an_encapsulating_route_has_no_next_hop() {
        let encap = RouteAttribute::Other(DefaultNla::new(RTA_ENCAP, vec![0; 8]));
        assert_eq!(route(RouteType::Unicast, vec![RouteAttribute::Oif(3), encap]), Route::Encapsulated { link: 3 });
        assert_eq!(route(RouteType::Unicast, vec![RouteAttribute::Oif(4)]), Route::Encapsulated { link: 4 });
    }

    #[test]
    fn routes_that_lead_nowhere_say_why() {
        for kind in [
            RouteType::BlackHole,
            RouteType::Unreachable,
            RouteType::Prohibit,
            RouteType::Broadcast,
            RouteType::Throw,
            RouteType::Other(77),
        ] {
            let found = route(kind, vec![RouteAttribute::Oif(3)]);
            assert!(matches!(&found, Route::Unreachable { reason } if !reason.is_empty()), "{kind:?}: {found:?}");
        }
        for attributes in [vec![], vec![RouteAttribute::Oif(99)]] {
            assert!(matches!(route(RouteType::Unicast, attributes), Route::Unreachable { .. }));
        }
    }

    #[test]
    fn an_address_of_the_host_is_local() {
        assert_eq!(route(RouteType::Local, vec![RouteAttribute::Oif(1)]), Route::Local { loopback: false });
        for (address, loopback) in [("127.0.0.53", true), ("::1", true), ("::2", false)] {
            let answer = bytes(&message(RouteType::Local, vec![]));
            let found = read_route(&answer, address.parse().unwrap(), &BTreeMap::new()).unwrap();
            assert_eq!(found, Route::Local { loopback }, "{address}");
        }
    }

    fn default_route(table: u8, attributes: Vec<RouteAttribute>) -> Option<DefaultRoute> {
        let mut message = message(RouteType::Unicast, attributes);
        message.header.destination_prefix_length = 0;
        message.header.table = table;
        read_default(&bytes(&message)).unwrap()
    }

    #[test]
    fn default_routes_are_those_of_the_main_table() {
        let attributes = vec![RouteAttribute::Oif(3), RouteAttribute::Priority(100)];
        let expected = Some(DefaultRoute { metric: 100, links: vec![3] });
        assert_eq!(default_route(RouteHeader::RT_TABLE_MAIN, attributes.clone()), expected);
        assert_eq!(default_route(100, attributes.clone()), None);
        // An attribute holds a table's number above 255, and the header RT_TABLE_COMPAT.
        let beyond = [attributes.clone(), vec![RouteAttribute::Table(5000)]].concat();
        assert_eq!(default_route(252, beyond), None);
        let prefix = message(RouteType::Unicast, attributes);
        assert_eq!(read_default(&bytes(&prefix)).unwrap(), None);
    }

    #[test]
    fn a_multipath_default_route_has_several_links() {
        let hop = |link| {
            let mut hop = RouteNextHop::default();
            hop.interface_index = link;
            hop.attributes = vec![RouteAttribute::Gateway("10.0.0.1".parse::<IpAddr>().unwrap().into())];
            hop
        };
        let paths = RouteAttribute::MultiPath(vec![hop(3), hop(5)]);
        let expected = Some(DefaultRoute { metric: 0, links: vec![3, 5] });
        assert_eq!(default_route(RouteHeader::RT_TABLE_MAIN, vec![paths]), expected);
    }

    #[test]
    fn cached_routes_are_recognised() {
        let mut message = message(RouteType::Unicast, vec![]);
        assert!(!is_cached(&bytes(&message)));
        message.header.flags = RouteFlags::Cloned;
        assert!(is_cached(&bytes(&message)));
    }

    #[test]
    fn the_kernels_misleading_errors_are_explained() {
        assert!(refusal(&io::Error::from_raw_os_error(libc::EINVAL)).contains("blackhole"));
        assert!(refusal(&io::Error::from_raw_os_error(libc::EACCES)).contains("prohibit"));
        let plain = refusal(&io::Error::from_raw_os_error(libc::ENETUNREACH));
        assert_eq!(plain, "Network is unreachable (os error 101)");
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_readers_panic(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = read_route(&bytes, DESTINATION.parse().unwrap(), &BTreeMap::new());
            let _ = read_default(&bytes);
            let _ = next_hop_links(&bytes);
            let _ = is_cached(&bytes);
        }
    }
}
