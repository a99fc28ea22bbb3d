//! Listeners' tables and downstreams in the kernel's flat arrays.
//!
//! A downstream entry never changes while a table names it; whatever changes takes a new id. Ids and slots that a new
//! table no longer names are retired: their counters still count, and they are reused only after an RCU grace period.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use anyhow::{Context, Result};

use super::admission::Admission;
use super::arena::{Arena, Region};
use super::books::{self, Item};
use super::maps::{MappedArray, downstream_entry, sum_over_cpus, wait_for_readers, zero_on_all_cpus};
use super::skel::{Loaded, Sizes, policy_number, types};
use crate::model::{ListenerId, Policy};
use crate::plan::{Delivery, ListenerPlan, Target};

/// A downstream of a listener, as counters are kept.
type Endpoint = (ListenerId, SocketAddr);

/// All tables in the kernel.
#[derive(Debug)]
pub struct Tables {
    states: MappedArray<types::listener_state>,
    slots: MappedArray<u32>,
    downstreams: MappedArray<types::downstream>,
    /// For the daemon after this one: 1 + the listener that each id counts for.
    owners: MappedArray<u32>,
    slot_arena: Arena,
    id_arena: Arena,
    current: BTreeMap<ListenerId, Table>,
    /// Ids that no table names any more, with whom they counted for.
    retired: Vec<(u32, Endpoint)>,
    /// Counts of ids that have been reused since.
    settled: BTreeMap<Endpoint, [u64; 2]>,
    /// What earlier programs have counted.
    inherited: BTreeMap<Endpoint, [u64; 2]>,
}

/// One listener's table.
#[derive(Debug, Default)]
struct Table {
    region: Region,
    /// The slots' content, to see whether a new table differs.
    slots: Vec<u32>,
    policy: Policy,
    targets: Vec<(Target, u32)>,
}

impl Tables {
    /// Maps the arrays; all entries are free.
    ///
    /// # Errors
    /// When the kernel refuses to map them.
    pub fn new(loaded: &Loaded, sizes: Sizes) -> Result<Tables> {
        Ok(Tables {
            states: MappedArray::new(&loaded.listener_states)?,
            slots: MappedArray::new(&loaded.table_slots)?,
            downstreams: MappedArray::new(&loaded.downstreams)?,
            owners: MappedArray::new(&loaded.owners)?,
            slot_arena: Arena::new(sizes.slots),
            id_arena: Arena::new(sizes.downstreams),
            current: BTreeMap::new(),
            retired: Vec::new(),
            settled: BTreeMap::new(),
            inherited: BTreeMap::new(),
        })
    }

    /// Makes the plan's table the listener's, atomically. Downstreams that stay as they are keep their ids.
    ///
    /// # Errors
    /// When there is no room; the old table then stays in force.
    pub fn publish(&mut self, loaded: &Loaded, plan: &ListenerPlan) -> Result<()> {
        let id = plan.id;
        let targets = self.assign_ids(loaded, plan)?;
        let slots: Vec<u32> = plan.table.iter().map(|&index| targets[index as usize].1).collect();
        let unchanged = self.current.get(&id).is_some_and(|old| old.slots == slots);
        // Policy and table cannot change at one instant. Any policy does well with any table but for this: to replicate by
        // a table in which someone has several places would give them several copies. So that policy comes after its
        // table and goes before the next, and nobody still reads the one when the other changes.
        let policy = plan.policy;
        let was = self.current.get(&id).map(|old| old.policy);
        let replicates_late = policy == Policy::Replicate && was.is_some_and(|was| was != policy);
        if !replicates_late {
            self.states.set_policy(id.0, policy_number(policy), least_mtu(plan));
        }
        if was == Some(Policy::Replicate) && policy != Policy::Replicate {
            wait_for_readers(&loaded.rcu_barrier, &loaded.barrier_inner)?;
        }
        if !unchanged {
            let region = match self.take_slots(loaded, slots.len()) {
                Ok(region) => region,
                Err(error) => {
                    let kept = self.current.get(&id).map(|old| old.targets.clone()).unwrap_or_default();
                    self.retire_ids(id, &targets, &kept);
                    return Err(error);
                }
            };
            for (place, &downstream) in (region.start..).zip(&slots) {
                self.slots.write(place, downstream);
            }
            self.states.publish(id.0, region);
            if self.current.get(&id).is_some_and(|old| same_ways(&old.targets, &targets)) {
                tracing::debug!(listener_id = id.0, "updated the neighbours of the downstream set");
            } else {
                tracing::info!(listener_id = id.0, endpoints = targets.len(), "updated tc_ebpf downstream set");
            }
            // Complete from here on, whatever the kernel refuses after it.
            let policy_in_force = was.filter(|_| replicates_late).unwrap_or(policy);
            let new = Table { region, slots, policy: policy_in_force, targets: targets.clone() };
            let old = self.current.insert(id, new).unwrap_or_default();
            self.slot_arena.give_back(old.region);
            self.retire_ids(id, &old.targets, &targets);
        }
        if replicates_late {
            wait_for_readers(&loaded.rcu_barrier, &loaded.barrier_inner)?;
            self.states.set_policy(id.0, policy_number(policy), least_mtu(plan));
        }
        self.keep_settled(loaded, |(listener, address)| {
            *listener != id || targets.iter().any(|(target, _)| target.downstream.address == *address)
        });
        if let Some(table) = self.current.get_mut(&id) {
            table.targets = targets;
            table.policy = policy;
        }
        Ok(())
    }

    /// Puts in force who may send to a listener, and how fast.
    pub fn admit(&mut self, id: ListenerId, admission: &Admission) {
        self.states.set_admission(id.0, admission);
    }

    /// Empties a listener's table. Its counters are forgotten.
    pub fn remove(&mut self, loaded: &Loaded, id: ListenerId) {
        self.states.set_admission(id.0, &Admission::default());
        if let Some(table) = self.current.remove(&id) {
            self.states.publish(id.0, Region::default());
            self.slot_arena.give_back(table.region);
            self.retire_ids(id, &table.targets, &[]);
        }
        for (number, _) in self.retired.iter().filter(|(_, (listener, _))| *listener == id) {
            self.owners.write(*number, 0);
        }
        self.keep_settled(loaded, |(listener, _)| *listener != id);
    }

    /// Forgets the settled counts of all others.
    fn keep_settled(&mut self, loaded: &Loaded, keep: impl Fn(&Endpoint) -> bool) {
        let kept = |key: &Endpoint, item: fn(ListenerId, SocketAddr) -> Item| {
            let stays = keep(key);
            if !stays {
                books::strike(loaded, item(key.0, key.1));
            }
            stays
        };
        self.settled.retain(|key, _| kept(key, Item::Downstream));
        self.inherited.retain(|key, _| kept(key, Item::Inherited));
    }

    fn names(&self, key: &Endpoint) -> bool {
        let named = |table: &Table| table.targets.iter().any(|(target, _)| target.downstream.address == key.1);
        self.current.get(&key.0).is_some_and(named)
    }

    /// Adds to the counts of a downstream what earlier programs have counted, if a table names it.
    ///
    /// # Errors
    /// When it cannot be written down for the next daemon.
    pub fn inherit(&mut self, loaded: &Loaded, key: Endpoint, counted: [u64; 2]) -> Result<()> {
        if !self.names(&key) {
            return Ok(());
        }
        let sum = self.inherited.entry(key).or_default();
        books::add(sum, counted);
        books::enter(loaded, Item::Inherited(key.0, key.1), sum)
    }

    /// Moves what the last of the retired ids has counted to where it stays, if a table still names the downstream, and makes
    /// the id ready for another. Whenever this fails or the daemon ends, each datagram counts once: from the first write on
    /// the id does not count itself for the next daemon, and for this one as soon as its counters are zero.
    fn settle(&mut self, loaded: &Loaded, (number, key): (u32, Endpoint)) -> Result<()> {
        let item = Item::Downstream(key.0, key.1);
        let mut sum = self.settled.get(&key).copied().unwrap_or_default();
        let named = self.names(&key);
        if named {
            books::add(&mut sum, sum_over_cpus(&loaded.downstream_stats, number)?);
            books::enter(loaded, item, &[sum[0], sum[1], u64::from(number) + 1])?;
        }
        self.owners.write(number, 0);
        zero_on_all_cpus(&loaded.next_hops, number)?;
        zero_on_all_cpus(&loaded.downstream_stats, number)?;
        self.retired.pop();
        if !named {
            return Ok(());
        }
        self.settled.insert(key, sum);
        books::enter(loaded, item, &sum)
    }

    /// Datagrams and bytes handed to each downstream that a table names.
    ///
    /// # Errors
    /// When the kernel refuses to read a counter.
    pub fn counters(&self, loaded: &Loaded) -> Result<BTreeMap<Endpoint, [u64; 2]>> {
        let mut sums = BTreeMap::new();
        for (&id, table) in &self.current {
            for (target, number) in &table.targets {
                let key = (id, target.downstream.address);
                let sum = sums.entry(key).or_insert_with(|| self.counted_elsewhere(&key));
                books::add(sum, sum_over_cpus(&loaded.downstream_stats, *number)?);
            }
        }
        for (number, key) in &self.retired {
            if let Some(sum) = sums.get_mut(key) {
                books::add(sum, sum_over_cpus(&loaded.downstream_stats, *number)?);
            }
        }
        Ok(sums)
    }

    /// What was counted of a downstream, but not under an id that still counts for it.
    fn counted_elsewhere(&self, key: &Endpoint) -> [u64; 2] {
        let mut sum = self.settled.get(key).copied().unwrap_or_default();
        books::add(&mut sum, self.inherited.get(key).copied().unwrap_or_default());
        sum
    }

    /// The plan's targets with their ids: the old id where nothing has changed, else a new one, written but not yet
    /// named by any table.
    fn assign_ids(&mut self, loaded: &Loaded, plan: &ListenerPlan) -> Result<Vec<(Target, u32)>> {
        let old: BTreeMap<SocketAddr, (Target, u32)> = self
            .current
            .get(&plan.id)
            .map(|table| table.targets.iter().map(|(t, n)| (t.downstream.address, (t.clone(), *n))).collect())
            .unwrap_or_default();
        let mut targets: Vec<(Target, u32)> = Vec::with_capacity(plan.targets.len());
        for target in &plan.targets {
            let known = old.get(&target.downstream.address).filter(|(was, _)| {
                was.delivery == target.delivery && was.downstream.sample == target.downstream.sample
            });
            let number = match known {
                Some((_, number)) => *number,
                None => match self.take_id(loaded) {
                    Ok(number) => {
                        self.downstreams.write(number, downstream_entry(target));
                        self.owners.write(number, plan.id.0 + 1);
                        number
                    }
                    Err(error) => {
                        let keep: Vec<_> = old.into_values().collect();
                        self.retire_ids(plan.id, &targets, &keep);
                        return Err(error);
                    }
                },
            };
            targets.push((target.clone(), number));
        }
        Ok(targets)
    }

    /// Retires the ids of `left` that `kept` does not have.
    fn retire_ids(&mut self, id: ListenerId, left: &[(Target, u32)], kept: &[(Target, u32)]) {
        let kept: std::collections::HashSet<u32> = kept.iter().map(|(_, number)| *number).collect();
        for (target, number) in left.iter().filter(|(_, number)| !kept.contains(number)) {
            self.retired.push((*number, (id, target.downstream.address)));
            self.id_arena.give_back(Region { start: *number, len: 1 });
        }
    }

    fn take_id(&mut self, loaded: &Loaded) -> Result<u32> {
        if let Some(region) = self.id_arena.take(1) {
            return Ok(region.start);
        }
        self.reclaim(loaded)?;
        let room = self.id_arena.take(1);
        Ok(room.context("no room for another downstream: raise limits.max_downstreams and restart")?.start)
    }

    fn take_slots(&mut self, loaded: &Loaded, len: usize) -> Result<Region> {
        let len = u32::try_from(len).context("a table is too long")?;
        if let Some(region) = self.slot_arena.take(len) {
            return Ok(region);
        }
        self.reclaim(loaded)?;
        self.slot_arena
            .take(len)
            .with_context(|| format!("no room for a table of {len} slots: raise limits.max_downstreams and restart"))
    }

    /// Waits until nothing reads what has been retired, settles its counters and frees it.
    fn reclaim(&mut self, loaded: &Loaded) -> Result<()> {
        wait_for_readers(&loaded.rcu_barrier, &loaded.barrier_inner)?;
        while let Some(&last) = self.retired.last() {
            self.settle(loaded, last)?;
        }
        self.slot_arena.release();
        self.id_arena.release();
        Ok(())
    }
}

/// The smallest MTU on the ways to the plan's downstreams; none if all are on this host.
fn least_mtu(plan: &ListenerPlan) -> u32 {
    let mtu = |target: &Target| match target.delivery {
        Delivery::Neighbour { mtu, .. } | Delivery::Bare { mtu, .. } => Some(mtu),
        Delivery::Local | Delivery::Unreachable => None,
    };
    plan.targets.iter().filter_map(mtu).min().unwrap_or(u32::MAX)
}

/// True if nothing differs but what is known of neighbours, which changes often and means nothing to an operator.
fn same_ways(old: &[(Target, u32)], new: &[(Target, u32)]) -> bool {
    let way = |(target, _): &(Target, u32)| (target.downstream.clone(), target.delivery.without_neighbour());
    old.len() == new.len() && old.iter().map(way).eq(new.iter().map(way))
}
