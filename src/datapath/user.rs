//! The userspace datapath: the listeners' sockets and the worker threads that read them. It implements all of
//! forwarding; the TC program accelerates it.
//!
//! ```text
//! UserDatapath ─► listener ─┬─► reuseport_group, steer   the sockets, and which of them receives a datagram
//!   (main thread)           ├─► table, admission         the plan in the form that workers read
//!                           ├─► counters                 cells that workers write and the main thread sums
//!                           └─► worker ─► forward ─┬─► filter_mask        which datagrams admission drops
//!                                 (thread)         ├─► grouping           datagrams sorted by downstream
//!                                                  ├─► replicate          one copy for each downstream
//!                                                  ├─► preserve_source    sending with the sender's address
//!                                                  ├─► queued_messages    what became of each datagram
//!                                                  ├─► mmsg               system calls: whole batches, GRO and GSO
//!                                                  ├─► send_queue         a sending socket, and what its errors mean
//!                                                  └─► downstream_errors  errors that come back later
//! ```
//!
//! **Why a datagram is here**: its listener has `mode = "userspace"`, its plan has
//! [`socket_only`](ListenerPlan::socket_only), or the TC program passed this one datagram to the socket.
//!
//! **A datagram's path.** A worker reads a batch of up to `batch_size` messages from its socket. Each message holds one
//! datagram, or several of one sender that the kernel joined (`UDP_GRO`). Each datagram gets a slot of the listener's
//! table: the next of the round (one shared cursor, moved once per batch) or the one that its hash selects. It is sent
//! from the memory it was received into, in one message with others for the same downstream (`UDP_SEGMENT`). Under
//! `replicate` it is sent to every downstream from there. The path takes no lock and allocates nothing.
//!
//! **Counting.** Datagrams are counted one by one, also those that came joined. They are counted when their batch has
//! been sent. In every reading, each received datagram is either forwarded or dropped for a reason. A replicated
//! datagram counts as forwarded once if any copy was sent; failed copies are counted separately.
//!
//! **A new table** goes to the workers through their channels. A worker reads its channel after it has received a batch
//! and before it selects downstreams. So a datagram that is sent to the listener after [`Datapath::apply`] has returned
//! follows the new table, and a batch follows one table.
//!
//! **Sockets outlive workers.** New settings mean new workers on the same sockets, so nothing is lost in between.
//! Listeners are matched by name: one that moves within the file keeps its sockets and counters. So does one that
//! changes only its name.

mod admission;
mod counters;
mod downstream_errors;
mod forward;
mod listener;
mod mmsg;
mod preserve_source;
mod reuseport_group;
mod send_queue;
mod steer;
mod table;
mod worker;

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use tracing::error;

use self::listener::UserListener;
pub use self::mmsg::raw_outgoing::udp_header;
use super::{Datapath, DatapathCounters};
use crate::model::ListenerId;
use crate::plan::{ListenerPlan, Plan};

/// The userspace datapath. Dropping it forwards what is queued, stops the workers and closes the sockets.
#[derive(Debug)]
pub struct UserDatapath {
    listeners: BTreeMap<Arc<str>, UserListener>,
    /// The last counters, after a shutdown.
    final_counters: DatapathCounters,
    cpus: usize,
}

impl UserDatapath {
    /// A datapath without listeners.
    #[must_use]
    pub fn new() -> Self {
        // Read once, so that `workers = 0` means the same number for as long as this exists.
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        UserDatapath { listeners: BTreeMap::new(), final_counters: DatapathCounters::default(), cpus }
    }

    /// Datagrams that each of a listener's current workers has received, by worker number.
    #[must_use]
    pub fn worker_packets(&self, id: ListenerId) -> Vec<u64> {
        self.listener(id).map_or_else(Vec::new, UserListener::per_worker)
    }

    /// The address that a listener's sockets are bound to. Has the real port where the plan leaves it to the kernel
    /// (port 0).
    #[must_use]
    pub fn local_address(&self, id: ListenerId) -> Option<SocketAddr> {
        self.listener(id).map(UserListener::address)
    }

    /// Replaces workers that ended on their own, which they do only if they can no longer wait or read, or if they panic; the
    /// log has the reason. Their sockets have kept what arrived. Returns the number of listeners
    /// that needed it. Cheap if none did: meant to be called every few seconds.
    ///
    /// # Errors
    /// Names the first listener whose workers could not be restarted.
    pub fn restart_dead_workers(&mut self) -> Result<usize> {
        let mut restarted = 0;
        for (name, listener) in &mut self.listeners {
            if listener.has_dead_worker() {
                let plan = Arc::clone(listener.plan());
                listener.apply(&plan, self.cpus, false).with_context(|| format!("listener {name:?}"))?;
                restarted += 1;
            }
        }
        Ok(restarted)
    }

    fn listener(&self, id: ListenerId) -> Option<&UserListener> {
        self.listeners.values().find(|listener| listener.plan().id == id)
    }

    fn apply_listener(&mut self, plan: &Arc<ListenerPlan>) -> Result<()> {
        let moves = self.listeners.get(&plan.name).is_none_or(|listener| listener.plan().bind != plan.bind);
        let shares_address = moves && self.share_overlapping(plan.bind)?;
        match self.listeners.get_mut(&plan.name) {
            Some(listener) => listener.apply(plan, self.cpus, shares_address),
            None => {
                let listener = UserListener::start(plan, self.cpus, shares_address)?;
                self.listeners.insert(Arc::clone(&plan.name), listener);
                Ok(())
            }
        }
    }

    /// If a listener's name is new but its address is that of a listener which the plan no longer names, takes over
    /// that one's sockets and counters.
    fn adopt_renamed(&mut self, plan: &ListenerPlan, names: &HashSet<&str>) {
        if self.listeners.contains_key(&plan.name) {
            return;
        }
        let same = |(name, listener): &(&Arc<str>, &UserListener)| {
            !names.contains(&***name) && plan.bind.port() != 0 && listener.plan().bind == plan.bind
        };
        let old = self.listeners.iter().find(same).map(|(name, _)| Arc::clone(name));
        if let Some(listener) = old.and_then(|old| self.listeners.remove(&old)) {
            self.listeners.insert(Arc::clone(&plan.name), listener);
        }
    }

    /// Lets sockets bind to an address that overlaps with that of an existing listener. This happens when a listener
    /// moves from a wildcard address to one that it covers, or takes the address of one that is about to move. True if
    /// there is such an overlap.
    fn share_overlapping(&self, address: SocketAddr) -> Result<bool> {
        let mut shares_address = false;
        for listener in self.listeners.values().filter(|listener| addresses_overlap(listener.address(), address)) {
            listener.allow_sharing()?;
            shares_address = true;
        }
        Ok(shares_address)
    }

    /// Removes the listeners for which `keep` is false. All are told to stop first, then each is waited for.
    fn stop_all_but(&mut self, keep: impl Fn(&str) -> bool) -> Vec<UserListener> {
        let names: Vec<Arc<str>> = self.listeners.keys().filter(|name| !keep(name)).cloned().collect();
        let mut gone: Vec<UserListener> = names.iter().filter_map(|name| self.listeners.remove(name)).collect();
        gone.iter_mut().for_each(UserListener::stop);
        gone.iter_mut().for_each(UserListener::finish);
        gone
    }
}

impl Datapath for UserDatapath {
    fn apply(&mut self, plan: &Plan) -> Result<()> {
        self.final_counters = DatapathCounters::default();
        let names: HashSet<&str> = plan.listeners.iter().map(|listener| &*listener.name).collect();
        for listener in &plan.listeners {
            self.adopt_renamed(listener, &names);
            self.apply_listener(listener).with_context(|| format!("listener {:?}", listener.name))?;
        }
        // Last, so that a plan that cannot be applied stops no listener. Until then, a new listener shares an address
        // with the old.
        self.stop_all_but(|name| names.contains(name));
        Ok(())
    }

    fn counters(&mut self) -> Result<DatapathCounters> {
        let mut counters = self.final_counters.clone();
        self.listeners.values_mut().for_each(|listener| add(&mut counters, listener));
        Ok(counters)
    }

    fn shutdown(&mut self) -> Result<()> {
        for mut listener in self.stop_all_but(|_| false) {
            add(&mut self.final_counters, &mut listener);
        }
        Ok(())
    }
}

impl Default for UserDatapath {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for UserDatapath {
    fn drop(&mut self) {
        if let Err(error) = self.shutdown() {
            error!("{error:#}");
        }
    }
}

fn add(counters: &mut DatapathCounters, listener: &mut UserListener) {
    let id = listener.plan().id;
    counters.listeners.insert(id, listener.totals());
    counters.downstreams.extend(listener.per_downstream().map(|(address, counts)| ((id, address), counts)));
}

/// True if sockets bound to the two addresses would conflict.
fn addresses_overlap(a: SocketAddr, b: SocketAddr) -> bool {
    let covers = |a: SocketAddr, b: SocketAddr| a.ip() == b.ip() || a.ip().is_unspecified();
    a.port() == b.port() && a.is_ipv4() == b.is_ipv4() && (covers(a, b) || covers(b, a))
}
