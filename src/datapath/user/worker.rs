//! A worker thread: waits for its socket or for word from the main thread, and forwards.
//!
//! Everything that can fail is done by [`Prepared::new`] on the main thread, before there is a thread. A worker that runs
//! ends only when it is told to, or when it cannot wait or read any more; the latter is logged and shows in
//! [`Worker::has_died`].

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

use super::count::WorkerKey;
use super::forward::Forwarder;
use super::table::WorkerTable;

const SOCKET: Token = Token(0);
const WAKE: Token = Token(1);

/// Longest thread name that Linux keeps, in bytes.
const MAX_THREAD_NAME: usize = 15;

/// Reads that may fail in a row. An error from the wire fails one read; only a broken socket fails this many.
const MAX_READ_ERRORS: u32 = 100;

/// What the main thread tells a worker.
#[derive(Debug)]
enum Command {
    /// Use this table for every datagram taken from now on.
    Table(WorkerTable),
    /// End.
    Stop(Stop),
}

/// How a worker ends.
#[derive(Debug, Clone, Copy)]
pub enum Stop {
    /// After the batch at hand. What the socket holds is left to the next worker.
    Now,
    /// Once it has forwarded what its socket holds, or when this time has come.
    Drained(Instant),
}

/// A worker with all it needs but its thread.
#[derive(Debug)]
pub struct Prepared {
    key: WorkerKey,
    name: String,
    /// The place in the list of allowed CPUs to stay on.
    pin_to: Option<usize>,
    commands: Sender<Command>,
    waker: Waker,
    loops: Loop,
}

/// A running worker. Dropping it stops it at its next batch and waits for its end.
#[derive(Debug)]
pub struct Worker {
    key: WorkerKey,
    commands: Sender<Command>,
    waker: Waker,
    thread: Option<JoinHandle<Result<()>>>,
}

/// What runs on the thread.
#[derive(Debug)]
struct Loop {
    socket: Arc<Socket>,
    poll: Poll,
    commands: Receiver<Command>,
    forwarder: Forwarder,
}

impl Prepared {
    /// A worker that will forward what arrives at the socket. `number` is its number within the listener.
    ///
    /// # Errors
    /// When the kernel has no epoll instance or eventfd left for it.
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
        Ok(Prepared {
            key,
            name: thread_name(listener, number),
            pin_to: pin.then_some(number),
            commands,
            waker,
            loops: Loop { socket, poll, commands: receiver, forwarder },
        })
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// When the kernel has no thread left.
    pub fn start(self) -> Result<Worker> {
        let Prepared { key, name, pin_to, commands, waker, loops } = self;
        let run = {
            let name = name.clone();
            move || {
                if let Some(number) = pin_to {
                    pin(&name, number);
                }
                loops.run().inspect_err(|error| error!(worker = name, "worker died: {error:#}"))
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
    /// Which worker of the listener it is.
    pub fn key(&self) -> WorkerKey {
        self.key
    }

    /// Hands over a new table. Whatever is sent to the listener after this returns is forwarded by it.
    pub fn set_table(&self, table: WorkerTable) {
        self.tell(Command::Table(table));
    }

    /// Asks it to end.
    pub fn stop(&self, how: Stop) {
        self.tell(Command::Stop(how));
    }

    /// True if it ended without having been asked.
    pub fn has_died(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for its end, which must have been asked for.
    pub fn join(mut self) {
        self.wait();
    }

    fn tell(&self, command: Command) {
        // A worker that has died reads no commands; that it has died is logged and acted upon elsewhere.
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
            self.stop(Stop::Now);
            self.wait();
        }
    }
}

impl Loop {
    fn run(mut self) -> Result<()> {
        let mut events = Events::with_capacity(4);
        loop {
            // First the socket, then the wait: epoll reports only what comes after a read that found nothing.
            match self.empty_socket(None)? {
                Some(Stop::Now) => return Ok(()),
                Some(Stop::Drained(until)) => return self.empty_socket(Some(until)).map(drop),
                None => {}
            }
            if let Err(error) = self.poll.poll(&mut events, None)
                && error.kind() != io::ErrorKind::Interrupted
            {
                return Err(error).context("cannot wait for datagrams");
            }
        }
    }

    /// Forwards until the socket is empty or the time has come; if told to stop in between, says how.
    fn empty_socket(&mut self, until: Option<Instant>) -> Result<Option<Stop>> {
        let mut errors = 0;
        while until.is_none_or(|until| Instant::now() < until) {
            let received = match self.forwarder.receive(&self.socket) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(self.obey()),
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
            // Between taking and choosing, so that what was sent after a table was handed over is forwarded by it.
            let stop = self.obey();
            self.forwarder.forward(received);
            if stop.is_some() {
                return Ok(stop);
            }
        }
        warn!("stopped before all queued datagrams were forwarded: out of time");
        Ok(None)
    }

    /// Does what it has been told. If that is to stop, says how: that is the last word.
    fn obey(&mut self) -> Option<Stop> {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Table(table)) => self.forwarder.set_table(table),
                Ok(Command::Stop(how)) => return Some(how),
                Err(TryRecvError::Empty) => return None,
                Err(TryRecvError::Disconnected) => return Some(Stop::Now),
            }
        }
    }
}

/// `fo-<listener>-<number>`, with as much of the listener's name as fits.
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

/// Keeps the calling thread on one CPU: the one of this number among those that it may use at all. A container's may
/// not begin at 0; more workers than CPUs begin again at the first.
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
    use super::super::count::Ledger;
    use super::super::group::tests::queued;
    use super::super::table::{Table, tests::plan};
    use super::*;
    use std::net::UdpSocket;
    use std::time::Duration;

    /// How many of 50 waiting datagrams a worker forwards that is told to stop before it has begun.
    fn forwarded(how: Stop) -> u64 {
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
        let table = Arc::new(Table::new(&plan, plan.bind).unwrap());
        let mut ledger = Ledger::default();
        let (key, cells) = ledger.open();
        let table = WorkerTable { cells: ledger.downstreams(key, table.addresses()), table };
        let settings = &plan.settings;
        let forwarder = Forwarder::new(plan.name.clone(), settings, table, Arc::default(), cells).unwrap();
        socket.set_nonblocking(true).unwrap();
        let worker = Prepared::new(key, "test", 0, false, Arc::new(socket.into()), forwarder).unwrap();
        worker.commands.send(Command::Stop(how)).unwrap();
        worker.start().unwrap().join();
        let totals = ledger.totals();
        assert!(totals.balanced());
        totals.packets_forwarded
    }

    #[test]
    fn a_worker_stops_at_once_or_when_its_socket_is_empty_or_when_time_is_up() {
        assert_eq!(forwarded(Stop::Now), 4);
        assert_eq!(forwarded(Stop::Drained(Instant::now() + Duration::from_secs(60))), 50);
        assert_eq!(forwarded(Stop::Drained(Instant::now())), 4);
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
