//! What `sendmmsg` will send: a list of datagrams in messages, each message for one downstream.
//!
//! Datagrams for the same downstream share a message if the kernel can segment it again (`UDP_SEGMENT`): all of one
//! length, except that the last may be shorter. Their order is kept.

use std::mem;
use std::ops::Range;
use std::ptr;

use super::RawAddress;

/// The maximum number of datagrams in a message: `UDP_MAX_SEGMENTS` of kernels before 6.9.
const MAX_SEGMENTS: usize = 64;
/// The maximum number of bytes in a message: the payload of the longest IPv4 datagram.
const MAX_MESSAGE_BYTES: usize = 65_507;

/// Room for one `UDP_SEGMENT` control message, in u64 for the alignment of its header.
type SegmentControl = [u64; 3];

/// A list. Its vectors never grow or shrink, so that pointers into them stay valid.
pub struct OutgoingMessages {
    headers: Vec<libc::mmsghdr>,
    names: Vec<RawAddress>,
    controls: Vec<SegmentControl>,
    /// The index of each message's first datagram.
    firsts: Vec<u32>,
    /// The bytes of each message.
    lengths: Vec<usize>,
    /// One for each datagram; those of a message are adjacent.
    vectors: Vec<libc::iovec>,
    messages: usize,
    datagrams: usize,
    to: RawAddress,
    max_segment: usize,
    /// The length of the last message's first datagram in bytes; zero if nothing can be appended to that message.
    segment_size: usize,
}

impl OutgoingMessages {
    /// Room for this many datagrams.
    pub fn new(datagrams: usize) -> Self {
        // SAFETY: zero is a valid value for every field: integers and nullable pointers.
        let mut header: libc::mmsghdr = unsafe { mem::zeroed() };
        header.msg_hdr.msg_iovlen = 1;
        let mut new = OutgoingMessages {
            headers: vec![header; datagrams],
            names: vec![RawAddress::zeroed(); datagrams],
            controls: vec![SegmentControl::default(); datagrams],
            firsts: vec![0; datagrams],
            lengths: vec![0; datagrams],
            vectors: vec![libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; datagrams],
            messages: 0,
            datagrams: 0,
            to: RawAddress::zeroed(),
            max_segment: 0,
            segment_size: 0,
        };
        let names = new.names.as_mut_ptr();
        for (index, header) in new.headers.iter_mut().enumerate() {
            header.msg_hdr.msg_name = names.wrapping_add(index).cast();
        }
        new
    }

    /// Addresses what is added from now on. Datagrams of more than `max_segment` bytes get their own messages.
    pub fn address(&mut self, to: &RawAddress, max_segment: u32) {
        self.to = *to;
        self.max_segment = max_segment as usize;
        self.segment_size = 0;
    }

    /// True if the list is full.
    pub fn full(&self) -> bool {
        self.datagrams == self.vectors.len()
    }

    /// Empties the list.
    pub fn clear(&mut self) {
        (self.messages, self.datagrams, self.segment_size) = (0, 0, 0);
    }

    /// The number of messages.
    pub fn messages(&self) -> usize {
        self.messages
    }

    /// The indices of the datagrams in a message.
    pub fn datagrams(&self, message: usize) -> Range<usize> {
        assert!(message < self.messages, "there is no message {message}");
        let first = self.firsts[message] as usize;
        first..first + count(&self.headers[message].msg_hdr)
    }

    /// The bytes of all datagrams in a message.
    pub fn bytes(&self, message: usize) -> u64 {
        assert!(message < self.messages, "there is no message {message}");
        self.lengths[message] as u64
    }

    /// The length of a datagram in bytes.
    pub fn length(&self, datagram: usize) -> usize {
        self.vectors[datagram].iov_len
    }

    /// The headers of the messages from this one on.
    pub fn headers(&mut self, from: usize) -> &mut [libc::mmsghdr] {
        &mut self.headers[from..self.messages]
    }

    /// Adds a datagram; there must be room.
    pub fn push(&mut self, vector: libc::iovec) {
        let at = self.datagrams;
        self.vectors[at] = vector;
        self.datagrams = at + 1;
        let bytes = vector.iov_len;
        if self.segment_size > 0 && self.can_append(bytes) {
            let last = self.messages - 1;
            let header = &mut self.headers[last].msg_hdr;
            header.msg_iovlen += 1;
            if header.msg_iovlen == 2 {
                self.controls[last] = segment_control(self.segment_size);
                header.msg_control = self.controls.as_mut_ptr().wrapping_add(last).cast();
                header.msg_controllen = mem::size_of::<SegmentControl>() as _;
            }
            self.lengths[last] += bytes;
            if bytes < self.segment_size || count(header) == MAX_SEGMENTS {
                self.segment_size = 0;
            }
        } else {
            self.begin(at, bytes);
        }
    }

    /// True if a datagram of this length can be appended to the last message.
    fn can_append(&self, bytes: usize) -> bool {
        0 < bytes && bytes <= self.segment_size && self.lengths[self.messages - 1] + bytes <= MAX_MESSAGE_BYTES
    }

    /// Begins a message with this datagram.
    fn begin(&mut self, datagram: usize, bytes: usize) {
        let message = self.messages;
        self.messages = message + 1;
        self.names[message] = self.to;
        self.firsts[message] = datagram as u32;
        let header = &mut self.headers[message].msg_hdr;
        header.msg_namelen = self.to.length;
        header.msg_iov = self.vectors.as_mut_ptr().wrapping_add(datagram);
        header.msg_iovlen = 1;
        header.msg_control = ptr::null_mut();
        header.msg_controllen = 0;
        // An empty datagram cannot be a segment.
        self.segment_size = if bytes <= self.max_segment { bytes } else { 0 };
        self.lengths[message] = bytes;
    }

    /// A header that sends one datagram of a message on its own.
    pub fn unsegmented(&mut self, message: usize, datagram: usize) -> libc::msghdr {
        assert!(self.datagrams(message).contains(&datagram), "message {message} has no datagram {datagram}");
        let mut header = self.headers[message].msg_hdr;
        header.msg_iov = self.vectors.as_mut_ptr().wrapping_add(datagram);
        header.msg_iovlen = 1;
        header.msg_control = ptr::null_mut();
        header.msg_controllen = 0;
        header
    }
}

/// The number of datagrams in a message.
#[allow(clippy::unnecessary_cast, reason = "some C libraries have another type there")]
fn count(header: &libc::msghdr) -> usize {
    header.msg_iovlen as usize
}

/// The control message that makes the kernel segment a message into datagrams of this many bytes.
fn segment_control(bytes: usize) -> SegmentControl {
    let mut control = SegmentControl::default();
    let header = libc::cmsghdr {
        // SAFETY: computes a number.
        cmsg_len: unsafe { libc::CMSG_LEN(mem::size_of::<u16>() as _) } as _,
        cmsg_level: libc::SOL_UDP,
        cmsg_type: libc::UDP_SEGMENT,
    };
    let start = control.as_mut_ptr();
    // SAFETY: the array is aligned for the header and has room for it and for two bytes after it.
    unsafe {
        start.cast::<libc::cmsghdr>().write(header);
        libc::CMSG_DATA(start.cast()).cast::<u16>().write_unaligned(bytes as u16);
    }
    control
}
