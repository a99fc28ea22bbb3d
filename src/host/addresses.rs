//! The host's own IP addresses.

use std::net::IpAddr;

use anyhow::Result;
use netlink_packet_core::{Emitable, parse_ip, parse_u32};
use netlink_packet_route::address::{AddressFlags, AddressHeader, AddressMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::facts::HostAddress;
use super::netlink::{NetlinkSocket, after_header, attributes};

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;

/// An address as netlink describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ObservedAddress {
    pub(super) address: HostAddress,
    /// False for an IPv6 address whose duplicate address detection is unfinished or failed: the host does not accept packets to
    /// it. Netlink announces the address again when that changes.
    pub(super) usable: bool,
}

/// All usable addresses, IPv4 and IPv6, ordered by interface.
///
/// # Errors
/// When netlink fails.
pub(super) fn list(socket: &mut NetlinkSocket) -> Result<Vec<HostAddress>> {
    let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let observed = socket.dump("addresses", &request, read)?;
    let mut addresses: Vec<_> = observed.into_iter().filter(|seen| seen.usable).map(|seen| seen.address).collect();
    addresses.sort_unstable_by_key(|address| (address.link, address.address));
    Ok(addresses)
}

/// Reads the payload of `RTM_NEWADDR` or `RTM_DELADDR`. None for address families other than IP.
///
/// # Errors
/// When the message is malformed.
pub(super) fn read(payload: &[u8]) -> Result<Option<ObservedAddress>> {
    let header = AddressHeader::parse(payload)?;
    if !matches!(header.family, AddressFamily::Inet | AddressFamily::Inet6) {
        return Ok(None);
    }
    let mut own: Option<IpAddr> = None;
    let mut peer: Option<IpAddr> = None;
    let mut flags = AddressFlags::from_bits_retain(u32::from(header.flags.bits()));
    for attribute in attributes(after_header(payload, header.buffer_len())?) {
        let (kind, value) = attribute?;
        match kind {
            IFA_LOCAL => own = Some(parse_ip(value)?),
            IFA_ADDRESS => peer = Some(parse_ip(value)?),
            IFA_FLAGS => flags = AddressFlags::from_bits_retain(parse_u32(value)?),
            _ => {}
        }
    }
    // On a point-to-point link, IFA_ADDRESS is the peer's address and IFA_LOCAL is ours. On other links both are the same, and
    // IPv6 omits IFA_LOCAL.
    let Some(address) = own.or(peer) else {
        return Ok(None);
    };
    let usable = !flags.contains(AddressFlags::Dadfailed)
        && (!flags.contains(AddressFlags::Tentative) || flags.contains(AddressFlags::Optimistic));
    Ok(Some(ObservedAddress { address: HostAddress { link: header.index, address }, usable }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags};

    fn observed(message: &AddressMessage) -> Option<ObservedAddress> {
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        read(&bytes).unwrap()
    }

    fn message(family: AddressFamily, attributes: Vec<AddressAttribute>) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.header.family = family;
        message.header.index = 7;
        message.attributes = attributes;
        message
    }

    #[test]
    fn the_own_address_of_a_point_to_point_link_is_taken_and_not_the_peers() {
        let (own, peer) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let seen = observed(&message(
            AddressFamily::Inet,
            vec![AddressAttribute::Address(peer), AddressAttribute::Local(own)],
        ));
        assert_eq!(seen, Some(ObservedAddress { address: HostAddress { link: 7, address: own }, usable: true }));
    }

    #[test]
    fn an_ipv6_address_counts_once_it_is_known_to_be_unique() {
        let address: IpAddr = "2001:db8::1".parse().unwrap();
        let usable = |flags: AddressFlags| {
            let attributes = vec![AddressAttribute::Address(address), AddressAttribute::Flags(flags)];
            let mut message = message(AddressFamily::Inet6, attributes);
            message.header.flags = AddressHeaderFlags::from_bits_truncate(flags.bits() as u8);
            observed(&message).unwrap().usable
        };
        assert!(usable(AddressFlags::Permanent));
        assert!(usable(AddressFlags::Permanent | AddressFlags::Deprecated));
        assert!(!usable(AddressFlags::Permanent | AddressFlags::Tentative));
        assert!(usable(AddressFlags::Tentative | AddressFlags::Optimistic));
        assert!(!usable(AddressFlags::Tentative | AddressFlags::Dadfailed));
        assert!(!usable(AddressFlags::Tentative | AddressFlags::Optimistic | AddressFlags::Dadfailed));
    }

    #[test]
    fn other_families_have_no_ip_addresses() {
        assert_eq!(observed(&message(AddressFamily::Mctp, vec![])), None);
    }
}
