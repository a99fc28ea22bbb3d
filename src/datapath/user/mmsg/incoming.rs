//! What `recvmmsg` received: messages, and the datagrams that the kernel joined in them (`UDP_GRO`).
//!
//! How super-packets count in userspace: [`GroMessage::segments`] yields each datagram, and everything behind it works
//! on single datagrams.

use std::io;
use std::iter;
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use super::{AddrPort, MappedMemory, RawAddress, Storage, find, size};

const CACHE_LINE: usize = 64;
/// Room for one message: more than the kernel joins.
const SLOT_SIZE: usize = 65_536;
/// Distance of two slots in bytes: an odd number of cache lines, so that slots begin in different sets of the cache.
const STRIDE: usize = ((SLOT_SIZE / CACHE_LINE) | 1) * CACHE_LINE;
/// Bytes to receive in one call at most, estimated from the previous call: datagrams should still be in the cache when
/// they are sent.
const TARGET_BATCH_BYTES: usize = 512 << 10;
/// The minimum number of messages to ask for in one call, if there is room for them.
const MIN_BATCH_MESSAGES: usize = 8;

/// Room for the control messages of one received message: destination address and segment size. In u64 for the
/// alignment of the headers.
type ReceiveControl = [u64; 8];

/// Where one datagram lies in its batch's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    offset: u32,
    length: u32,
}

impl Segment {
    /// Its length in bytes.
    #[must_use]
    pub fn length(self) -> u32 {
        self.length
    }
}

/// A message as it was received: one datagram, or several of one length. The last may be shorter.
#[derive(Debug, Clone, Copy)]
pub struct GroMessage {
    offset: u32,
    /// Bytes that were sent, which may be more than there is room for.
    length: u32,
    /// The length of each datagram but the last, in bytes.
    segment_size: u32,
    max_length: u32,
}

impl GroMessage {
    /// Bytes that all its datagrams were sent with.
    #[must_use]
    pub fn length(self) -> u64 {
        u64::from(self.length)
    }

    /// The number of datagrams: at least one.
    #[must_use]
    pub fn count(self) -> usize {
        self.length.div_ceil(self.segment_size).max(1) as usize
    }

    /// True if every datagram is complete and not longer than allowed.
    #[must_use]
    pub fn all_fit(self) -> bool {
        self.segment_size.min(self.length) <= self.max_length && self.length as usize <= SLOT_SIZE
    }

    /// Its datagrams in the order of arrival; none for one that is longer than allowed.
    pub fn segments(self) -> impl Iterator<Item = Option<Segment>> {
        let mut at = 0;
        iter::repeat_with(move || {
            let length = self.segment_size.min(self.length - at);
            let segment = Segment { offset: self.offset + at, length };
            let whole = length <= self.max_length && (at + length) as usize <= SLOT_SIZE;
            at += length;
            whole.then_some(segment)
        })
        .take(self.count())
    }
}

/// The memory that messages are received into, and their headers.
pub struct IncomingMessages {
    memory: MappedMemory,
    max_length: u32,
    headers: Vec<libc::mmsghdr>,
    /// One per header, which points to it; the same holds for names and controls. They never grow or shrink.
    vectors: Vec<libc::iovec>,
    names: Vec<RawAddress>,
    controls: Vec<ReceiveControl>,
    /// Whether to receive the next batch with addresses.
    want_addresses: bool,
    /// Whether the current batch was received with addresses.
    with_addresses: bool,
    received: usize,
    /// The number of messages to ask for in the next call.
    batch_limit: usize,
}

impl IncomingMessages {
    /// Room for `count` messages. Datagrams of more than `max_length` bytes count as truncated.
    ///
    /// # Errors
    /// When the kernel refuses the memory.
    pub fn new(count: usize, max_length: usize) -> io::Result<Self> {
        let length = count.checked_mul(STRIDE).filter(|&length| u32::try_from(length).is_ok());
        let memory = MappedMemory::new(length.and_then(NonZeroUsize::new).ok_or(io::ErrorKind::InvalidInput)?)?;
        // SAFETY: zero is a valid value for every field: integers and nullable pointers.
        let header: libc::mmsghdr = unsafe { mem::zeroed() };
        let start = memory.start.as_ptr();
        let vector = |slot| libc::iovec { iov_base: start.wrapping_byte_add(slot * STRIDE), iov_len: SLOT_SIZE };
        let mut new = IncomingMessages {
            memory,
            max_length: max_length.try_into().map_err(|_| io::ErrorKind::InvalidInput)?,
            headers: vec![header; count],
            vectors: (0..count).map(vector).collect(),
            names: vec![RawAddress::zeroed(); count],
            controls: vec![ReceiveControl::default(); count],
            want_addresses: false,
            with_addresses: false,
            received: 0,
            batch_limit: count,
        };
        let (vectors, names) = (new.vectors.as_mut_ptr(), new.names.as_mut_ptr());
        let controls = new.controls.as_mut_ptr();
        for (slot, header) in new.headers.iter_mut().enumerate() {
            header.msg_hdr.msg_iov = vectors.wrapping_add(slot);
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_name = names.wrapping_add(slot).cast();
            header.msg_hdr.msg_control = controls.wrapping_add(slot).cast();
        }
        new.reset_headers(count);
        Ok(new)
    }

    /// Whether later batches include each message's addresses.
    pub fn want_addresses(&mut self, wanted: bool) {
        self.want_addresses = wanted;
    }

    /// The number of messages received.
    pub fn received(&self) -> usize {
        self.received
    }

    /// Restores the sizes in the first headers, which the kernel has overwritten with what it used.
    fn reset_headers(&mut self, headers: usize) {
        let name = if self.with_addresses { size::<Storage>() } else { 0 };
        for header in &mut self.headers[..headers] {
            header.msg_hdr.msg_namelen = name;
            header.msg_hdr.msg_controllen = mem::size_of::<ReceiveControl>() as _;
        }
    }

    /// Receives what the socket holds, without waiting.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` if the socket is empty.
    pub fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        if self.want_addresses == self.with_addresses {
            self.reset_headers(self.received);
        } else {
            self.with_addresses = self.want_addresses;
            self.reset_headers(self.headers.len());
        }
        self.received = 0;
        let headers = &mut self.headers[..self.batch_limit];
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
        self.batch_limit = self.next_batch_limit();
        Ok(self.received)
    }

    /// The number of messages to ask for next, if they are as long as the current ones.
    fn next_batch_limit(&self) -> usize {
        let bytes: usize = self.headers[..self.received].iter().map(|header| header.msg_len as usize).sum();
        let fitting = TARGET_BATCH_BYTES * self.received / bytes.max(1);
        fitting.max(MIN_BATCH_MESSAGES).min(self.headers.len())
    }

    /// The message in this slot.
    #[must_use]
    pub fn message(&self, slot: usize) -> GroMessage {
        assert!(slot < self.received, "slot {slot} holds no message");
        let header = &self.headers[slot];
        // SAFETY: `recvmmsg` has filled the header of every slot below `received` and the control buffer it points to,
        // whose used length it has written.
        let segment_size = unsafe { find::<libc::c_int>(&header.msg_hdr, libc::SOL_UDP, libc::UDP_GRO) };
        let segment_size = segment_size
            .and_then(|segment_size| u32::try_from(segment_size).ok())
            .filter(|&segment_size| segment_size > 0);
        GroMessage {
            offset: (slot * STRIDE) as u32,
            length: header.msg_len,
            segment_size: segment_size.unwrap_or(header.msg_len.max(1)),
            max_length: self.max_length,
        }
    }

    /// The first `N` bytes of a datagram, if it has as many.
    #[must_use]
    pub fn first_bytes<const N: usize>(&self, segment: Segment) -> Option<[u8; N]> {
        if (segment.length as usize) < N {
            return None;
        }
        let mut bytes = [0; N];
        let start = self.vector(segment).iov_base.cast::<u8>();
        // SAFETY: `vector` has checked that the segment lies within the memory, and it has no fewer than N bytes; mapped
        // memory is always initialised.
        unsafe { ptr::copy_nonoverlapping(start, bytes.as_mut_ptr(), N) };
        Some(bytes)
    }

    /// A datagram's bytes in the form of a system call argument. Valid until the next batch is received.
    #[must_use]
    pub fn vector(&self, segment: Segment) -> libc::iovec {
        let (offset, length) = (segment.offset as usize, segment.length as usize);
        assert!(offset + length <= self.memory.length, "a segment of another batch");
        libc::iovec { iov_base: self.memory.start.as_ptr().wrapping_byte_add(offset), iov_len: length }
    }

    /// The sender of the message in this slot, if the batch was received with addresses.
    #[must_use]
    pub fn sender(&self, slot: usize) -> Option<AddrPort> {
        assert!(slot < self.received, "slot {slot} holds no message");
        self.with_addresses.then(|| self.names[slot].endpoint())
    }

    /// The destination of the message in this slot, if the batch was received with addresses and the socket has
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

    /// A segment for tests, without a batch.
    pub fn segment(offset: u32, length: u32) -> Segment {
        Segment { offset, length }
    }

    fn joined(length: u32, segment_size: u32, max_length: u32) -> Vec<Option<(u32, u32)>> {
        let message = GroMessage { offset: 10, length, segment_size, max_length };
        let segments: Vec<_> =
            message.segments().map(|segment| segment.map(|segment| (segment.offset, segment.length))).collect();
        assert_eq!(segments.len(), message.count());
        if message.all_fit() {
            assert!(segments.iter().all(Option::is_some));
        }
        segments
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
