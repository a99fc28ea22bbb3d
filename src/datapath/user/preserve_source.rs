//! A worker's raw socket for `preserve_source`: sends datagrams with the address of their sender.
//!
//! ICMP errors about such datagrams go to their senders, as if a router had forwarded them. Only what this host refuses
//! to send is known here.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{Ipv4RecvErr, Ipv6RecvErr, SndBufForce};
use socket2::{Domain, Protocol, Socket, Type};

use super::mmsg::{Batch, next_report};
use super::send_queue::{MAX_BUFFER_WAIT, NO_WAIT_PERIOD, SEND_BUFFER, mark_fragmentable};
use super::steer;
use crate::net::Family;

/// The address that the IPv4 socket is bound to. Nothing is sent there, so the socket receives no packets. An unbound
/// raw socket would receive a copy of every UDP packet that arrives at the host.
const NOWHERE_V4: Ipv4Addr = Ipv4Addr::new(127, 117, 102, 1);
/// The same for IPv6: an address of the discard prefix (RFC 6666).
const NOWHERE_V6: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0x7566, 1);

/// One datagram of the batch's raw list.
#[derive(Debug, Clone, Copy)]
pub struct RawSendEntry {
    /// The downstream.
    pub target: u32,
    /// The datagram of which it is a copy, under `replicate`.
    pub original: u32,
    /// UDP payload in bytes.
    pub bytes: u32,
}

/// A worker's raw socket, and what is known about the datagrams in the batch's raw list.
#[derive(Debug)]
pub struct PreserveSourceSocket {
    socket: Socket,
    entries: Vec<RawSendEntry>,
    no_wait_until: Option<Instant>,
}

impl PreserveSourceSocket {
    /// Opens the socket, for lists of up to `room` datagrams.
    ///
    /// # Errors
    /// Without `CAP_NET_RAW`; the error says how to fix it.
    pub fn open(family: Family, room: usize) -> Result<Self> {
        let (domain, nowhere): (_, IpAddr) = match family {
            Family::V4 => (Domain::IPV4, NOWHERE_V4.into()),
            Family::V6 => (Domain::IPV6, NOWHERE_V6.into()),
        };
        let socket =
            Socket::new(domain, Type::RAW.nonblocking(), Some(Protocol::UDP)).map_err(|error| denied(&error))?;
        // First of all, before anything can arrive.
        steer::drop_new_datagrams(&socket)?;
        match family {
            Family::V4 => {
                socket.set_ip_transparent_v4(true).map_err(|error| denied(&error))?;
                mark_fragmentable(&socket)?;
                setsockopt(&socket, Ipv4RecvErr, &true).context("cannot set IP_RECVERR")?;
            }
            Family::V6 => {
                socket.set_ip_transparent_v6(true).map_err(|error| denied(&error))?;
                setsockopt(&socket, Ipv6RecvErr, &true).context("cannot set IPV6_RECVERR")?;
            }
        }
        socket
            .bind(&SocketAddr::new(nowhere, 0).into())
            .with_context(|| format!("cannot bind a raw socket to {nowhere}"))?;
        if setsockopt(&socket, SndBufForce, &SEND_BUFFER).is_err() {
            // Without CAP_NET_ADMIN the kernel gives what net.core.wmem_max allows.
            socket.set_send_buffer_size(SEND_BUFFER).context("cannot set SO_SNDBUF")?;
        }
        Ok(PreserveSourceSocket { socket, entries: Vec::with_capacity(room), no_wait_until: None })
    }

    /// Records the datagram that was just added to the batch's raw list.
    pub fn add(&mut self, entry: RawSendEntry) {
        self.entries.push(entry);
    }

    /// Sends the batch's raw list, reports the result of each datagram, and empties the list.
    pub fn flush(&mut self, batch: &mut Batch, mut on_result: impl FnMut(RawSendEntry, Result<(), &io::Error>)) {
        let mut at = 0;
        while at < self.entries.len() {
            match batch.send_raw(at, self.socket.as_fd()) {
                Ok(sent) => {
                    self.entries[at..at + sent].iter().for_each(|&entry| on_result(entry, Ok(())));
                    at += sent;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.wait_for_room() => {}
                Err(error) => {
                    on_result(self.entries[at], Err(&error));
                    at += 1;
                    // The kernel also puts what it refuses into the error queue.
                    while next_report(self.socket.as_fd()).is_some() {}
                }
            }
        }
        self.entries.clear();
        batch.clear_raw();
    }

    /// Waits until half of a full send buffer is free. False if that is unlikely to happen.
    fn wait_for_room(&mut self) -> bool {
        let start = Instant::now();
        if self.no_wait_until.is_some_and(|until| start < until) {
            return false;
        }
        let mut sockets = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
        let timeout = PollTimeout::try_from(MAX_BUFFER_WAIT).unwrap_or(PollTimeout::ZERO);
        // A failed poll is treated like one that timed out.
        let _ = poll(&mut sockets, timeout);
        let ready = sockets[0].revents().is_some_and(|ready| ready.contains(PollFlags::POLLOUT));
        self.no_wait_until = (!ready).then(|| Instant::now() + NO_WAIT_PERIOD);
        ready
    }
}

/// True if a datagram from `from` can be sent to `to` with its source address. An address that is valid on one link or
/// one host only cannot be used elsewhere.
pub fn can_preserve_source(from: IpAddr, to: IpAddr) -> bool {
    from.is_ipv4() == to.is_ipv4()
        && !from.is_unspecified()
        && !matches!(from, IpAddr::V6(v6) if v6.is_unicast_link_local())
        && (!from.is_loopback() || to.is_loopback())
}

fn denied(error: &io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::PermissionDenied => anyhow!(
            "settings.preserve_source needs CAP_NET_RAW, to send with the senders' addresses; grant it, or remove the key \
             (receivers then see this host's address)"
        ),
        _ => anyhow!("cannot open a raw socket, which settings.preserve_source needs: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_one_link_or_one_host_are_not_taken_elsewhere() {
        let keeps = |from: &str, to: &str| can_preserve_source(from.parse().unwrap(), to.parse().unwrap());
        assert!(keeps("192.0.2.1", "198.51.100.1"));
        assert!(keeps("2001:db8::1", "2001:db8::2"));
        assert!(keeps("127.0.0.1", "127.0.0.2"));
        assert!(keeps("192.0.2.1", "127.0.0.1"));
        assert!(!keeps("127.0.0.1", "192.0.2.1"));
        assert!(!keeps("fe80::1", "2001:db8::2"));
        assert!(!keeps("0.0.0.0", "192.0.2.1"));
        assert!(!keeps("192.0.2.1", "2001:db8::2"));
    }
}
