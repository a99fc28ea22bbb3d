//! The bare loop on `io_uring`: the same work as [`super::bare`], on what should be its fastest interface.
//!
//! One request receives every message into provided buffers (multishot `recvmsg`). The same call submits the sends and waits
//! for the next arrivals, so that a batch takes one system call instead of two. The caller does the ring's work
//! (`DEFER_TASKRUN`) instead of a polling thread, because there is only one CPU.

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

/// Number of provided buffers: those of the current batch, and of the next one, which arrives meanwhile.
const BUFFERS: u16 = 64;
/// Bytes from one buffer to the next: the largest GRO message with its metadata, rounded up to an odd number of cache lines, as
/// in udp-fanout.
const STRIDE: usize = bare::ROOM + 64 * 3;
/// Capacity of the submission queue.
const REQUESTS: u32 = 4096;
/// The indexes of the registered sockets.
const TAKE: Fixed = Fixed(0);
const SEND: Fixed = Fixed(1);
/// The request that a completion belongs to.
const TAKEN: u64 = 0;
const SENT: u64 = 1;
/// Timeout of every wait, so that a stopped loop ends.
const PATIENCE: Timespec = Timespec::new().nsec(20_000_000);

/// Starts the loop on the baseline's CPU.
///
/// # Errors
/// When a socket cannot be opened, or the kernel does not support such a ring.
pub fn start(testbed: &Testbed, task: &ForwardingTask) -> Result<Box<dyn RunningBaseline>> {
    ring().context("no io_uring (see /proc/sys/kernel/io_uring_disabled)")?;
    let replicate = task.replicate;
    bare::spawn(testbed, task, true, move |take, send, downstreams, stop| {
        if let Err(error) = forward([take, send], downstreams, replicate, stop) {
            eprintln!("The loop on io_uring has ended: {error}");
        }
    })
}

/// A ring whose work is done by the calling thread.
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
    // Buffers whose contents are being sent.
    let mut held = Vec::with_capacity(BUFFERS.into());
    while !stop.load(Ordering::Relaxed) {
        // Submits the sends, and waits for all of them, because their memory is used again, and for the first arrival.
        work.submit_receive()?;
        work.enter(work.sending + 1)?;
        while work.sending > 0 {
            work.enter(work.sending)?;
        }
        shares.clear();
        work.buffers.provide(&mut held);
        let mut size = 1;
        for (buffer, length) in work.arrived.drain(..) {
            let (start, length, each) = work.buffers.contents(buffer, length, &work.room);
            size = each;
            shares.assign(start, length, each);
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

/// The ring and the state of its requests.
struct Work {
    // Dropped first: the kernel writes into the buffers while the ring exists.
    ring: IoUring,
    buffers: Buffers,
    /// Layout of each buffer: space for a name and for control messages.
    room: Box<libc::msghdr>,
    /// The receive request is active.
    taking: bool,
    /// Number of messages that are being sent.
    sending: usize,
    /// Filled buffers, with their number of bytes.
    arrived: Vec<(u16, usize)>,
}

impl Work {
    fn new(sockets: [&Socket; 2]) -> io::Result<Work> {
        let ring = ring()?;
        ring.submitter().register_files(&sockets.map(AsRawFd::as_raw_fd))?;
        let mut buffers = Buffers::new();
        // SAFETY: the list has as many entries, and outlives the ring.
        unsafe { ring.submitter().register_buf_ring_with_flags(buffers.list.0.as_ptr() as u64, BUFFERS, 0, 0)? };
        buffers.provide(&mut (0..BUFFERS).collect());
        // SAFETY: zero is a valid value for every field: integers and nullable pointers.
        let mut room: Box<libc::msghdr> = Box::new(unsafe { mem::zeroed() });
        room.msg_controllen = mem::size_of::<Control>() as _;
        Ok(Work { ring, buffers, room, taking: false, sending: 0, arrived: Vec::with_capacity(BUFFERS.into()) })
    }

    fn request(&mut self, request: &squeue::Entry) -> io::Result<()> {
        // SAFETY: the memory that the request points to stays valid until its completion.
        unsafe { self.ring.submission().push(request) }.map_err(|_| io::ErrorKind::QuotaExceeded.into())
    }

    /// Submits the receive request, unless it is active.
    fn submit_receive(&mut self) -> io::Result<()> {
        if self.taking {
            return Ok(());
        }
        self.taking = true;
        let request = opcode::RecvMsgMulti::new(TAKE, &raw const *self.room, 0).build().user_data(TAKEN);
        self.request(&request)
    }

    /// Waits until no request uses this program's memory or a socket: the kernel frees a ring some time after it has been closed,
    /// and the next baseline needs the port.
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

    /// Submits requests, waits for this many completions or the timeout, and records their results.
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
            // The receive request ends when no buffers are left, and after many messages.
            self.taking = cqueue::more(completion.flags());
            let buffer = cqueue::buffer_select(completion.flags());
            if let (Some(buffer), Ok(length)) = (buffer, usize::try_from(completion.result())) {
                self.arrived.push((buffer, length));
            }
        }
        Ok(())
    }
}

/// The ring of provided buffers, which the kernel reads. It is page-aligned.
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

    /// Provides buffers to the kernel.
    fn provide(&mut self, numbers: &mut Vec<u16>) {
        let entries = self.list.0.as_mut_ptr().cast::<BufRingEntry>();
        for number in numbers.drain(..) {
            // SAFETY: an entry of the ring, which the kernel does not read before the tail has passed it. All zeros are a valid
            // entry.
            let entry = unsafe { &mut *entries.add(usize::from(self.tail % BUFFERS)) };
            entry.set_addr(self.memory.as_mut_ptr().wrapping_add(usize::from(number) * STRIDE) as u64);
            entry.set_len(STRIDE as u32);
            entry.set_bid(number);
            self.tail = self.tail.wrapping_add(1);
        }
        // SAFETY: the tail is a field of the first entry, aligned, and all accesses to it are atomic.
        let tail = unsafe { AtomicU16::from_ptr(BufRingEntry::tail(entries).cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }

    /// Offset and length of the payload in a buffer that holds this many bytes, and its segment size.
    fn contents(&mut self, number: u16, length: usize, room: &libc::msghdr) -> (*mut u8, usize, usize) {
        let start = usize::from(number) * STRIDE;
        // SAFETY: within the memory, and the kernel does not write there before the buffer is provided again.
        let filled = unsafe { slice::from_raw_parts(self.memory.as_ptr().add(start), length.min(STRIDE)) };
        let Ok(message) = RecvMsgOut::parse(filled, room) else { return (ptr::null_mut(), 0, 1) };
        let (control, bytes) = (message.control_data(), message.payload_data().len());
        let each = if control.is_empty() { bytes } else { bare::segment_size(control) };
        let start = self.memory.as_mut_ptr().wrapping_add(start + filled.len() - bytes);
        (start, bytes, each.max(1))
    }
}
