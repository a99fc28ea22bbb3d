//! The UDP headers of datagrams sent with their original source address (`preserve_source`).

use std::net::{IpAddr, SocketAddr};

use udp_fanout::testing::datapath::user::udp_header;

use super::bytes::Bytes;
use crate::kernel::packet::{pseudo_sum, sum};

/// Builds a datagram's header and asserts that a receiver accepts it.
pub fn run(bytes: &[u8]) {
    let mut bytes = Bytes(bytes);
    let v6 = bytes.one_in(2);
    let mut end = || {
        let ip = match v6 {
            true => IpAddr::from(<[u8; 16]>::try_from(padded(bytes.take(16), 16)).unwrap()),
            false => IpAddr::from(<[u8; 4]>::try_from(padded(bytes.take(4), 4)).unwrap()),
        };
        SocketAddr::new(ip, bytes.word())
    };
    let (from, to) = (end(), end());
    let repeated = 1 + usize::from(bytes.byte());
    let mut payload = bytes.0.repeat(repeated);
    payload.truncate(65_507);
    let header = udp_header((from.ip(), from.port()), to, &payload);
    let word = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    assert_eq!((word(0), word(2), usize::from(word(4))), (from.port(), to.port(), 8 + payload.len()));
    assert_ne!(word(6), 0, "zero means that the datagram has no checksum");
    let datagram = [&header[..], &payload].concat();
    assert_eq!(sum(&datagram, pseudo_sum(from.ip(), to.ip(), datagram.len())), 0xffff);
}

fn padded(bytes: &[u8], length: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(length, 0);
    bytes
}
