//! The listeners' sockets and the worker threads behind them: the complete implementation of forwarding, of which the
//! TC program is the accelerator.
//!
//! ```text
//! UserDatapath ─► listener ─┬─► group, steer     the sockets, and which of them a datagram goes to
//!   (main thread)           ├─► table, gate      what the plan says, in the form that workers ask
//!                           ├─► count            cells the workers write and the main thread sums
//!                           └─► worker ─► forward ─┬─► deal      datagrams sorted by downstream
//!                                  (thread)        ├─► replicate one copy for everyone
//!                                                  ├─► outcome   what has become of each
//!                                                  ├─► mmsg      receive and send, whole batches, joined and cut apart
//!                                                  ├─► lane      what errors mean, whom they cost
//!                                                  └─► standing  errors that come back later
//! ```
//!
//! **A datagram** is taken from a worker's socket together with others: in a message with those of its sender that the
//! kernel has joined it with, and that message with up to `batch_size` others. It is given a place in the listener's table
//! (the next of the round, from one shared cursor moved once per batch; or the one that its hash names), and sent from the
//! memory it was received into, in a message with others for the same downstream. Under `replicate` it is sent from there
//! to every downstream. The path takes no lock and allocates nothing. A datagram is counted when its batch has been sent;
//! whatever was received is either forwarded or dropped for a reason, in every reading. One that was replicated counts as
//! forwarded once, if any copy was sent; the copies that failed are counted beside.
//!
//! **A new table** goes to the workers through their channels. A worker looks there after it has taken a batch and before
//! it chooses, so what is sent to the listener after [`Datapath::apply`] has returned follows the new table, and a
//! batch follows one table whole.
//!
//! **Sockets outlive workers.** New settings mean new workers on the same sockets, so nothing is lost in between.
//! Listeners are told apart by name: one that moves within the file keeps its sockets and its counts, and so does one that
//! changes its name alone.

mod behalf;
mod count;
mod forward;
mod gate;
mod group;
mod lane;
mod listener;
mod mmsg;
mod standing;
mod steer;
mod table;
mod worker;

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use tracing::error;

use self::listener::Listener;
pub use self::mmsg::onbehalf::udp_header;
use super::{Counters, Datapath};
use crate::model::{ListenerId, Mode};
use crate::plan::{ListenerPlan, Plan};

/// The userspace datapath. Dropping it forwards what is queued, stops the workers and closes the sockets.
#[derive(Debug)]
pub struct UserDatapath {
    listeners: BTreeMap<Arc<str>, Listener>,
    /// The last counts, after a shutdown.
    finished: Counters,
    cpus: usize,
}

impl UserDatapath {
    /// A datapath without listeners.
    #[must_use]
    pub fn new() -> Self {
        // Asked once, so that a plan means the same as long as this lives.
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        UserDatapath { listeners: BTreeMap::new(), finished: Counters::default(), cpus }
    }

    /// How many workers a listener runs; 0 if there is no such listener.
    #[must_use]
    pub fn workers(&self, id: ListenerId) -> usize {
        self.listener(id).map_or(0, Listener::workers)
    }

    /// Datagrams that each of a listener's present workers has taken, by the worker's number.
    #[must_use]
    pub fn worker_packets(&self, id: ListenerId) -> Vec<u64> {
        self.listener(id).map_or_else(Vec::new, Listener::per_worker)
    }

    /// The address a listener's sockets are bound to, also where the plan leaves the port to the kernel.
    #[must_use]
    pub fn local_address(&self, id: ListenerId) -> Option<SocketAddr> {
        self.listener(id).map(Listener::address)
    }

    /// True while every worker runs. A worker ends on its own only when it can no longer wait or read, or panics;
    /// the log has the reason. [`UserDatapath::tend`] replaces it.
    #[must_use]
    pub fn healthy(&self) -> bool {
        !self.listeners.values().any(Listener::has_dead_worker)
    }

    /// Replaces workers that ended on their own; their sockets have kept what arrived. Cheap if there are none: meant to
    /// be called every few seconds. Says how many listeners needed it.
    ///
    /// # Errors
    /// Names the first listener that could not be helped.
    pub fn tend(&mut self) -> Result<usize> {
        let mut helped = 0;
        for (name, listener) in &mut self.listeners {
            if listener.has_dead_worker() {
                let plan = listener.plan().clone();
                listener.follow(&plan, self.cpus, false).with_context(|| format!("listener {name:?}"))?;
                helped += 1;
            }
        }
        Ok(helped)
    }

    fn listener(&self, id: ListenerId) -> Option<&Listener> {
        self.listeners.values().find(|listener| listener.plan().id == id)
    }

    fn apply_listener(&mut self, plan: &ListenerPlan) -> Result<()> {
        let moves = self.listeners.get(&plan.name).is_none_or(|listener| listener.plan().bind != plan.bind);
        let beside_ours = moves && self.make_room(plan.bind)?;
        match self.listeners.get_mut(&plan.name) {
            Some(listener) => listener.follow(plan, self.cpus, beside_ours),
            None => {
                let listener = Listener::start(plan, self.cpus, beside_ours)?;
                self.listeners.insert(Arc::clone(&plan.name), listener);
                Ok(())
            }
        }
    }

    /// A listener that is new by its name, at the address of one that the plan no longer names, takes that one over: its
    /// sockets and its counts.
    fn rename(&mut self, plan: &ListenerPlan, names: &HashSet<&str>) {
        if self.listeners.contains_key(&plan.name) {
            return;
        }
        let same = |(name, listener): &(&Arc<str>, &Listener)| {
            !names.contains(&***name) && plan.bind.port() != 0 && listener.plan().bind == plan.bind
        };
        let old = self.listeners.iter().find(same).map(|(name, _)| Arc::clone(name));
        if let Some(listener) = old.and_then(|old| self.listeners.remove(&old)) {
            self.listeners.insert(Arc::clone(&plan.name), listener);
        }
    }

    /// Lets an address be bound that overlaps with one of ours: a listener that moves from a wildcard address to one
    /// that it covers, or that takes the place of one which is to move. True if there is such an overlap.
    fn make_room(&self, address: SocketAddr) -> Result<bool> {
        let mut beside_ours = false;
        for listener in self.listeners.values().filter(|listener| overlap(listener.address(), address)) {
            listener.share()?;
            beside_ours = true;
        }
        Ok(beside_ours)
    }

    /// Ends the listeners that fail the test: all stop at once, then each is waited for.
    fn retain(&mut self, keep: impl Fn(&str) -> bool) -> Vec<Listener> {
        let names: Vec<Arc<str>> = self.listeners.keys().filter(|name| !keep(name)).cloned().collect();
        let mut gone: Vec<Listener> = names.iter().filter_map(|name| self.listeners.remove(name)).collect();
        gone.iter_mut().for_each(Listener::stop);
        gone.iter_mut().for_each(Listener::finish);
        gone
    }
}

impl Datapath for UserDatapath {
    fn mode(&self) -> Mode {
        Mode::Userspace
    }

    fn apply(&mut self, plan: &Plan) -> Result<()> {
        self.finished = Counters::default();
        let names: HashSet<&str> = plan.listeners.iter().map(|listener| &*listener.name).collect();
        for listener in &plan.listeners {
            self.rename(listener, &names);
            self.apply_listener(listener).with_context(|| format!("listener {:?}", listener.name))?;
        }
        // Last, so that a plan that cannot be followed has ended nobody. Whoever wants an address of theirs shares it
        // until they are gone.
        self.retain(|name| names.contains(name));
        Ok(())
    }

    fn counters(&mut self) -> Result<Counters> {
        let mut counters = self.finished.clone();
        self.listeners.values_mut().for_each(|listener| add(&mut counters, listener));
        Ok(counters)
    }

    fn shutdown(&mut self) -> Result<()> {
        for mut listener in self.retain(|_| false) {
            add(&mut self.finished, &mut listener);
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

fn add(counters: &mut Counters, listener: &mut Listener) {
    let id = listener.plan().id;
    counters.listeners.insert(id, listener.totals());
    counters.downstreams.extend(listener.per_downstream().map(|(address, counts)| ((id, address), counts)));
}

/// True if sockets bound to the two addresses would be in each other's way.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    let covers = |a: SocketAddr, b: SocketAddr| a.ip() == b.ip() || a.ip().is_unspecified();
    a.port() == b.port() && a.is_ipv4() == b.is_ipv4() && (covers(a, b) || covers(b, a))
}
