//! What will be sent with the senders' addresses: a list of datagrams, each with a UDP header that is written here.
//!
//! They are sent through a raw socket. The kernel adds the IP header with the source address that the control message
//! names, and fragments datagrams that are too long for the link. Ports and checksum are written here. Each datagram is
//! a message of its own, because raw sockets do not support `UDP_SEGMENT`.

use std::mem;
use std::net::{IpAddr, SocketAddr};
use std::slice;

use super::{AddrPort, RawAddress};
use crate::net::{Family, mapped_octets};

/// The length of a UDP header in bytes.
const UDP_HEADER_LEN: usize = 8;
/// The IP protocol number of UDP.
const UDP: u8 = 17;

/// Room for one `IP_PKTINFO` or `IPV6_PKTINFO` control message, in u64 for the alignment of its header.
type SourceControl = [u64; 5];

/// A list. Its vectors never grow or shrink, so that pointers into them stay valid.
pub struct RawOutgoing {
    headers: Vec<libc::mmsghdr>,
    names: Vec<RawAddress>,
    controls: Vec<SourceControl>,
    udp_headers: Vec<[u8; UDP_HEADER_LEN]>,
    /// For each datagram, its UDP header and its payload.
    vectors: Vec<[libc::iovec; 2]>,
    count: usize,
}

impl RawOutgoing {
    /// Room for this many datagrams.
    pub fn new(room: usize) -> Self {
        let empty_vector = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: zero is a valid value for every field: integers and nullable pointers.
        let header: libc::mmsghdr = unsafe { mem::zeroed() };
        let mut new = RawOutgoing {
            headers: vec![header; room],
            names: vec![RawAddress::zeroed(); room],
            controls: vec![SourceControl::default(); room],
            udp_headers: vec![[0; UDP_HEADER_LEN]; room],
            vectors: vec![[empty_vector; 2]; room],
            count: 0,
        };
        let (names, controls) = (new.names.as_mut_ptr(), new.controls.as_mut_ptr());
        let (udp_headers, vectors) = (new.udp_headers.as_mut_ptr(), new.vectors.as_mut_ptr());
        for (at, header) in new.headers.iter_mut().enumerate() {
            header.msg_hdr.msg_name = names.wrapping_add(at).cast();
            header.msg_hdr.msg_control = controls.wrapping_add(at).cast();
            header.msg_hdr.msg_iov = vectors.wrapping_add(at).cast();
            header.msg_hdr.msg_iovlen = 2;
        }
        for (at, [udp_header_vector, _]) in new.vectors.iter_mut().enumerate() {
            *udp_header_vector = libc::iovec { iov_base: udp_headers.wrapping_add(at).cast(), iov_len: UDP_HEADER_LEN };
        }
        new
    }

    /// True if the list is full.
    pub fn full(&self) -> bool {
        self.count == self.headers.len()
    }

    /// Empties the list.
    pub fn clear(&mut self) {
        self.count = 0;
    }

    /// The message headers of the datagrams from this one on.
    pub fn headers(&mut self, from: usize) -> &mut [libc::mmsghdr] {
        &mut self.headers[from..self.count]
    }

    /// Adds a datagram. There must be room, and both addresses must be of one family.
    ///
    /// # Safety
    /// The payload must be readable.
    pub unsafe fn push(&mut self, from: AddrPort, to: SocketAddr, payload: libc::iovec) {
        let at = self.count;
        self.count += 1;
        // SAFETY: the caller's promise.
        let bytes = unsafe { slice::from_raw_parts(payload.iov_base.cast::<u8>(), payload.iov_len) };
        self.udp_headers[at] = udp_header(from, to, bytes);
        self.vectors[at][1] = payload;
        let family = Family::of(to.ip());
        let mut without_port = to;
        // A raw socket uses the port field for the protocol.
        without_port.set_port(0);
        self.names[at] = RawAddress::new(without_port, family);
        let header = &mut self.headers[at].msg_hdr;
        header.msg_namelen = self.names[at].length;
        header.msg_controllen = set_source(&mut self.controls[at], from.0) as _;
    }
}

/// Writes the control message that sets a packet's source, and returns its length.
fn set_source(control: &mut SourceControl, source: IpAddr) -> usize {
    match source {
        IpAddr::V4(v4) => {
            let info = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(v4.octets()) },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            write_control(control, libc::SOL_IP, libc::IP_PKTINFO, info)
        }
        IpAddr::V6(v6) => {
            let info = libc::in6_pktinfo { ipi6_addr: libc::in6_addr { s6_addr: v6.octets() }, ipi6_ifindex: 0 };
            write_control(control, libc::SOL_IPV6, libc::IPV6_PKTINFO, info)
        }
    }
}

fn write_control<T>(control: &mut SourceControl, level: libc::c_int, kind: libc::c_int, data: T) -> usize {
    const { assert!(mem::size_of::<libc::cmsghdr>() + mem::size_of::<T>() <= mem::size_of::<SourceControl>()) }
    let size = mem::size_of::<T>() as libc::c_uint;
    // SAFETY: computes a number.
    let length = unsafe { libc::CMSG_LEN(size) };
    let start = control.as_mut_ptr().cast::<libc::cmsghdr>();
    // SAFETY: there is room for both, as asserted, and u64 is as aligned as the header must be; the data need not be.
    unsafe {
        start.write(libc::cmsghdr { cmsg_len: length as _, cmsg_level: level, cmsg_type: kind });
        libc::CMSG_DATA(start).cast::<T>().write_unaligned(data);
    }
    length as usize
}

/// The UDP header of a datagram with this payload, which may have at most 65,527 bytes.
#[must_use]
pub fn udp_header(from: AddrPort, to: SocketAddr, payload: &[u8]) -> [u8; UDP_HEADER_LEN] {
    // A received datagram is never longer than the maximum.
    let length = (UDP_HEADER_LEN + payload.len()) as u16;
    let mut header = [0; UDP_HEADER_LEN];
    header[0..2].copy_from_slice(&from.1.to_be_bytes());
    header[2..4].copy_from_slice(&to.port().to_be_bytes());
    header[4..6].copy_from_slice(&length.to_be_bytes());
    let addresses = match (from.0, to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => sum(&from.octets()) + sum(&to.octets()),
        (from, to) => sum(&mapped_octets(from)) + sum(&mapped_octets(to)),
    };
    let total = addresses + u64::from(UDP) + u64::from(length) + sum(&header) + sum(payload);
    let checksum = match !fold(total) {
        // Zero would mean "no checksum".
        0 => u16::MAX,
        other => other,
    };
    header[6..8].copy_from_slice(&checksum.to_be_bytes());
    header
}

/// The sum of the 16-bit words in network order, padded with zeros.
fn sum(bytes: &[u8]) -> u64 {
    let mut chunks = bytes.chunks_exact(4);
    // Sums of 32-bit words are equal modulo 2^16 - 1.
    let whole: u64 =
        chunks.by_ref().map(|word| u64::from(u32::from_be_bytes([word[0], word[1], word[2], word[3]]))).sum();
    let mut rest = [0; 4];
    rest[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
    whole + u64::from(u32::from_be_bytes(rest))
}

/// Folds a sum to 16 bits.
fn fold(mut sum: u64) -> u16 {
    while sum > u64::from(u16::MAX) {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::UdpHeader;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn headers_are_those_that_anybody_would_write(
            from: (u32, u16), to: (u32, u16), from6: (u128, u16), to6: (u128, u16),
            payload in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let expected = UdpHeader::with_ipv4_checksum(
                from.1, to.1,
                &etherparse::Ipv4Header::new(0, 64, etherparse::IpNumber::UDP, from.0.to_be_bytes(), to.0.to_be_bytes()).unwrap(),
                &payload,
            ).unwrap();
            let ours = udp_header((IpAddr::V4(from.0.into()), from.1), SocketAddr::new(IpAddr::V4(to.0.into()), to.1), &payload);
            prop_assert_eq!(ours, expected.to_bytes());
            let ip = etherparse::Ipv6Header {
                source: from6.0.to_be_bytes(), destination: to6.0.to_be_bytes(), ..Default::default()
            };
            let expected = UdpHeader::with_ipv6_checksum(from6.1, to6.1, &ip, &payload).unwrap();
            let ours = udp_header((IpAddr::V6(from6.0.into()), from6.1), SocketAddr::new(IpAddr::V6(to6.0.into()), to6.1), &payload);
            prop_assert_eq!(ours, expected.to_bytes());
        }
    }

    #[test]
    fn the_longest_payload_of_ones_has_a_checksum() {
        let address: SocketAddr = "255.255.255.255:65535".parse().unwrap();
        let header = udp_header((address.ip(), 65_535), address, &[0xff; 65_507]);
        assert_eq!(header[4..6], (65_507u16 + 8).to_be_bytes());
        assert_ne!(header[6..8], [0, 0]);
    }
}
