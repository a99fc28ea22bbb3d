//! The raw system calls of the userspace datapath; its other modules hold no `unsafe`.
//!
//! [`Batch`] owns the memory that `recvmmsg` writes datagrams into and that `sendmmsg` reads them from, so that a
//! datagram is never copied in between and nothing is allocated once a worker runs. What goes where is decided in
//! `forward`; what an error means, in `lane`.
//!
//! The kernel hands over datagrams of one sender that arrived together as one message, which it has joined (`UDP_GRO`),
//! and takes datagrams for one downstream as one message, which it cuts apart (`UDP_SEGMENT`). [`incoming`] undoes the
//! first, [`outgoing`] prepares the second. [`onbehalf`] is for datagrams that leave in their senders' names.

pub mod incoming;
pub mod onbehalf;
pub mod outgoing;

use std::fmt;
use std::io;
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

use self::incoming::{Incoming, Joined, Piece};
use self::onbehalf::OnBehalf;
use self::outgoing::Outgoing;
use crate::net::Family;

/// How many lists of outgoing datagrams a batch can hold at once, each for a sending socket of its own.
pub const LANES: usize = 2;

/// An address with the port, as the kernel reports it: without scope and flow label.
pub type Endpoint = (IpAddr, u16);

#[derive(Clone, Copy)]
#[repr(C)]
union Storage {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

/// A socket address in the form the kernel takes, encoded once per table rather than once per datagram.
#[derive(Clone, Copy)]
#[repr(C)] // the kernel is given the address of the whole, which must be that of the storage
pub struct RawAddress {
    storage: Storage,
    length: libc::socklen_t,
}

impl RawAddress {
    /// The address as a socket of this family wants it. An IPv6 address stays one for an IPv4 socket, whose sends to
    /// it will fail.
    #[must_use]
    pub fn new(address: SocketAddr, family: Family) -> Self {
        match (address, family) {
            (SocketAddr::V4(v4), Family::V4) => {
                let sin = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: v4.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                    sin_zero: [0; 8],
                };
                RawAddress { storage: Storage { v4: sin }, length: size::<libc::sockaddr_in>() }
            }
            (SocketAddr::V4(v4), Family::V6) => Self::v6(v4.ip().to_ipv6_mapped(), v4.port(), 0),
            (SocketAddr::V6(v6), _) => Self::v6(*v6.ip(), v6.port(), v6.scope_id()),
        }
    }

    fn v6(ip: Ipv6Addr, port: u16, scope: u32) -> Self {
        let sin6 = libc::sockaddr_in6 {
            sin6_family: libc::AF_INET6 as libc::sa_family_t,
            sin6_port: port.to_be(),
            sin6_flowinfo: 0,
            sin6_addr: libc::in6_addr { s6_addr: ip.octets() },
            sin6_scope_id: scope,
        };
        RawAddress { storage: Storage { v6: sin6 }, length: size::<libc::sockaddr_in6>() }
    }

    fn zeroed() -> Self {
        Self::v6(Ipv6Addr::UNSPECIFIED, 0, 0)
    }

    /// The address and port; IPv4 where it is an IPv4 address in mapped form.
    #[must_use]
    pub fn endpoint(&self) -> Endpoint {
        // SAFETY: every bit pattern is valid for both variants and both begin with the family, so either may be read.
        unsafe {
            if libc::c_int::from(self.storage.v4.sin_family) == libc::AF_INET {
                let sin = self.storage.v4;
                (IpAddr::V4(Ipv4Addr::from(sin.sin_addr.s_addr.to_ne_bytes())), u16::from_be(sin.sin_port))
            } else {
                let sin6 = self.storage.v6;
                (Ipv6Addr::from(sin6.sin6_addr.s6_addr).to_canonical(), u16::from_be(sin6.sin6_port))
            }
        }
    }
}

impl fmt::Debug for RawAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.endpoint().fmt(f)
    }
}

/// The size of a small C struct as the kernel wants to hear it.
fn size<T>() -> libc::socklen_t {
    mem::size_of::<T>() as libc::socklen_t
}

/// An anonymous mapping. Pages that no datagram has touched cost nothing.
struct Memory {
    start: NonNull<libc::c_void>,
    length: usize,
}

impl Memory {
    fn new(length: NonZeroUsize) -> io::Result<Self> {
        // SAFETY: a fresh private mapping at an address of the kernel's choosing touches nothing that exists.
        let start = unsafe {
            mmap_anonymous(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)?
        };
        let memory = Memory { start, length: length.get() };
        // Huge pages would make two megabytes resident for one small datagram. A kernel built without them answers
        // EINVAL, which is as good.
        // SAFETY: the range is the mapping just made, and the advice does not change its contents.
        let _ = unsafe { madvise(start, memory.length, MmapAdvise::MADV_NOHUGEPAGE) };
        Ok(memory)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, whole, and nothing points into it once its owner goes.
        let _ = unsafe { munmap(self.start, self.length) };
    }
}

/// The memory and the message headers of one worker.
pub struct Batch {
    incoming: Incoming,
    outgoing: [Outgoing; LANES],
    on_behalf: OnBehalf,
}

// SAFETY: the raw pointers all point into memory that the batch itself owns, and every use of them goes through
// `&mut self`; moving the batch to another thread moves the whole.
unsafe impl Send for Batch {}

impl Batch {
    /// Room to take `count` messages with datagrams of up to `max_length` bytes, and to send `lists` datagrams per lane
    /// at once.
    ///
    /// # Errors
    /// When the kernel has no memory for it.
    pub fn new(count: usize, max_length: usize, lists: usize) -> io::Result<Self> {
        let outgoing = std::array::from_fn(|_| Outgoing::new(lists));
        Ok(Batch { incoming: Incoming::new(count, max_length)?, outgoing, on_behalf: OnBehalf::new(0) })
    }

    /// Makes room for so many datagrams that are sent in the senders' names.
    pub fn make_room_on_behalf(&mut self, datagrams: usize) {
        self.on_behalf = OnBehalf::new(datagrams);
    }

    /// Whether the batches to come say where each message came from and where it was sent to.
    pub fn want_addresses(&mut self, wanted: bool) {
        self.incoming.want_addresses(wanted);
    }

    /// Takes what the socket holds, up to the batch's size, without waiting; the slots from 0 then hold messages. What was
    /// queued for sending is forgotten.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` if the socket is empty.
    pub fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.outgoing.iter_mut().for_each(Outgoing::clear);
        self.on_behalf.clear();
        self.incoming.receive(socket)
    }

    /// The message of this slot.
    #[must_use]
    pub fn message(&self, slot: usize) -> Joined {
        self.incoming.message(slot)
    }

    /// The first bytes of a datagram of this batch, if it has as many.
    #[must_use]
    pub fn first_bytes<const N: usize>(&self, piece: Piece) -> Option<[u8; N]> {
        self.incoming.first_bytes(piece)
    }

    /// Who sent the message of this slot, if the batch was taken with addresses.
    #[must_use]
    pub fn sender(&self, slot: usize) -> Option<Endpoint> {
        self.incoming.sender(slot)
    }

    /// The address that the message of this slot was sent to, if the batch was taken with addresses and the socket has
    /// `IP_PKTINFO` or `IPV6_RECVPKTINFO` set.
    #[must_use]
    pub fn destination(&self, slot: usize) -> Option<IpAddr> {
        self.incoming.destination(slot)
    }

    /// What is queued in a lane from now on is for this address. Datagrams of more than `most_joined` bytes go out one
    /// by one.
    pub fn address(&mut self, lane: usize, to: &RawAddress, most_joined: u32) {
        self.outgoing[lane].address(to, most_joined);
    }

    /// Appends a datagram to a lane's list, which must not be full.
    pub fn queue(&mut self, lane: usize, piece: Piece) {
        self.outgoing[lane].push(self.incoming.vector(piece));
    }

    /// Appends a datagram to the list of those sent in the senders' names, which must not be full. Both addresses must be
    /// of one family.
    pub fn queue_on_behalf(&mut self, from: Endpoint, to: SocketAddr, piece: Piece) {
        let payload = self.incoming.vector(piece);
        // SAFETY: `vector` has checked that it lies within memory that lives as long as the batch; mapped memory is always
        // initialised, and nothing writes there before the next batch is taken.
        unsafe { self.on_behalf.push(from, to, payload) };
    }

    /// True if that list has no room for another.
    #[must_use]
    pub fn full_on_behalf(&self) -> bool {
        self.on_behalf.full()
    }

    /// Empties that list.
    pub fn clear_on_behalf(&mut self) {
        self.on_behalf.clear();
    }

    /// Sends that list from datagram `from`, which must be in it, and says how many were sent: at least one.
    ///
    /// # Errors
    /// What kept the first of them from being sent.
    pub fn send_on_behalf(&mut self, from: usize, socket: BorrowedFd<'_>) -> io::Result<usize> {
        send_all(self.on_behalf.headers(from), socket)
    }

    /// True if a lane's list has no room for another datagram.
    #[must_use]
    pub fn full(&self, lane: usize) -> bool {
        self.outgoing[lane].full()
    }

    /// Empties a lane's list.
    pub fn clear(&mut self, lane: usize) {
        self.outgoing[lane].clear();
    }

    /// How many messages a lane's list holds.
    #[must_use]
    pub fn messages(&self, lane: usize) -> usize {
        self.outgoing[lane].messages()
    }

    /// The numbers of the datagrams in a message of a lane's list.
    #[must_use]
    pub fn datagrams(&self, lane: usize, message: usize) -> Range<usize> {
        self.outgoing[lane].datagrams(message)
    }

    /// The bytes of all datagrams in a message of a lane's list.
    #[must_use]
    pub fn bytes(&self, lane: usize, message: usize) -> u64 {
        self.outgoing[lane].bytes(message)
    }

    /// The length in bytes of a datagram of a lane's list, by its number.
    #[must_use]
    pub fn length(&self, lane: usize, datagram: usize) -> usize {
        self.outgoing[lane].length(datagram)
    }

    /// Sends a lane's list from message `from`, which must be in it, and says how many messages were sent: at least one.
    ///
    /// # Errors
    /// What kept the first of them from being sent.
    pub fn send(&mut self, lane: usize, from: usize, socket: BorrowedFd<'_>) -> io::Result<usize> {
        send_all(self.outgoing[lane].headers(from), socket)
    }

    /// Sends one datagram of a message by itself.
    ///
    /// # Errors
    /// What kept it from being sent.
    pub fn send_apart(
        &mut self,
        lane: usize,
        message: usize,
        datagram: usize,
        socket: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let header = self.outgoing[lane].apart(message, datagram);
        // SAFETY: as for `send`; the header points to one vector and no control message.
        let sent =
            unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Sends messages of a list in a batch, and says how many were sent.
fn send_all(headers: &mut [libc::mmsghdr], socket: BorrowedFd<'_>) -> io::Result<usize> {
    // SAFETY: the headers were filled by their list's `push`: they point to names, control messages and vectors that the
    // list owns, and the vectors to its own memory or to bytes within the memory of `incoming`.
    let sent = unsafe {
        libc::sendmmsg(
            socket.as_raw_fd(),
            headers.as_mut_ptr(),
            headers.len() as _,
            (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as _,
        )
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let queued: Vec<usize> = self.outgoing.iter().map(Outgoing::messages).collect();
        f.debug_struct("Batch").field("received", &self.incoming.received()).field("queued", &queued).finish()
    }
}

/// What came back for a datagram that was sent earlier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// Where the datagram had been sent to.
    pub to: Endpoint,
    /// The kernel's number for what was wrong, such as `ECONNREFUSED`.
    pub errno: i32,
}

/// Takes the next report out of a socket's error queue, if there is one. The socket's pending error goes with the last.
///
/// What the kernel itself refused to send also leaves an entry there; `send` has reported it, so it is skipped.
pub fn next_report(socket: BorrowedFd<'_>) -> Option<Report> {
    loop {
        let mut name = RawAddress::zeroed();
        // Room for the extended error and the address of the host that sent it; u64 for the alignment of the headers.
        let mut control = [0u64; 32];
        // SAFETY: zero is a valid value for every field: integers and nullable pointers.
        let mut header: libc::msghdr = unsafe { mem::zeroed() };
        header.msg_name = (&raw mut name.storage).cast();
        header.msg_namelen = size::<Storage>();
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = mem::size_of_val(&control) as _;
        // SAFETY: name and control are writable for the lengths given and outlive the call; there are no vectors.
        let got =
            unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT) };
        if got < 0 {
            return None;
        }
        // SAFETY: the kernel has just filled the header and the control buffer it points to, and both are still here.
        if let Some(errno) = unsafe { remote_error(&header) } {
            return Some(Report { to: name.endpoint(), errno });
        }
    }
}

/// The error in a message from the error queue, unless this host's own stack put it there.
///
/// # Safety
/// As for [`find`].
unsafe fn remote_error(header: &libc::msghdr) -> Option<i32> {
    // SAFETY: the caller promises what `find` asks for; both messages begin with this struct.
    let error: libc::sock_extended_err = unsafe {
        find(header, libc::SOL_IP, libc::IP_RECVERR).or_else(|| find(header, libc::SOL_IPV6, libc::IPV6_RECVERR))?
    };
    (error.ee_origin != libc::SO_EE_ORIGIN_LOCAL).then_some(error.ee_errno as i32)
}

/// The beginning of the control message of this kind, if there is one that long.
///
/// # Safety
/// The header must have been filled by a successful `recvmsg`, its control buffer must still be there, and every bit
/// pattern must be a valid `T`.
unsafe fn find<T: Copy>(header: &libc::msghdr, level: libc::c_int, kind: libc::c_int) -> Option<T> {
    // SAFETY: the caller's promise is exactly what the CMSG functions ask for.
    let mut control = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !control.is_null() {
        // SAFETY: the CMSG functions return headers within the control buffer, or null; its start is aligned for them.
        let found = unsafe { *control };
        // SAFETY: computes a number.
        let wanted_length = unsafe { libc::CMSG_LEN(size::<T>()) };
        if found.cmsg_level == level && found.cmsg_type == kind && found.cmsg_len as usize >= wanted_length as usize {
            // SAFETY: the message is long enough; it is copied because its data need not be aligned.
            return Some(unsafe { libc::CMSG_DATA(control).cast::<T>().read_unaligned() });
        }
        // SAFETY: as above.
        control = unsafe { libc::CMSG_NXTHDR(header, control) };
    }
    None
}

/// Waits until every CPU has finished what it was doing in the network stack when this was called.
///
/// A changed steering program or filter holds for datagrams that arrive later; one that was already past it may still
/// be on its way into a socket. `MEMBARRIER_CMD_GLOBAL` waits for an RCU grace period, and the stack receives inside
/// read-side critical sections. Where the kernel does not offer it (`nohz_full`), there is no wait.
pub fn wait_for_network_stack() {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: takes three integers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::os::fd::AsFd;
    use std::time::Duration;

    fn socket() -> UdpSocket {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket
    }

    #[test]
    fn addresses_keep_their_meaning_in_either_family() {
        for text in ["192.0.2.7:514", "[2001:db8::1]:8125"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(RawAddress::new(address, Family::V6).endpoint(), (address.ip(), address.port()));
        }
        let address: SocketAddr = "192.0.2.7:514".parse().unwrap();
        assert_eq!(RawAddress::new(address, Family::V4).endpoint(), (address.ip(), 514));
    }

    #[test]
    fn a_batch_takes_and_sends_datagrams_of_every_length() {
        let (from, through, to) = (socket(), socket(), socket());
        let target = RawAddress::new(to.local_addr().unwrap(), Family::V4);
        let mut batch = Batch::new(4, 1000, 4).unwrap();
        assert_eq!(batch.receive(through.as_fd()).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        for length in [0, 1, 1000, 1001, 7] {
            from.send_to(&vec![length as u8; length], through.local_addr().unwrap()).unwrap();
        }
        assert_eq!(batch.receive(through.as_fd()).unwrap(), 4);
        let pieces: Vec<_> = (0..4).flat_map(|slot| batch.message(slot).pieces()).collect();
        let lengths: Vec<_> = pieces.iter().map(|piece| piece.map(Piece::length)).collect();
        assert_eq!(lengths, [Some(0), Some(1), Some(1000), None]);
        assert_eq!((batch.message(3).length(), batch.message(3).count()), (1001, 1));
        batch.address(1, &target, u32::MAX);
        for piece in &pieces[..3] {
            batch.queue(1, piece.unwrap());
        }
        assert_eq!((batch.messages(0), batch.messages(1)), (0, 3));
        assert_eq!(batch.send(1, 1, through.as_fd()).unwrap(), 2);
        let mut buffer = [0; 2000];
        assert_eq!(to.recv(&mut buffer).unwrap(), 1);
        assert_eq!(buffer[0], 1);
        assert_eq!(to.recv(&mut buffer).unwrap(), 1000);
        assert!(buffer[..1000].iter().all(|&byte| byte == 1000u32 as u8));
        assert_eq!(batch.receive(through.as_fd()).unwrap(), 1);
        assert_eq!((batch.message(0).length(), batch.messages(1)), (7, 0));
    }

    #[test]
    fn a_batch_tells_addresses_and_first_bytes_where_wanted() {
        use nix::sys::socket::{setsockopt, sockopt::Ipv4PacketInfo, sockopt::Ipv6RecvPacketInfo};
        let wildcard = UdpSocket::bind("0.0.0.0:0").unwrap();
        setsockopt(&wildcard, Ipv4PacketInfo, &true).unwrap();
        let wildcard6 = UdpSocket::bind("[::]:0").unwrap();
        setsockopt(&wildcard6, Ipv6RecvPacketInfo, &true).unwrap();
        let mut batch = Batch::new(4, 20, 4).unwrap();
        for (through, from, to) in [
            (&wildcard, "127.0.0.1:0", "127.0.0.1"),
            (&wildcard, "127.0.0.1:0", "127.3.2.1"),
            (&wildcard6, "[::1]:0", "::1"),
        ] {
            through.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let from = UdpSocket::bind(from).unwrap();
            let (sender, to): (SocketAddr, IpAddr) = (from.local_addr().unwrap(), to.parse().unwrap());
            for wanted in [true, true, false, true] {
                from.send_to(b"0123456789", (to, through.local_addr().unwrap().port())).unwrap();
                through.peek(&mut [0; 1]).unwrap();
                batch.want_addresses(wanted);
                // Twice the same: the kernel has overwritten how much room there is.
                assert_eq!(batch.receive(through.as_fd()).unwrap(), 1);
                assert_eq!(batch.sender(0), wanted.then_some((sender.ip(), sender.port())));
                assert_eq!(batch.destination(0), wanted.then_some(to));
                let piece = batch.message(0).pieces().next().unwrap().unwrap();
                assert_eq!(batch.first_bytes(piece), Some(*b"0123456789"));
                assert_eq!(batch.first_bytes::<11>(piece), None);
                assert_eq!(batch.first_bytes::<21>(piece), None);
            }
        }
    }

    #[test]
    fn a_refusal_names_the_destination() {
        // On an address where nothing else here binds, so that the port stays closed.
        let closed = UdpSocket::bind("127.0.0.6:0").unwrap().local_addr().unwrap();
        let sender = socket();
        nix::sys::socket::setsockopt(&sender, nix::sys::socket::sockopt::Ipv4RecvErr, &true).unwrap();
        assert_eq!(next_report(sender.as_fd()), None);
        sender.send_to(b"?", closed).unwrap();
        // Blocks until the refusal is back, because nothing else can arrive here.
        let mut nothing = [0; 1];
        assert_eq!(sender.recv(&mut nothing).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let expected = Report { to: (closed.ip(), closed.port()), errno: libc::ECONNREFUSED };
        assert_eq!(next_report(sender.as_fd()), Some(expected));
        assert_eq!(next_report(sender.as_fd()), None);
    }

    #[test]
    fn waiting_for_the_stack_returns() {
        wait_for_network_stack();
    }
}
