//! Small helpers for IP addresses that every layer may use. Pure; imports nothing of this crate.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

/// An IP address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    #[must_use]
    pub fn of(address: IpAddr) -> Family {
        match address {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
    }
}

/// True for an IPv6 multicast address of interface-local or link-local scope: it names a different group on each link.
#[must_use]
pub fn is_link_scoped_multicast(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_multicast() && matches!(v6.segments()[0] & 0xf, 1 | 2))
}

/// True if the address can belong to one host: not unspecified, multicast or broadcast.
#[must_use]
pub fn is_unicast(address: IpAddr) -> bool {
    !address.is_unspecified() && !address.is_multicast() && !matches!(address, IpAddr::V4(v4) if v4.is_broadcast())
}

/// The 16 bytes of an address; IPv4 in its mapped IPv6 form.
#[must_use]
pub fn mapped_octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// A hash of address and port that is the same in every run and on every host.
#[must_use]
pub fn endpoint_hash(endpoint: SocketAddr) -> u64 {
    let whole = u128::from_be_bytes(mapped_octets(endpoint.ip()));
    mix(mix(mix((whole >> 64) as u64) ^ whole as u64) ^ u64::from(endpoint.port()))
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): spreads every input bit over all output bits.
#[must_use]
pub fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}
