//! ICMP echo: one socket for all targets of a family.
//!
//! Ping sockets need no privilege if the sysctl `net.ipv4.ping_group_range` (also for IPv6) includes a group of this process;
//! raw sockets need `CAP_NET_RAW`. Ping sockets are preferred: there the kernel delivers only replies to own requests.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;

use socket2::{Domain, Protocol, Socket, Type};

use super::errors::{SendError, send_error};
use super::probe_socket::{ProbeSocket, Received};
use super::{ProbeReply, ProbeVerdict};
use crate::health::model::ProbeId;

/// The sysctl with the groups that may open ping sockets.
const GROUP_RANGE: &str = "/proc/sys/net/ipv4/ping_group_range";

/// Bytes of the ICMP header: type, code, checksum, identifier, sequence number.
const HEADER: usize = 8;

/// The payload after the nonce, to identify probes in packet captures.
const SIGNATURE: &[u8] = b"udp-fanout health";

/// The kind of socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IcmpSocketKind {
    /// A ping socket: the kernel sets the identifier.
    Ping,
    /// A raw socket with an own identifier.
    Raw {
        /// Distinguishes own replies from those to other programs.
        identifier: u16,
    },
}

/// The prober of one address family.
#[derive(Debug)]
pub struct IcmpProber {
    socket: ProbeSocket,
    access: IcmpSocketKind,
    v6: bool,
    /// By address and sequence number (the lowest 16 bits of the probe's number).
    pending: HashMap<(SocketAddr, u16), PendingEcho>,
}

#[derive(Debug, Clone, Copy)]
struct PendingEcho {
    probe: ProbeId,
    nonce: u64,
}

/// An ICMP echo message.
#[derive(Debug, PartialEq, Eq)]
pub struct EchoMessage {
    /// The identifier of the sender.
    pub identifier: u16,
    /// The lowest 16 bits of the probe's number.
    pub sequence: u16,
    /// None if the message was truncated before it.
    pub nonce: Option<u64>,
}

/// Opens a ping socket, or else a raw socket.
///
/// # Errors
/// [`SendError::Local`] if both are denied; it names the capability, the sysctl and its value. [`SendError::Target`] if this host
/// does not support the IP version.
pub fn open(v6: bool) -> Result<(Socket, IcmpSocketKind), SendError> {
    let (domain, protocol) = if v6 { (Domain::IPV6, Protocol::ICMPV6) } else { (Domain::IPV4, Protocol::ICMPV4) };
    if let Ok(socket) = Socket::new(domain, Type::DGRAM, Some(protocol)) {
        return Ok((socket, IcmpSocketKind::Ping));
    }
    match Socket::new(domain, Type::RAW, Some(protocol)) {
        Ok(socket) => {
            accept_echo_replies_only(&socket, v6).map_err(|error| send_error(&error))?;
            Ok((socket, IcmpSocketKind::Raw { identifier: rand::random() }))
        }
        Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES)) => {
            Err(SendError::Local(no_socket_message(fs::read_to_string(GROUP_RANGE).ok().as_deref())))
        }
        Err(error) => Err(send_error(&error)),
    }
}

/// Why both kinds of socket are denied, and the fix. `group_range` is the value of the sysctl.
fn no_socket_message(group_range: Option<&str>) -> String {
    let range = group_range.map_or("unreadable".to_owned(), |range| {
        let words: Vec<&str> = range.split_whitespace().collect();
        format!("\"{}\"", words.join(" "))
    });
    format!(
        "ping sockets are denied because no group of this process is in net.ipv4.ping_group_range, which is {range}, and \
         raw sockets need CAP_NET_RAW, which is missing; set that sysctl to \"0 2147483647\", or grant CAP_NET_RAW \
         (systemd: AmbientCapabilities=, Kubernetes: securityContext.capabilities.add), or choose another \
         health.protocol"
    )
}

/// Filters everything except echo replies from a raw socket, which otherwise receives all ICMP of the host.
fn accept_echo_replies_only(socket: &Socket, v6: bool) -> io::Result<()> {
    // linux/icmp.h and linux/icmpv6.h: a set bit blocks the ICMP type of that number.
    const ICMP_FILTER: libc::c_int = 1;
    const ICMPV6_FILTER: libc::c_int = 1;
    let mut filter = [u32::MAX; 8];
    let reply = usize::from(reply_type(v6));
    filter[reply / 32] &= !(1 << (reply % 32));
    let (level, name, words) = if v6 { (libc::SOL_ICMPV6, ICMPV6_FILTER, 8) } else { (libc::SOL_RAW, ICMP_FILTER, 1) };
    let length = libc::socklen_t::try_from(words * size_of::<u32>()).map_err(io::Error::other)?;
    // SAFETY: the kernel reads `length` bytes, at most the size of `filter`, and keeps no pointer.
    let outcome = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, filter.as_ptr().cast(), length) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn request_type(v6: bool) -> u8 {
    if v6 { 128 } else { 8 }
}

fn reply_type(v6: bool) -> u8 {
    if v6 { 129 } else { 0 }
}

impl IcmpProber {
    /// Opens the socket of one address family.
    ///
    /// # Errors
    /// As of [`open`].
    pub fn new(v6: bool) -> Result<IcmpProber, SendError> {
        let (socket, access) = open(v6)?;
        let socket = ProbeSocket::new(socket, v6).map_err(|error| send_error(&error))?;
        Ok(IcmpProber { socket, access, v6, pending: HashMap::new() })
    }

    /// The socket.
    pub fn socket(&self) -> &ProbeSocket {
        &self.socket
    }

    /// Sends an echo request.
    pub fn send(&mut self, probe: ProbeId, to: SocketAddr) -> Result<(), SendError> {
        let nonce = rand::random();
        let identifier = match self.access {
            IcmpSocketKind::Ping => 0,
            IcmpSocketKind::Raw { identifier } => identifier,
        };
        self.socket.send(&request(self.v6, identifier, probe, nonce), to)?;
        self.pending.insert((to, sequence(probe)), PendingEcho { probe, nonce });
        Ok(())
    }

    /// Forgets a probe.
    pub fn cancel(&mut self, probe: ProbeId, to: SocketAddr) {
        let key = (to, sequence(probe));
        if self.pending.get(&key).is_some_and(|pending| pending.probe == probe) {
            self.pending.remove(&key);
        }
    }

    /// Reads replies and ICMP errors. True if there may be more.
    pub fn receive(&mut self, replies: &mut Vec<ProbeReply>) -> bool {
        let IcmpProber { socket, access, v6, pending } = self;
        let (access, v6) = (*access, *v6);
        let is_own = |echo: &EchoMessage| match access {
            IcmpSocketKind::Ping => true,
            IcmpSocketKind::Raw { identifier } => echo.identifier == identifier,
        };
        let mut take = |from: SocketAddr, echo: &EchoMessage, verdict| {
            let key = (from, echo.sequence);
            let Some(&PendingEcho { probe, nonce }) = pending.get(&key) else { return false };
            if echo.nonce.is_some_and(|returned| returned != nonce) {
                return false;
            }
            pending.remove(&key);
            replies.push(ProbeReply { probe, verdict });
            true
        };
        socket.receive(|incoming| match incoming {
            Received::Datagram { mut from, bytes } => {
                from.set_port(0);
                let bytes = if access == IcmpSocketKind::Ping || v6 { bytes } else { without_ip_header(bytes) };
                let Some(echo) = EchoMessage::read(reply_type(v6), bytes).filter(&is_own) else { return };
                if echo.nonce.is_none() || !take(from, &echo, ProbeVerdict::Answered { exact: true }) {
                    tracing::debug!(%from, "ignored an ICMP echo reply that answers no probe");
                }
            }
            Received::IcmpError { mut to, quoted, failure } => {
                to.set_port(0);
                if let Some(echo) = EchoMessage::read(request_type(v6), quoted).filter(&is_own) {
                    take(to, &echo, ProbeVerdict::Failed(failure));
                }
            }
        })
    }
}

fn sequence(probe: ProbeId) -> u16 {
    (probe.0 & 0xffff) as u16
}

/// The echo request of a probe.
fn request(v6: bool, identifier: u16, probe: ProbeId, nonce: u64) -> Vec<u8> {
    let mut packet = vec![request_type(v6), 0, 0, 0];
    packet.extend(identifier.to_be_bytes());
    packet.extend(sequence(probe).to_be_bytes());
    packet.extend(nonce.to_be_bytes());
    packet.extend(SIGNATURE);
    if !v6 {
        // For raw sockets. The kernel computes it for ping sockets, and for ICMPv6, whose checksum covers addresses.
        let sum = checksum(&packet).to_be_bytes();
        packet[2..4].copy_from_slice(&sum);
    }
    packet
}

impl EchoMessage {
    /// Parses an echo message of this ICMP type; none if it is anything else.
    #[must_use]
    pub fn read(kind: u8, bytes: &[u8]) -> Option<EchoMessage> {
        let (header, payload) = bytes.split_first_chunk::<HEADER>()?;
        let [actual, code, _, _, id_high, id_low, sequence_high, sequence_low] = *header;
        (actual == kind && code == 0).then(|| EchoMessage {
            identifier: u16::from_be_bytes([id_high, id_low]),
            sequence: u16::from_be_bytes([sequence_high, sequence_low]),
            nonce: payload.first_chunk().map(|nonce| u64::from_be_bytes(*nonce)),
        })
    }
}

/// The payload of an IPv4 packet; empty if it is truncated.
#[must_use]
pub fn without_ip_header(packet: &[u8]) -> &[u8] {
    let length = packet.first().map_or(0, |first| usize::from(first & 0x0f) * 4);
    packet.get(length..).unwrap_or_default()
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let (pairs, rest) = bytes.as_chunks::<2>();
    let last = rest.first().map_or(0, |&byte| u32::from(byte) << 8);
    let mut sum = pairs.iter().fold(last, |sum, &pair| sum + u32::from(u16::from_be_bytes(pair)));
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !((sum & 0xffff) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{Icmpv4Slice, Icmpv4Type};
    use proptest::prelude::*;

    #[test]
    fn a_request_is_what_a_decoder_takes_it_for() {
        let packet = request(false, 0x1234, ProbeId(0xabc_def0), 77);
        let slice = Icmpv4Slice::from_slice(&packet).unwrap();
        let Icmpv4Type::EchoRequest(echo) = slice.icmp_type() else { panic!("{slice:?}") };
        assert_eq!((echo.id, echo.seq), (0x1234, 0xdef0));
        assert_eq!(slice.icmp_type().calc_checksum(slice.payload()), slice.checksum());
        let seen = EchoMessage::read(request_type(false), &packet).unwrap();
        assert_eq!(seen, EchoMessage { identifier: 0x1234, sequence: 0xdef0, nonce: Some(77) });
        assert_eq!(EchoMessage::read(reply_type(false), &packet), None);
        assert_eq!(EchoMessage::read(request_type(true), &request(true, 1, ProbeId(2), 3)).unwrap().nonce, Some(3));
        // As little as a router has to return.
        assert_eq!(EchoMessage::read(request_type(false), &packet[..8]).unwrap().nonce, None);
        assert_eq!(EchoMessage::read(request_type(false), &packet[..7]), None);
    }

    #[test]
    fn the_ip_header_may_have_options() {
        assert_eq!(without_ip_header(&[&[0x46; 24][..], &[1, 2]].concat()), [1, 2]);
        assert_eq!(without_ip_header(&[0x4f, 0]), [0; 0]);
        assert_eq!(without_ip_header(&[]), [0; 0]);
    }

    #[test]
    fn what_is_missing_is_said_and_how_to_get_it() {
        let words = no_socket_message(Some("1\t0\n"));
        assert!(words.contains("net.ipv4.ping_group_range, which is \"1 0\""), "{words}");
        assert!(words.contains("CAP_NET_RAW, which is missing"), "{words}");
        assert!(no_socket_message(None).contains("which is unreadable"));
    }

    proptest! {
        #[test]
        fn nothing_received_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = EchoMessage::read(0, without_ip_header(&bytes));
            let _ = checksum(&bytes);
        }
    }
}
