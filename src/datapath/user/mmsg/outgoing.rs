//! What `sendmmsg` is about to send: a list of datagrams in messages, of which each is for one downstream.
//!
//! Datagrams for the same downstream share a message where the kernel can cut them apart again (`UDP_SEGMENT`): all of one
//! length, but the last, which may be shorter. Their order is kept.

use std::mem;
use std::ops::Range;
use std::ptr;

use super::RawAddress;

/// Most datagrams of one message: `UDP_MAX_SEGMENTS` of kernels before 6.9.
const MOST_JOINED: usize = 64;
/// Most bytes of one message: what fits into the longest IPv4 datagram.
const LONGEST_MESSAGE: usize = 65_507;

/// Room for one `UDP_SEGMENT` message, in u64 for the alignment of its header.
type Control = [u64; 3];

/// A list. Its vectors never grow or shrink, so that pointers into them stay good.
pub struct Outgoing {
    headers: Vec<libc::mmsghdr>,
    names: Vec<RawAddress>,
    controls: Vec<Control>,
    /// The number of each message's first datagram.
    firsts: Vec<u32>,
    /// The bytes of each message.
    lengths: Vec<usize>,
    /// One for each datagram; those of a message are side by side.
    vectors: Vec<libc::iovec>,
    messages: usize,
    datagrams: usize,
    to: RawAddress,
    most_joined: usize,
    /// Bytes of the last message's first datagram; zero if nothing can be added to that message.
    each: usize,
}

impl Outgoing {
    /// Room for so many datagrams.
    pub fn new(datagrams: usize) -> Self {
        // SAFETY: zero is a valid value for every field: integers and nullable pointers.
        let mut header: libc::mmsghdr = unsafe { mem::zeroed() };
        header.msg_hdr.msg_iovlen = 1;
        let mut new = Outgoing {
            headers: vec![header; datagrams],
            names: vec![RawAddress::zeroed(); datagrams],
            controls: vec![Control::default(); datagrams],
            firsts: vec![0; datagrams],
            lengths: vec![0; datagrams],
            vectors: vec![libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; datagrams],
            messages: 0,
            datagrams: 0,
            to: RawAddress::zeroed(),
            most_joined: 0,
            each: 0,
        };
        let names = new.names.as_mut_ptr();
        for (index, header) in new.headers.iter_mut().enumerate() {
            header.msg_hdr.msg_name = names.wrapping_add(index).cast();
        }
        new
    }

    /// What is added from now on is for this address. Datagrams of more than `most_joined` bytes get messages of their
    /// own.
    pub fn address(&mut self, to: &RawAddress, most_joined: u32) {
        self.to = *to;
        self.most_joined = most_joined as usize;
        self.each = 0;
    }

    /// True if there is no room for another datagram.
    pub fn full(&self) -> bool {
        self.datagrams == self.vectors.len()
    }

    /// Empties the list.
    pub fn clear(&mut self) {
        (self.messages, self.datagrams, self.each) = (0, 0, 0);
    }

    /// How many messages there are.
    pub fn messages(&self) -> usize {
        self.messages
    }

    /// The numbers of the datagrams in a message.
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

    /// The length in bytes of a datagram, by its number.
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
        if self.each > 0 && self.joins(bytes) {
            let last = self.messages - 1;
            let header = &mut self.headers[last].msg_hdr;
            header.msg_iovlen += 1;
            if header.msg_iovlen == 2 {
                self.controls[last] = segment_size(self.each);
                header.msg_control = self.controls.as_mut_ptr().wrapping_add(last).cast();
                header.msg_controllen = mem::size_of::<Control>() as _;
            }
            self.lengths[last] += bytes;
            if bytes < self.each || count(header) == MOST_JOINED {
                self.each = 0;
            }
        } else {
            self.begin(at, bytes);
        }
    }

    /// True if a datagram of this length can be added to the last message.
    fn joins(&self, bytes: usize) -> bool {
        0 < bytes && bytes <= self.each && self.lengths[self.messages - 1] + bytes <= LONGEST_MESSAGE
    }

    /// Begins a message with the datagram of this number.
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
        // One without bytes cannot be told from the end of another.
        self.each = if bytes <= self.most_joined { bytes } else { 0 };
        self.lengths[message] = bytes;
    }

    /// The header for one datagram of a message, to be sent by itself.
    pub fn apart(&mut self, message: usize, datagram: usize) -> libc::msghdr {
        assert!(self.datagrams(message).contains(&datagram), "message {message} has no datagram {datagram}");
        let mut header = self.headers[message].msg_hdr;
        header.msg_iov = self.vectors.as_mut_ptr().wrapping_add(datagram);
        header.msg_iovlen = 1;
        header.msg_control = ptr::null_mut();
        header.msg_controllen = 0;
        header
    }
}

/// How many datagrams a message holds.
#[allow(clippy::unnecessary_cast, reason = "some C libraries have another type there")]
fn count(header: &libc::msghdr) -> usize {
    header.msg_iovlen as usize
}

/// The control message that has the kernel cut a message into datagrams of this many bytes.
fn segment_size(bytes: usize) -> Control {
    let mut control = Control::default();
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
