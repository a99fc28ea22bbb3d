//! Numbered datagrams from senders to collectors.
//!
//! A sender keeps only so many datagrams in flight as fit half of the smallest socket buffer on the way, and waits for the
//! collectors before it sends more: a closed loop, as fast as the path and without loss of its own making. Nothing
//! sleeps; the collectors wake the sender.
//!
//! A datagram is the run's id, its sequence number and its own length, then filling that follows from the number, so
//! that one that is cut, damaged or foreign is recognised.

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
use super::report::{Expect, Report, RunId, Tally};
use super::topology::Lab;

/// Bytes of a datagram before the filling: run, number, length.
pub const HEADER: usize = 20;
/// Sequence numbers are smaller, so that a tally stays small.
const MAX_SEQUENCE: u64 = 1 << 28;
/// After this long without any arrival the rest counts as lost, unless a test that expects loss says otherwise.
pub const PATIENCE: Duration = Duration::from_secs(3);
/// How long a collector stays on after everything has arrived, for datagrams that should not come.
const SETTLE: Duration = Duration::from_millis(50);
/// What may be in flight, in bytes of kernel memory: half of Linux's default socket buffer.
const IN_FLIGHT: usize = 100_000;
/// Bytes a collector's socket may hold, so that one that no sender waits for, as under a `sample`, keeps what it gets.
const COLLECTED: usize = 16 << 20;

/// How far senders and collectors have got; shared by all of them.
#[derive(Debug)]
pub struct Progress {
    expect: Expect,
    collectors: u64,
    sent: AtomicU64,
    arrived: AtomicU64,
    /// The lowest number of arrivals that some sender waits for; `u64::MAX` if none does.
    wake_at: AtomicU64,
    lock: Mutex<()>,
    news: Condvar,
}

/// A socket in every receiver's place, each emptied by a thread of its own.
#[derive(Debug)]
pub struct Collectors {
    progress: Arc<Progress>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<Tally>>>,
}

/// One sending socket and its numbers.
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

/// Opens a socket in a namespace. The address may be one that a socket of ours had a moment ago: a program that some
/// other thread is just starting may still hold a copy of that one, and the newer socket gets the datagrams.
///
/// # Errors
/// When the address is not the namespace's, or somebody else's.
pub fn bind(namespace: &Namespace, address: SocketAddr) -> Result<UdpSocket> {
    namespace.run(|| {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into()).with_context(|| format!("cannot bind {address}"))?;
        Ok(socket.into())
    })
}

impl Progress {
    /// Datagrams sent and copies arrived so far.
    pub fn now(&self) -> (u64, u64) {
        (self.sent.load(Ordering::SeqCst), self.arrived.load(Ordering::SeqCst))
    }

    /// Copies that all datagrams sent so far should make.
    fn due(&self) -> u64 {
        let copies = match self.expect {
            Expect::OneOfThem => 1,
            Expect::EachOfThem => self.collectors,
        };
        self.sent.load(Ordering::SeqCst) * copies
    }

    fn note_arrival(&self) {
        // Arrivals are counted before `wake_at` is read, and `wake_at` is written before arrivals are read: one of
        // the two sides always sees the other.
        let arrived = self.arrived.fetch_add(1, Ordering::SeqCst) + 1;
        if arrived >= self.wake_at.load(Ordering::SeqCst) {
            let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.wake_at.store(u64::MAX, Ordering::SeqCst);
            self.news.notify_all();
        }
    }

    /// Waits until so many copies have arrived; false if for `patience` nothing has.
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
    /// When a socket cannot be opened there.
    pub fn start(lab: &Lab, expect: Expect) -> Result<Self> {
        let sites = lab.sites.iter().map(|site| (site.name.as_str(), lab.namespace_of(site), site.address));
        Self::start_at(sites, expect)
    }

    /// Starts collecting at these places: a name, a namespace, the address to bind there.
    ///
    /// # Errors
    /// When a socket cannot be opened there.
    pub fn start_at<'a>(
        places: impl IntoIterator<Item = (&'a str, &'a Namespace, SocketAddr)>,
        expect: Expect,
    ) -> Result<Self> {
        let mut sockets = Vec::new();
        for (name, namespace, address) in places {
            let socket = bind(namespace, address).with_context(|| format!("for {name}"))?;
            socket.set_read_timeout(Some(SETTLE))?;
            setsockopt(&socket, RcvBufForce, &COLLECTED).context("cannot enlarge a collector's buffer")?;
            sockets.push((socket, Tally::new(name, address)));
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
        for (socket, tally) in sockets {
            let (progress, stop) = (Arc::clone(&progress), Arc::clone(&stop));
            let thread = thread::Builder::new().name(tally.name.clone());
            threads.push(thread.spawn(move || collect(&socket, tally, &progress, &stop))?);
        }
        Ok(Collectors { progress, stop, threads })
    }

    /// How far things have got.
    pub fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    /// Waits until so many copies have arrived in all; false if for `patience` nothing has.
    pub fn wait_for(&self, copies: u64, patience: Duration) -> bool {
        self.progress.wait_for(copies, patience)
    }

    /// Waits for stragglers, stops and reckons up what these senders have sent.
    ///
    /// # Errors
    /// When a collector could not receive.
    pub fn finish(mut self, senders: &[&Sender]) -> Result<Report> {
        let sent: BTreeMap<_, _> = senders.iter().map(|sender| (sender.run, sender.next)).collect();
        self.stop.store(true, Ordering::SeqCst);
        let mut tallies = Vec::new();
        for thread in self.threads.drain(..) {
            tallies.push(thread.join().map_err(|_| anyhow!("a collector's thread panicked"))??);
        }
        Ok(Report::new(&sent, &tallies, self.progress.expect))
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

/// Empties a socket until told to stop and nothing has come for a while.
fn collect(socket: &UdpSocket, mut tally: Tally, progress: &Progress, stop: &AtomicBool) -> Result<Tally> {
    let mut buffer = vec![0; 65_536];
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((length, source)) => match decode(&buffer[..length]) {
                Ok((run, sequence)) => {
                    tally.note(run, sequence, source, length);
                    progress.note_arrival();
                }
                Err(what) => tally.note_unexpected(source, || what),
            },
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if stop.load(Ordering::SeqCst) {
                    return Ok(tally);
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => bail!("{} cannot receive: {error}", tally.name),
        }
    }
}

impl Sender {
    /// A socket in `namespace` bound to `source` (port 0 for any) that will send to `target`.
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

    /// A socket of the lab's sender that will send to the lab's listener.
    ///
    /// # Errors
    /// When the socket cannot be opened.
    pub fn in_lab(lab: &Lab) -> Result<Self> {
        Self::open(&lab.sender, (lab.sender_address(), 0), lab.listener())
    }

    /// The datagrams' size in bytes of UDP payload, from 20 to 65,507; 100 unless told. Takes effect with the next datagram.
    pub fn payload(mut self, bytes: usize) -> Self {
        assert!((HEADER..=65_507).contains(&bytes), "a payload has 20 to 65,507 bytes");
        self.payload = bytes;
        self
    }

    /// How many datagrams may be in flight, instead of what default socket buffers hold.
    pub fn window(mut self, datagrams: u64) -> Self {
        self.window = Some(datagrams.max(1));
        self
    }

    /// Hands the kernel so many datagrams in one piece, to be cut up as late as possible (`UDP_SEGMENT`): that is
    /// how a TC program meets packets that hold several datagrams. At most 64, and 65,507 bytes together.
    pub fn segments(mut self, count: u16) -> Self {
        assert!((1..=64).contains(&count) && usize::from(count) * self.payload <= 65_507, "too much for one call");
        self.segments = count;
        self
    }

    /// How long [`Sender::send`] waits for the next arrival before it gives up, instead of [`PATIENCE`].
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The socket, to set its options.
    pub fn socket(&self) -> &UdpSocket {
        &self.socket
    }

    /// The address and port receivers see where the source is kept.
    ///
    /// # Errors
    /// When the socket does not know.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// What tells its datagrams from others' in a [`Report`].
    pub fn run_id(&self) -> RunId {
        self.run
    }

    /// Datagrams sent so far.
    pub fn sent(&self) -> u64 {
        self.next
    }

    /// Sends so many datagrams without waiting for anybody. Only for few: more than buffers hold are lost.
    ///
    /// The thread stays on one CPU meanwhile, as in [`Sender::send`]; on each, the kernel program takes turns by itself.
    ///
    /// # Errors
    /// When the kernel refuses to send.
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

    /// Sends so many datagrams in a closed loop and waits until all have arrived; returns how long that took. Gives
    /// up, with less sent, when nothing arrives any more: the report then shows what is lost.
    ///
    /// The thread stays on one CPU meanwhile. Datagrams of one socket that enter the network on different CPUs may
    /// overtake each other, which no forwarder could be blamed for.
    ///
    /// # Errors
    /// When the kernel refuses to send.
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

/// As many datagrams as certainly fit the socket buffers on the way. The kernel charges a socket for the memory a
/// packet occupies: about the next power of two, and its own bookkeeping.
fn default_window(payload: usize) -> u64 {
    (IN_FLIGHT / (payload.next_power_of_two() + 768)).max(1) as u64
}

/// Keeps the thread on the CPU it is on, until dropped.
#[derive(Debug)]
pub struct Pinned(CpuSet);

impl Pinned {
    /// Keeps it there.
    ///
    /// # Errors
    /// When the kernel refuses.
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
    buffer.extend_from_slice(filling(sequence, payload - header));
}

/// Reads a datagram's run and number; an error says in words what is wrong with it.
pub fn decode(datagram: &[u8]) -> Result<(RunId, u64), String> {
    let field = |from: usize| datagram.get(from..from + 8).and_then(|bytes| bytes.try_into().ok());
    let (Some(run), Some(sequence)) = (field(0).map(u64::from_be_bytes), field(8).map(u64::from_be_bytes)) else {
        return Err(format!("{} bytes, too short for a header", datagram.len()));
    };
    let length = datagram.get(16..HEADER).and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes);
    if length.map(|n| n as usize) != Some(datagram.len()) || sequence >= MAX_SEQUENCE {
        return Err(format!("{} bytes, sent as {length:?}, number {sequence}", datagram.len()));
    }
    let (seen, sent) = (&datagram[HEADER..], filling(sequence, datagram.len() - HEADER));
    if seen != sent {
        let at = seen.iter().zip(sent).position(|(a, b)| a != b).unwrap_or(0) + HEADER;
        return Err(format!("number {sequence} of run {run:#x} is damaged at byte {at}"));
    }
    Ok((run, sequence))
}

/// What follows the header: bytes that count up from one that depends on the number. From a table, because test
/// programs are not optimised and this is done for every datagram.
fn filling(sequence: u64, length: usize) -> &'static [u8] {
    static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| (0..=u8::MAX).cycle().take(256 + 65_536).collect());
    let first = (sequence.wrapping_mul(31) & 0xff) as usize;
    &BYTES[first..first + length]
}

/// A socket address of this IP with any port, for [`Sender::open`].
pub fn any_port(ip: IpAddr) -> SocketAddr {
    SocketAddr::new(ip, 0)
}
