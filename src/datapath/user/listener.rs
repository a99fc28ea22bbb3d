//! One listener: its sockets, workers, table and counters. Changes each of them only where the plan has changed.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use anyhow::Result;
use socket2::Socket;
use tracing::{debug, info};

use super::admission::UserAdmission;
use super::counters::{CounterSet, ReceivedTotals};
use super::forward::Forwarder;
use super::reuseport_group::ReuseportGroup;
use super::table::{ForwardingTable, WorkerTable};
use super::worker::{PreparedWorker, StopMode, Worker};
use crate::model::{DownstreamCounters, DropReason, ListenerCounters, Mode};
use crate::plan::ListenerPlan;

/// The maximum time to forward queued datagrams before their socket is closed.
const DRAIN: Duration = Duration::from_millis(600);

/// A listener that serves.
#[derive(Debug)]
pub struct UserListener {
    /// The plan in force.
    plan: Arc<ListenerPlan>,
    group: ReuseportGroup,
    workers: Vec<Worker>,
    table: Arc<ForwardingTable>,
    counters: CounterSet,
    gro_ratio: GroRatio,
    cursor: Arc<AtomicU64>,
}

/// How many datagrams a message has held recently, to count the datagrams of messages that the kernel dropped.
#[derive(Debug, Default)]
struct GroRatio {
    last: ReceivedTotals,
    recent: ReceivedTotals,
}

impl GroRatio {
    /// Estimates how many datagrams `messages` unseen messages held. Uses the ratio since the last call, or if nothing
    /// was received since, the ratio before.
    fn estimate_datagrams(&mut self, now: ReceivedTotals, messages: u64) -> u64 {
        // The totals decrease when workers end.
        let since = if now.messages < self.last.messages { ReceivedTotals::default() } else { self.last };
        self.last = now;
        if now.messages > since.messages {
            let datagrams = now.datagrams.saturating_sub(since.datagrams);
            self.recent = ReceivedTotals { datagrams, messages: now.messages - since.messages };
        }
        let ReceivedTotals { datagrams, messages: of } = self.recent;
        let all = u128::from(messages) * u128::from(datagrams) + u128::from(of) / 2;
        let estimate = all.checked_div(u128::from(of)).and_then(|all| u64::try_from(all).ok());
        estimate.unwrap_or(messages).max(messages)
    }
}

impl UserListener {
    /// Binds the sockets and starts the workers.
    ///
    /// `cpus` is the number of workers for `workers = 0`. `shares_address` says that the address overlaps with that of
    /// another listener of this daemon.
    ///
    /// # Errors
    /// Says what failed and the fix; nothing is left behind.
    pub fn start(plan: &Arc<ListenerPlan>, cpus: usize, shares_address: bool) -> Result<Self> {
        Self::start_on(plan, cpus, ReuseportGroup::bind(plan.bind, shares_address, plan.mode == Mode::TcEbpf)?)
    }

    /// Starts the workers on sockets that are already bound.
    fn start_on(plan: &Arc<ListenerPlan>, cpus: usize, group: ReuseportGroup) -> Result<Self> {
        let table = Arc::new(ForwardingTable::new(plan, group.address())?);
        let mut listener = UserListener {
            plan: Arc::clone(plan),
            group,
            workers: Vec::new(),
            table: Arc::clone(&table),
            counters: CounterSet::default(),
            gro_ratio: GroRatio::default(),
            cursor: Arc::default(),
        };
        listener.group.grow(worker_count(plan, cpus))?;
        listener.group.join(&plan.joins)?;
        listener.group.set_gro(plan.mode == Mode::Userspace);
        listener.group.set_receive_buffer(&plan.name, plan.settings.recv_buf_size);
        let prepared = listener.prepare(plan, &listener.group.sockets(), &table)?;
        listener.counters.retain_downstreams(table.addresses());
        listener.group.apply_steering(plan.policy)?;
        listener.workers = prepared.into_iter().map(PreparedWorker::start).collect::<Result<_>>()?;
        listener.log_start();
        listener.log_table();
        Ok(listener)
    }

    /// The plan in force.
    pub fn plan(&self) -> &Arc<ListenerPlan> {
        &self.plan
    }

    /// The address its sockets are bound to.
    pub fn address(&self) -> SocketAddr {
        self.group.address()
    }

    /// Lets other sockets of this daemon bind to an address that overlaps with this listener's.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn allow_sharing(&self) -> Result<()> {
        self.group.allow_sharing()
    }

    /// True if a worker ended on its own, so that one of the sockets is not read.
    pub fn has_dead_worker(&self) -> bool {
        self.workers.iter().any(Worker::has_died)
    }

    /// Puts a new plan for the same listener in force.
    ///
    /// # Errors
    /// As for [`UserListener::start`]; the old plan stays in force then.
    pub fn apply(&mut self, plan: &Arc<ListenerPlan>, cpus: usize, shares_address: bool) -> Result<()> {
        if plan.bind != self.plan.bind {
            return self.rebind(plan, cpus, shares_address);
        }
        self.group.join(&plan.joins)?;
        let count = worker_count(plan, cpus);
        // A worker that has not asked for addresses may hold a batch without them. Its senders are unknown, so the new
        // rules cannot be applied to it.
        let new_admission = self.table.admission().admits_all() && !UserAdmission::would_admit_all(plan);
        let respawn = plan.settings != self.plan.settings
            || count != self.workers.len()
            || self.has_dead_worker()
            || new_admission;
        let table_changed = self.table.differs_from(plan);
        if plan.mode != self.plan.mode {
            self.group.set_gro(plan.mode == Mode::Userspace);
        }
        let done = if respawn {
            if self.has_dead_worker() && count < self.group.len() {
                // Forward what the dead worker's socket holds before the socket is closed.
                self.respawn_workers(&Arc::clone(&self.plan), self.group.len())?;
            }
            self.respawn_workers(plan, count)
        } else if table_changed {
            self.replace_table(plan)
        } else {
            Ok(())
        };
        // Count for the downstreams of the table in force, new or old.
        self.counters.retain_downstreams(self.table.addresses());
        done?;
        self.plan = Arc::clone(plan);
        if respawn {
            self.log_start();
        }
        if table_changed {
            self.log_table();
        }
        Ok(())
    }

    /// Sends every worker the plan's table.
    fn replace_table(&mut self, plan: &ListenerPlan) -> Result<()> {
        let table = Arc::new(self.table.next(plan)?);
        if plan.policy != self.plan.policy {
            self.group.apply_steering(plan.policy)?;
        }
        for worker in &self.workers {
            let cells = self.counters.downstream_cells(worker.key(), table.addresses());
            worker.set_table(WorkerTable { table: Arc::clone(&table), cells });
        }
        self.table = table;
        Ok(())
    }

    /// Starts new workers on the same sockets, and adds or closes sockets as needed. Datagrams wait in the sockets
    /// meanwhile.
    fn respawn_workers(&mut self, plan: &ListenerPlan, count: usize) -> Result<()> {
        let before = self.group.len();
        self.try_respawn_workers(plan, count).or_else(|error| {
            self.close_sockets(before);
            self.counters.fold_all_but(self.workers.iter().map(Worker::key));
            self.group.apply_steering(self.plan.policy).and(Err(error))
        })
    }

    fn try_respawn_workers(&mut self, plan: &ListenerPlan, count: usize) -> Result<()> {
        let table = Arc::new(self.table.next(plan)?);
        self.group.grow(count)?;
        self.group.set_gro(plan.mode == Mode::Userspace);
        let prepared = self.prepare(plan, &self.group.sockets()[..count], &table)?;
        if count < self.group.len() {
            self.group.restrict_to(plan.policy, count)?;
        }
        self.group.set_receive_buffer(&plan.name, plan.settings.recv_buf_size);
        let until = Instant::now() + DRAIN;
        for (number, worker) in self.workers.iter().enumerate() {
            // The next worker of a socket that stays forwards what the socket holds.
            worker.stop(if number < count { StopMode::Now } else { StopMode::Drained(until) });
        }
        self.join_workers();
        self.close_sockets(count);
        self.table = table;
        self.workers = prepared.into_iter().map(PreparedWorker::start).collect::<Result<_>>()?;
        self.group.apply_steering(plan.policy)
    }

    /// Serves another address from now on. Forwards what is queued at the old one first.
    fn rebind(&mut self, plan: &Arc<ListenerPlan>, cpus: usize, shares_address: bool) -> Result<()> {
        let mut new = Self::start(plan, cpus, shares_address)?;
        self.stop();
        self.finish();
        new.counters.import(std::mem::take(&mut self.counters));
        *self = new;
        Ok(())
    }

    /// Prepares one worker for each of the sockets.
    fn prepare(
        &mut self,
        plan: &ListenerPlan,
        sockets: &[Arc<Socket>],
        table: &Arc<ForwardingTable>,
    ) -> Result<Vec<PreparedWorker>> {
        let mut prepare = |number, socket: &Arc<Socket>| {
            let (key, cells) = self.counters.add_worker();
            let downstreams = self.counters.downstream_cells(key, table.addresses());
            let table = WorkerTable { table: Arc::clone(table), cells: downstreams };
            let (name, settings, cursor) = (Arc::clone(&plan.name), &plan.settings, Arc::clone(&self.cursor));
            let forwarder = Forwarder::new(name, settings, table, cursor, cells)?;
            PreparedWorker::new(key, &plan.name, number, settings.pin_cpus, Arc::clone(socket), forwarder)
        };
        sockets.iter().enumerate().map(|(number, socket)| prepare(number, socket)).collect()
    }

    /// Drops what arrives from now on and tells the workers to forward what is queued. [`UserListener::finish`] waits
    /// for them.
    pub fn stop(&mut self) {
        let (lost, refused) = self.group.drop_new_datagrams();
        self.record_queue_drops(lost);
        if let Err(error) = refused {
            // Without the filter, the drain ends at its deadline.
            debug!(listener = %self.plan.name, "{error:#}");
        }
        let until = Instant::now() + DRAIN;
        self.workers.iter().for_each(|worker| worker.stop(StopMode::Drained(until)));
    }

    /// Waits for the workers to end. All counters are final then.
    pub fn finish(&mut self) {
        self.join_workers();
        info!(listener = %self.plan.name, bind = %self.group.address(), "listener closed");
    }

    fn join_workers(&mut self) {
        for worker in self.workers.drain(..) {
            let key = worker.key();
            worker.join();
            self.counters.fold_worker(key);
        }
    }

    fn close_sockets(&mut self, count: usize) {
        let lost = self.group.shrink(count);
        self.record_queue_drops(lost);
    }

    /// Counts messages that the kernel dropped because a receive buffer was full.
    fn record_queue_drops(&mut self, messages: u64) {
        let datagrams = self.gro_ratio.estimate_datagrams(self.counters.received_totals(), messages);
        self.counters.record_drops(DropReason::ReceiveQueueFull, datagrams);
    }

    /// The listener's totals.
    pub fn totals(&mut self) -> ListenerCounters {
        let lost = self.group.new_drops();
        self.record_queue_drops(lost);
        self.counters.totals()
    }

    /// The counters of each downstream.
    pub fn per_downstream(&self) -> impl Iterator<Item = (SocketAddr, DownstreamCounters)> + '_ {
        self.counters.per_downstream()
    }

    /// Datagrams that each current worker has received, by worker number.
    pub fn per_worker(&self) -> Vec<u64> {
        self.workers.iter().map(|worker| self.counters.received_by(worker.key())).collect()
    }

    fn log_start(&self) {
        let (name, bind) = (&self.plan.name, self.group.address());
        info!(listener = %name, listener_id = self.plan.id.0, %bind, workers = self.workers.len(), "listening");
    }

    fn log_table(&self) {
        let (listener_id, endpoints) = (self.plan.id.0, self.table.addresses().len());
        match self.plan.mode {
            Mode::Userspace => info!(listener_id, endpoints, "updated userspace downstream set"),
            // The kernel datapath logs this at info for such listeners.
            Mode::TcEbpf => debug!(listener_id, endpoints, "updated userspace downstream set"),
        }
    }
}

/// The number of workers that the plan asks for. One is enough behind the TC program. A multicast group needs exactly
/// one, because each of several sockets would receive every datagram.
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

    /// Datagrams wait in a socket before there is a worker, as many as fit into a small buffer. The rest must be
    /// counted as lost to the full queue. The waiting ones must be forwarded although the listener stops at once.
    #[test]
    fn what_overflowed_is_counted_and_what_is_queued_is_forwarded_before_the_end() {
        let sink = sink();
        let mut plan = plan(LOCALHOST.parse().unwrap(), &[(sink.local_addr().unwrap(), 1)]);
        plan.settings.recv_buf_size = Some(16_384);
        let group = ReuseportGroup::bind(plan.bind, false, false).unwrap();
        group.set_receive_buffer("test", plan.settings.recv_buf_size);
        let sender = UdpSocket::bind(LOCALHOST).unwrap();
        for _ in 0..100 {
            sender.send_to(&[7; 500], group.address()).unwrap();
        }
        let mut listener = UserListener::start_on(&Arc::new(plan), 1, group).unwrap();
        // Datagrams that the kernel has not delivered yet arrive in the meantime.
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

    /// A listener whose last worker has died.
    fn with_dead_worker(plan: &ListenerPlan) -> UserListener {
        let listener = UserListener::start(&Arc::new(plan.clone()), 1, false).unwrap();
        assert!(!listener.has_dead_worker());
        listener.workers.last().unwrap().stop(StopMode::Now);
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
        listener.apply(&Arc::new(plan), 1, false).unwrap();
        assert_eq!(sink.recv(&mut [0; 16]).unwrap(), 7);
        assert!(!listener.has_dead_worker());
    }

    #[test]
    fn a_socket_that_goes_is_emptied_first() {
        let sink = sink();
        let mut plan = plan(LOCALHOST.parse().unwrap(), &[(sink.local_addr().unwrap(), 1)]);
        plan.settings.workers = 2;
        // So that the new worker must forward more than one batch.
        plan.settings.batch_size = 4;
        let mut listener = with_dead_worker(&plan);
        let sender = UdpSocket::bind(LOCALHOST).unwrap();
        for _ in 0..200 {
            sender.send_to(b"waiting", listener.address()).unwrap();
        }
        plan.settings.workers = 1;
        listener.apply(&Arc::new(plan), 1, false).unwrap();
        assert_eq!((listener.workers.len(), listener.group.len()), (1, 1));
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
        let mut listener = UserListener::start(&Arc::new(plan.clone()), 1, false).unwrap();
        let mut impossible = plan.clone();
        impossible.settings.workers = 3;
        impossible.table = [9].into();
        let error = listener.apply(&Arc::new(impossible), 1, false).unwrap_err().to_string();
        assert!(error.contains("downstream 9"), "{error}");
        assert_eq!((listener.workers.len(), listener.group.len()), (1, 1));
        UdpSocket::bind(LOCALHOST).unwrap().send_to(b"still", listener.address()).unwrap();
        assert_eq!(sink.recv(&mut [0; 16]).unwrap(), 5);
    }

    #[test]
    fn what_was_lost_unseen_counts_as_what_was_taken_lately() {
        let taken = |datagrams, messages| ReceivedTotals { datagrams, messages };
        let mut gro_ratio = GroRatio::default();
        assert_eq!(gro_ratio.estimate_datagrams(taken(0, 0), 7), 7);
        assert_eq!(gro_ratio.estimate_datagrams(taken(100, 100), 7), 7);
        assert_eq!(gro_ratio.estimate_datagrams(taken(100 + 640, 110), 7), 7 * 64);
        assert_eq!(gro_ratio.estimate_datagrams(taken(740, 110), 3), 3 * 64);
        assert_eq!(gro_ratio.estimate_datagrams(taken(742, 111), 3), 6);
        // New workers.
        assert_eq!(gro_ratio.estimate_datagrams(taken(15, 10), 3), 5);
        assert_eq!(gro_ratio.estimate_datagrams(taken(15, 10), 0), 0);
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
