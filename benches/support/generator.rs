//! The sender: numbered datagrams at a given rate, from one socket or many.
//!
//! Datagrams go out in trains: one message with `UDP_SEGMENT`, which the kernel cuts into real packets, because the testbed
//! has switched the sending device's own segmentation off. The thread stays on one CPU and never sleeps while it sends.
//! After a delay, it does not catch up with a burst that no sender would send, and reports the rate that it really sent.

use std::io;
use std::mem;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Socket, Type};

use super::cpu::pin_thread;
use udp_fanout_lab::Namespace;

/// The most messages in one `sendmmsg` call.
const MESSAGES: usize = 16;
/// The longest delay that is caught up on, in seconds. Longer ones are skipped.
const SLACK: f64 = 0.000_2;
/// The longest pause between trains, in seconds. At low rates, trains are shorter to keep to it.
const SPACING: f64 = 0.000_05;
/// Bytes at the beginning of each datagram: its number and the time it was sent.
const STAMP: usize = 16;

/// What a generator sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Payload of each datagram in bytes, at least 16.
    pub size: usize,
    /// Number of sending sockets, used in turn.
    pub senders: usize,
    /// Maximum number of datagrams that one sender sends in a row, 1 to 64.
    pub train: usize,
    /// The payload's format.
    pub content: Content,
}

/// The format of a payload, besides its number and the time it was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Filled with dots.
    Plain,
    /// A DNS query, with number and time inside the queried name. At least 51 bytes, at most 250.
    Dns,
    /// A syslog message (RFC 5424), with number and time at its end.
    Syslog,
}

impl Content {
    /// A datagram of this many bytes.
    fn template(self, size: usize) -> Vec<u8> {
        let mut text = match self {
            Content::Plain => Vec::new(),
            Content::Syslog => b"<134>1 2026-01-01T00:00:00Z host application 1 - - ".to_vec(),
            Content::Dns => return query(size),
        };
        text.resize(size.max(text.len()), b'.');
        text
    }

    /// Bytes before number and time.
    pub fn stamp_at(self, size: usize) -> usize {
        match self {
            Content::Plain => 0,
            // The header, and the length of the name's first label.
            Content::Dns => 13,
            Content::Syslog => size - STAMP,
        }
    }
}

/// A query for an address.
fn query(size: usize) -> Vec<u8> {
    let mut message = vec![0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, STAMP as u8];
    message.resize(message.len() + STAMP, 0);
    // Bytes for labels; the name's end, type and class follow.
    while let Some(left @ 2..) = size.checked_sub(message.len() + 5) {
        // Leaves no single byte, which could not hold a label with its length.
        let label = if left == 65 { 62 } else { (left - 1).min(63) };
        message.push(label as u8);
        message.resize(message.len() + label, b'x');
    }
    message.extend([0, 0, 1, 0, 1]);
    message
}

impl Load {
    /// One busy sender of datagrams of this size.
    pub fn one_sender(size: usize) -> Load {
        Load { size, senders: 1, train: 64.min(65_000 / size), content: Content::Plain }
    }

    /// Many senders, of which each sends a few datagrams at a time.
    pub fn many_senders(size: usize) -> Load {
        Load { size, senders: 256, train: 4, content: Content::Plain }
    }
}

/// What was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sent {
    /// Datagrams.
    pub datagrams: u64,
    /// How long it took.
    pub seconds: f64,
    /// Seconds of these in which another program had the generator's CPU.
    pub held_up: f64,
}

impl Sent {
    /// Datagrams per second.
    pub fn rate(self) -> f64 {
        self.datagrams as f64 / self.seconds.max(1e-9)
    }
}

/// Sockets and buffers.
pub struct Generator {
    sockets: Vec<Socket>,
    load: Load,
    cpu: usize,
    next: u64,
    turn: usize,
    messages: Vec<Message>,
}

struct Message {
    payload: Vec<u8>,
    datagrams: usize,
}

/// Buffer for one `UDP_SEGMENT` control message, aligned for its header.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; 24]);

impl Generator {
    /// Opens the sockets in a namespace. They are connected to the destinations in turn.
    ///
    /// # Errors
    /// When the kernel refuses, or the load is impossible.
    pub fn open(namespace: &Namespace, to: &[SocketAddr], load: Load, cpu: usize) -> Result<Generator> {
        let longest = load.size * load.train;
        ensure!(load.size >= STAMP && (1..=64).contains(&load.train) && longest <= 65_507, "impossible load {load:?}");
        ensure!(!to.is_empty() && load.senders > 0, "a load needs a destination and a sender");
        let sockets = namespace.run(|| {
            let open = |number: usize| -> Result<Socket> {
                let to = to[number % to.len()];
                let socket = Socket::new(Domain::for_address(to), Type::DGRAM, None)?;
                socket.connect(&to.into()).with_context(|| format!("cannot connect to {to}"))?;
                Ok(socket)
            };
            (0..load.senders.max(to.len())).map(open).collect::<Result<Vec<_>>>()
        })?;
        let template = load.content.template(load.size);
        ensure!(template.len() == load.size, "{load:?} does not fit its content");
        let message = || Message { payload: template.repeat(load.train), datagrams: 0 };
        let messages = (0..MESSAGES).map(|_| message()).collect();
        Ok(Generator { sockets, load, cpu, next: 0, turn: 0, messages })
    }

    /// Limits the datagrams in flight from each socket, in bytes of kernel memory. Sending blocks at the limit.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn limit_buffers(&self, bytes: usize) -> Result<()> {
        Ok(self.sockets.iter().try_for_each(|socket| socket.set_send_buffer_size(bytes))?)
    }

    /// What it sends.
    pub fn load(&self) -> Load {
        self.load
    }

    /// The number that the next datagram gets.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Resets the number of the next datagram to zero.
    pub fn restart(&mut self) {
        self.next = 0;
    }

    /// Sends at this rate, in datagrams per second, for this long.
    ///
    /// # Errors
    /// When the kernel refuses to send.
    pub fn run(&mut self, rate: f64, duration: Duration) -> Result<Sent> {
        let cpu = self.cpu;
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                pin_thread(cpu)?;
                let before = waited();
                let sent = self.paced(rate, duration)?;
                Ok(Sent { held_up: waited() - before, ..sent })
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn paced(&mut self, rate: f64, duration: Duration) -> Result<Sent> {
        let length = duration.as_secs_f64();
        // A whole train, or as much of it as falls due within the spacing.
        let least = ((rate * SPACING) as usize).clamp(1, self.load.train);
        let start = now();
        let (mut sent, mut forgiven) = (0u64, 0.0f64);
        loop {
            let elapsed = (now() - start) as f64 / 1e9;
            if elapsed >= length {
                return Ok(Sent { datagrams: sent, seconds: elapsed, held_up: 0.0 });
            }
            let mut due = rate * (elapsed - forgiven) - sent as f64;
            let most = (rate * SLACK).max(least as f64);
            if due > most {
                forgiven += (due - most) / rate;
                due = most;
            }
            if due < least as f64 {
                std::hint::spin_loop();
                continue;
            }
            sent += self.burst(due as usize)? as u64;
        }
    }

    /// Sends this many datagrams, or as many as one call takes. Returns the number.
    fn burst(&mut self, datagrams: usize) -> Result<usize> {
        let (size, stamp) = (self.load.size, now());
        let stamp_at = self.load.content.stamp_at(size);
        let datagrams = datagrams.min(MESSAGES * self.load.train);
        // With several senders, each sends one train in turn.
        let at_once = if self.sockets.len() > 1 { 1 } else { MESSAGES };
        let mut left = datagrams;
        while left > 0 {
            let mut filled = 0;
            while left > 0 && filled < at_once {
                let message = &mut self.messages[filled];
                message.datagrams = left.min(self.load.train);
                for datagram in message.payload.chunks_exact_mut(size).take(message.datagrams) {
                    let place = &mut datagram[stamp_at..stamp_at + STAMP];
                    place[..8].copy_from_slice(&self.next.to_ne_bytes());
                    place[8..].copy_from_slice(&stamp.to_ne_bytes());
                    self.next += 1;
                }
                left -= message.datagrams;
                filled += 1;
            }
            self.send(filled)?;
        }
        Ok(datagrams)
    }

    /// Sends the first messages from the socket whose turn it is.
    fn send(&mut self, count: usize) -> Result<()> {
        let socket = self.sockets[self.turn].as_raw_fd();
        self.turn = (self.turn + 1) % self.sockets.len();
        let size = self.load.size;
        let mut vectors: [libc::iovec; MESSAGES] =
            [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MESSAGES];
        // SAFETY: zero is a valid value for every field: integers and nullable pointers.
        let mut headers: [libc::mmsghdr; MESSAGES] = unsafe { mem::zeroed() };
        let mut control = segment_size(size);
        for (at, message) in self.messages[..count].iter_mut().enumerate() {
            vectors[at].iov_base = message.payload.as_mut_ptr().cast();
            vectors[at].iov_len = message.datagrams * size;
            let header = &mut headers[at].msg_hdr;
            header.msg_iov = &raw mut vectors[at];
            header.msg_iovlen = 1;
            if message.datagrams > 1 {
                header.msg_control = (&raw mut control).cast();
                header.msg_controllen = mem::size_of::<Control>() as _;
            }
        }
        let mut done = 0;
        while done < count {
            // SAFETY: the headers point to vectors, payloads and a control message that outlive the call.
            let sent = unsafe { libc::sendmmsg(socket, headers[done..].as_mut_ptr(), (count - done) as _, 0) };
            match usize::try_from(sent) {
                Ok(sent) => done += sent,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    // The destination is closed while a forwarder starts or ends.
                    if !matches!(error.raw_os_error(), Some(libc::ECONNREFUSED | libc::ENOBUFS | libc::EINTR)) {
                        return Err(error).context("the generator cannot send");
                    }
                }
            }
        }
        Ok(())
    }
}

/// How long the calling thread has waited for its CPU so far, in seconds; 0 if unknown.
fn waited() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds: u64 = text.split_whitespace().nth(1).and_then(|word| word.parse().ok()).unwrap_or(0);
    nanoseconds as f64 / 1e9
}

/// The control message that makes the kernel split a message into datagrams of this many bytes.
fn segment_size(size: usize) -> Control {
    let mut control = Control([0; 24]);
    let header = libc::cmsghdr {
        // SAFETY: computes a number.
        cmsg_len: unsafe { libc::CMSG_LEN(2) } as _,
        cmsg_level: libc::SOL_UDP,
        cmsg_type: libc::UDP_SEGMENT,
    };
    // SAFETY: the buffer is large enough for a header and two bytes, and aligned for the header.
    unsafe {
        let start = control.0.as_mut_ptr();
        start.cast::<libc::cmsghdr>().write(header);
        libc::CMSG_DATA(start.cast()).cast::<u16>().write_unaligned(size as u16);
    }
    control
}

/// `CLOCK_MONOTONIC` in nanoseconds, the clock that the sink reads as well.
pub fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the time into the struct given.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
