//! A listener's sockets: bound to one address, one for each worker.
//!
//! The sockets outlive the workers. When a listener's settings change, its workers are replaced and the sockets keep
//! what arrives in the meantime, so nothing is lost. The order of the sockets is the order in which the kernel numbers
//! them; only the last are ever taken away, so that a number always means the same socket.

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

/// A socket's memory and drop counts, in the order of `SK_MEMINFO_*`.
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
pub struct Group {
    address: SocketAddr,
    members: Vec<Member>,
    default_buffer: usize,
    /// The address need not be the host's.
    unowned: bool,
    /// Where the multicast group has been joined.
    joined: Vec<LinkRef>,
    /// New datagrams are turned away, which the kernel counts as drops too.
    refusing: bool,
}

#[derive(Debug)]
struct Member {
    socket: Arc<Socket>,
    /// The kernel's 32-bit count of dropped datagrams when it was last read; it starts at 0 and wraps.
    drops: u32,
}

impl Member {
    /// Messages the kernel has dropped at this socket since the last call, each of one datagram or of several that it had
    /// joined. Nearly all of them for lack of room in the receive buffer; the kernel counts bad UDP checksums in the same
    /// place.
    fn new_drops(&mut self) -> u64 {
        let Ok(info) = getsockopt(&*self.socket, MemInfo) else { return 0 };
        let now = info[libc::SK_MEMINFO_DROPS as usize];
        let new = now.wrapping_sub(self.drops);
        self.drops = now;
        u64::from(new)
    }
}

impl Group {
    /// Binds one socket to the address, port 0 standing for any free port.
    ///
    /// It is bound without `SO_REUSEPORT`: with it, the kernel would let us share the address with another program of
    /// the same user, and each would get some of the datagrams. `beside_ours` says that the address overlaps with
    /// one of this program's own, which is about to go; then sharing is what is wanted.
    ///
    /// `unowned` says that no interface need have the address: the TC program meets datagrams for it before the host
    /// asks whose they are, as with the address of a load balancer that only answers ARP for it.
    ///
    /// # Errors
    /// Names the address, the reason and the fix.
    pub fn bind(address: SocketAddr, beside_ours: bool, unowned: bool) -> Result<Self> {
        let socket = bound(address, beside_ours, unowned).map_err(|error| bind_error(address, &error))?;
        let default_buffer = socket.recv_buffer_size()?;
        let address = socket.local_addr()?.as_socket().context("a bound socket has no address")?;
        Ok(Group {
            address,
            members: vec![Member { socket: Arc::new(socket), drops: 0 }],
            default_buffer,
            unowned,
            joined: Vec::new(),
            refusing: false,
        })
    }

    /// Joins the multicast group that the address is on these interfaces, and leaves it on others.
    ///
    /// There is one socket then: several would each get every datagram.
    ///
    /// # Errors
    /// Names the interface, the reason and the fix. The group has been joined on those before it.
    pub fn join(&mut self, links: &[LinkRef]) -> Result<()> {
        let Some(member) = self.members.first() else { return Ok(()) };
        for link in self.joined.extract_if(.., |link| !links.contains(link)) {
            // An interface that is gone has taken its membership along.
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

    /// Lets further sockets of this program bind to an address that overlaps with this group's.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn share(&self) -> Result<()> {
        for member in &self.members {
            member.socket.set_reuse_port(true).context("cannot set SO_REUSEPORT")?;
        }
        Ok(())
    }

    /// Binds further sockets until there are `count`. On failure the group is as before.
    ///
    /// # Errors
    /// As for [`Group::bind`].
    pub fn grow(&mut self, count: usize) -> Result<()> {
        let before = self.members.len();
        if before >= count {
            return Ok(());
        }
        self.share()?;
        for _ in before..count {
            match bound(self.address, true, self.unowned) {
                Ok(socket) => self.members.push(Member { socket: Arc::new(socket), drops: 0 }),
                Err(error) => {
                    self.members.truncate(before);
                    return Err(bind_error(self.address, &error));
                }
            }
        }
        Ok(())
    }

    /// Says whether the kernel may hand over datagrams of one sender that arrived together as one message, which saves it
    /// most of its work. It then joins them before the TC program sees them, too, which would send all of them to one
    /// downstream: only for listeners that have no such program.
    pub fn join_datagrams(&self, yes: bool) {
        for member in &self.members {
            if let Err(errno) = setsockopt(&*member.socket, UdpGroSegment, &yes) {
                // Before Linux 5.0 there is no such option.
                debug!(%errno, "cannot set UDP_GRO: each datagram is received by itself");
            }
        }
    }

    /// Makes the kernel choose among the sockets as the policy demands, and say what the policy needs to know.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn steer(&self, policy: Policy) -> Result<()> {
        if policy == Policy::Hash(HashOn::Flow) && self.address.ip().is_unspecified() {
            for member in &self.members {
                tell_destinations(&member.socket)?;
            }
        }
        let first = &*self.members[0].socket;
        if self.members.len() == 1 {
            return Ok(());
        }
        if policy.keeps_sender_order() { steer::by_sender(first) } else { steer::spread(first, self.width()) }
    }

    /// Keeps new datagrams away from all but the first `count` sockets, so that the rest can be drained and taken away.
    /// Every datagram on its way has arrived when this returns.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn confine(&self, policy: Policy, count: usize) -> Result<()> {
        // The kernel's hash cannot be told to leave sockets out. One socket for all keeps each sender's order as well.
        let first = if policy.keeps_sender_order() { 1 } else { u32::try_from(count)? };
        steer::spread(&*self.members[0].socket, first)?;
        wait_for_network_stack();
        Ok(())
    }

    fn width(&self) -> u32 {
        u32::try_from(self.members.len()).unwrap_or(u32::MAX)
    }

    /// Closes all but the first `count` sockets, last first. Returns the dropped messages they had not yet reported.
    pub fn shrink(&mut self, count: usize) -> u64 {
        let mut drops = 0;
        while self.members.len() > count {
            drops += self.members.pop().map_or(0, |mut member| member.new_drops());
        }
        drops
    }

    /// Messages the kernel has dropped at these sockets since the last call, until they began to turn all away.
    pub fn new_drops(&mut self) -> u64 {
        if self.refusing {
            return 0;
        }
        self.members.iter_mut().map(Member::new_drops).sum()
    }

    /// Turns away what arrives from now on, and reports the messages dropped until then. What is queued stays. The result says
    /// whether the kernel agreed.
    pub fn refuse_all(&mut self) -> (u64, Result<()>) {
        // Drops are read first: those that the program makes are datagrams that come after the end.
        let drops = self.new_drops();
        self.refusing = true;
        (drops, self.members.iter().try_for_each(|member| steer::refuse_all(&member.socket)))
    }

    /// Gives every socket a receive buffer of this many bytes, or the host's default.
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

/// Asks for a receive buffer and says what was granted, in bytes as the kernel's setting counts them.
fn receive_buffer(socket: &Socket, bytes: usize) -> Result<usize> {
    // The first ignores net.core.rmem_max and needs CAP_NET_ADMIN; the second is capped silently.
    if setsockopt(socket, RcvBufForce, &bytes).is_err() {
        socket.set_recv_buffer_size(bytes)?;
    }
    // The kernel doubles what it is asked for, to allow for its own overhead, and reports the double.
    Ok(socket.recv_buffer_size()? / 2)
}

/// Makes the kernel say with each datagram which of the host's addresses it was sent to.
fn tell_destinations(socket: &Socket) -> Result<()> {
    match socket.domain()? {
        Domain::IPV4 => setsockopt(socket, Ipv4PacketInfo, &true).context("cannot set IP_PKTINFO"),
        _ => setsockopt(socket, Ipv6RecvPacketInfo, &true).context("cannot set IPV6_RECVPKTINFO"),
    }
}

fn bound(address: SocketAddr, shared: bool, unowned: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if address.ip().is_multicast() {
        // Every socket of a group gets every datagram, so nobody loses anything to others; and it gets those of the
        // interfaces that it has joined the group on, not of those that others have.
        socket.set_reuse_address(true)?;
        match address {
            SocketAddr::V4(_) => socket.set_multicast_all_v4(false)?,
            SocketAddr::V6(_) => socket.set_multicast_all_v6(false)?,
        }
    }
    if shared {
        socket.set_reuse_port(true)?;
    }
    if unowned {
        match address {
            SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
            SocketAddr::V6(_) => socket.set_freebind_v6(true)?,
        }
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Joins a group on an interface, or leaves it.
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

    fn group(count: usize) -> Group {
        let mut group = Group::bind(LOCALHOST.parse().unwrap(), false, false).unwrap();
        group.grow(count).unwrap();
        group
    }

    /// Sends datagrams from one socket and says how many each member got, once all have arrived.
    fn one_sender(group: &Group, datagrams: u32) -> Vec<u32> {
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
        group.steer(Policy::RoundRobin).unwrap();
        assert!(one_sender(&group, 400).iter().all(|&count| count > 0));
    }

    #[test]
    fn without_the_program_a_sender_stays_on_one_socket() {
        let group = group(3);
        steer::by_sender(&*group.members[0].socket).unwrap();
        group.steer(Policy::RoundRobin).unwrap();
        steer::by_sender(&*group.members[0].socket).unwrap();
        let mut counts = one_sender(&group, 100);
        counts.sort_unstable();
        assert_eq!(counts, [0, 0, 100]);
    }

    #[test]
    fn sockets_about_to_go_get_nothing_and_the_rest_carry_on() {
        let mut group = group(4);
        group.steer(Policy::RoundRobin).unwrap();
        group.confine(Policy::RoundRobin, 2).unwrap();
        let counts = one_sender(&group, 200);
        assert_eq!(counts[2..], [0, 0]);
        assert!(counts[0] > 0 && counts[1] > 0);
        assert_eq!(group.shrink(2), 0);
        group.steer(Policy::RoundRobin).unwrap();
        assert!(one_sender(&group, 200).iter().all(|&count| count > 0));
        group.grow(5).unwrap();
        group.steer(Policy::RoundRobin).unwrap();
        assert!(one_sender(&group, 400).iter().all(|&count| count > 0));
        group.confine(Policy::RoundRobin, 1).unwrap();
        assert_eq!(one_sender(&group, 100), [100, 0, 0, 0, 0]);
    }

    #[test]
    fn an_address_in_use_is_never_shared_with_another_program() {
        let other = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
        // Even one that would let us.
        other.set_reuse_port(true).unwrap();
        other.bind(&LOCALHOST.parse::<SocketAddr>().unwrap().into()).unwrap();
        let address = other.local_addr().unwrap().as_socket().unwrap();
        let error = Group::bind(address, false, false).unwrap_err().to_string();
        let port = address.port();
        assert_eq!(
            error,
            format!(
                "cannot bind {address}: address already in use; another program listens there \
                 (see `ss -ulpn sport = :{port}`)"
            )
        );
        assert!(Group::bind(address, true, false).is_ok());
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
            Group::bind("192.0.2.1:5514".parse().unwrap(), false, false)
                .unwrap_err()
                .to_string()
                .contains("192.0.2.1:5514")
        );
    }

    #[test]
    fn the_receive_buffer_can_be_set_and_given_back() {
        let group = group(2);
        let size = |group: &Group| group.members[1].socket.recv_buffer_size().unwrap();
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
        let queued = |group: &Group| {
            let mut count = 0;
            while group.members[0].socket.recv(&mut [std::mem::MaybeUninit::uninit(); 8]).is_ok() {
                count += 1;
            }
            count
        };
        let guard = Instant::now() + Duration::from_secs(10);
        let (mut taken, mut dropped) = (0, 0);
        // Until it has dropped something nothing is taken, so that there is something to drop.
        while taken + dropped < 100 {
            assert!(Instant::now() < guard, "{taken} taken and {dropped} dropped");
            dropped += group.new_drops();
            if dropped > 0 {
                taken += queued(&group);
            }
        }
        assert!(taken > 0 && dropped > 0);
        assert_eq!((taken + dropped, group.new_drops()), (100, 0));
        let (drops, refused) = group.refuse_all();
        refused.unwrap();
        sender.send_to(b"late", group.address()).unwrap();
        assert_eq!((drops, group.new_drops(), queued(&group)), (0, 0, 0));
    }
}
