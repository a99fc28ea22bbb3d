//! The kernel's neighbours: which link-layer addresses it knows, and getting it to find out one.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Context, Result};
use netlink_packet_core::{Emitable, parse_ip};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourHeader, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::facts::{Mac, Neighbour};
use super::netlink::{Connection, after_header, attributes};

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;

/// A neighbour's address: the interface's index and the neighbour's IP address.
pub(super) type Hop = (u32, IpAddr);

/// What netlink says of a neighbour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Observed {
    /// Who.
    pub(super) hop: Hop,
    /// Its link-layer address, as far as the kernel would send to it.
    pub(super) mac: Option<Mac>,
    /// Written down by an administrator, not found out.
    pub(super) fixed: bool,
    /// How far the kernel has got with finding it.
    pub(super) standing: Standing,
}

/// How far the kernel has got with finding a neighbour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It was found, needs not be, or has not been asked for.
    Well,
    /// It is being asked for.
    Asked,
    /// It was asked for, and nobody answered.
    Failed,
}

/// Those of `wanted` that the kernel has heard of.
///
/// # Errors
/// When the kernel cannot be asked.
pub(super) fn list(connection: &mut Connection, wanted: &BTreeSet<Hop>) -> Result<Vec<Observed>> {
    let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
    connection
        .dump("neighbours", &request, |payload| Ok(read(payload)?.filter(|observed| wanted.contains(&observed.hop))))
}

/// As facts, in their order.
pub(super) fn known(observed: &[Observed]) -> Vec<Neighbour> {
    let fact = |seen: &Observed| Some(Neighbour { link: seen.hop.0, address: seen.hop.1, mac: seen.mac? });
    let mut known: Vec<Neighbour> = observed.iter().filter_map(fact).collect();
    known.sort_unstable_by_key(|neighbour| (neighbour.link, neighbour.address));
    known
}

/// Makes the kernel treat these neighbours as if a packet had just been sent to them: it asks for those it does not know
/// and checks up on those it has not heard from for long. Those written down by an administrator are left alone.
///
/// # Errors
/// When the kernel cannot be asked. What it refuses for a single neighbour (its interface may be down or gone) is no
/// error: that neighbour stays unknown.
pub(super) fn remind(connection: &mut Connection, hops: &BTreeSet<Hop>, observed: &[Observed]) -> Result<()> {
    let fixed: BTreeSet<Hop> = observed.iter().filter(|seen| seen.fixed).map(|seen| seen.hop).collect();
    let requests: Vec<_> = hops.difference(&fixed).map(request).collect();
    connection.tell(&requests).context("cannot have the kernel look for the downstreams' neighbours")
}

fn request(&(link, address): &Hop) -> RouteNetlinkMessage {
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

/// Reads the payload of `RTM_NEWNEIGH` or `RTM_DELNEIGH`. None for what is no IP neighbour.
///
/// # Errors
/// When the message is malformed.
pub(super) fn read(payload: &[u8]) -> Result<Option<Observed>> {
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
    let standing = match header.state {
        NeighbourState::Incomplete => Standing::Asked,
        NeighbourState::Failed => Standing::Failed,
        _ => Standing::Well,
    };
    Ok(address.map(|address| Observed { hop: (header.ifindex, address), mac, fixed, standing }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 7];

    fn observed(state: NeighbourState, flags: NeighbourFlags, mac: &[u8]) -> Option<Observed> {
        let RouteNetlinkMessage::NewNeighbour(mut message) = request(&(3, "10.0.0.7".parse().unwrap())) else {
            unreachable!("a request to look for a neighbour is of that type");
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
    fn a_neighbour_that_nobody_answers_for_is_told_from_one_still_asked_for() {
        for (state, standing) in [
            (NeighbourState::Failed, Standing::Failed),
            (NeighbourState::Incomplete, Standing::Asked),
            (NeighbourState::None, Standing::Well),
            (NeighbourState::Stale, Standing::Well),
        ] {
            assert_eq!(observed(state, NeighbourFlags::empty(), &MAC).unwrap().standing, standing, "{state:?}");
        }
    }

    #[test]
    fn what_an_administrator_has_written_is_told_apart() {
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
        let seen = |mac| Observed { hop, mac, fixed: false, standing: Standing::Well };
        assert_eq!(known(&[seen(None), seen(Some(MAC))]), [Neighbour { link: 3, address: hop.1, mac: MAC }]);
    }
}
