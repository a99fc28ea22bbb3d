//! One socket through which all datagrams of a sort go, and what comes back to it: answers, and the kernel's word that
//! a datagram could not be delivered, which it gives with the datagram's destination and beginning (`IP_RECVERR`).

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn6, SockaddrStorage, recvmsg, setsockopt, sockopt};
use socket2::Socket;

use super::errors::{SendError, send_error};
use crate::health::model::{ProbeFailure, ProbeFailureKind, canonical_address};

/// ProbeBytes of receive buffer to ask for: room for the answers of a thousand probes sent at once.
const RECEIVE_BUFFER: usize = 1024 * 1024;

/// Most things read at a time, so that a flood at this socket cannot hold up the event loop.
const READS: usize = 1024;

/// How often a datagram is sent again because an earlier one's error was reported in place of its own success.
const SENDS: usize = 3;

/// An unconnected socket for datagrams of one address family.
#[derive(Debug)]
pub struct ProbeSocket {
    socket: Socket,
    buffer: Vec<u8>,
    control: Vec<u8>,
}

/// Something that has come back. Addresses are [`canonical_address`].
#[derive(Debug)]
pub enum Received<'a> {
    /// A datagram; for raw IPv4 sockets, with its IP header.
    Datagram {
        /// From whom.
        from: SocketAddr,
        /// Its content.
        bytes: &'a [u8],
    },
    /// One of ours has not arrived.
    IcmpError {
        /// Where it was sent.
        to: SocketAddr,
        /// As much of it as the reporting host has returned, from behind the IP (and UDP) header.
        quoted: &'a [u8],
        /// What was reported.
        failure: ProbeFailure,
    },
}

impl ProbeSocket {
    /// Prepares a fresh socket of the given family.
    pub fn new(socket: Socket, v6: bool) -> io::Result<ProbeSocket> {
        socket.set_nonblocking(true)?;
        if v6 {
            setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?;
        } else {
            setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
        }
        // Beyond the host's limit where we may; if not, up to it.
        if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
        }
        let control = nix::cmsg_space!(libc::sock_extended_err, SockaddrIn6);
        Ok(ProbeSocket { socket, buffer: vec![0; 2048], control })
    }

    /// The socket, for options.
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Its descriptor, to be watched for readability.
    pub fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Sends one datagram.
    pub fn send(&self, bytes: &[u8], to: SocketAddr) -> Result<(), SendError> {
        let mut sends = 1;
        loop {
            match self.socket.send_to(bytes, &to.into()) {
                Ok(_) => return Ok(()),
                // What is reported may be another datagram's fate, of which `receive` tells with the right address. It is
                // reported once; what is wrong with this datagram is reported each time.
                Err(error) if sends < SENDS && error.kind() != io::ErrorKind::WouldBlock => {
                    tracing::trace!(%to, %error, "sending a health probe again");
                    sends += 1;
                }
                Err(error) => return Err(send_error(&error)),
            }
        }
    }

    /// Hands over what has come back. True if there may be more: then this is to be called again soon.
    pub fn receive(&mut self, mut take: impl FnMut(Received<'_>)) -> bool {
        for flags in [MsgFlags::MSG_DONTWAIT, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_ERRQUEUE] {
            let mut reads = 0;
            while self.receive_one(flags, &mut take) {
                reads += 1;
                if reads == READS {
                    return true;
                }
            }
        }
        false
    }

    /// False if there is nothing.
    fn receive_one(&mut self, flags: MsgFlags, take: &mut impl FnMut(Received<'_>)) -> bool {
        let fd = self.socket.as_raw_fd();
        let mut parts = [IoSliceMut::new(&mut self.buffer)];
        let (length, address, bounced) =
            match recvmsg::<SockaddrStorage>(fd, &mut parts, Some(&mut self.control), flags) {
                Ok(message) => {
                    (message.bytes, message.address, message.cmsgs().ok().and_then(|mut all| all.find_map(bounce)))
                }
                Err(Errno::EAGAIN) => return false,
                // Interrupted, or the fate of a datagram, which the error queue tells better.
                Err(_) => return true,
            };
        let Some(address) = address.as_ref().and_then(to_std).map(canonical_address) else { return true };
        let bytes = &self.buffer[..length];
        if !flags.contains(MsgFlags::MSG_ERRQUEUE) {
            take(Received::Datagram { from: address, bytes });
        } else if let Some(failure) = bounced {
            take(Received::IcmpError { to: address, quoted: bytes, failure });
        }
        true
    }
}

/// What an entry of the error queue says about its datagram's destination, if anything.
fn bounce(message: ControlMessageOwned) -> Option<ProbeFailure> {
    let (error, by) = match message {
        ControlMessageOwned::Ipv4RecvErr(error, by) => {
            (error, by.map(|by| IpAddr::from(by.sin_addr.s_addr.to_ne_bytes())))
        }
        ControlMessageOwned::Ipv6RecvErr(error, by) => (error, by.map(|by| IpAddr::from(by.sin6_addr.s6_addr))),
        _ => return None,
    };
    let errno = Errno::from_raw(i32::try_from(error.ee_errno).unwrap_or_default());
    let (kind, what) = verdict(error.ee_origin, error.ee_type, error.ee_code, errno)?;
    // The kernel gives no address where it was this host itself that gave up.
    let by = by.filter(|by| !by.is_unspecified()).map(|by| format!(", says {by}")).unwrap_or_default();
    Some(ProbeFailure::new(kind, format!("{what}{by}")))
}

/// What an ICMP message says about the destination of the packet it returns. None where that is nothing: a packet that
/// was too big, or what this host itself could not do.
fn verdict(origin: u8, kind: u8, code: u8, errno: Errno) -> Option<(ProbeFailureKind, &'static str)> {
    const V4: u8 = libc::SO_EE_ORIGIN_ICMP;
    const V6: u8 = libc::SO_EE_ORIGIN_ICMP6;
    Some(match (origin, kind, code) {
        // "Fragmentation needed" is a sort of "unreachable" in IPv4.
        (V4, 3, 4) => return None,
        (V4, 3, 3) | (V6, 1, 4) => (ProbeFailureKind::Refused, "port unreachable"),
        (V4, 3, _) | (V6, 1, _) => match errno {
            Errno::ENETUNREACH => (ProbeFailureKind::Unreachable, "network unreachable"),
            Errno::EHOSTUNREACH => (ProbeFailureKind::Unreachable, "host unreachable"),
            Errno::EACCES => (ProbeFailureKind::Unreachable, "prohibited"),
            _ => (ProbeFailureKind::Unreachable, "unreachable"),
        },
        (V4, 11, _) | (V6, 3, _) => (ProbeFailureKind::Unreachable, "hop limit exceeded on the way"),
        _ => return None,
    })
}

fn to_std(address: &SockaddrStorage) -> Option<SocketAddr> {
    match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
        (Some(v4), _) => Some(SocketAddrV4::from(*v4).into()),
        (_, Some(v6)) => Some(SocketAddrV6::from(*v6).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_concerns_the_destination_counts() {
        let (v4, v6) = (libc::SO_EE_ORIGIN_ICMP, libc::SO_EE_ORIGIN_ICMP6);
        let of = |origin, kind, code, errno| verdict(origin, kind, code, errno).map(|(_, what)| what);
        assert_eq!(of(v4, 3, 3, Errno::ECONNREFUSED), Some("port unreachable"));
        assert_eq!(of(v6, 1, 4, Errno::ECONNREFUSED), Some("port unreachable"));
        assert_eq!(of(v4, 3, 0, Errno::ENETUNREACH), Some("network unreachable"));
        assert_eq!(of(v6, 1, 3, Errno::EHOSTUNREACH), Some("host unreachable"));
        assert_eq!(of(v6, 1, 1, Errno::EACCES), Some("prohibited"));
        assert_eq!(of(v4, 3, 2, Errno::ENOPROTOOPT), Some("unreachable"));
        assert_eq!(of(v4, 11, 0, Errno::EHOSTUNREACH), Some("hop limit exceeded on the way"));
        assert_eq!(of(v4, 3, 4, Errno::EMSGSIZE), None);
        assert_eq!(of(v6, 2, 0, Errno::EMSGSIZE), None);
        assert_eq!(of(v4, 4, 0, Errno::ECONNREFUSED), None);
        assert_eq!(of(libc::SO_EE_ORIGIN_LOCAL, 0, 0, Errno::EMSGSIZE), None);
    }
}
