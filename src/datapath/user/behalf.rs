//! Sending in the senders' names (`preserve_source`): the raw socket of a worker, and whose name may be used.
//!
//! Whatever goes wrong on the way of such a datagram is reported to its sender, as it is when a router forwards it; only what
//! this host itself refuses to send is known here.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{Ipv4RecvErr, Ipv6RecvErr, SndBufForce};
use socket2::{Domain, Protocol, Socket, Type};

use super::lane::{IMPATIENCE, PATIENCE, SEND_BUFFER, mark_fragmentable};
use super::mmsg::{Batch, next_report};
use super::steer;
use crate::net::Family;

/// Where the IPv4 socket is bound: nobody sends there, so the kernel never has a packet for it. An unbound one would be
/// given a copy of every UDP packet that the host receives.
const NOWHERE_V4: Ipv4Addr = Ipv4Addr::new(127, 117, 102, 1);
/// The same for IPv6: of the prefix whose packets are discarded (RFC 6666).
const NOWHERE_V6: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0x7566, 1);

/// One datagram of the list in the batch.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Whom it is for.
    pub target: u32,
    /// Which of the datagrams to replicate it is a copy of.
    pub original: u32,
    /// Its bytes.
    pub bytes: u32,
}

/// A worker's raw socket, and what is known about the datagrams that are about to leave by it.
#[derive(Debug)]
pub struct Behalf {
    socket: Socket,
    entries: Vec<Entry>,
    no_wait_until: Option<Instant>,
}

impl Behalf {
    /// Opens the socket, for lists of so many datagrams.
    ///
    /// # Errors
    /// Without `CAP_NET_RAW`, with the fix.
    pub fn open(family: Family, room: usize) -> Result<Self> {
        let (domain, nowhere): (_, IpAddr) = match family {
            Family::V4 => (Domain::IPV4, NOWHERE_V4.into()),
            Family::V6 => (Domain::IPV6, NOWHERE_V6.into()),
        };
        let socket =
            Socket::new(domain, Type::RAW.nonblocking(), Some(Protocol::UDP)).map_err(|error| denied(&error))?;
        // At once, before anything is queued.
        steer::refuse_all(&socket)?;
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
        Ok(Behalf { socket, entries: Vec::with_capacity(room), no_wait_until: None })
    }

    /// Notes what has just been added to the batch's list.
    pub fn add(&mut self, entry: Entry) {
        self.entries.push(entry);
    }

    /// Sends the batch's list, says of each datagram whether it was sent, and empties the list.
    pub fn flush(&mut self, batch: &mut Batch, mut tell: impl FnMut(Entry, Result<(), &io::Error>)) {
        let mut at = 0;
        while at < self.entries.len() {
            match batch.send_on_behalf(at, self.socket.as_fd()) {
                Ok(sent) => {
                    self.entries[at..at + sent].iter().for_each(|&entry| tell(entry, Ok(())));
                    at += sent;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.wait() => {}
                Err(error) => {
                    tell(self.entries[at], Err(&error));
                    at += 1;
                    // What the kernel refuses it also puts there.
                    while next_report(self.socket.as_fd()).is_some() {}
                }
            }
        }
        self.entries.clear();
        batch.clear_on_behalf();
    }

    /// Waits for a full buffer to empty by half. False if there is no hope of it.
    fn wait(&mut self) -> bool {
        let start = Instant::now();
        if self.no_wait_until.is_some_and(|until| start < until) {
            return false;
        }
        let mut sockets = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
        let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::ZERO);
        // A failed poll is like one that timed out.
        let _ = poll(&mut sockets, timeout);
        let ready = sockets[0].revents().is_some_and(|ready| ready.contains(PollFlags::POLLOUT));
        self.no_wait_until = (!ready).then(|| Instant::now() + IMPATIENCE);
        ready
    }
}

/// True if a datagram from this address can be sent to that one in its sender's name. An address that means something on one
/// link or one host only cannot be used on others.
pub fn can_keep(from: IpAddr, to: IpAddr) -> bool {
    from.is_ipv4() == to.is_ipv4()
        && !from.is_unspecified()
        && !matches!(from, IpAddr::V6(v6) if v6.is_unicast_link_local())
        && (!from.is_loopback() || to.is_loopback())
}

fn denied(error: &io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::PermissionDenied => anyhow!(
            "settings.preserve_source needs CAP_NET_RAW, to send in the senders' names; grant it, or remove the key \
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
        let keeps = |from: &str, to: &str| can_keep(from.parse().unwrap(), to.parse().unwrap());
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
