//! A socket for all probes of one kind. It receives replies and, through the error queue (`IP_RECVERR`), ICMP errors with the
//! destination and the first bytes of the datagram concerned.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn6, SockaddrStorage, recvmsg, setsockopt, sockopt};
use socket2::Socket;

use super::errors::{SendError, send_error};
use crate::health::model::{ProbeFailure, ProbeFailureKind, canonical_address};

/// The requested receive buffer in bytes: room for the replies to a thousand probes.
const RECEIVE_BUFFER: usize = 1024 * 1024;

/// The most messages read per call, so that a flood at this socket cannot block the event loop.
const READS: usize = 1024;

/// The most attempts to send a datagram: `sendto` may report the pending error of an earlier one instead of sending.
const SENDS: usize = 3;

/// An unconnected socket for datagrams of one address family.
#[derive(Debug)]
pub struct ProbeSocket {
    socket: Socket,
    buffer: Vec<u8>,
    control: Vec<u8>,
}

/// A received message. Addresses are [`canonical_address`].
#[derive(Debug)]
pub enum Received<'a> {
    /// A datagram; for raw IPv4 sockets, with its IP header.
    Datagram {
        /// The sender.
        from: SocketAddr,
        /// The payload.
        bytes: &'a [u8],
    },
    /// An ICMP error about a datagram sent from this socket.
    IcmpError {
        /// The destination of that datagram.
        to: SocketAddr,
        /// As much of its payload as the ICMP message returns, without the IP and UDP headers.
        quoted: &'a [u8],
        /// The reported failure.
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
        // `RcvBufForce` exceeds `net.core.rmem_max` but needs CAP_NET_ADMIN.
        if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
        }
        let control = nix::cmsg_space!(libc::sock_extended_err, SockaddrIn6);
        Ok(ProbeSocket { socket, buffer: vec![0; 2048], control })
    }

    /// The descriptor, to register for readability.
    pub fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Sends one datagram.
    pub fn send(&self, bytes: &[u8], to: SocketAddr) -> Result<(), SendError> {
        let mut sends = 1;
        loop {
            match self.socket.send_to(bytes, &to.into()) {
                Ok(_) => return Ok(()),
                // It may be the error of another datagram, which `receive` reports with the right address. Such an error
                // comes once; an error of this datagram comes each time.
                Err(error) if sends < SENDS && error.kind() != io::ErrorKind::WouldBlock => {
                    tracing::trace!(%to, %error, "sending a health probe again");
                    sends += 1;
                }
                Err(error) => return Err(send_error(&error)),
            }
        }
    }

    /// Passes received messages to `take`. True if there may be more; then call it again soon.
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

    /// False if there is nothing to read.
    fn receive_one(&mut self, flags: MsgFlags, take: &mut impl FnMut(Received<'_>)) -> bool {
        let fd = self.socket.as_raw_fd();
        let mut parts = [IoSliceMut::new(&mut self.buffer)];
        let (length, address, bounced) =
            match recvmsg::<SockaddrStorage>(fd, &mut parts, Some(&mut self.control), flags) {
                Ok(message) => {
                    (message.bytes, message.address, message.cmsgs().ok().and_then(|mut all| all.find_map(bounce)))
                }
                Err(Errno::EAGAIN) => return false,
                // Interrupted, or a pending error, for which the error queue has the details.
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

/// The failure that an entry of the error queue reports about its datagram's destination, if any.
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
    // There is no reporting address if this host itself gave up.
    let by = by.filter(|by| !by.is_unspecified()).map(|by| format!(", says {by}")).unwrap_or_default();
    Some(ProbeFailure::new(kind, format!("{what}{by}")))
}

/// The failure of the destination that an ICMP message reports. None if it reports none: a packet that was too big, or an
/// error of this host.
fn verdict(origin: u8, kind: u8, code: u8, errno: Errno) -> Option<(ProbeFailureKind, &'static str)> {
    const V4: u8 = libc::SO_EE_ORIGIN_ICMP;
    const V6: u8 = libc::SO_EE_ORIGIN_ICMP6;
    Some(match (origin, kind, code) {
        // In IPv4 "fragmentation needed" is a code of "destination unreachable".
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
