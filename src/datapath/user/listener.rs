//! One listener: its sockets, its workers, its table, its counts. Changes each of them only where the plan has changed.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use anyhow::Result;
use socket2::Socket;
use tracing::{debug, info};

use super::count::{Ledger, Taken};
use super::forward::Forwarder;
use super::gate::Gate;
use super::group::Group;
use super::table::{Table, WorkerTable};
use super::worker::{Prepared, Stop, Worker};
use crate::model::{DownstreamCounters, DropReason, ListenerCounters, Mode};
use crate::plan::ListenerPlan;

/// Longest time that datagrams already queued may take to be forwarded when their socket is about to go.
const DRAIN: Duration = Duration::from_millis(600);

/// A listener that serves.
#[derive(Debug)]
pub struct Listener {
    /// What it follows.
    plan: ListenerPlan,
    group: Group,
    workers: Vec<Worker>,
    table: Arc<Table>,
    ledger: Ledger,
    joined: Joined,
    cursor: Arc<AtomicU64>,
}

/// How many datagrams a message has held lately.
#[derive(Debug, Default)]
struct Joined {
    last: Taken,
    lately: Taken,
}

impl Joined {
    /// How many datagrams were in messages that nobody has seen, going by those taken since the last call, or if there
    /// were none, by those before.
    fn datagrams(&mut self, now: Taken, messages: u64) -> u64 {
        // Workers that have gone take their numbers with them.
        let since = if now.messages < self.last.messages { Taken::default() } else { self.last };
        self.last = now;
        if now.messages > since.messages {
            let datagrams = now.datagrams.saturating_sub(since.datagrams);
            self.lately = Taken { datagrams, messages: now.messages - since.messages };
        }
        let Taken { datagrams, messages: of } = self.lately;
        let all = u128::from(messages) * u128::from(datagrams) + u128::from(of) / 2;
        let estimate = all.checked_div(u128::from(of)).and_then(|all| u64::try_from(all).ok());
        estimate.unwrap_or(messages).max(messages)
    }
}

impl Listener {
    /// Binds the sockets and starts the workers.
    ///
    /// `cpus` is how many workers stand for "one per CPU". `beside_ours` says that the address overlaps with another of
    /// this program's.
    ///
    /// # Errors
    /// Says what could not be had and the fix; nothing is left behind then.
    pub fn start(plan: &ListenerPlan, cpus: usize, beside_ours: bool) -> Result<Self> {
        Self::serve(plan, cpus, Group::bind(plan.bind, beside_ours, plan.mode == Mode::TcEbpf)?)
    }

    /// Starts the workers on sockets that are bound already.
    fn serve(plan: &ListenerPlan, cpus: usize, group: Group) -> Result<Self> {
        let table = Arc::new(Table::new(plan, group.address())?);
        let mut listener = Listener {
            plan: plan.clone(),
            group,
            workers: Vec::new(),
            table: Arc::clone(&table),
            ledger: Ledger::default(),
            joined: Joined::default(),
            cursor: Arc::default(),
        };
        listener.group.grow(worker_count(plan, cpus))?;
        listener.group.join(&plan.joins)?;
        listener.group.join_datagrams(plan.mode == Mode::Userspace);
        listener.group.set_receive_buffer(&plan.name, plan.settings.recv_buf_size);
        let prepared = listener.prepare(plan, &listener.group.sockets(), &table)?;
        listener.ledger.retain(table.addresses());
        listener.group.steer(plan.policy)?;
        listener.workers = prepared.into_iter().map(Prepared::start).collect::<Result<_>>()?;
        listener.log_start();
        listener.log_table();
        Ok(listener)
    }

    /// The plan that it follows.
    pub fn plan(&self) -> &ListenerPlan {
        &self.plan
    }

    /// The address its sockets are bound to.
    pub fn address(&self) -> SocketAddr {
        self.group.address()
    }

    /// Lets other sockets of this program bind to an address that overlaps with this listener's.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn share(&self) -> Result<()> {
        self.group.share()
    }

    /// How many workers it has.
    pub fn workers(&self) -> usize {
        self.workers.len()
    }

    /// True if a worker ended on its own, so that nobody reads one of the sockets.
    pub fn has_dead_worker(&self) -> bool {
        self.workers.iter().any(Worker::has_died)
    }

    /// Follows a new plan for the same listener.
    ///
    /// # Errors
    /// As for [`Listener::start`]; the listener goes on as before then.
    pub fn follow(&mut self, plan: &ListenerPlan, cpus: usize, beside_ours: bool) -> Result<()> {
        if plan.bind != self.plan.bind {
            return self.relocate(plan, cpus, beside_ours);
        }
        self.group.join(&plan.joins)?;
        let count = worker_count(plan, cpus);
        // A worker that has not asked for addresses so far may hold a batch without them, of which nobody can say
        // whether its senders may send.
        let new_gate = self.table.gate().is_open() && !Gate::would_be_open(plan);
        let new_staff =
            plan.settings != self.plan.settings || count != self.workers.len() || self.has_dead_worker() || new_gate;
        let new_table = self.table.differs_from(plan);
        if plan.mode != self.plan.mode {
            self.group.join_datagrams(plan.mode == Mode::Userspace);
        }
        let done = if new_staff {
            if self.has_dead_worker() && count < self.group.len() {
                // Somebody must forward what the dead worker's socket holds before it goes.
                self.restaff(&self.plan.clone(), self.group.len())?;
            }
            self.restaff(plan, count)
        } else if new_table {
            self.replace_table(plan)
        } else {
            Ok(())
        };
        // Whichever table holds now, its downstreams are the ones to count for.
        self.ledger.retain(self.table.addresses());
        done?;
        self.plan = plan.clone();
        if new_staff {
            self.log_start();
        }
        if new_table {
            self.log_table();
        }
        Ok(())
    }

    /// Hands every worker the table of the plan.
    fn replace_table(&mut self, plan: &ListenerPlan) -> Result<()> {
        let table = Arc::new(self.table.next(plan)?);
        if plan.policy != self.plan.policy {
            self.group.steer(plan.policy)?;
        }
        for worker in &self.workers {
            let cells = self.ledger.downstreams(worker.key(), table.addresses());
            worker.set_table(WorkerTable { table: Arc::clone(&table), cells });
        }
        self.table = table;
        Ok(())
    }

    /// Puts new workers on the same sockets, more or fewer of them if need be. Datagrams wait in the sockets meanwhile.
    fn restaff(&mut self, plan: &ListenerPlan, count: usize) -> Result<()> {
        let before = self.group.len();
        self.try_restaff(plan, count).or_else(|error| {
            self.lose_sockets(before);
            self.ledger.close_all_but(self.workers.iter().map(Worker::key));
            self.group.steer(self.plan.policy).and(Err(error))
        })
    }

    fn try_restaff(&mut self, plan: &ListenerPlan, count: usize) -> Result<()> {
        let table = Arc::new(self.table.next(plan)?);
        self.group.grow(count)?;
        self.group.join_datagrams(plan.mode == Mode::Userspace);
        let prepared = self.prepare(plan, &self.group.sockets()[..count], &table)?;
        if count < self.group.len() {
            self.group.confine(plan.policy, count)?;
        }
        self.group.set_receive_buffer(&plan.name, plan.settings.recv_buf_size);
        let until = Instant::now() + DRAIN;
        for (number, worker) in self.workers.iter().enumerate() {
            // What a socket that stays still holds is for its next worker.
            worker.stop(if number < count { Stop::Now } else { Stop::Drained(until) });
        }
        self.bury_workers();
        self.lose_sockets(count);
        self.table = table;
        self.workers = prepared.into_iter().map(Prepared::start).collect::<Result<_>>()?;
        self.group.steer(plan.policy)
    }

    /// Serves another address from now on, and the old one until everything queued there is forwarded.
    fn relocate(&mut self, plan: &ListenerPlan, cpus: usize, beside_ours: bool) -> Result<()> {
        let mut new = Self::start(plan, cpus, beside_ours)?;
        self.stop();
        self.finish();
        new.ledger.absorb(std::mem::take(&mut self.ledger));
        *self = new;
        Ok(())
    }

    /// One worker for each of the sockets, ready to start.
    fn prepare(&mut self, plan: &ListenerPlan, sockets: &[Arc<Socket>], table: &Arc<Table>) -> Result<Vec<Prepared>> {
        let mut prepare = |number, socket: &Arc<Socket>| {
            let (key, cells) = self.ledger.open();
            let downstreams = self.ledger.downstreams(key, table.addresses());
            let table = WorkerTable { table: Arc::clone(table), cells: downstreams };
            let (name, settings, cursor) = (Arc::clone(&plan.name), &plan.settings, Arc::clone(&self.cursor));
            let forwarder = Forwarder::new(name, settings, table, cursor, cells)?;
            Prepared::new(key, &plan.name, number, settings.pin_cpus, Arc::clone(socket), forwarder)
        };
        sockets.iter().enumerate().map(|(number, socket)| prepare(number, socket)).collect()
    }

    /// Turns away what arrives from now on and tells the workers to forward what is queued. [`Listener::finish`] waits.
    pub fn stop(&mut self) {
        let (lost, refused) = self.group.refuse_all();
        self.lose(lost);
        if let Err(error) = refused {
            // The drain's deadline ends it also while datagrams keep coming.
            debug!(listener = %self.plan.name, "{error:#}");
        }
        let until = Instant::now() + DRAIN;
        self.workers.iter().for_each(|worker| worker.stop(Stop::Drained(until)));
    }

    /// Waits for the workers' end. All counts are final then.
    pub fn finish(&mut self) {
        self.bury_workers();
        info!(listener = %self.plan.name, bind = %self.group.address(), "listener closed");
    }

    fn bury_workers(&mut self) {
        for worker in self.workers.drain(..) {
            let key = worker.key();
            worker.join();
            self.ledger.close(key);
        }
    }

    fn lose_sockets(&mut self, count: usize) {
        let lost = self.group.shrink(count);
        self.lose(lost);
    }

    /// Counts messages that no worker has seen, because the queue was full.
    fn lose(&mut self, messages: u64) {
        let datagrams = self.joined.datagrams(self.ledger.taken(), messages);
        self.ledger.lost(DropReason::ReceiveQueueFull, datagrams);
    }

    /// The listener's totals.
    pub fn totals(&mut self) -> ListenerCounters {
        let lost = self.group.new_drops();
        self.lose(lost);
        self.ledger.totals()
    }

    /// Per downstream, what was handed to it.
    pub fn per_downstream(&self) -> impl Iterator<Item = (SocketAddr, DownstreamCounters)> + '_ {
        self.ledger.per_downstream()
    }

    /// Datagrams that each of the present workers has taken, by its number.
    pub fn per_worker(&self) -> Vec<u64> {
        self.workers.iter().map(|worker| self.ledger.taken_by(worker.key())).collect()
    }

    fn log_start(&self) {
        let (name, bind) = (&self.plan.name, self.group.address());
        info!(listener = %name, listener_id = self.plan.id.0, %bind, workers = self.workers.len(), "listening");
    }

    fn log_table(&self) {
        let (listener_id, endpoints) = (self.plan.id.0, self.table.addresses().len());
        match self.plan.mode {
            Mode::Userspace => info!(listener_id, endpoints, "updated userspace downstream set"),
            // The kernel datapath has said so for this listener.
            Mode::TcEbpf => debug!(listener_id, endpoints, "updated userspace downstream set"),
        }
    }
}

/// How many workers the plan asks for. Where the TC program does the work, one is enough for what it passes up; and each
/// of several sockets would get all datagrams of a multicast group.
fn worker_count(plan: &ListenerPlan, cpus: usize) -> usize {
    if plan.bind.ip().is_multicast() {
        return 1;
    }
    match (plan.settings.workers, plan.mode) {
        (0, Mode::TcEbpf) => 1,
        (0, Mode::Userspace) => cpus.max(1),
        (count, _) => count as usize,
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::plan;
    use super::*;
    use std::net::UdpSocket;

    const LOCALHOST: &str = "127.0.0.1:0";

    fn sink() -> UdpSocket {
        let socket = UdpSocket::bind(LOCALHOST).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket
    }

    fn receive_all(socket: &UdpSocket) -> u64 {
        socket.set_nonblocking(true).unwrap();
        let mut count = 0;
        while socket.recv(&mut [0; 1024]).is_ok() {
            count += 1;
        }
        count
    }

    /// Datagrams that wait in a socket before there is a worker, as many as fit into a small buffer: the rest must be
    /// counted as lost to the full queue, and the waiting ones forwarded although the end follows the start at once.
    #[test]
    fn what_overflowed_is_counted_and_what_is_queued_is_forwarded_before_the_end() {
        let sink = sink();
        let mut plan = plan(LOCALHOST.parse().unwrap(), &[(sink.local_addr().unwrap(), 1)]);
        plan.settings.recv_buf_size = Some(16_384);
        let group = Group::bind(plan.bind, false, false).unwrap();
        group.set_receive_buffer("test", plan.settings.recv_buf_size);
        let sender = UdpSocket::bind(LOCALHOST).unwrap();
        for _ in 0..100 {
            sender.send_to(&[7; 500], group.address()).unwrap();
        }
        let mut listener = Listener::serve(&plan, 1, group).unwrap();
        // Whatever the kernel has not yet delivered shows once all are accounted for.
        let guard = Instant::now() + Duration::from_secs(10);
        while listener.totals().packets_received < 100 {
            assert!(Instant::now() < guard, "{:?}", listener.totals());
        }
        listener.stop();
        listener.finish();
        let totals = listener.totals();
        let dropped = totals.dropped.get(DropReason::ReceiveQueueFull);
        assert!(totals.balanced());
        assert!(dropped > 0 && dropped < 100, "{dropped} dropped");
        assert_eq!((totals.packets_received, totals.packets_forwarded), (100, 100 - dropped));
        assert_eq!((totals.bytes_received, totals.bytes_forwarded), ((100 - dropped) * 500, (100 - dropped) * 500));
        assert_eq!(receive_all(&sink), 100 - dropped);
    }

    /// A listener of whose workers the last has died, although nobody wanted it to.
    fn with_dead_worker(plan: &ListenerPlan) -> Listener {
        let listener = Listener::start(plan, 1, false).unwrap();
        assert!(!listener.has_dead_worker());
        listener.workers.last().unwrap().stop(Stop::Now);
        let guard = Instant::now() + Duration::from_secs(10);
        while !listener.has_dead_worker() {
            assert!(Instant::now() < guard, "the worker goes on");
        }
        listener
    }

    #[test]
    fn a_worker_that_dies_is_noticed_and_replaced_and_its_socket_keeps_what_arrives() {
        let sink = sink();
        let plan = plan(LOCALHOST.parse().unwrap(), &[(sink.local_addr().unwrap(), 1)]);
        let mut listener = with_dead_worker(&plan);
        UdpSocket::bind(LOCALHOST).unwrap().send_to(b"waiting", listener.address()).unwrap();
        listener.follow(&plan, 1, false).unwrap();
        assert_eq!(sink.recv(&mut [0; 16]).unwrap(), 7);
        assert!(!listener.has_dead_worker());
    }

    #[test]
    fn a_socket_that_goes_is_emptied_first() {
        let sink = sink();
        let mut plan = plan(LOCALHOST.parse().unwrap(), &[(sink.local_addr().unwrap(), 1)]);
        plan.settings.workers = 2;
        // The new worker has more to do than one batch.
        plan.settings.batch_size = 4;
        let mut listener = with_dead_worker(&plan);
        let sender = UdpSocket::bind(LOCALHOST).unwrap();
        for _ in 0..200 {
            sender.send_to(b"waiting", listener.address()).unwrap();
        }
        plan.settings.workers = 1;
        listener.follow(&plan, 1, false).unwrap();
        assert_eq!((listener.workers(), listener.group.len()), (1, 1));
        for n in 0..200 {
            assert_eq!(sink.recv(&mut [0; 16]).unwrap_or_else(|error| panic!("{n} came, then {error}")), 7);
        }
        listener.stop();
        listener.finish();
        assert_eq!(listener.totals().packets_forwarded, 200);
    }

    #[test]
    fn a_settings_change_that_fails_leaves_the_listener_as_it_was() {
        let sink = sink();
        let plan = plan(LOCALHOST.parse().unwrap(), &[(sink.local_addr().unwrap(), 1)]);
        let mut listener = Listener::start(&plan, 1, false).unwrap();
        let mut impossible = plan.clone();
        impossible.settings.workers = 3;
        impossible.table = [9].into();
        let error = listener.follow(&impossible, 1, false).unwrap_err().to_string();
        assert!(error.contains("downstream 9"), "{error}");
        assert_eq!((listener.workers(), listener.group.len()), (1, 1));
        UdpSocket::bind(LOCALHOST).unwrap().send_to(b"still", listener.address()).unwrap();
        assert_eq!(sink.recv(&mut [0; 16]).unwrap(), 5);
    }

    #[test]
    fn what_was_lost_unseen_counts_as_what_was_taken_lately() {
        let taken = |datagrams, messages| Taken { datagrams, messages };
        let mut joined = Joined::default();
        assert_eq!(joined.datagrams(taken(0, 0), 7), 7);
        assert_eq!(joined.datagrams(taken(100, 100), 7), 7);
        assert_eq!(joined.datagrams(taken(100 + 640, 110), 7), 7 * 64);
        assert_eq!(joined.datagrams(taken(740, 110), 3), 3 * 64);
        assert_eq!(joined.datagrams(taken(742, 111), 3), 6);
        // New workers.
        assert_eq!(joined.datagrams(taken(15, 10), 3), 5);
        assert_eq!(joined.datagrams(taken(15, 10), 0), 0);
    }

    #[test]
    fn the_tc_program_needs_one_worker_behind_it_and_userspace_one_per_cpu() {
        let mut plan = plan(LOCALHOST.parse().unwrap(), &[]);
        plan.settings.workers = 0;
        assert_eq!(worker_count(&plan, 8), 8);
        plan.mode = Mode::TcEbpf;
        assert_eq!(worker_count(&plan, 8), 1);
        plan.settings.workers = 3;
        assert_eq!(worker_count(&plan, 8), 3);
    }
}
