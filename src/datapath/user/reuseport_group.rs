//! A listener's sockets: bound to one address (`SO_REUSEPORT`), one for each worker.
//!
//! The sockets outlive the workers. When a listener's settings change, its workers are replaced, and the sockets hold
//! what arrives meanwhile, so nothing is lost. The order of the sockets is the kernel's order. Only the last ones are
//! ever closed, so an index always means the same socket.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use nix::sys::socket::sockopt::{GetStruct, Ipv4PacketInfo, Ipv6RecvPacketInfo, RcvBufForce, UdpGroSegment};
use nix::sys::socket::{getsockopt, setsockopt};
use socket2::{Domain, InterfaceIndexOrAddress, Protocol, Socket, Type};
use tracing::{debug, info, warn};

use super::mmsg::wait_for_network_stack;
use super::steer;
use crate::model::{HashOn, Policy};
use crate::net::is_link_scoped_multicast;
use crate::plan::LinkRef;

/// `SO_MEMINFO` of `asm-generic/socket.h`.
const MEMINFO: libc::c_int = 55;

/// A socket's memory and drop counters, in the order of `SK_MEMINFO_*`.
#[derive(Clone, Copy)]
struct MemInfo;

nix::getsockopt_impl!(
    MemInfo,
    libc::SOL_SOCKET,
    MEMINFO,
    [u32; libc::SK_MEMINFO_DROPS as usize + 1],
    GetStruct<[u32; libc::SK_MEMINFO_DROPS as usize + 1]>
);

/// The sockets of one listener.
#[derive(Debug)]
pub struct ReuseportGroup {
    address: SocketAddr,
    members: Vec<GroupSocket>,
    default_buffer: usize,
    /// The address need not belong to the host (`IP_FREEBIND`).
    freebind: bool,
    /// The interfaces on which the multicast group has been joined.
    joined: Vec<LinkRef>,
    /// New datagrams are dropped by a filter; the kernel counts these as drops too.
    dropping_new: bool,
}

#[derive(Debug)]
struct GroupSocket {
    socket: Arc<Socket>,
    /// The kernel's 32-bit drop counter when it was last read; it starts at 0 and wraps.
    drops: u32,
}

impl GroupSocket {
    /// Messages that the kernel dropped at this socket since the last call; with GRO, a message may hold several
    /// datagrams. Nearly all were dropped because the receive buffer was full. The counter includes bad UDP checksums.
    fn new_drops(&mut self) -> u64 {
        let Ok(info) = getsockopt(&*self.socket, MemInfo) else { return 0 };
        let now = info[libc::SK_MEMINFO_DROPS as usize];
        let new = now.wrapping_sub(self.drops);
        self.drops = now;
        u64::from(new)
    }
}

impl ReuseportGroup {
    /// Binds one socket to the address; port 0 means any free port.
    ///
    /// The socket is bound without `SO_REUSEPORT`. With it, the kernel would let another program of the same user bind
    /// the same address, and each would get some of the datagrams. `shares_address` says that the address overlaps with
    /// that of another listener of this daemon which is about to go; then `SO_REUSEPORT` is needed.
    ///
    /// `freebind` allows an address that no interface has: the TC program sees its datagrams before the host looks for
    /// the address. Load balancers have such addresses when they only answer ARP for them.
    ///
    /// # Errors
    /// Names the address, the reason and the fix.
    pub fn bind(address: SocketAddr, shares_address: bool, freebind: bool) -> Result<Self> {
        let socket = bound(address, shares_address, freebind).map_err(|error| bind_error(address, &error))?;
        let default_buffer = socket.recv_buffer_size()?;
        let address = socket.local_addr()?.as_socket().context("a bound socket has no address")?;
        Ok(ReuseportGroup {
            address,
            members: vec![GroupSocket { socket: Arc::new(socket), drops: 0 }],
            default_buffer,
            freebind,
            joined: Vec::new(),
            dropping_new: false,
        })
    }

    /// Joins the multicast group on these interfaces and leaves it on all others.
    ///
    /// There is one socket then, because each of several would receive every datagram.
    ///
    /// # Errors
    /// Names the interface, the reason and the fix. The group has been joined on the interfaces before it.
    pub fn join(&mut self, links: &[LinkRef]) -> Result<()> {
        let Some(member) = self.members.first() else { return Ok(()) };
        for link in self.joined.extract_if(.., |link| !links.contains(link)) {
            // If the interface is gone, so is the membership.
            let _ = membership(&member.socket, self.address.ip(), &link, false);
        }
        for link in links {
            if !self.joined.contains(link) {
                membership(&member.socket, self.address.ip(), link, true)
                    .map_err(|error| join_error(self.address.ip(), link, &error))?;
                info!(group = %self.address.ip(), interface = link.name, "joined multicast group");
                self.joined.push(link.clone());
            }
        }
        Ok(())
    }

    /// The address the sockets are bound to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many sockets there are.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// The sockets, in the order of the workers.
    pub fn sockets(&self) -> Vec<Arc<Socket>> {
        self.members.iter().map(|member| Arc::clone(&member.socket)).collect()
    }

    /// Lets other sockets of this daemon bind to an address that overlaps with this group's.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn allow_sharing(&self) -> Result<()> {
        for member in &self.members {
            member.socket.set_reuse_port(true).context("cannot set SO_REUSEPORT")?;
        }
        Ok(())
    }

    /// Binds more sockets until there are `count`. On failure the group is unchanged.
    ///
    /// # Errors
    /// As for [`ReuseportGroup::bind`].
    pub fn grow(&mut self, count: usize) -> Result<()> {
        let before = self.members.len();
        if before >= count {
            return Ok(());
        }
        self.allow_sharing()?;
        for _ in before..count {
            match bound(self.address, true, self.freebind) {
                Ok(socket) => self.members.push(GroupSocket { socket: Arc::new(socket), drops: 0 }),
                Err(error) => {
                    self.members.truncate(before);
                    return Err(bind_error(self.address, &error));
                }
            }
        }
        Ok(())
    }

    /// Switches GRO: the kernel may deliver datagrams of one sender that arrived together as one message, which saves
    /// it most of its work. It then joins them before the TC program sees them, which would forward all of them to one
    /// downstream. So only listeners without the program may use it.
    pub fn set_gro(&self, yes: bool) {
        for member in &self.members {
            if let Err(errno) = setsockopt(&*member.socket, UdpGroSegment, &yes) {
                // Linux before 5.0 does not have this option.
                debug!(%errno, "cannot set UDP_GRO: each datagram is received by itself");
            }
        }
    }

    /// Makes the kernel select among the sockets as the policy demands, and deliver the addresses that the policy
    /// needs.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn apply_steering(&self, policy: Policy) -> Result<()> {
        if policy == Policy::Hash(HashOn::Flow) && self.address.ip().is_unspecified() {
            for member in &self.members {
                enable_destination_info(&member.socket)?;
            }
        }
        let first = &*self.members[0].socket;
        if self.members.len() == 1 {
            return Ok(());
        }
        if policy.keeps_sender_order() {
            steer::hash_by_sender(first)
        } else {
            steer::spread_randomly(first, self.width())
        }
    }

    /// Keeps new datagrams away from all but the first `count` sockets, so that the others can be drained and closed.
    /// Datagrams that were on their way have arrived when this returns.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn restrict_to(&self, policy: Policy, count: usize) -> Result<()> {
        // The kernel's hash cannot exclude sockets. A single socket keeps each sender's order as well.
        let first = if policy.keeps_sender_order() { 1 } else { u32::try_from(count)? };
        steer::spread_randomly(&*self.members[0].socket, first)?;
        wait_for_network_stack();
        Ok(())
    }

    fn width(&self) -> u32 {
        u32::try_from(self.members.len()).unwrap_or(u32::MAX)
    }

    /// Closes all but the first `count` sockets, last first. Returns their dropped messages since the last reading.
    pub fn shrink(&mut self, count: usize) -> u64 {
        let mut drops = 0;
        while self.members.len() > count {
            drops += self.members.pop().map_or(0, |mut member| member.new_drops());
        }
        drops
    }

    /// Messages that the kernel dropped at these sockets since the last call; 0 after
    /// [`ReuseportGroup::drop_new_datagrams`].
    pub fn new_drops(&mut self) -> u64 {
        if self.dropping_new {
            return 0;
        }
        self.members.iter_mut().map(GroupSocket::new_drops).sum()
    }

    /// Drops what arrives from now on. Queued datagrams stay. Returns the messages dropped before, and whether the
    /// kernel accepted the filter.
    pub fn drop_new_datagrams(&mut self) -> (u64, Result<()>) {
        // Read first, because datagrams that the filter drops came after the end and do not count.
        let drops = self.new_drops();
        self.dropping_new = true;
        (drops, self.members.iter().try_for_each(|member| steer::drop_new_datagrams(&member.socket)))
    }

    /// Sets the receive buffer of every socket, in bytes; none restores the host's default.
    pub fn set_receive_buffer(&self, listener: &str, bytes: Option<u32>) {
        let asked = bytes.map_or(self.default_buffer / 2, |bytes| bytes as usize);
        let granted = self.members.iter().filter_map(|member| receive_buffer(&member.socket, asked).ok()).min();
        if let Some(granted) = granted
            && granted < asked
        {
            warn!(
                listener,
                asked,
                granted,
                "receive buffer is smaller than recv_buf_size: raise net.core.rmem_max or grant CAP_NET_ADMIN"
            );
        }
    }
}

/// Requests a receive buffer and returns the granted size, in bytes as passed to the kernel.
fn receive_buffer(socket: &Socket, bytes: usize) -> Result<usize> {
    // The first ignores net.core.rmem_max and needs CAP_NET_ADMIN; the second is limited silently.
    if setsockopt(socket, RcvBufForce, &bytes).is_err() {
        socket.set_recv_buffer_size(bytes)?;
    }
    // The kernel doubles the requested size for its own overhead, and reports the double.
    Ok(socket.recv_buffer_size()? / 2)
}

/// Makes the kernel deliver each datagram's destination address.
fn enable_destination_info(socket: &Socket) -> Result<()> {
    match socket.domain()? {
        Domain::IPV4 => setsockopt(socket, Ipv4PacketInfo, &true).context("cannot set IP_PKTINFO"),
        _ => setsockopt(socket, Ipv6RecvPacketInfo, &true).context("cannot set IPV6_RECVPKTINFO"),
    }
}

fn bound(address: SocketAddr, shared: bool, freebind: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if address.ip().is_multicast() {
        // With SO_REUSEADDR, every socket of the group receives every datagram, so sharing takes nothing from other
        // programs. The option below restricts the socket to interfaces on which it has joined the group itself.
        socket.set_reuse_address(true)?;
        match address {
            SocketAddr::V4(_) => socket.set_multicast_all_v4(false)?,
            SocketAddr::V6(_) => socket.set_multicast_all_v6(false)?,
        }
    }
    if shared {
        socket.set_reuse_port(true)?;
    }
    if freebind {
        match address {
            SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
            SocketAddr::V6(_) => socket.set_freebind_v6(true)?,
        }
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Joins a multicast group on an interface, or leaves it.
fn membership(socket: &Socket, group: IpAddr, link: &LinkRef, join: bool) -> io::Result<()> {
    let index = InterfaceIndexOrAddress::Index(link.index);
    match (group, join) {
        (IpAddr::V4(v4), true) => socket.join_multicast_v4_n(&v4, &index),
        (IpAddr::V4(v4), false) => socket.leave_multicast_v4_n(&v4, &index),
        (IpAddr::V6(v6), true) => socket.join_multicast_v6(&v6, link.index),
        (IpAddr::V6(v6), false) => socket.leave_multicast_v6(&v6, link.index),
    }
}

fn join_error(group: IpAddr, link: &LinkRef, error: &io::Error) -> anyhow::Error {
    let name = &link.name;
    match error.raw_os_error() {
        Some(libc::ENOBUFS) => anyhow!(
            "cannot join {group} on {name}: this host has joined as many groups as net.ipv4.igmp_max_memberships or \
             net.ipv6.mld_max_msf allow; raise it"
        ),
        _ => anyhow!("cannot join {group} on {name}: {error}"),
    }
}

fn bind_error(address: SocketAddr, error: &io::Error) -> anyhow::Error {
    let port = address.port();
    match error.kind() {
        io::ErrorKind::InvalidInput if is_link_scoped_multicast(address.ip()) => {
            anyhow!("cannot bind {address}: its interface does not exist (see `ip link`)")
        }
        io::ErrorKind::AddrInUse => anyhow!(
            "cannot bind {address}: address already in use; another program listens there (see `ss -ulpn sport = :{port}`)"
        ),
        io::ErrorKind::PermissionDenied if port < 1024 => anyhow!(
            "cannot bind {address}: permission denied; a port below 1024 needs CAP_NET_BIND_SERVICE (or a lower \
             net.ipv4.ip_unprivileged_port_start)"
        ),
        io::ErrorKind::AddrNotAvailable => {
            anyhow!("cannot bind {address}: no interface of this host has this address (see `ip address`)")
        }
        _ => anyhow!("cannot bind {address}: {error}"),
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Bytes of memory that a socket's queued datagrams take.
    pub fn queued(socket: &impl std::os::fd::AsFd) -> u32 {
        getsockopt(socket, MemInfo).unwrap()[libc::SK_MEMINFO_RMEM_ALLOC as usize]
    }

    use std::net::UdpSocket;
    use std::time::{Duration, Instant};

    const LOCALHOST: &str = "127.0.0.1:0";

    fn group(count: usize) -> ReuseportGroup {
        let mut group = ReuseportGroup::bind(LOCALHOST.parse().unwrap(), false, false).unwrap();
        group.grow(count).unwrap();
        group
    }

    /// Sends datagrams from one socket and returns how many each socket of the group received, once all have arrived.
    fn one_sender(group: &ReuseportGroup, datagrams: u32) -> Vec<u32> {
        let sender = UdpSocket::bind(LOCALHOST).unwrap();
        let mut counts = vec![0; group.len()];
        let guard = Instant::now() + Duration::from_secs(10);
        for sent in 1..=datagrams {
            sender.send_to(b"x", group.address()).unwrap();
            while counts.iter().sum::<u32>() < sent {
                assert!(Instant::now() < guard, "a datagram did not arrive");
                for (count, member) in counts.iter_mut().zip(&group.members) {
                    while member.socket.recv(&mut [std::mem::MaybeUninit::uninit(); 8]).is_ok() {
                        *count += 1;
                    }
                }
            }
        }
        counts
    }

    #[test]
    fn one_senders_datagrams_reach_every_socket_under_round_robin() {
        let group = group(3);
        group.apply_steering(Policy::RoundRobin).unwrap();
        assert!(one_sender(&group, 400).iter().all(|&count| count > 0));
    }

    #[test]
    fn without_the_program_a_sender_stays_on_one_socket() {
        let group = group(3);
        steer::hash_by_sender(&*group.members[0].socket).unwrap();
        group.apply_steering(Policy::RoundRobin).unwrap();
        steer::hash_by_sender(&*group.members[0].socket).unwrap();
        let mut counts = one_sender(&group, 100);
        counts.sort_unstable();
        assert_eq!(counts, [0, 0, 100]);
    }

    #[test]
    fn sockets_about_to_go_get_nothing_and_the_rest_carry_on() {
        let mut group = group(4);
        group.apply_steering(Policy::RoundRobin).unwrap();
        group.restrict_to(Policy::RoundRobin, 2).unwrap();
        let counts = one_sender(&group, 200);
        assert_eq!(counts[2..], [0, 0]);
        assert!(counts[0] > 0 && counts[1] > 0);
        assert_eq!(group.shrink(2), 0);
        group.apply_steering(Policy::RoundRobin).unwrap();
        assert!(one_sender(&group, 200).iter().all(|&count| count > 0));
        group.grow(5).unwrap();
        group.apply_steering(Policy::RoundRobin).unwrap();
        assert!(one_sender(&group, 400).iter().all(|&count| count > 0));
        group.restrict_to(Policy::RoundRobin, 1).unwrap();
        assert_eq!(one_sender(&group, 100), [100, 0, 0, 0, 0]);
    }

    #[test]
    fn an_address_in_use_is_never_shared_with_another_program() {
        let other = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
        // Even a socket with SO_REUSEPORT.
        other.set_reuse_port(true).unwrap();
        other.bind(&LOCALHOST.parse::<SocketAddr>().unwrap().into()).unwrap();
        let address = other.local_addr().unwrap().as_socket().unwrap();
        let error = ReuseportGroup::bind(address, false, false).unwrap_err().to_string();
        let port = address.port();
        assert_eq!(
            error,
            format!(
                "cannot bind {address}: address already in use; another program listens there \
                 (see `ss -ulpn sport = :{port}`)"
            )
        );
        assert!(ReuseportGroup::bind(address, true, false).is_ok());
    }

    #[test]
    fn bind_errors_name_the_fix() {
        let error = |address: &str, errno| {
            bind_error(address.parse().unwrap(), &io::Error::from_raw_os_error(errno)).to_string()
        };
        assert!(error("0.0.0.0:514", libc::EACCES).contains("needs CAP_NET_BIND_SERVICE"));
        assert!(error("0.0.0.0:1514", libc::EACCES).contains("Permission denied"));
        assert!(error("192.0.2.1:514", libc::EADDRNOTAVAIL).contains("no interface of this host has this address"));
        assert!(
            ReuseportGroup::bind("192.0.2.1:5514".parse().unwrap(), false, false)
                .unwrap_err()
                .to_string()
                .contains("192.0.2.1:5514")
        );
    }

    #[test]
    fn the_receive_buffer_can_be_set_and_given_back() {
        let group = group(2);
        let size = |group: &ReuseportGroup| group.members[1].socket.recv_buffer_size().unwrap();
        let default = size(&group);
        group.set_receive_buffer("test", Some(65_536));
        assert_eq!(size(&group), 131_072);
        group.set_receive_buffer("test", None);
        assert_eq!(size(&group), default);
    }

    #[test]
    fn drops_are_reported_once_and_not_after_the_end() {
        let mut group = group(1);
        group.set_receive_buffer("test", Some(4096));
        let sender = UdpSocket::bind(LOCALHOST).unwrap();
        for _ in 0..100 {
            sender.send_to(&[0; 500], group.address()).unwrap();
        }
        let queued = |group: &ReuseportGroup| {
            let mut count = 0;
            while group.members[0].socket.recv(&mut [std::mem::MaybeUninit::uninit(); 8]).is_ok() {
                count += 1;
            }
            count
        };
        let guard = Instant::now() + Duration::from_secs(10);
        let (mut taken, mut dropped) = (0, 0);
        // Nothing is received until a datagram has been dropped, so that there is a drop to count.
        while taken + dropped < 100 {
            assert!(Instant::now() < guard, "{taken} taken and {dropped} dropped");
            dropped += group.new_drops();
            if dropped > 0 {
                taken += queued(&group);
            }
        }
        assert!(taken > 0 && dropped > 0);
        assert_eq!((taken + dropped, group.new_drops()), (100, 0));
        let (drops, refused) = group.drop_new_datagrams();
        refused.unwrap();
        sender.send_to(b"late", group.address()).unwrap();
        assert_eq!((drops, group.new_drops(), queued(&group)), (0, 0, 0));
    }
}
