//! Numbered datagrams from senders to collectors.
//!
//! A sender limits the datagrams in flight to half of the smallest socket buffer on the path, and waits for the collectors
//! before it sends more: a closed loop, as fast as the path and without loss by overload. Nothing sleeps; the collectors wake
//! the sender.
//!
//! A datagram consists of the run ID, its sequence number, its length, and padding derived from the number, so that
//! truncated, damaged and foreign datagrams are detected.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, IoSlice};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg, setsockopt, sockopt::RcvBufForce};
use nix::unistd::Pid;
use socket2::{Domain, Socket, Type};

use super::netns::Namespace;
use super::report::{Expect, ReceiverStats, Report, RunId};
use super::topology::Lab;

/// Bytes of a datagram before the padding: run ID, sequence number, length.
pub const HEADER: usize = 20;
/// Upper limit of sequence numbers, which bounds the size of the statistics.
const MAX_SEQUENCE: u64 = 1 << 28;
/// After this time without an arrival, missing datagrams count as lost. A test that expects loss may set another time.
pub const PATIENCE: Duration = Duration::from_secs(3);
/// How long a collector continues after everything has arrived, to catch unexpected datagrams.
const SETTLE: Duration = Duration::from_millis(50);
/// Maximum in flight, in bytes of kernel memory: half of Linux's default socket buffer.
const IN_FLIGHT: usize = 100_000;
/// Receive buffer size of a collector in bytes. Large enough for receivers that no sender waits for, as with `sample`.
const COLLECTED: usize = 16 << 20;

/// Progress counters that senders and collectors share.
#[derive(Debug)]
pub struct Progress {
    expect: Expect,
    collectors: u64,
    sent: AtomicU64,
    arrived: AtomicU64,
    /// The lowest number of arrivals that a sender waits for; `u64::MAX` if none waits.
    wake_at: AtomicU64,
    lock: Mutex<()>,
    news: Condvar,
}

/// A socket at every receiver, each read by its own thread.
#[derive(Debug)]
pub struct Collectors {
    progress: Arc<Progress>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<ReceiverStats>>>,
}

/// A sending socket with its run ID and sequence numbers.
#[derive(Debug)]
pub struct Sender {
    socket: UdpSocket,
    target: SocketAddr,
    run: RunId,
    next: u64,
    payload: usize,
    window: Option<u64>,
    segments: u16,
    patience: Duration,
    buffer: Vec<u8>,
}

/// Opens a socket in a namespace. The address may still be bound by a recently closed socket: a child process that another
/// thread is starting may hold a copy of it. The newer socket gets the datagrams.
///
/// # Errors
/// When the address does not belong to the namespace, or is in use.
pub fn bind(namespace: &Namespace, address: SocketAddr) -> Result<UdpSocket> {
    namespace.run(|| {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into()).with_context(|| format!("cannot bind {address}"))?;
        Ok(socket.into())
    })
}

impl Progress {
    /// The datagrams sent and the copies arrived so far.
    pub fn now(&self) -> (u64, u64) {
        (self.sent.load(Ordering::SeqCst), self.arrived.load(Ordering::SeqCst))
    }

    /// The expected copies of all datagrams sent so far.
    fn due(&self) -> u64 {
        let copies = match self.expect {
            Expect::OneOfThem => 1,
            Expect::EachOfThem => self.collectors,
        };
        self.sent.load(Ordering::SeqCst) * copies
    }

    fn note_arrival(&self) {
        // A collector counts the arrival before it reads `wake_at`; a sender writes `wake_at` before it reads the arrivals.
        // So at least one of them sees the other's write.
        let arrived = self.arrived.fetch_add(1, Ordering::SeqCst) + 1;
        if arrived >= self.wake_at.load(Ordering::SeqCst) {
            let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.wake_at.store(u64::MAX, Ordering::SeqCst);
            self.news.notify_all();
        }
    }

    /// Waits until this many copies have arrived; false after `patience` without an arrival.
    fn wait_for(&self, target: u64, patience: Duration) -> bool {
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let mut before = self.arrived.load(Ordering::SeqCst);
        loop {
            self.wake_at.fetch_min(target, Ordering::SeqCst);
            let arrived = self.arrived.load(Ordering::SeqCst);
            if arrived >= target {
                return true;
            }
            let (held, wait) = self.news.wait_timeout(guard, patience).unwrap_or_else(PoisonError::into_inner);
            guard = held;
            let after = self.arrived.load(Ordering::SeqCst);
            if wait.timed_out() && after == before && after < target {
                return false;
            }
            before = after;
        }
    }
}

impl Collectors {
    /// Starts collecting at every receiver of a lab.
    ///
    /// # Errors
    /// When a socket cannot be opened.
    pub fn start(lab: &Lab, expect: Expect) -> Result<Self> {
        let sites = lab.sites.iter().map(|site| (site.name.as_str(), lab.namespace_of(site), site.address));
        Self::start_at(sites, expect)
    }

    /// Starts collecting at these receivers: name, namespace, address to bind.
    ///
    /// # Errors
    /// When a socket cannot be opened.
    pub fn start_at<'a>(
        places: impl IntoIterator<Item = (&'a str, &'a Namespace, SocketAddr)>,
        expect: Expect,
    ) -> Result<Self> {
        let mut sockets = Vec::new();
        for (name, namespace, address) in places {
            let socket = bind(namespace, address).with_context(|| format!("for {name}"))?;
            socket.set_read_timeout(Some(SETTLE))?;
            setsockopt(&socket, RcvBufForce, &COLLECTED).context("cannot enlarge a collector's buffer")?;
            sockets.push((socket, ReceiverStats::new(name, address)));
        }
        let progress = Arc::new(Progress {
            expect,
            collectors: sockets.len() as u64,
            sent: AtomicU64::new(0),
            arrived: AtomicU64::new(0),
            wake_at: AtomicU64::new(u64::MAX),
            lock: Mutex::new(()),
            news: Condvar::new(),
        });
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for (socket, stats) in sockets {
            let (progress, stop) = (Arc::clone(&progress), Arc::clone(&stop));
            let thread = thread::Builder::new().name(stats.name.clone());
            threads.push(thread.spawn(move || collect(&socket, stats, &progress, &stop))?);
        }
        Ok(Collectors { progress, stop, threads })
    }

    /// The datagrams sent and the copies arrived so far.
    pub fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    /// Waits until this many copies have arrived in total; false after `patience` without an arrival.
    pub fn wait_for(&self, copies: u64, patience: Duration) -> bool {
        self.progress.wait_for(copies, patience)
    }

    /// Waits for late datagrams, stops, and reports on the datagrams of these senders.
    ///
    /// # Errors
    /// When a collector could not receive.
    pub fn finish(mut self, senders: &[&Sender]) -> Result<Report> {
        let sent: BTreeMap<_, _> = senders.iter().map(|sender| (sender.run, sender.next)).collect();
        self.stop.store(true, Ordering::SeqCst);
        let mut all_stats = Vec::new();
        for thread in self.threads.drain(..) {
            all_stats.push(thread.join().map_err(|_| anyhow!("a collector's thread panicked"))??);
        }
        Ok(Report::new(&sent, &all_stats, self.progress.expect))
    }
}

impl Drop for Collectors {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Reads a socket until `stop` is set and a read times out.
fn collect(
    socket: &UdpSocket,
    mut stats: ReceiverStats,
    progress: &Progress,
    stop: &AtomicBool,
) -> Result<ReceiverStats> {
    let mut buffer = vec![0; 65_536];
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((length, source)) => match decode(&buffer[..length]) {
                Ok((run, sequence)) => {
                    stats.note(run, sequence, source, length);
                    progress.note_arrival();
                }
                Err(what) => stats.note_unexpected(source, || what),
            },
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if stop.load(Ordering::SeqCst) {
                    return Ok(stats);
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => bail!("{} cannot receive: {error}", stats.name),
        }
    }
}

impl Sender {
    /// Opens a socket in `namespace`, bound to `source` (port 0 for any), that sends to `target`.
    ///
    /// # Errors
    /// When the socket cannot be opened.
    pub fn open(namespace: &Namespace, source: impl Into<SocketAddr>, target: SocketAddr) -> Result<Self> {
        let socket = bind(namespace, source.into())?;
        Ok(Sender {
            socket,
            target,
            run: rand::random(),
            next: 0,
            payload: 100,
            window: None,
            segments: 1,
            patience: PATIENCE,
            buffer: Vec::new(),
        })
    }

    /// Opens a socket of the lab's sender that sends to the lab's listener.
    ///
    /// # Errors
    /// When the socket cannot be opened.
    pub fn in_lab(lab: &Lab) -> Result<Self> {
        Self::open(&lab.sender, (lab.sender_address(), 0), lab.listener())
    }

    /// Sets the UDP payload size in bytes, from 20 to 65,507; default 100. Takes effect with the next datagram.
    pub fn payload(mut self, bytes: usize) -> Self {
        assert!((HEADER..=65_507).contains(&bytes), "the payload must have 20 to 65,507 bytes");
        self.payload = bytes;
        self
    }

    /// Sets the maximum number of datagrams in flight. The default fits default socket buffers.
    pub fn window(mut self, datagrams: u64) -> Self {
        self.window = Some(datagrams.max(1));
        self
    }

    /// Sends this many datagrams in one GSO message (`UDP_SEGMENT`), which a TC program sees as one packet. At most 64
    /// datagrams and 65,507 bytes in total.
    pub fn segments(mut self, count: u16) -> Self {
        assert!(
            (1..=64).contains(&count) && usize::from(count) * self.payload <= 65_507,
            "at most 64 segments and 65,507 bytes per call"
        );
        self.segments = count;
        self
    }

    /// Sets how long [`Sender::send`] waits for the next arrival before it gives up; default [`PATIENCE`].
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The socket, to set its options.
    pub fn socket(&self) -> &UdpSocket {
        &self.socket
    }

    /// The sender's address and port, which receivers see if the source is preserved.
    ///
    /// # Errors
    /// When the kernel cannot return the address.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// The run ID of this sender's datagrams in a [`Report`].
    pub fn run_id(&self) -> RunId {
        self.run
    }

    /// Datagrams sent so far.
    pub fn sent(&self) -> u64 {
        self.next
    }

    /// Sends this many datagrams without waiting. Socket buffers must hold them all, or some are lost.
    ///
    /// The thread stays on one CPU meanwhile, as in [`Sender::send`]: the kernel program has a round-robin cursor per CPU.
    ///
    /// # Errors
    /// When a send fails.
    pub fn burst(&mut self, count: u64, collectors: &Collectors) -> Result<()> {
        let _pinned = Pinned::here()?;
        self.send_at_once(count, collectors)
    }

    fn send_at_once(&mut self, count: u64, collectors: &Collectors) -> Result<()> {
        let mut left = count;
        while left > 0 {
            let n = left.min(self.segments.into());
            self.send_piece(n)?;
            collectors.progress.sent.fetch_add(n, Ordering::SeqCst);
            left -= n;
        }
        Ok(())
    }

    /// Sends this many datagrams in a closed loop, waits until all have arrived, and returns the elapsed time. Gives up early
    /// when nothing arrives any more: the report then shows the loss.
    ///
    /// The thread stays on one CPU meanwhile: datagrams of one socket sent from different CPUs may be reordered before they
    /// reach the forwarder.
    ///
    /// # Errors
    /// When a send fails.
    pub fn send(&mut self, count: u64, collectors: &Collectors) -> Result<Duration> {
        let _pinned = Pinned::here()?;
        let window = self.window.unwrap_or_else(|| default_window(self.payload));
        let progress = &collectors.progress;
        let start = Instant::now();
        let mut left = count;
        while left > 0 {
            if progress.due().saturating_sub(progress.now().1) >= window {
                // Half a window at a time: a wake-up for every datagram would cost more than the datagram.
                let target = progress.due() - window / 2;
                if !progress.wait_for(target, self.patience) {
                    return Ok(start.elapsed());
                }
            }
            let n = left.min(self.segments.into());
            self.send_at_once(n, collectors)?;
            left -= n;
        }
        progress.wait_for(progress.due(), self.patience);
        Ok(start.elapsed())
    }

    /// Sends the next `n` datagrams in one call.
    fn send_piece(&mut self, n: u64) -> Result<()> {
        self.buffer.clear();
        for sequence in self.next..self.next + n {
            encode(&mut self.buffer, self.run, sequence, self.payload);
        }
        let refused = || format!("cannot send to {}", self.target);
        if n == 1 {
            self.socket.send_to(&self.buffer, self.target).with_context(refused)?;
        } else {
            let size = u16::try_from(self.payload)?;
            let segment = [ControlMessage::UdpGsoSegments(&size)];
            let data = [IoSlice::new(&self.buffer)];
            let target = SockaddrStorage::from(self.target);
            sendmsg(self.socket.as_raw_fd(), &data, &segment, MsgFlags::empty(), Some(&target))
                .with_context(refused)?;
        }
        self.next += n;
        Ok(())
    }
}

/// The number of datagrams that always fit the socket buffers on the path. The kernel charges a socket for a packet's memory:
/// about the next power of two, plus metadata.
fn default_window(payload: usize) -> u64 {
    (IN_FLIGHT / (payload.next_power_of_two() + 768)).max(1) as u64
}

/// Pins the thread to its current CPU, until dropped.
#[derive(Debug)]
pub struct Pinned(CpuSet);

impl Pinned {
    /// Pins the calling thread.
    ///
    /// # Errors
    /// When the affinity cannot be changed.
    pub fn here() -> Result<Self> {
        let this_thread = Pid::from_raw(0);
        let before = sched_getaffinity(this_thread)?;
        let mut here = CpuSet::new();
        here.set(sched_getcpu()?)?;
        sched_setaffinity(this_thread, &here)?;
        Ok(Pinned(before))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = sched_setaffinity(Pid::from_raw(0), &self.0);
    }
}

/// Appends a datagram to `buffer`.
pub fn encode(buffer: &mut Vec<u8>, run: RunId, sequence: u64, payload: usize) {
    let start = buffer.len();
    buffer.extend_from_slice(&run.to_be_bytes());
    buffer.extend_from_slice(&sequence.to_be_bytes());
    buffer.extend_from_slice(&u32::try_from(payload).unwrap_or(u32::MAX).to_be_bytes());
    let header = buffer.len() - start;
    buffer.extend_from_slice(padding(sequence, payload - header));
}

/// Reads a datagram's run ID and sequence number; an error describes the defect.
pub fn decode(datagram: &[u8]) -> Result<(RunId, u64), String> {
    let field = |from: usize| datagram.get(from..from + 8).and_then(|bytes| bytes.try_into().ok());
    let (Some(run), Some(sequence)) = (field(0).map(u64::from_be_bytes), field(8).map(u64::from_be_bytes)) else {
        return Err(format!("{} bytes, too short for a header", datagram.len()));
    };
    let length = datagram.get(16..HEADER).and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes);
    if length.map(|n| n as usize) != Some(datagram.len()) || sequence >= MAX_SEQUENCE {
        return Err(format!("{} bytes, sent as {length:?}, number {sequence}", datagram.len()));
    }
    let (seen, sent) = (&datagram[HEADER..], padding(sequence, datagram.len() - HEADER));
    if seen != sent {
        let at = seen.iter().zip(sent).position(|(a, b)| a != b).unwrap_or(0) + HEADER;
        return Err(format!("number {sequence} of run {run:#x} is damaged at byte {at}"));
    }
    Ok((run, sequence))
}

/// The padding after the header: bytes that count up from a value derived from the sequence number. Taken from a table,
/// because test programs are not optimised.
fn padding(sequence: u64, length: usize) -> &'static [u8] {
    static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| (0..=u8::MAX).cycle().take(256 + 65_536).collect());
    let first = (sequence.wrapping_mul(31) & 0xff) as usize;
    &BYTES[first..first + length]
}

/// A socket address of this IP with any port, for [`Sender::open`].
pub fn any_port(ip: IpAddr) -> SocketAddr {
    SocketAddr::new(ip, 0)
}
