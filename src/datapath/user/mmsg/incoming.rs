//! What `recvmmsg` has taken: messages, and the datagrams that the kernel has joined in them.

use std::io;
use std::iter;
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use super::{Endpoint, Memory, RawAddress, Storage, find, size};

const CACHE_LINE: usize = 64;
/// Room for one message: more than any that the kernel joins.
const ROOM: usize = 65_536;
/// Bytes from one slot to the next: an odd number of cache lines, so that the beginnings fall into different sets of the
/// cache.
const STRIDE: usize = ((ROOM / CACHE_LINE) | 1) * CACHE_LINE;
/// Bytes that one call should take at most, going by the length of messages in the call before: what has been received
/// should still be in the cache when it is sent.
const TAKE_BYTES: usize = 512 << 10;
/// Fewest messages asked for in one call, if there is room for them.
const TAKE_LEAST: usize = 8;

/// Room for what the kernel says about one message besides its sender: the address that it was sent to, and the length of
/// the datagrams that it has joined. In u64 for the alignment of the headers.
type Control = [u64; 8];

/// Where one datagram lies in the memory of its batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    offset: u32,
    length: u32,
}

impl Piece {
    /// Its length in bytes.
    #[must_use]
    pub fn length(self) -> u32 {
        self.length
    }
}

/// A message as it was taken: one datagram, or several of one length, of which the last may be shorter.
#[derive(Debug, Clone, Copy)]
pub struct Joined {
    offset: u32,
    /// What all of it was sent with, which may be more than there is room for.
    length: u32,
    /// The length of each datagram but the last.
    each: u32,
    longest: u32,
}

impl Joined {
    /// How many bytes all its datagrams were sent with.
    #[must_use]
    pub fn length(self) -> u64 {
        u64::from(self.length)
    }

    /// How many datagrams it holds: at least one.
    #[must_use]
    pub fn count(self) -> usize {
        self.length.div_ceil(self.each).max(1) as usize
    }

    /// True if each of its datagrams is whole and no longer than allowed.
    #[must_use]
    pub fn all_whole(self) -> bool {
        self.each.min(self.length) <= self.longest && self.length as usize <= ROOM
    }

    /// Its datagrams, in the order of their arrival; none for one that is longer than allowed.
    pub fn pieces(self) -> impl Iterator<Item = Option<Piece>> {
        let mut at = 0;
        iter::repeat_with(move || {
            let length = self.each.min(self.length - at);
            let piece = Piece { offset: self.offset + at, length };
            let whole = length <= self.longest && (at + length) as usize <= ROOM;
            at += length;
            whole.then_some(piece)
        })
        .take(self.count())
    }
}

/// The memory that datagrams are received into, and the headers that say so.
pub struct Incoming {
    memory: Memory,
    longest: u32,
    headers: Vec<libc::mmsghdr>,
    /// One for each header, which points to it, as is each of the following; they never grow or shrink.
    vectors: Vec<libc::iovec>,
    names: Vec<RawAddress>,
    controls: Vec<Control>,
    /// Whether the next batch is to be taken with addresses.
    want_addresses: bool,
    /// Whether this one was.
    with_addresses: bool,
    received: usize,
    /// How many messages the next call asks for.
    take: usize,
}

impl Incoming {
    /// Room for `count` messages. A datagram of more than `longest` bytes does not count as whole.
    ///
    /// # Errors
    /// When the kernel has no memory for it.
    pub fn new(count: usize, longest: usize) -> io::Result<Self> {
        let length = count.checked_mul(STRIDE).filter(|&length| u32::try_from(length).is_ok());
        let memory = Memory::new(length.and_then(NonZeroUsize::new).ok_or(io::ErrorKind::InvalidInput)?)?;
        // SAFETY: zero is a valid value for every field: integers and nullable pointers.
        let header: libc::mmsghdr = unsafe { mem::zeroed() };
        let start = memory.start.as_ptr();
        let vector = |slot| libc::iovec { iov_base: start.wrapping_byte_add(slot * STRIDE), iov_len: ROOM };
        let mut new = Incoming {
            memory,
            longest: longest.try_into().map_err(|_| io::ErrorKind::InvalidInput)?,
            headers: vec![header; count],
            vectors: (0..count).map(vector).collect(),
            names: vec![RawAddress::zeroed(); count],
            controls: vec![Control::default(); count],
            want_addresses: false,
            with_addresses: false,
            received: 0,
            take: count,
        };
        let (vectors, names) = (new.vectors.as_mut_ptr(), new.names.as_mut_ptr());
        let controls = new.controls.as_mut_ptr();
        for (slot, header) in new.headers.iter_mut().enumerate() {
            header.msg_hdr.msg_iov = vectors.wrapping_add(slot);
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_name = names.wrapping_add(slot).cast();
            header.msg_hdr.msg_control = controls.wrapping_add(slot).cast();
        }
        new.make_room(count);
        Ok(new)
    }

    /// Whether the batches to come say where each message came from.
    pub fn want_addresses(&mut self, wanted: bool) {
        self.want_addresses = wanted;
    }

    /// How many messages there are.
    pub fn received(&self) -> usize {
        self.received
    }

    /// Says anew in the first headers how much room there is; the kernel has written there how much it used.
    fn make_room(&mut self, headers: usize) {
        let name = if self.with_addresses { size::<Storage>() } else { 0 };
        for header in &mut self.headers[..headers] {
            header.msg_hdr.msg_namelen = name;
            header.msg_hdr.msg_controllen = mem::size_of::<Control>() as _;
        }
    }

    /// Takes what the socket holds without waiting.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` if the socket is empty.
    pub fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        if self.want_addresses == self.with_addresses {
            self.make_room(self.received);
        } else {
            self.with_addresses = self.want_addresses;
            self.make_room(self.headers.len());
        }
        self.received = 0;
        let headers = &mut self.headers[..self.take];
        // MSG_TRUNC makes the kernel report a message's real length even where it did not fit.
        // SAFETY: the headers point to names, control buffers and vectors owned by `self`, for no more than their sizes;
        // each vector describes `ROOM` bytes of its own slot within `self.memory`, to which no Rust reference ever exists.
        let taken = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                headers.len() as _,
                (libc::MSG_DONTWAIT | libc::MSG_TRUNC) as _,
                ptr::null_mut(),
            )
        };
        self.received = usize::try_from(taken).map_err(|_| io::Error::last_os_error())?;
        self.take = self.next_take();
        Ok(self.received)
    }

    /// How many messages to ask for next, if they are as long as the present ones.
    fn next_take(&self) -> usize {
        let bytes: usize = self.headers[..self.received].iter().map(|header| header.msg_len as usize).sum();
        let fitting = TAKE_BYTES * self.received / bytes.max(1);
        fitting.max(TAKE_LEAST).min(self.headers.len())
    }

    /// The message of this slot.
    #[must_use]
    pub fn message(&self, slot: usize) -> Joined {
        assert!(slot < self.received, "slot {slot} holds no message");
        let header = &self.headers[slot];
        // SAFETY: `recvmmsg` has filled the header of every slot below `received` and the control buffer it points to,
        // whose used length it has written.
        let each = unsafe { find::<libc::c_int>(&header.msg_hdr, libc::SOL_UDP, libc::UDP_GRO) };
        let each = each.and_then(|each| u32::try_from(each).ok()).filter(|&each| each > 0);
        Joined {
            offset: (slot * STRIDE) as u32,
            length: header.msg_len,
            each: each.unwrap_or(header.msg_len.max(1)),
            longest: self.longest,
        }
    }

    /// The first bytes of a datagram, if it has as many.
    #[must_use]
    pub fn first_bytes<const N: usize>(&self, piece: Piece) -> Option<[u8; N]> {
        if (piece.length as usize) < N {
            return None;
        }
        let mut bytes = [0; N];
        let start = self.vector(piece).iov_base.cast::<u8>();
        // SAFETY: `vector` has checked that the piece lies within the memory, and it has no fewer than N bytes; mapped
        // memory is always initialised.
        unsafe { ptr::copy_nonoverlapping(start, bytes.as_mut_ptr(), N) };
        Some(bytes)
    }

    /// The bytes of a datagram as a system call takes them. They stay what they are until the next batch is taken.
    #[must_use]
    pub fn vector(&self, piece: Piece) -> libc::iovec {
        let (offset, length) = (piece.offset as usize, piece.length as usize);
        assert!(offset + length <= self.memory.length, "a piece of another batch");
        libc::iovec { iov_base: self.memory.start.as_ptr().wrapping_byte_add(offset), iov_len: length }
    }

    /// Who sent the message of this slot, if the batch was taken with addresses.
    #[must_use]
    pub fn sender(&self, slot: usize) -> Option<Endpoint> {
        assert!(slot < self.received, "slot {slot} holds no message");
        self.with_addresses.then(|| self.names[slot].endpoint())
    }

    /// The address that the message of this slot was sent to, if the batch was taken with addresses and the socket has
    /// `IP_PKTINFO` or `IPV6_RECVPKTINFO` set.
    #[must_use]
    pub fn destination(&self, slot: usize) -> Option<IpAddr> {
        assert!(slot < self.received, "slot {slot} holds no message");
        if !self.with_addresses {
            return None;
        }
        let header = &self.headers[slot].msg_hdr;
        // SAFETY: as in `message`.
        unsafe {
            find::<libc::in_pktinfo>(header, libc::SOL_IP, libc::IP_PKTINFO)
                .map(|info| Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes()).into())
                .or_else(|| {
                    find::<libc::in6_pktinfo>(header, libc::SOL_IPV6, libc::IPV6_PKTINFO)
                        .map(|info| Ipv6Addr::from(info.ipi6_addr.s6_addr).into())
                })
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A piece of no batch in particular.
    pub fn piece(offset: u32, length: u32) -> Piece {
        Piece { offset, length }
    }

    fn joined(length: u32, each: u32, longest: u32) -> Vec<Option<(u32, u32)>> {
        let message = Joined { offset: 10, length, each, longest };
        let pieces: Vec<_> = message.pieces().map(|piece| piece.map(|piece| (piece.offset, piece.length))).collect();
        assert_eq!(pieces.len(), message.count());
        if message.all_whole() {
            assert!(pieces.iter().all(Option::is_some));
        }
        pieces
    }

    #[test]
    fn a_message_falls_into_the_datagrams_that_were_joined() {
        assert_eq!(joined(0, 1, 100), [Some((10, 0))]);
        assert_eq!(joined(7, 7, 100), [Some((10, 7))]);
        assert_eq!(joined(6, 3, 100), [Some((10, 3)), Some((13, 3))]);
        assert_eq!(joined(7, 3, 100), [Some((10, 3)), Some((13, 3)), Some((16, 1))]);
    }

    #[test]
    fn only_what_is_too_long_or_did_not_fit_is_missing() {
        assert_eq!(joined(7, 7, 6), [None]);
        assert_eq!(joined(7, 3, 2), [None, None, Some((16, 1))]);
        let fitting = joined(65_600, 1000, 1000);
        assert_eq!(fitting.len(), 66);
        assert_eq!(fitting.iter().position(Option::is_none), Some(65));
        assert_eq!(joined(65_536 + 10, 65_536, 65_536).len(), 2);
    }
}
