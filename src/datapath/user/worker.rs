//! A worker thread: waits for datagrams or for a command of the main thread, and forwards.
//!
//! Whatever can fail happens in [`PreparedWorker::new`] on the main thread, before the thread exists. A worker ends
//! only when told to, or when it can no longer wait or read; the latter is logged and shows in [`Worker::has_died`].

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, Result};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use socket2::Socket;
use tracing::{error, warn};

use super::counters::WorkerKey;
use super::forward::Forwarder;
use super::table::WorkerTable;

const SOCKET: Token = Token(0);
const WAKE: Token = Token(1);

/// The maximum length of a thread name in Linux, in bytes.
const MAX_THREAD_NAME: usize = 15;

/// Reads that may fail in a row. A network error fails one read; only a broken socket fails this many.
const MAX_READ_ERRORS: u32 = 100;

/// What the main thread tells a worker.
#[derive(Debug)]
enum WorkerCommand {
    /// Use this table for every datagram received from now on.
    Table(WorkerTable),
    /// End.
    Stop(StopMode),
}

/// How a worker ends.
#[derive(Debug, Clone, Copy)]
pub enum StopMode {
    /// After the current batch. The next worker forwards what the socket holds.
    Now,
    /// When the socket is empty, at this time at the latest.
    Drained(Instant),
}

/// A worker that lacks only its thread.
#[derive(Debug)]
pub struct PreparedWorker {
    key: WorkerKey,
    name: String,
    /// The index in the list of allowed CPUs to pin to.
    pin_to: Option<usize>,
    commands: Sender<WorkerCommand>,
    waker: Waker,
    worker_loop: WorkerLoop,
}

/// A running worker. Dropping it stops it after its current batch and waits for its end.
#[derive(Debug)]
pub struct Worker {
    key: WorkerKey,
    commands: Sender<WorkerCommand>,
    waker: Waker,
    thread: Option<JoinHandle<Result<()>>>,
}

/// The part that runs on the thread.
#[derive(Debug)]
struct WorkerLoop {
    socket: Arc<Socket>,
    poll: Poll,
    commands: Receiver<WorkerCommand>,
    forwarder: Forwarder,
}

impl PreparedWorker {
    /// A worker that will forward what arrives at the socket. `number` is its number within the listener.
    ///
    /// # Errors
    /// When the kernel refuses an epoll instance or an eventfd.
    pub fn new(
        key: WorkerKey,
        listener: &str,
        number: usize,
        pin: bool,
        socket: Arc<Socket>,
        forwarder: Forwarder,
    ) -> Result<Self> {
        let poll = Poll::new().context("cannot create an epoll instance")?;
        let waker = Waker::new(poll.registry(), WAKE).context("cannot create an eventfd")?;
        poll.registry()
            .register(&mut SourceFd(&socket.as_raw_fd()), SOCKET, Interest::READABLE)
            .context("cannot watch the listener's socket")?;
        let (commands, receiver) = channel();
        Ok(PreparedWorker {
            key,
            name: thread_name(listener, number),
            pin_to: pin.then_some(number),
            commands,
            waker,
            worker_loop: WorkerLoop { socket, poll, commands: receiver, forwarder },
        })
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// When the kernel refuses a thread.
    pub fn start(self) -> Result<Worker> {
        let PreparedWorker { key, name, pin_to, commands, waker, worker_loop } = self;
        let run = {
            let name = name.clone();
            move || {
                if let Some(number) = pin_to {
                    pin(&name, number);
                }
                worker_loop.run().inspect_err(|error| error!(worker = name, "worker died: {error:#}"))
            }
        };
        let thread = std::thread::Builder::new()
            .name(name.clone())
            .spawn(run)
            .with_context(|| format!("cannot start the thread {name}"))?;
        Ok(Worker { key, commands, waker, thread: Some(thread) })
    }
}

impl Worker {
    /// Identifies the worker within its listener.
    pub fn key(&self) -> WorkerKey {
        self.key
    }

    /// Sends a new table. Datagrams that are sent to the listener after this returns are forwarded by it.
    pub fn set_table(&self, table: WorkerTable) {
        self.send(WorkerCommand::Table(table));
    }

    /// Tells the worker to end.
    pub fn stop(&self, how: StopMode) {
        self.send(WorkerCommand::Stop(how));
    }

    /// True if it ended without having been told to.
    pub fn has_died(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for its end. Call [`Worker::stop`] first.
    pub fn join(mut self) {
        self.wait();
    }

    fn send(&self, command: WorkerCommand) {
        // Sending fails if the worker has died; that is logged and handled elsewhere.
        if self.commands.send(command).is_ok()
            && let Err(error) = self.waker.wake()
        {
            error!("cannot wake a worker: {error}");
        }
    }

    fn wait(&mut self) {
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join) {
            let what = panic.downcast_ref::<String>().map(String::as_str);
            error!("a worker panicked: {}", what.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no message"));
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.stop(StopMode::Now);
            self.wait();
        }
    }
}

impl WorkerLoop {
    fn run(mut self) -> Result<()> {
        let mut events = Events::with_capacity(4);
        loop {
            // Read before waiting: epoll reports only what arrives after a read that found nothing.
            match self.drain_socket(None)? {
                Some(StopMode::Now) => return Ok(()),
                Some(StopMode::Drained(until)) => return self.drain_socket(Some(until)).map(drop),
                None => {}
            }
            if let Err(error) = self.poll.poll(&mut events, None)
                && error.kind() != io::ErrorKind::Interrupted
            {
                return Err(error).context("cannot wait for datagrams");
            }
        }
    }

    /// Forwards until the socket is empty or the time has come. Returns early if told to stop.
    fn drain_socket(&mut self, until: Option<Instant>) -> Result<Option<StopMode>> {
        let mut errors = 0;
        while until.is_none_or(|until| Instant::now() < until) {
            let received = match self.forwarder.receive(&self.socket) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(self.process_commands()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    errors += 1;
                    if errors == MAX_READ_ERRORS {
                        return Err(error).context("cannot read from the listener's socket");
                    }
                    continue;
                }
            };
            errors = 0;
            // Between receiving and selecting, so that datagrams sent after a new table was handed over follow it.
            let stop = self.process_commands();
            self.forwarder.forward(received);
            if stop.is_some() {
                return Ok(stop);
            }
        }
        warn!("stopped before all queued datagrams were forwarded: out of time");
        Ok(None)
    }

    /// Processes the queued commands, up to the first that stops the worker.
    fn process_commands(&mut self) -> Option<StopMode> {
        loop {
            match self.commands.try_recv() {
                Ok(WorkerCommand::Table(table)) => self.forwarder.set_table(table),
                Ok(WorkerCommand::Stop(how)) => return Some(how),
                Err(TryRecvError::Empty) => return None,
                Err(TryRecvError::Disconnected) => return Some(StopMode::Now),
            }
        }
    }
}

/// `fo-LISTENER-NUMBER`, with as much of the listener's name as fits.
fn thread_name(listener: &str, number: usize) -> String {
    let number = number.to_string();
    let room = MAX_THREAD_NAME.saturating_sub("fo--".len() + number.len());
    let mut short = String::new();
    for c in listener.chars().filter(|c| !c.is_control()) {
        if short.len() + c.len_utf8() > room {
            break;
        }
        short.push(c);
    }
    format!("fo-{short}-{number}")
}

/// Pins the calling thread to the CPU with this index among the allowed ones, modulo their number. The allowed CPUs of
/// a container may not begin at 0.
fn pin(name: &str, number: usize) {
    let this = Pid::from_raw(0);
    let pinned = sched_getaffinity(this).and_then(|allowed| {
        let cpus: Vec<usize> = (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false)).collect();
        let mut only = CpuSet::new();
        only.set(cpus[number % cpus.len()])?;
        sched_setaffinity(this, &only)
    });
    if let Err(error) = pinned {
        warn!(worker = name, "cannot pin worker to a CPU, it runs on any: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::super::counters::CounterSet;
    use super::super::reuseport_group::tests::queued;
    use super::super::table::{ForwardingTable, tests::plan};
    use super::*;
    use std::net::UdpSocket;
    use std::time::Duration;

    /// How many of 50 waiting datagrams a worker forwards if it is told to stop before it starts.
    fn forwarded(how: StopMode) -> u64 {
        let sink = UdpSocket::bind("127.0.0.1:0").unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut one = 0;
        for n in 1..=50 {
            sink.send_to(b"waiting", socket.local_addr().unwrap()).unwrap();
            let guard = Instant::now() + Duration::from_secs(10);
            while queued(&socket) == 0 || queued(&socket) < one * n {
                assert!(Instant::now() < guard, "datagram {n} did not arrive");
            }
            one = queued(&socket) / n;
        }
        let mut plan = plan("127.0.0.1:0".parse().unwrap(), &[(sink.local_addr().unwrap(), 1)]);
        plan.settings.batch_size = 4;
        let table = Arc::new(ForwardingTable::new(&plan, plan.bind).unwrap());
        let mut counters = CounterSet::default();
        let (key, cells) = counters.add_worker();
        let table = WorkerTable { cells: counters.downstream_cells(key, table.addresses()), table };
        let settings = &plan.settings;
        let forwarder = Forwarder::new(plan.name.clone(), settings, table, Arc::default(), cells).unwrap();
        socket.set_nonblocking(true).unwrap();
        let worker = PreparedWorker::new(key, "test", 0, false, Arc::new(socket.into()), forwarder).unwrap();
        worker.commands.send(WorkerCommand::Stop(how)).unwrap();
        worker.start().unwrap().join();
        let totals = counters.totals();
        assert!(totals.balanced());
        totals.packets_forwarded
    }

    #[test]
    fn a_worker_stops_at_once_or_when_its_socket_is_empty_or_when_time_is_up() {
        assert_eq!(forwarded(StopMode::Now), 4);
        assert_eq!(forwarded(StopMode::Drained(Instant::now() + Duration::from_secs(60))), 50);
        assert_eq!(forwarded(StopMode::Drained(Instant::now())), 4);
    }

    #[test]
    fn thread_names_fit_and_keep_the_number() {
        assert_eq!(thread_name("syslog", 0), "fo-syslog-0");
        assert_eq!(thread_name("tenant-a-syslog", 12), "fo-tenant-a--12");
        assert_eq!(thread_name("übergröße-eins", 3), "fo-übergrö-3");
        assert_eq!(thread_name("a\0b", 1), "fo-ab-1");
        for number in [0, 7, 1023] {
            assert!(thread_name("a-rather-long-name", number).len() <= MAX_THREAD_NAME);
        }
    }

    #[test]
    fn a_pinned_thread_runs_on_one_of_its_cpus() {
        std::thread::spawn(|| {
            let before = sched_getaffinity(Pid::from_raw(0)).unwrap();
            pin("test", 1);
            let after = sched_getaffinity(Pid::from_raw(0)).unwrap();
            let cpus: Vec<usize> = (0..CpuSet::count()).filter(|&cpu| after.is_set(cpu).unwrap()).collect();
            assert_eq!(cpus.len(), 1);
            assert!(before.is_set(cpus[0]).unwrap());
        })
        .join()
        .unwrap();
    }
}
