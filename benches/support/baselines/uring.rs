//! The bare loop on `io_uring`: the same work as [`super::bare`], by what should be its quickest way.
//!
//! One request stays and takes whatever arrives into buffers that the ring has been given (multishot `recvmsg`); what is
//! to be sent is handed in while the next arrivals are waited for, so that a batch is one system call rather than two.
//! The ring's work is done by the caller (`DEFER_TASKRUN`) rather than by a polling thread, for there is one CPU.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::{mem, ptr, slice};

use anyhow::{Context, Result};
use io_uring::types::{BufRingEntry, CancelBuilder, Fixed, RecvMsgOut, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use socket2::Socket;

use super::bare::{self, Control, SEGMENTS, Shares};
use super::{ForwardingTask, RunningBaseline};
use crate::bench::testbed::Testbed;

/// Buffers that the ring has for what arrives: those of the batch at hand and of the one that arrives meanwhile.
const BUFFERS: u16 = 64;
/// Bytes from one buffer to the next: what the kernel joins at most, and what it says about it, in cache lines of an odd
/// number, as in udp-fanout.
const STRIDE: usize = bare::ROOM + 64 * 3;
/// Requests that can be handed in at once.
const REQUESTS: u32 = 4096;
/// The places of the registered sockets.
const TAKE: Fixed = Fixed(0);
const SEND: Fixed = Fixed(1);
/// What a completion belongs to.
const TAKEN: u64 = 0;
const SENT: u64 = 1;
/// How long a wait lasts at most, so that a stopped loop ends.
const PATIENCE: Timespec = Timespec::new().nsec(20_000_000);

/// Starts the loop on the baseline's CPU.
///
/// # Errors
/// When a socket cannot be had, or the kernel has no such ring for us.
pub fn start(testbed: &Testbed, task: &ForwardingTask) -> Result<Box<dyn RunningBaseline>> {
    ring().context("no io_uring (see /proc/sys/kernel/io_uring_disabled)")?;
    let replicate = task.replicate;
    bare::spawn(testbed, task, true, move |take, send, downstreams, stop| {
        if let Err(error) = forward([take, send], downstreams, replicate, stop) {
            eprintln!("The loop on io_uring has ended: {error}");
        }
    })
}

/// A ring that does its work when it is asked to, by the thread that asks.
fn ring() -> io::Result<IoUring> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_submit_all()
        .setup_cqsize(2 * REQUESTS)
        .build(REQUESTS)
}

fn forward(sockets: [&Socket; 2], downstreams: &[SocketAddr], replicate: bool, stop: &AtomicBool) -> io::Result<()> {
    let mut work = Work::new(sockets)?;
    let mut shares = Shares::new(downstreams, replicate);
    // Buffers whose contents are about to be sent.
    let mut held = Vec::with_capacity(BUFFERS.into());
    while !stop.load(Ordering::Relaxed) {
        // With what is to be sent: all of it has to be done before its memory is used again, and the first message that
        // arrives is waited for, too.
        work.take()?;
        work.enter(work.sending + 1)?;
        while work.sending > 0 {
            work.enter(work.sending)?;
        }
        shares.clear();
        work.buffers.give(&mut held);
        let mut size = 1;
        for (buffer, length) in work.arrived.drain(..) {
            let (start, length, each) = work.buffers.contents(buffer, length, &work.room);
            size = each;
            shares.deal(start, length, each);
            held.push(buffer);
        }
        for message in shares.messages(size, SEGMENTS) {
            let request = opcode::SendMsg::new(SEND, &raw const message.msg_hdr).build().user_data(SENT);
            work.request(&request)?;
            work.sending += 1;
        }
    }
    work.end()
}

/// The ring and what is known about its requests.
struct Work {
    // Dropped first: the kernel writes into the buffers as long as there is a ring.
    ring: IoUring,
    buffers: Buffers,
    /// How much room for a name and for control messages each buffer has.
    room: Box<libc::msghdr>,
    /// Whether the request that takes what arrives is in force.
    taking: bool,
    /// Messages that are being sent.
    sending: usize,
    /// Buffers that have been filled, and with how many bytes.
    arrived: Vec<(u16, usize)>,
}

impl Work {
    fn new(sockets: [&Socket; 2]) -> io::Result<Work> {
        let ring = ring()?;
        ring.submitter().register_files(&sockets.map(AsRawFd::as_raw_fd))?;
        let mut buffers = Buffers::new();
        // SAFETY: the list has as many entries, and outlives the ring.
        unsafe { ring.submitter().register_buf_ring_with_flags(buffers.list.0.as_ptr() as u64, BUFFERS, 0, 0)? };
        buffers.give(&mut (0..BUFFERS).collect());
        // SAFETY: zero is a valid value for every field: integers and nullable pointers.
        let mut room: Box<libc::msghdr> = Box::new(unsafe { mem::zeroed() });
        room.msg_controllen = mem::size_of::<Control>() as _;
        Ok(Work { ring, buffers, room, taking: false, sending: 0, arrived: Vec::with_capacity(BUFFERS.into()) })
    }

    fn request(&mut self, request: &squeue::Entry) -> io::Result<()> {
        // SAFETY: what the request points to stays until its completion has been seen.
        unsafe { self.ring.submission().push(request) }.map_err(|_| io::ErrorKind::QuotaExceeded.into())
    }

    /// Has what arrives taken, if nothing does so any more.
    fn take(&mut self) -> io::Result<()> {
        if self.taking {
            return Ok(());
        }
        self.taking = true;
        let request = opcode::RecvMsgMulti::new(TAKE, &raw const *self.room, 0).build().user_data(TAKEN);
        self.request(&request)
    }

    /// Waits until nothing is left that uses our memory or a socket: a ring goes some time after it has been closed, and
    /// the next baseline needs the port.
    fn end(mut self) -> io::Result<()> {
        while self.sending > 0 {
            self.enter(self.sending)?;
        }
        if self.taking {
            self.ring.submitter().register_sync_cancel(None, CancelBuilder::user_data(TAKEN))?;
        }
        while self.taking {
            self.enter(1)?;
        }
        self.ring.submitter().unregister_files()
    }

    /// Hands requests in, waits for so many completions, though not for long, and notes what they say.
    fn enter(&mut self, want: usize) -> io::Result<()> {
        match self.ring.submitter().submit_with_args(want, &SubmitArgs::new().timespec(&PATIENCE)) {
            Err(error) if !matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR)) => return Err(error),
            _ => {}
        }
        for completion in self.ring.completion() {
            if completion.user_data() == SENT {
                self.sending -= 1;
                continue;
            }
            // It ends when there are no buffers left, and when it has taken many.
            self.taking = cqueue::more(completion.flags());
            let buffer = cqueue::buffer_select(completion.flags());
            if let (Some(buffer), Ok(length)) = (buffer, usize::try_from(completion.result())) {
                self.arrived.push((buffer, length));
            }
        }
        Ok(())
    }
}

/// The list of free buffers, as the kernel reads it: it begins a page.
#[repr(C, align(4096))]
struct List([u8; BUFFERS as usize * mem::size_of::<BufRingEntry>()]);

struct Buffers {
    memory: Vec<u8>,
    list: Box<List>,
    tail: u16,
}

impl Buffers {
    fn new() -> Buffers {
        let memory = vec![0; usize::from(BUFFERS) * STRIDE];
        Buffers { memory, list: Box::new(List([0; BUFFERS as usize * 16])), tail: 0 }
    }

    /// Gives buffers to the kernel.
    fn give(&mut self, numbers: &mut Vec<u16>) {
        let entries = self.list.0.as_mut_ptr().cast::<BufRingEntry>();
        for number in numbers.drain(..) {
            // SAFETY: an entry of the list, which the kernel does not look at before the tail is behind it. All zeros are a
            // valid entry.
            let entry = unsafe { &mut *entries.add(usize::from(self.tail % BUFFERS)) };
            entry.set_addr(self.memory.as_mut_ptr().wrapping_add(usize::from(number) * STRIDE) as u64);
            entry.set_len(STRIDE as u32);
            entry.set_bid(number);
            self.tail = self.tail.wrapping_add(1);
        }
        // SAFETY: the tail is a field of the first entry, aligned, and everyone's accesses to it are atomic.
        let tail = unsafe { AtomicU16::from_ptr(BufRingEntry::tail(entries).cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }

    /// Where the payload in a buffer begins that has been filled with so many bytes, its length, and that of each of its
    /// datagrams.
    fn contents(&mut self, number: u16, length: usize, room: &libc::msghdr) -> (*mut u8, usize, usize) {
        let start = usize::from(number) * STRIDE;
        // SAFETY: within the memory, and the kernel does not write there before the buffer is given to it again.
        let filled = unsafe { slice::from_raw_parts(self.memory.as_ptr().add(start), length.min(STRIDE)) };
        let Ok(message) = RecvMsgOut::parse(filled, room) else { return (ptr::null_mut(), 0, 1) };
        let (control, bytes) = (message.control_data(), message.payload_data().len());
        let each = if control.is_empty() { bytes } else { bare::segment_size(control) };
        let start = self.memory.as_mut_ptr().wrapping_add(start + filled.len() - bytes);
        (start, bytes, each.max(1))
    }
}
