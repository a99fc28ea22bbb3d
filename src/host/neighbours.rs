//! The kernel's neighbour table (ARP and neighbour discovery): reads link-layer addresses from it, and makes the kernel
//! resolve them.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Context, Result};
use netlink_packet_core::{Emitable, parse_ip};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourHeader, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::facts::{Mac, Neighbour, NextHop};
use super::netlink::{NetlinkSocket, after_header, attributes};

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;

/// A neighbour as netlink describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ObservedNeighbour {
    pub(super) hop: NextHop,
    /// Its link-layer address. None while the kernel would not send to it.
    pub(super) mac: Option<Mac>,
    /// Configured by an administrator, not resolved.
    pub(super) fixed: bool,
    /// How far the kernel is with resolving it.
    pub(super) resolution: NeighbourResolution,
}

/// How far the kernel is with resolving a neighbour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NeighbourResolution {
    /// It is resolved, needs no resolution, or none was requested.
    Resolved,
    /// Requests are sent.
    Pending,
    /// Nobody replied to the requests.
    Failed,
}

/// The entries of the kernel's table for `wanted`.
///
/// # Errors
/// When netlink fails.
pub(super) fn list(socket: &mut NetlinkSocket, wanted: &BTreeSet<NextHop>) -> Result<Vec<ObservedNeighbour>> {
    let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
    socket.dump("neighbours", &request, |payload| Ok(read(payload)?.filter(|observed| wanted.contains(&observed.hop))))
}

/// The resolved ones as facts, ordered by link and address.
pub(super) fn known(observed: &[ObservedNeighbour]) -> Vec<Neighbour> {
    let fact = |seen: &ObservedNeighbour| Some(Neighbour { link: seen.hop.0, address: seen.hop.1, mac: seen.mac? });
    let mut known: Vec<Neighbour> = observed.iter().filter_map(fact).collect();
    known.sort_unstable_by_key(|neighbour| (neighbour.link, neighbour.address));
    known
}

/// Makes the kernel treat these neighbours as if it had just sent a packet to each (`NTF_USE`): it resolves unknown ones and
/// verifies stale ones. Neighbours that an administrator configured are left alone.
///
/// # Errors
/// When netlink fails. A refusal for a single neighbour (its interface may be down or gone) is no error; that neighbour
/// stays unresolved.
pub(super) fn request_resolution(
    socket: &mut NetlinkSocket,
    hops: &BTreeSet<NextHop>,
    observed: &[ObservedNeighbour],
) -> Result<()> {
    let fixed: BTreeSet<NextHop> = observed.iter().filter(|seen| seen.fixed).map(|seen| seen.hop).collect();
    let requests: Vec<_> = hops.difference(&fixed).map(request).collect();
    socket.create(&requests).context("cannot make the kernel resolve the next hops of the downstreams")
}

fn request(&(link, address): &NextHop) -> RouteNetlinkMessage {
    let mut message = NeighbourMessage::default();
    message.header = NeighbourHeader {
        family: if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 },
        ifindex: link,
        state: NeighbourState::None,
        flags: NeighbourFlags::Use,
        ..NeighbourHeader::default()
    };
    let destination = match address {
        IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
        IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
    };
    message.attributes.push(NeighbourAttribute::Destination(destination));
    RouteNetlinkMessage::NewNeighbour(message)
}

/// Reads the payload of `RTM_NEWNEIGH` or `RTM_DELNEIGH`. None for proxy entries and other families than IP.
///
/// # Errors
/// When the message is malformed.
pub(super) fn read(payload: &[u8]) -> Result<Option<ObservedNeighbour>> {
    let header = NeighbourHeader::parse(payload)?;
    let proxy = header.flags.contains(NeighbourFlags::Proxy);
    if proxy || !matches!(header.family, AddressFamily::Inet | AddressFamily::Inet6) {
        return Ok(None);
    }
    let (mut address, mut mac) = (None, None);
    for attribute in attributes(after_header(payload, header.buffer_len())?) {
        match attribute? {
            (NDA_DST, value) => address = Some(parse_ip(value)?),
            (NDA_LLADDR, value) => mac = value.try_into().ok(),
            _ => {}
        }
    }
    let fixed = matches!(header.state, NeighbourState::Permanent | NeighbourState::Noarp);
    let found = matches!(
        header.state,
        NeighbourState::Reachable | NeighbourState::Stale | NeighbourState::Delay | NeighbourState::Probe
    );
    let mac = mac.filter(|_| fixed || found);
    let resolution = match header.state {
        NeighbourState::Incomplete => NeighbourResolution::Pending,
        NeighbourState::Failed => NeighbourResolution::Failed,
        _ => NeighbourResolution::Resolved,
    };
    Ok(address.map(|address| ObservedNeighbour { hop: (header.ifindex, address), mac, fixed, resolution }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 7];

    fn observed(state: NeighbourState, flags: NeighbourFlags, mac: &[u8]) -> Option<ObservedNeighbour> {
        let RouteNetlinkMessage::NewNeighbour(mut message) = request(&(3, "10.0.0.7".parse().unwrap())) else {
            unreachable!("a request to resolve a neighbour has that type");
        };
        (message.header.state, message.header.flags) = (state, flags);
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        read(&bytes).unwrap()
    }

    #[test]
    fn an_address_counts_while_the_kernel_would_send_to_it() {
        let mac = |state| observed(state, NeighbourFlags::empty(), &MAC).unwrap().mac;
        for usable in [
            NeighbourState::Reachable,
            NeighbourState::Stale,
            NeighbourState::Delay,
            NeighbourState::Probe,
            NeighbourState::Permanent,
            NeighbourState::Noarp,
        ] {
            assert_eq!(mac(usable), Some(MAC), "{usable:?}");
        }
        for lost in [NeighbourState::Incomplete, NeighbourState::Failed, NeighbourState::None] {
            assert_eq!(mac(lost), None, "{lost:?}");
        }
    }

    #[test]
    fn an_unresolved_neighbour_is_told_from_one_being_resolved() {
        for (state, resolution) in [
            (NeighbourState::Failed, NeighbourResolution::Failed),
            (NeighbourState::Incomplete, NeighbourResolution::Pending),
            (NeighbourState::None, NeighbourResolution::Resolved),
            (NeighbourState::Stale, NeighbourResolution::Resolved),
        ] {
            assert_eq!(observed(state, NeighbourFlags::empty(), &MAC).unwrap().resolution, resolution, "{state:?}");
        }
    }

    #[test]
    fn configured_neighbours_are_recognised() {
        let fixed = |state| observed(state, NeighbourFlags::empty(), &MAC).unwrap().fixed;
        assert!(fixed(NeighbourState::Permanent) && fixed(NeighbourState::Noarp));
        assert!(!fixed(NeighbourState::Reachable) && !fixed(NeighbourState::Failed));
    }

    #[test]
    fn addresses_of_other_lengths_and_proxies_are_no_neighbours() {
        assert_eq!(observed(NeighbourState::Reachable, NeighbourFlags::empty(), &[1; 20]).unwrap().mac, None);
        assert_eq!(observed(NeighbourState::Permanent, NeighbourFlags::Proxy, &MAC), None);
    }

    #[test]
    fn known_neighbours_become_facts() {
        let hop = (3, "10.0.0.7".parse().unwrap());
        let seen = |mac| ObservedNeighbour { hop, mac, fixed: false, resolution: NeighbourResolution::Resolved };
        assert_eq!(known(&[seen(None), seen(Some(MAC))]), [Neighbour { link: 3, address: hop.1, mac: MAC }]);
    }
}
