//! The system calls of the userspace datapath; its other modules contain no `unsafe`.
//!
//! [`Batch`] owns the memory that `recvmmsg` writes datagrams into and that `sendmmsg` reads them from. So datagrams
//! are not copied, and a running worker allocates nothing. `forward` decides what goes where; `send_queue` knows what
//! an error means.
//!
//! The kernel joins datagrams of one sender that arrived together into one message (`UDP_GRO`), which [`incoming`]
//! takes apart again. It segments one message into datagrams for one downstream (`UDP_SEGMENT`), which [`outgoing`]
//! prepares. [`raw_outgoing`] is for datagrams that are sent with their sender's address.

pub mod incoming;
pub mod outgoing;
pub mod raw_outgoing;

use std::fmt;
use std::io;
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

use self::incoming::{GroMessage, IncomingMessages, Segment};
use self::outgoing::OutgoingMessages;
use self::raw_outgoing::RawOutgoing;
use crate::net::Family;

/// The number of send queues, each with its own list of outgoing datagrams in the batch.
pub const SEND_QUEUES: usize = 2;

/// Address and port as the kernel reports them, without scope and flow label.
pub type AddrPort = (IpAddr, u16);

#[derive(Clone, Copy)]
#[repr(C)]
union Storage {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

/// A socket address in the kernel's form, encoded once per table instead of once per datagram.
#[derive(Clone, Copy)]
#[repr(C)] // the kernel is given the address of the whole, which must be that of the storage
pub struct RawAddress {
    storage: Storage,
    length: libc::socklen_t,
}

impl RawAddress {
    /// The address for a socket of this family. An IPv6 address is not converted for an IPv4 socket, so sending to it
    /// fails.
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

    /// The address and port; a mapped IPv6 address is returned as IPv4.
    #[must_use]
    pub fn endpoint(&self) -> AddrPort {
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

/// The size of a small C struct, as the kernel expects it.
fn size<T>() -> libc::socklen_t {
    mem::size_of::<T>() as libc::socklen_t
}

/// An anonymous mapping. Pages that hold no datagram use no memory.
struct MappedMemory {
    start: NonNull<libc::c_void>,
    length: usize,
}

impl MappedMemory {
    fn new(length: NonZeroUsize) -> io::Result<Self> {
        // SAFETY: a fresh private mapping at an address of the kernel's choosing touches nothing that exists.
        let start = unsafe {
            mmap_anonymous(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)?
        };
        let memory = MappedMemory { start, length: length.get() };
        // Huge pages would make two megabytes resident for one small datagram. A kernel built without them answers
        // EINVAL, which is as good.
        // SAFETY: the range is the mapping just made, and the advice does not change its contents.
        let _ = unsafe { madvise(start, memory.length, MmapAdvise::MADV_NOHUGEPAGE) };
        Ok(memory)
    }
}

impl Drop for MappedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, whole, and nothing points into it once its owner goes.
        let _ = unsafe { munmap(self.start, self.length) };
    }
}

/// One worker's memory for datagrams, and its message headers.
pub struct Batch {
    incoming: IncomingMessages,
    outgoing: [OutgoingMessages; SEND_QUEUES],
    raw_outgoing: RawOutgoing,
}

// SAFETY: the raw pointers all point into memory that the batch itself owns, and every use of them goes through
// `&mut self`; moving the batch to another thread moves the whole.
unsafe impl Send for Batch {}

impl Batch {
    /// Room to receive `count` messages with datagrams of up to `max_length` bytes, and to send `lists` datagrams per
    /// send queue at once.
    ///
    /// # Errors
    /// When the kernel refuses the memory.
    pub fn new(count: usize, max_length: usize, lists: usize) -> io::Result<Self> {
        let outgoing = std::array::from_fn(|_| OutgoingMessages::new(lists));
        Ok(Batch { incoming: IncomingMessages::new(count, max_length)?, outgoing, raw_outgoing: RawOutgoing::new(0) })
    }

    /// Allocates the raw list, for this many datagrams.
    pub fn reserve_raw(&mut self, datagrams: usize) {
        self.raw_outgoing = RawOutgoing::new(datagrams);
    }

    /// Whether later batches include each message's source and destination address.
    pub fn want_addresses(&mut self, wanted: bool) {
        self.incoming.want_addresses(wanted);
    }

    /// Receives what the socket holds, up to the batch's size, without waiting. Clears all outgoing lists.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` if the socket is empty.
    pub fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.outgoing.iter_mut().for_each(OutgoingMessages::clear);
        self.raw_outgoing.clear();
        self.incoming.receive(socket)
    }

    /// The message in this slot.
    #[must_use]
    pub fn message(&self, slot: usize) -> GroMessage {
        self.incoming.message(slot)
    }

    /// The first `N` bytes of a datagram of this batch, if it has as many.
    #[must_use]
    pub fn first_bytes<const N: usize>(&self, segment: Segment) -> Option<[u8; N]> {
        self.incoming.first_bytes(segment)
    }

    /// The sender of the message in this slot, if the batch was received with addresses.
    #[must_use]
    pub fn sender(&self, slot: usize) -> Option<AddrPort> {
        self.incoming.sender(slot)
    }

    /// The destination of the message in this slot, if the batch was received with addresses and the socket has
    /// `IP_PKTINFO` or `IPV6_RECVPKTINFO` set.
    #[must_use]
    pub fn destination(&self, slot: usize) -> Option<IpAddr> {
        self.incoming.destination(slot)
    }

    /// Addresses what is queued in a send queue from now on. Datagrams of more than `max_segment` bytes are sent one by
    /// one.
    pub fn address(&mut self, queue: usize, to: &RawAddress, max_segment: u32) {
        self.outgoing[queue].address(to, max_segment);
    }

    /// Appends a datagram to a send queue's list, which must not be full.
    pub fn push(&mut self, queue: usize, segment: Segment) {
        self.outgoing[queue].push(self.incoming.vector(segment));
    }

    /// Appends a datagram to the raw list, which must not be full. Both addresses must be of one family.
    pub fn push_raw(&mut self, from: AddrPort, to: SocketAddr, segment: Segment) {
        let payload = self.incoming.vector(segment);
        // SAFETY: `vector` has checked that it lies within memory that lives as long as the batch; mapped memory is always
        // initialised, and nothing writes there before the next batch is taken.
        unsafe { self.raw_outgoing.push(from, to, payload) };
    }

    /// True if the raw list is full.
    #[must_use]
    pub fn raw_is_full(&self) -> bool {
        self.raw_outgoing.full()
    }

    /// Empties the raw list.
    pub fn clear_raw(&mut self) {
        self.raw_outgoing.clear();
    }

    /// Sends the raw list from datagram `from` on and returns how many were sent: at least one. `from` must be in the
    /// list.
    ///
    /// # Errors
    /// Why the first of them could not be sent.
    pub fn send_raw(&mut self, from: usize, socket: BorrowedFd<'_>) -> io::Result<usize> {
        send_all(self.raw_outgoing.headers(from), socket)
    }

    /// True if a send queue's list is full.
    #[must_use]
    pub fn full(&self, queue: usize) -> bool {
        self.outgoing[queue].full()
    }

    /// Empties a send queue's list.
    pub fn clear(&mut self, queue: usize) {
        self.outgoing[queue].clear();
    }

    /// The number of messages in a send queue's list.
    #[must_use]
    pub fn messages(&self, queue: usize) -> usize {
        self.outgoing[queue].messages()
    }

    /// The indices of the datagrams in a message of a send queue's list.
    #[must_use]
    pub fn datagrams(&self, queue: usize, message: usize) -> Range<usize> {
        self.outgoing[queue].datagrams(message)
    }

    /// The bytes of all datagrams in a message of a send queue's list.
    #[must_use]
    pub fn bytes(&self, queue: usize, message: usize) -> u64 {
        self.outgoing[queue].bytes(message)
    }

    /// The length in bytes of a datagram in a send queue's list.
    #[must_use]
    pub fn length(&self, queue: usize, datagram: usize) -> usize {
        self.outgoing[queue].length(datagram)
    }

    /// Sends a send queue's list from message `from` on and returns how many messages were sent: at least one. `from`
    /// must be in the list.
    ///
    /// # Errors
    /// Why the first of them could not be sent.
    pub fn send(&mut self, queue: usize, from: usize, socket: BorrowedFd<'_>) -> io::Result<usize> {
        send_all(self.outgoing[queue].headers(from), socket)
    }

    /// Sends one datagram of a message on its own.
    ///
    /// # Errors
    /// Why it could not be sent.
    pub fn send_unsegmented(
        &mut self,
        queue: usize,
        message: usize,
        datagram: usize,
        socket: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let header = self.outgoing[queue].unsegmented(message, datagram);
        // SAFETY: as for `send`; the header points to one vector and no control message.
        let sent =
            unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Sends messages of a list and returns how many were sent.
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
        let queued: Vec<usize> = self.outgoing.iter().map(OutgoingMessages::messages).collect();
        f.debug_struct("Batch").field("received", &self.incoming.received()).field("queued", &queued).finish()
    }
}

/// An error that came back for a datagram sent earlier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ErrorReport {
    /// The datagram's destination.
    pub to: AddrPort,
    /// The kernel's error number, such as `ECONNREFUSED`.
    pub errno: i32,
}

/// Takes the next error report from a socket's error queue, if there is one. The last one also clears the socket's
/// pending error.
///
/// What the kernel itself refused to send is in this queue too; `send` has returned that error, so it is skipped.
pub fn next_report(socket: BorrowedFd<'_>) -> Option<ErrorReport> {
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
            return Some(ErrorReport { to: name.endpoint(), errno });
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

/// The data of the control message of this kind, if there is one of at least that length.
///
/// # Safety
/// The header must have been filled by a successful `recvmsg`, its control buffer must still exist, and every bit
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
/// A new steering program or filter applies to datagrams that arrive later. A datagram that had already passed the old
/// one may still be on its way into a socket. `MEMBARRIER_CMD_GLOBAL` waits for an RCU grace period, and the stack
/// receives inside read-side critical sections. Where the kernel does not offer it (`nohz_full`), there is no wait.
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
        let segments: Vec<_> = (0..4).flat_map(|slot| batch.message(slot).segments()).collect();
        let lengths: Vec<_> = segments.iter().map(|segment| segment.map(Segment::length)).collect();
        assert_eq!(lengths, [Some(0), Some(1), Some(1000), None]);
        assert_eq!((batch.message(3).length(), batch.message(3).count()), (1001, 1));
        batch.address(1, &target, u32::MAX);
        for segment in &segments[..3] {
            batch.push(1, segment.unwrap());
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
                // Twice the same: the kernel has overwritten the sizes in the headers.
                assert_eq!(batch.receive(through.as_fd()).unwrap(), 1);
                assert_eq!(batch.sender(0), wanted.then_some((sender.ip(), sender.port())));
                assert_eq!(batch.destination(0), wanted.then_some(to));
                let segment = batch.message(0).segments().next().unwrap().unwrap();
                assert_eq!(batch.first_bytes(segment), Some(*b"0123456789"));
                assert_eq!(batch.first_bytes::<11>(segment), None);
                assert_eq!(batch.first_bytes::<21>(segment), None);
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
        let expected = ErrorReport { to: (closed.ip(), closed.port()), errno: libc::ECONNREFUSED };
        assert_eq!(next_report(sender.as_fd()), Some(expected));
        assert_eq!(next_report(sender.as_fd()), None);
    }

    #[test]
    fn waiting_for_the_stack_returns() {
        wait_for_network_stack();
    }
}
