//! Conversions between Rust values and map entries: addresses, keys of `listeners`, downstreams.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use super::abi::{
    DELIVER_LOCAL, DELIVER_NEIGHBOUR, DELIVER_UNREACHABLE, DOWNSTREAM_L3_DEVICE, DOWNSTREAM_MACS, DOWNSTREAM_PEER,
    KEY_ADDRESS, KEY_L3_DEVICE, KEY_LISTENER,
};
use super::skel::types;
use crate::plan::{Delivery, PlanTarget};

/// The address and port that these words in a map stand for.
#[must_use]
pub fn address_of(words: [u32; 4], port_be: u16) -> SocketAddr {
    let mut octets = [0; 16];
    for (bytes, word) in octets.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    SocketAddr::new(IpAddr::from(octets).to_canonical(), u16::from_be(port_be))
}

/// An address in the maps' form: IPv4 as v4-mapped IPv6.
#[must_use]
pub fn mapped_words(address: IpAddr) -> [u32; 4] {
    let octets = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    };
    words(octets)
}

fn words(octets: [u8; 16]) -> [u32; 4] {
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(octets.chunks_exact(4)) {
        *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    words
}

/// Key of `listeners` for datagrams to this address and port.
#[must_use]
pub fn listener_key(address: SocketAddr) -> types::listener_key {
    types::listener_key { addr_be: mapped_words(address.ip()), port_be: address.port().to_be(), scope: KEY_LISTENER }
}

/// Keys of `listeners` other than destinations. Only their presence matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum KeyMark {
    /// The address belongs to a listener. Later fragments carry no port.
    Address(IpAddr),
    /// The device with this index is an L3 device: its packets have no Ethernet header.
    L3Device(u32),
}

impl KeyMark {
    /// The key in `listeners`.
    #[must_use]
    pub fn key(self) -> types::listener_key {
        let (addr_be, scope) = match self {
            KeyMark::Address(address) => (mapped_words(address), KEY_ADDRESS),
            KeyMark::L3Device(link) => ([link, 0, 0, 0], KEY_L3_DEVICE),
        };
        types::listener_key { addr_be, port_be: 0, scope }
    }
}

impl fmt::Display for KeyMark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KeyMark::Address(address) => write!(f, "{address}"),
            KeyMark::L3Device(link) => write!(f, "interface {link}"),
        }
    }
}

/// The map entry of a downstream.
#[must_use]
pub fn downstream_entry(target: &PlanTarget) -> types::downstream {
    let address = target.downstream.address;
    let mut entry = types::downstream {
        addr_be: mapped_words(address.ip()),
        port_be: address.port().to_be(),
        delivery: DELIVER_UNREACHABLE,
        sample: target.downstream.sample,
        ..Default::default()
    };
    match target.delivery {
        Delivery::Unreachable => {}
        Delivery::Local => entry.delivery = DELIVER_LOCAL,
        Delivery::L3Device { link, mtu } => {
            entry.delivery = DELIVER_NEIGHBOUR;
            entry.ifindex = link;
            entry.mtu = mtu;
            entry.flags = DOWNSTREAM_L3_DEVICE;
        }
        Delivery::Neighbour { link, next_hop, mtu, macs, into_pod } => {
            entry.delivery = DELIVER_NEIGHBOUR;
            entry.ifindex = link;
            entry.mtu = mtu;
            if let Some(macs) = macs {
                entry.flags = DOWNSTREAM_MACS | if into_pod { DOWNSTREAM_PEER } else { 0 };
                entry.macs[..6].copy_from_slice(&macs.neighbour);
                entry.macs[6..].copy_from_slice(&macs.own);
            }
            match next_hop {
                IpAddr::V4(v4) => {
                    entry.next_hop_family = libc::AF_INET as u8;
                    entry.next_hop_be[0] = u32::from_ne_bytes(v4.octets());
                }
                IpAddr::V6(v6) => {
                    entry.next_hop_family = libc::AF_INET6 as u8;
                    entry.next_hop_be = words(v6.octets());
                }
            }
        }
    }
    entry
}
