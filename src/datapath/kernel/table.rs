//! Listeners' tables and downstreams in the kernel's flat arrays.
//!
//! A downstream entry is immutable while a table names it; a change gets a new id. Ids and slots that a new table no
//! longer names stay pending: their counters still count, and they are reused only after an RCU grace period.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::counters::{self, CarriedCounter};
use super::entries::downstream_entry;
use super::listener_state::{ListenerAdmission, ListenerStates};
use super::maps::{MappedArray, sum_over_cpus, wait_for_grace_period, zero_on_all_cpus};
use super::skel::{LoadedProgram, MapSizes, types};
use super::slot_allocator::{SlotAllocator, SlotRange};
use crate::model::{ListenerId, Policy};
use crate::plan::{Delivery, ListenerPlan, PlanTarget};

/// A downstream of a listener: the key of its counters.
type ListenerEndpoint = (ListenerId, SocketAddr);

/// All tables in the kernel.
#[derive(Debug)]
pub struct KernelTables {
    states: ListenerStates,
    downstreams: MappedArray<types::downstream>,
    /// For the next daemon: 1 + the id of the listener that each downstream id counts for.
    stat_owners: MappedArray<u32>,
    slot_allocator: SlotAllocator,
    id_allocator: SlotAllocator,
    current: BTreeMap<ListenerId, ListenerTable>,
    /// Ids that no table names any more, and whose counters they hold.
    pending_free: Vec<(u32, ListenerEndpoint)>,
    /// Counts of ids that were reused since.
    folded: BTreeMap<ListenerEndpoint, [u64; 2]>,
    /// Counts of earlier programs.
    inherited: BTreeMap<ListenerEndpoint, [u64; 2]>,
}

/// One listener's table.
#[derive(Debug, Clone, Default)]
struct ListenerTable {
    region: SlotRange,
    /// The slots' contents, to see whether a new table differs.
    slots: Arc<[u32]>,
    policy: Policy,
    targets: Arc<[PlanTarget]>,
    /// The targets' ids.
    ids: Arc<[u32]>,
}

/// The ids of a plan's targets.
struct IdAssignment {
    /// In the order of the targets.
    ids: Arc<[u32]>,
    /// Newly allocated ids.
    fresh: Vec<(u32, SocketAddr)>,
    /// Ids of the old table that are no longer needed.
    released: Vec<(u32, SocketAddr)>,
}

impl KernelTables {
    /// Maps the arrays; all entries are free.
    ///
    /// # Errors
    /// When the kernel refuses to map them.
    pub fn new(loaded: &LoadedProgram, sizes: MapSizes) -> Result<KernelTables> {
        Ok(KernelTables {
            states: ListenerStates::new(loaded)?,
            downstreams: MappedArray::new(&loaded.downstreams)?,
            stat_owners: MappedArray::new(&loaded.stat_owners)?,
            slot_allocator: SlotAllocator::new(sizes.slots),
            id_allocator: SlotAllocator::new(sizes.downstreams),
            current: BTreeMap::new(),
            pending_free: Vec::new(),
            folded: BTreeMap::new(),
            inherited: BTreeMap::new(),
        })
    }

    /// Publishes the plan's table atomically. Unchanged downstreams keep their ids.
    ///
    /// # Errors
    /// When there is no room; the old table then stays in force.
    pub fn publish(&mut self, loaded: &LoadedProgram, plan: &ListenerPlan) -> Result<()> {
        let id = plan.id;
        let old = self.current.get(&id).cloned();
        let assignment = self.assign_ids(loaded, plan, &old.clone().unwrap_or_default())?;
        let policy_deferred = match self.publish_assignment(loaded, plan, old, &assignment) {
            Ok(policy_deferred) => policy_deferred,
            Err(error) => {
                self.retire_ids(id, &assignment.fresh);
                return Err(error);
            }
        };
        self.retire_ids(id, &assignment.released);
        let still: BTreeSet<SocketAddr> = assignment.fresh.iter().map(|(_, address)| *address).collect();
        for (_, address) in assignment.released.iter().filter(|(_, address)| !still.contains(address)) {
            self.forget_folded(loaded, (id, *address));
        }
        if policy_deferred {
            wait_for_grace_period(&loaded.rcu_barrier, &loaded.barrier_inner)?;
            self.set_policy(plan);
        }
        Ok(())
    }

    /// Publishes the plan's table and, unless it must wait for a grace period, its policy. True if the policy must
    /// wait. After an error the old table stays in force.
    fn publish_assignment(
        &mut self,
        loaded: &LoadedProgram,
        plan: &ListenerPlan,
        old: Option<ListenerTable>,
        assignment: &IdAssignment,
    ) -> Result<bool> {
        let (id, policy) = (plan.id, plan.policy);
        let was = old.as_ref().map(|old| old.policy);
        let old = old.unwrap_or_default();
        let slots: Arc<[u32]> = plan.table.iter().map(|&index| assignment.ids[index as usize]).collect();
        let region = if was.is_some() && old.slots == slots { old.region } else { self.write_region(loaded, &slots)? };
        // ListenerTable and policy cannot change in one store. Every policy works with every table, except that replicating
        // over a table with several slots per downstream would send several copies. So that policy is set after its
        // table and cleared before the next one, with a grace period between.
        let follows = policy == Policy::Replicate && was.is_some_and(|was| was != policy);
        if !follows {
            self.set_policy(plan);
        }
        if was == Some(Policy::Replicate)
            && policy != Policy::Replicate
            && let Err(error) = wait_for_grace_period(&loaded.rcu_barrier, &loaded.barrier_inner)
        {
            if region != old.region {
                self.slot_allocator.retire(region);
            }
            return Err(error);
        }
        if region != old.region || was.is_none() {
            self.states.publish_table(id, region);
            self.slot_allocator.retire(old.region);
            if same_routes(&old.targets, &plan.targets) {
                tracing::debug!(listener_id = id.0, "updated the neighbours of the downstream set");
            } else {
                tracing::info!(listener_id = id.0, endpoints = plan.targets.len(), "updated tc_ebpf downstream set");
            }
        }
        let (targets, ids) = (Arc::clone(&plan.targets), Arc::clone(&assignment.ids));
        let policy = was.filter(|_| follows).unwrap_or(policy);
        self.current.insert(id, ListenerTable { region, slots, policy, targets, ids });
        Ok(follows)
    }

    /// Allocates slots and writes a table that is not published yet.
    fn write_region(&mut self, loaded: &LoadedProgram, slots: &[u32]) -> Result<SlotRange> {
        let region = self.take_slots(loaded, slots.len())?;
        write_slots(loaded, region, slots).inspect_err(|_| self.slot_allocator.retire(region))?;
        Ok(region)
    }

    fn set_policy(&mut self, plan: &ListenerPlan) {
        self.states.set_policy(plan.id, plan.policy, min_mtu(plan));
        if let Some(table) = self.current.get_mut(&plan.id) {
            table.policy = plan.policy;
        }
    }

    /// Puts a listener's admission in force.
    pub fn set_admission(&mut self, id: ListenerId, admission: &ListenerAdmission) {
        self.states.set_admission(id, admission);
    }

    /// Removes a listener's table and forgets its downstreams' counters.
    pub fn remove(&mut self, loaded: &LoadedProgram, id: ListenerId) {
        self.states.set_admission(id, &ListenerAdmission::default());
        if let Some(table) = self.current.remove(&id) {
            self.states.publish_table(id, SlotRange::default());
            self.slot_allocator.retire(table.region);
            self.retire_ids(id, &table.named().collect::<Vec<_>>());
        }
        for (number, _) in self.pending_free.iter().filter(|(_, (listener, _))| *listener == id) {
            self.stat_owners.write(*number, 0);
        }
        let folded = self.folded.keys().chain(self.inherited.keys()).filter(|(listener, _)| *listener == id);
        let folded: Vec<ListenerEndpoint> = folded.copied().collect();
        folded.into_iter().for_each(|key| self.forget_folded(loaded, key));
    }

    fn forget_folded(&mut self, loaded: &LoadedProgram, key: ListenerEndpoint) {
        if self.folded.remove(&key).is_some() {
            counters::delete_carried(loaded, CarriedCounter::Downstream(key.0, key.1));
        }
        if self.inherited.remove(&key).is_some() {
            counters::delete_carried(loaded, CarriedCounter::Inherited(key.0, key.1));
        }
    }

    /// Adds counts of earlier programs to downstreams that a table names.
    ///
    /// # Errors
    /// When they cannot be stored for the next daemon.
    pub fn import(
        &mut self,
        loaded: &LoadedProgram,
        counted: impl IntoIterator<Item = (ListenerEndpoint, [u64; 2])>,
    ) -> Result<()> {
        let named = self.named();
        for (key, counts) in counted.into_iter().filter(|(key, _)| named.contains(key)) {
            let sum = self.inherited.entry(key).or_default();
            counters::add(sum, counts);
            counters::store_carried(loaded, CarriedCounter::Inherited(key.0, key.1), sum)?;
        }
        Ok(())
    }

    /// The downstreams that tables name.
    fn named(&self) -> HashSet<ListenerEndpoint> {
        let tables = self.current.iter();
        tables.flat_map(|(&id, table)| table.named().map(move |(_, address)| (id, address))).collect()
    }

    /// Folds the counts of the last pending id into `folded`, if a table still names the downstream, and prepares the
    /// id for reuse. Each datagram counts once even if this fails or the daemon ends: from the first write on the id
    /// no longer counts for the next daemon, and for this one once its counters are zero.
    fn fold(
        &mut self,
        loaded: &LoadedProgram,
        named: &HashSet<ListenerEndpoint>,
        (number, key): (u32, ListenerEndpoint),
    ) -> Result<()> {
        let item = CarriedCounter::Downstream(key.0, key.1);
        let mut sum = self.folded.get(&key).copied().unwrap_or_default();
        let named = named.contains(&key);
        if named {
            counters::add(&mut sum, sum_over_cpus(&loaded.downstream_stats, number)?);
            counters::store_carried(loaded, item, &[sum[0], sum[1], u64::from(number) + 1])?;
        }
        self.stat_owners.write(number, 0);
        zero_on_all_cpus(&loaded.downstream_stats, number)?;
        self.pending_free.pop();
        if !named {
            return Ok(());
        }
        self.folded.insert(key, sum);
        counters::store_carried(loaded, item, &sum)
    }

    /// Counts of a downstream that are not in the counters of its current or pending ids.
    fn counted_elsewhere(&self, key: &ListenerEndpoint) -> [u64; 2] {
        let mut sum = self.folded.get(key).copied().unwrap_or_default();
        counters::add(&mut sum, self.inherited.get(key).copied().unwrap_or_default());
        sum
    }

    /// Datagrams and bytes sent to each downstream that a table names.
    ///
    /// # Errors
    /// When the kernel refuses to read a counter.
    pub fn counters(&self, loaded: &LoadedProgram) -> Result<BTreeMap<ListenerEndpoint, [u64; 2]>> {
        let mut sums = BTreeMap::new();
        for (&id, table) in &self.current {
            for (number, address) in table.named() {
                let key = (id, address);
                let sum = sums.entry(key).or_insert_with(|| self.counted_elsewhere(&key));
                counters::add(sum, sum_over_cpus(&loaded.downstream_stats, number)?);
            }
        }
        for (number, key) in &self.pending_free {
            if let Some(sum) = sums.get_mut(key) {
                counters::add(sum, sum_over_cpus(&loaded.downstream_stats, *number)?);
            }
        }
        Ok(sums)
    }

    /// Assigns ids to the plan's targets: the old id if nothing changed, else a new one whose entry is written but
    /// not named by any table yet.
    fn assign_ids(&mut self, loaded: &LoadedProgram, plan: &ListenerPlan, old: &ListenerTable) -> Result<IdAssignment> {
        let mut index = TargetIndex::new(&old.targets);
        let mut stays = vec![false; old.targets.len()];
        let (mut ids, mut fresh) = (Vec::with_capacity(plan.targets.len()), Vec::new());
        for target in plan.targets.iter() {
            let address = target.downstream.address;
            if let Some(at) = index.find(address).filter(|&at| same_entry(&old.targets[at], target)) {
                stays[at] = true;
                ids.push(old.ids[at]);
                continue;
            }
            match self.take_id(loaded) {
                Ok(number) => {
                    self.downstreams.write(number, downstream_entry(target));
                    self.stat_owners.write(number, plan.id.0 + 1);
                    fresh.push((number, address));
                    ids.push(number);
                }
                Err(error) => {
                    self.retire_ids(plan.id, &fresh);
                    return Err(error);
                }
            }
        }
        let released = old.named().zip(stays).filter(|(_, stays)| !stays).map(|(left, _)| left).collect();
        Ok(IdAssignment { ids: ids.into(), fresh, released })
    }

    /// Retires a listener's ids.
    fn retire_ids(&mut self, id: ListenerId, ids: &[(u32, SocketAddr)]) {
        for &(number, address) in ids {
            self.pending_free.push((number, (id, address)));
            self.id_allocator.retire(SlotRange { start: number, len: 1 });
        }
    }

    fn take_id(&mut self, loaded: &LoadedProgram) -> Result<u32> {
        if let Some(region) = self.id_allocator.allocate(1) {
            return Ok(region.start);
        }
        self.reclaim(loaded)?;
        let room = self.id_allocator.allocate(1);
        Ok(room.context("no room for another downstream: raise limits.max_downstreams and restart")?.start)
    }

    fn take_slots(&mut self, loaded: &LoadedProgram, len: usize) -> Result<SlotRange> {
        let len = u32::try_from(len).context("a table is too long")?;
        if let Some(region) = self.slot_allocator.allocate(len) {
            return Ok(region);
        }
        self.reclaim(loaded)?;
        self.slot_allocator
            .allocate(len)
            .with_context(|| format!("no room for a table of {len} slots: raise limits.max_downstreams and restart"))
    }

    /// Waits for an RCU grace period, folds the counts of pending ids and frees ids and slots.
    fn reclaim(&mut self, loaded: &LoadedProgram) -> Result<()> {
        wait_for_grace_period(&loaded.rcu_barrier, &loaded.barrier_inner)?;
        let named = self.named();
        while let Some(&last) = self.pending_free.last() {
            self.fold(loaded, &named, last)?;
        }
        self.slot_allocator.reclaim();
        self.id_allocator.reclaim();
        Ok(())
    }
}

/// Writes a table that is not published yet. The slots are mapped only for that: the map is large, and its pages
/// would count as the daemon's memory.
fn write_slots(loaded: &LoadedProgram, region: SlotRange, slots: &[u32]) -> Result<()> {
    if region.len == 0 {
        return Ok(());
    }
    let mut mapped = MappedArray::part(&loaded.table_slots, region)?;
    (region.start..).zip(slots).for_each(|(place, &downstream)| mapped.write(place, downstream));
    Ok(())
}

/// Smallest MTU of the egress paths to the plan's downstreams; the maximum if all are on this host.
fn min_mtu(plan: &ListenerPlan) -> u32 {
    let mtu = |target: &PlanTarget| match target.delivery {
        Delivery::Neighbour { mtu, .. } | Delivery::L3Device { mtu, .. } => Some(mtu),
        Delivery::Local | Delivery::Unreachable => None,
    };
    plan.targets.iter().filter_map(mtu).min().unwrap_or(u32::MAX)
}

/// True if only neighbours differ, which change often and do not concern operators.
fn same_routes(old: &[PlanTarget], new: &[PlanTarget]) -> bool {
    let same = |(old, new): (&PlanTarget, &PlanTarget)| {
        old.downstream == new.downstream && old.delivery.without_neighbour() == new.delivery.without_neighbour()
    };
    old.len() == new.len() && old.iter().zip(new).all(same)
}

/// True if the program sees no difference.
fn same_entry(old: &PlanTarget, new: &PlanTarget) -> bool {
    old.delivery == new.delivery && old.downstream.sample == new.downstream.sample
}

impl ListenerTable {
    /// The ids with their targets' addresses.
    fn named(&self) -> impl Iterator<Item = (u32, SocketAddr)> {
        self.ids.iter().copied().zip(self.targets.iter().map(|target| target.downstream.address))
    }
}

/// Finds targets by address. Fastest in the targets' own order, because long lists change little.
struct TargetIndex<'a> {
    targets: &'a [PlanTarget],
    next: usize,
    missed: usize,
    places: Option<HashMap<SocketAddr, usize>>,
}

impl<'a> TargetIndex<'a> {
    /// Number of linear searches before an index is built.
    const FEW: usize = 8;

    fn new(targets: &'a [PlanTarget]) -> Self {
        Self { targets, next: 0, missed: 0, places: None }
    }

    /// Position of the target with this address.
    fn find(&mut self, address: SocketAddr) -> Option<usize> {
        let is_it = |target: &PlanTarget| target.downstream.address == address;
        let found = if self.targets.get(self.next).is_some_and(is_it) {
            Some(self.next)
        } else if self.missed < Self::FEW {
            self.missed += 1;
            self.targets.iter().position(is_it)
        } else {
            let targets = self.targets;
            let index = || targets.iter().zip(0..).map(|(target, at)| (target.downstream.address, at)).collect();
            self.places.get_or_insert_with(index).get(&address).copied()
        };
        self.next = found.map_or(self.next, |at| at + 1);
        found
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::Downstream;

    fn targets(ports: &[u16]) -> Vec<PlanTarget> {
        let target = |&port: &u16| PlanTarget {
            downstream: Downstream {
                name: "d".into(),
                address: SocketAddr::from(([192, 0, 2, 1], port)),
                weight: 1,
                sample: Downstream::ALL,
            },
            delivery: Delivery::Local,
        };
        ports.iter().map(target).collect()
    }

    proptest! {
        #[test]
        fn the_target_index_finds_what_is_there(
            there in prop::collection::btree_set(0u16..60, 0..40).prop_map(Vec::from_iter).prop_shuffle(),
            sought in prop::collection::vec(0u16..60, 0..60),
        ) {
            let targets = targets(&there);
            let mut index = TargetIndex::new(&targets);
            for port in there.iter().chain(&sought) {
                let found = index.find(SocketAddr::from(([192, 0, 2, 1], *port)));
                prop_assert_eq!(found, there.iter().position(|other| other == port));
            }
        }
    }
}
