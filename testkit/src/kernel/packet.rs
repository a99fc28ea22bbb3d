//! Builds frames field by field, valid by default, and computes checksums.

use std::net::{IpAddr, SocketAddr};

/// A UDP datagram over Ethernet. `bytes` serialises it: lengths and checksums are computed unless overridden.
#[derive(Debug, Clone)]
pub struct Frame {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub destination_mac: [u8; 6],
    pub ttl: u8,
    pub protocol: u8,
    pub payload: Vec<u8>,
    /// IPv4 options, a multiple of four bytes.
    pub options: Vec<u8>,
    pub fragment: u16,
    pub udp_checksum: Checksum,
    pub ip_checksum: Checksum,
}

/// The value to write into a checksum field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checksum {
    Right,
    Wrong,
    Zero,
}

impl Frame {
    pub fn new(source: &str, destination: &str, payload: &[u8]) -> Frame {
        Frame {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            // The address of the loopback device, on which test runs receive.
            destination_mac: [0; 6],
            ttl: 64,
            protocol: 17,
            payload: payload.to_vec(),
            options: Vec::new(),
            fragment: 0,
            udp_checksum: Checksum::Right,
            ip_checksum: Checksum::Right,
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut frame = self.destination_mac.to_vec();
        frame.extend([2, 0, 0, 0, 0, 9]);
        let udp = self.udp();
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                frame.extend([8, 0]);
                let header = 20 + self.options.len();
                let mut ip = vec![0x40 | (header / 4) as u8, 0];
                ip.extend(((header + udp.len()) as u16).to_be_bytes());
                ip.extend([0xab, 0xcd]);
                ip.extend(self.fragment.to_be_bytes());
                ip.extend([self.ttl, self.protocol, 0, 0]);
                ip.extend(source.octets());
                ip.extend(destination.octets());
                ip.extend(&self.options);
                let check = chosen(self.ip_checksum, !sum(&ip, 0));
                ip[10..12].copy_from_slice(&check.to_be_bytes());
                frame.extend(ip);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                frame.extend([0x86, 0xdd, 0x60, 0x01, 0x02, 0x03]);
                frame.extend((udp.len() as u16).to_be_bytes());
                frame.extend([self.protocol, self.ttl]);
                frame.extend(source.octets());
                frame.extend(destination.octets());
            }
            _ => panic!("mixed families"),
        }
        frame.extend(udp);
        frame
    }

    fn udp(&self) -> Vec<u8> {
        let mut udp = self.source.port().to_be_bytes().to_vec();
        udp.extend(self.destination.port().to_be_bytes());
        udp.extend(((8 + self.payload.len()) as u16).to_be_bytes());
        udp.extend([0, 0]);
        udp.extend(&self.payload);
        let pseudo = pseudo_sum(self.source.ip(), self.destination.ip(), udp.len());
        let right = match !sum(&udp, pseudo) {
            0 => 0xffff,
            check => check,
        };
        udp[6..8].copy_from_slice(&chosen(self.udp_checksum, right).to_be_bytes());
        udp
    }
}

/// Splits a frame into fragments of at most `size` bytes, a multiple of eight, as a sender or router does. IPv6 fragments get a
/// fragment header.
pub fn fragmented(frame: &[u8], size: usize, number: u32) -> Vec<Vec<u8>> {
    assert!(size.is_multiple_of(8) && size > 0);
    let v6 = frame[12..14] == [0x86, 0xdd];
    let header = if v6 { 54 } else { 14 + usize::from(frame[14] & 15) * 4 };
    let body = &frame[header..];
    let count = body.len().div_ceil(size);
    let part = |index: usize| {
        let (offset, piece) = (index * size, &body[index * size..body.len().min((index + 1) * size)]);
        let more = index + 1 < count;
        let mut fragment = frame[..header].to_vec();
        if v6 {
            let next = std::mem::replace(&mut fragment[20], 44);
            fragment[18..20].copy_from_slice(&((8 + piece.len()) as u16).to_be_bytes());
            fragment.extend([next, 0]);
            fragment.extend((offset as u16 | u16::from(more)).to_be_bytes());
            fragment.extend(number.to_be_bytes());
        } else {
            fragment[16..18].copy_from_slice(&((header - 14 + piece.len()) as u16).to_be_bytes());
            fragment[18..20].copy_from_slice(&(number as u16).to_be_bytes());
            fragment[20..22].copy_from_slice(&((offset / 8) as u16 | if more { 0x2000 } else { 0 }).to_be_bytes());
            fragment[24..26].fill(0);
            let check = !sum(&fragment[14..header], 0);
            fragment[24..26].copy_from_slice(&check.to_be_bytes());
        }
        fragment.extend(piece);
        fragment
    };
    (0..count).map(part).collect()
}

fn chosen(what: Checksum, right: u16) -> u16 {
    match what {
        Checksum::Right => right,
        Checksum::Wrong => right ^ 0x1234,
        Checksum::Zero => 0,
    }
}

/// The one's complement sum (RFC 1071) of `bytes`, starting from `start`.
pub fn sum(bytes: &[u8], start: u32) -> u16 {
    let mut sum = u64::from(start);
    for pair in bytes.chunks(2) {
        sum += u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The pseudo header's share of a UDP checksum.
pub fn pseudo_sum(source: IpAddr, destination: IpAddr, udp_len: usize) -> u32 {
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    u32::from(sum(&octets(source), 0)) + u32::from(sum(&octets(destination), 0)) + 17 + udp_len as u32
}
