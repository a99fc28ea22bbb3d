//! The hash that selects a slot of the table. Both datapaths use the same one, so a datagram that the TC program passes
//! to the socket goes to the same downstream as the rest of its flow. `bpf/hash.h` is the kernel's half; a test
//! compares both.
//!
//! `MurmurHash3_x86_32` over 32-bit words in host order, seed 0: small enough for the TC program, and every input bit
//! affects every output bit.

use std::net::{IpAddr, SocketAddr};

use crate::model::HashOn;
use crate::net::mapped_octets;

/// The hash of a datagram from `source` to `destination` under a listener's `hash_on`.
#[must_use]
pub fn flow_hash(on: HashOn, source: SocketAddr, destination: SocketAddr) -> u32 {
    let source_words = words(source.ip());
    match on {
        HashOn::SourceIp => murmur3(source_words),
        HashOn::Source => murmur3(source_words.into_iter().chain([u32::from(source.port().to_be())])),
        HashOn::Flow => {
            let ports = u32::from(source.port().to_be()) << 16 | u32::from(destination.port().to_be());
            murmur3(source_words.into_iter().chain(words(destination.ip())).chain([ports]))
        }
    }
}

/// The hash of a GELF message ID (the eight bytes after a chunk's magic).
#[must_use]
pub fn message_hash(id: [u8; 8]) -> u32 {
    let [a, b, c, d, e, f, g, h] = id;
    murmur3([u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])])
}

/// The slot of a table with `slots` slots that `hash` selects. Hashes are spread evenly over the slots.
#[must_use]
pub fn table_slot(hash: u32, slots: u32) -> u32 {
    ((u64::from(hash) * u64::from(slots)) >> 32) as u32
}

/// An address as the TC program holds it: IPv4 in mapped IPv6 form, the bytes of each word in wire order.
fn words(ip: IpAddr) -> [u32; 4] {
    let octets = mapped_octets(ip);
    std::array::from_fn(|i| {
        u32::from_ne_bytes([octets[4 * i], octets[4 * i + 1], octets[4 * i + 2], octets[4 * i + 3]])
    })
}

/// Workers call this for every datagram, so it must not allocate.
fn murmur3(words: impl IntoIterator<Item = u32>) -> u32 {
    let mut hash = 0u32;
    let mut bytes = 0u32;
    for word in words {
        hash ^= word.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593);
        hash = hash.rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64);
        bytes += 4;
    }
    hash ^= bytes;
    hash = (hash ^ hash >> 16).wrapping_mul(0x85eb_ca6b);
    hash = (hash ^ hash >> 13).wrapping_mul(0xc2b2_ae35);
    hash ^ hash >> 16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_function_is_murmur3() {
        // Test vectors of MurmurHash3_x86_32 with seed 0: the empty input, and "test" and "aaaa" as little-endian words.
        assert_eq!(murmur3([]), 0);
        assert_eq!(murmur3([u32::from_le_bytes(*b"test")]), 0xba6b_d213);
    }

    #[test]
    fn places_are_in_range_and_even() {
        let slots = 7;
        let mut seen = vec![0u32; slots as usize];
        for n in 0..7000u32 {
            let source = SocketAddr::from(([10, 0, (n >> 8) as u8, n as u8], 40_000));
            seen[table_slot(flow_hash(HashOn::SourceIp, source, source), slots) as usize] += 1;
        }
        assert!(seen.iter().all(|&n| (850..1150).contains(&n)), "{seen:?}");
    }
}
