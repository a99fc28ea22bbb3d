//! The minimum for any userspace forwarder: the same system calls, and nothing else.
//!
//! A loop receives GRO messages (`UDP_GRO`), assigns the datagrams round robin, and sends each downstream its share as GSO
//! messages (`UDP_SEGMENT`). It counts nothing, ignores errors and changes, and assumes that all datagrams of a message have
//! the same length. Under replication, each downstream's share is all datagrams.
//!
//! [`copier`] is the other extreme: one `recvfrom`, and one `sendto` for each downstream, as in samplicator.

use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use std::{io, mem, ptr};

use anyhow::{Context, Result};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{RcvBufForce, UdpGroSegment};
use nix::unistd::Pid;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::bench::baselines::{ForwardingTask, RunningBaseline};
use crate::bench::cpu::{cpu_seconds, pin_thread};
use crate::bench::testbed::{LISTENER, Testbed};

/// Receive buffer size in bytes, the same for every baseline.
const RECEIVE_BUFFER: usize = 4 << 20;
/// Maximum number of datagrams per message.
pub const SEGMENTS: usize = 64;
/// Size of the largest GRO message, in bytes.
pub const ROOM: usize = 65_536;

/// Kernel features that the loop uses.
#[derive(Debug, Clone, Copy)]
pub struct Calls {
    /// Messages received in one call.
    pub take: usize,
    /// `UDP_GRO` and `UDP_SEGMENT`; otherwise one message is one datagram.
    pub gro: bool,
}

struct Loop {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    task: Pid,
}

impl RunningBaseline for Loop {
    fn cpu_seconds(&self) -> Option<f64> {
        cpu_seconds("/proc/self/task", Some(self.task))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Starts the loop on the baseline's CPU.
///
/// # Errors
/// When a socket cannot be opened.
pub fn start(testbed: &Testbed, task: &ForwardingTask, calls: Calls) -> Result<Box<dyn RunningBaseline>> {
    let replicate = task.replicate;
    spawn(testbed, task, calls.gro, move |take, send, downstreams, stop| {
        forward(take, send, downstreams, (calls, replicate), stop);
    })
}

/// Starts a loop that copies each datagram to each downstream, one system call each, on the baseline's CPU.
///
/// # Errors
/// When a socket cannot be opened.
pub fn copier(testbed: &Testbed, task: &ForwardingTask) -> Result<Box<dyn RunningBaseline>> {
    spawn(testbed, task, false, copy)
}

/// Starts a loop that receives from the first socket and sends with the second, on the baseline's CPU, until it is stopped.
/// `gro` enables `UDP_GRO`.
///
/// # Errors
/// When a socket cannot be opened.
pub fn spawn(
    testbed: &Testbed,
    task: &ForwardingTask,
    gro: bool,
    work: impl FnOnce(&Socket, &Socket, &[SocketAddr], &AtomicBool) + Send + 'static,
) -> Result<Box<dyn RunningBaseline>> {
    let (take, send) = testbed.gateway.run(|| {
        let take = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
        take.bind(&LISTENER.into())?;
        setsockopt(&take, RcvBufForce, &RECEIVE_BUFFER)?;
        take.set_read_timeout(Some(Duration::from_millis(20)))?;
        if gro {
            setsockopt(&take, UdpGroSegment, &true)?;
        }
        let send = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
        send.set_send_buffer_size(RECEIVE_BUFFER)?;
        Ok((take, send))
    })?;
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, downstreams, cpu) =
        (Arc::clone(&stop), Testbed::downstreams(task.downstreams), testbed.forwarder_cpu());
    let (tell, told) = std::sync::mpsc::channel();
    let thread = std::thread::Builder::new().name("bare".into()).spawn(move || {
        if pin_thread(cpu).is_ok() && tell.send(nix::unistd::gettid()).is_ok() {
            work(&take, &send, &downstreams, &stopped);
        }
    });
    let thread = Some(thread.context("cannot start a thread")?);
    let task = told.recv().context("the loop has not started")?;
    Ok(Box::new(Loop { stop, thread, task }))
}

/// Buffer for a control message with an integer.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct Control(pub [u8; 24]);

fn copy(take: &Socket, send: &Socket, downstreams: &[SocketAddr], stop: &AtomicBool) {
    let names: Vec<SockAddr> = downstreams.iter().map(|&address| address.into()).collect();
    let mut memory = vec![0u8; ROOM];
    while !stop.load(Ordering::Relaxed) {
        let Ok(length) = io::Read::read(&mut &*take, &mut memory) else { continue };
        for name in &names {
            // As in such loops, a datagram that cannot be sent is lost.
            let _ = send.send_to(&memory[..length], name);
        }
    }
}

fn forward(
    take: &Socket,
    send: &Socket,
    downstreams: &[SocketAddr],
    (calls, replicate): (Calls, bool),
    stop: &AtomicBool,
) {
    let mut memory = vec![0u8; calls.take * ROOM];
    let mut controls = vec![Control([0; 24]); calls.take];
    let mut vectors: Vec<libc::iovec> =
        memory.chunks_mut(ROOM).map(|slot| libc::iovec { iov_base: slot.as_mut_ptr().cast(), iov_len: ROOM }).collect();
    // SAFETY: zero is a valid value for every field: integers and nullable pointers.
    let mut headers: Vec<libc::mmsghdr> = vec![unsafe { mem::zeroed() }; calls.take];
    for ((header, vector), control) in headers.iter_mut().zip(&mut vectors).zip(&mut controls) {
        header.msg_hdr.msg_iov = vector;
        header.msg_hdr.msg_iovlen = 1;
        header.msg_hdr.msg_control = ptr::from_mut(control).cast();
    }
    let mut shares = Shares::new(downstreams, replicate);
    while !stop.load(Ordering::Relaxed) {
        headers.iter_mut().for_each(|header| header.msg_hdr.msg_controllen = mem::size_of::<Control>() as _);
        // SAFETY: every header points to a vector and a control buffer that live as long as this function.
        let taken = unsafe {
            libc::recvmmsg(
                take.as_raw_fd(),
                headers.as_mut_ptr(),
                calls.take as _,
                libc::MSG_WAITFORONE as _,
                ptr::null_mut(),
            )
        };
        let Ok(taken) = usize::try_from(taken) else { continue };
        let mut size = 1;
        for slot in 0..taken {
            let length = headers[slot].msg_len as usize;
            let gro = headers[slot].msg_hdr.msg_controllen > 0;
            size = if gro { segment_size(&controls[slot].0) } else { length.max(1) };
            // SAFETY: within the buffer, in which each slot has this many bytes.
            let start = unsafe { memory.as_mut_ptr().add(slot * ROOM) };
            shares.assign(start, length, size);
        }
        send_all(send, shares.messages(size, if calls.gro { SEGMENTS } else { 1 }));
        shares.clear();
    }
}

fn send_all(socket: &Socket, headers: &mut [libc::mmsghdr]) {
    let mut done = 0;
    while done < headers.len() {
        // SAFETY: the headers point to names, vectors and payloads that outlive the call.
        let sent =
            unsafe { libc::sendmmsg(socket.as_raw_fd(), headers[done..].as_mut_ptr(), (headers.len() - done) as _, 0) };
        done += usize::try_from(sent).unwrap_or(1);
    }
}

/// The datagrams to send to each downstream.
pub struct Shares {
    names: Vec<SockAddr>,
    shares: Vec<Vec<libc::iovec>>,
    replicate: bool,
    turn: usize,
    headers: Vec<libc::mmsghdr>,
    control: Box<Control>,
}

impl Shares {
    /// Empty shares. Under replication, every downstream will get all datagrams.
    pub fn new(downstreams: &[SocketAddr], replicate: bool) -> Shares {
        let names: Vec<SockAddr> = downstreams.iter().map(|&address| address.into()).collect();
        let shares = names.iter().map(|_| Vec::with_capacity(4096)).collect();
        Shares { names, shares, replicate, turn: 0, headers: Vec::new(), control: Box::new(Control([0; 24])) }
    }

    /// Assigns the datagrams of a message: each has `size` bytes, except for the last.
    pub fn assign(&mut self, start: *mut u8, length: usize, size: usize) {
        let mut at = 0;
        while at < length {
            let this = size.min(length - at);
            let vector = libc::iovec { iov_base: start.wrapping_add(at).cast(), iov_len: this };
            if self.replicate {
                self.shares.iter_mut().for_each(|share| share.push(vector));
            } else {
                self.shares[self.turn].push(vector);
                self.turn = if self.turn + 1 == self.shares.len() { 0 } else { self.turn + 1 };
            }
            at += this;
        }
    }

    /// The assigned datagrams, as messages of up to `most` datagrams of `size` bytes. They are valid until the next call of this
    /// or of [`Shares::clear`].
    pub fn messages(&mut self, size: usize, most: usize) -> &mut [libc::mmsghdr] {
        set_segment_size(&mut self.control, size);
        self.headers.clear();
        for (name, share) in self.names.iter().zip(self.shares.iter_mut()) {
            for chunk in share.chunks_mut(most.min(65_000 / size).max(1)) {
                self.headers.push(header(name, chunk, &mut self.control));
            }
        }
        &mut self.headers
    }

    /// Removes all assigned datagrams.
    pub fn clear(&mut self) {
        self.shares.iter_mut().for_each(Vec::clear);
    }
}

fn header(name: &SockAddr, vectors: &mut [libc::iovec], control: &mut Control) -> libc::mmsghdr {
    // SAFETY: zero is a valid value for every field: integers and nullable pointers.
    let mut header: libc::mmsghdr = unsafe { mem::zeroed() };
    header.msg_hdr.msg_name = name.as_ptr().cast_mut().cast();
    header.msg_hdr.msg_namelen = name.len();
    header.msg_hdr.msg_iov = vectors.as_mut_ptr();
    header.msg_hdr.msg_iovlen = vectors.len() as _;
    if vectors.len() > 1 {
        header.msg_hdr.msg_control = ptr::from_mut(control).cast();
        header.msg_hdr.msg_controllen = mem::size_of::<Control>() as _;
    }
    header
}

/// The segment size of a GRO message, from the kernel's control message.
pub fn segment_size(control: &[u8]) -> usize {
    assert!(control.len() >= 20, "there is no whole control message");
    // SAFETY: there is room for a header and an integer after it.
    let size = unsafe { libc::CMSG_DATA(control.as_ptr().cast()).cast::<libc::c_int>().read_unaligned() };
    usize::try_from(size).unwrap_or(1).max(1)
}

fn set_segment_size(control: &mut Control, size: usize) {
    let header = libc::cmsghdr {
        // SAFETY: computes a number.
        cmsg_len: unsafe { libc::CMSG_LEN(2) } as _,
        cmsg_level: libc::SOL_UDP,
        cmsg_type: libc::UDP_SEGMENT,
    };
    // SAFETY: the buffer has room for both and is aligned for the header.
    unsafe {
        let start = control.0.as_mut_ptr();
        start.cast::<libc::cmsghdr>().write(header);
        libc::CMSG_DATA(start.cast()).cast::<u16>().write_unaligned(size as u16);
    }
}
