//! The kernel datapath: loads the TC program of `bpf/`, applies plans to its maps, attaches it, reads its counters.
//!
//! - `skel`: the compiled program, its types and its loading. `abi`: the constants that it shares with user space.
//! - `maps`: typed access to maps. `entries`: their keys and values.
//! - `table`: listeners' tables and downstreams; `slot_allocator`: free array entries; `listener_state`: publishes
//!   tables.
//! - `listener_cache`: fast lookup of destinations. `admission`: source rules and rate limits.
//! - `handover`: from one daemon to the next. `pins`: the BPF file system; `counters`: what a program has counted;
//!   `heartbeat`: how long the program acts without a daemon.
//! - `attach`: filters and TCX programs on interfaces. `events`: single datagrams. `libbpf_log`: libbpf's messages.
//!
//! One 64-bit store publishes a listener's table, and the entries it replaces are reused only after an RCU grace
//! period, so a datagram sees the old table or the new one. At start, tables come first, then destination keys, then
//! attachment: the program never sees a listener without its table.

mod abi;
mod admission;
pub mod attach;
pub mod counters;
mod entries;
pub mod events;
pub mod handover;
mod heartbeat;
mod libbpf_log;
mod listener_cache;
mod listener_state;
mod maps;
pub mod pins;
pub mod skel;
mod slot_allocator;
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags};

use self::abi::{DROP_REASONS, LISTENER_SOCKET_ONLY};
use self::admission::AdmissionRules;
use self::attach::{AttachMode, Attachment};
use self::counters::CounterMaps;
use self::entries::{KeyMark, listener_key};
use self::events::EventReader;
use self::handover::HandoverState;
use self::listener_cache::ListenerCache;
use self::maps::{MappedArray, bytes_of, wait_for_grace_period, zero_on_all_cpus};
use self::skel::{LoadedProgram, MapSizes, types};
use self::table::KernelTables;
use super::{Datapath, DatapathCounters};
use crate::config::{AttachConfig, MapLimits};
use crate::model::{DownstreamCounters, FragmentCounters, ListenerCounters, ListenerId, Mode};
use crate::plan::{LinkRef, ListenerPlan, Plan};

/// The kernel datapath. Dropping it detaches the program from all interfaces and frees it.
#[derive(Debug)]
pub struct KernelDatapath {
    // Fields drop in this order: the attachments first.
    attachments: Vec<Attachment>,
    tables: KernelTables,
    events: EventReader,
    admissions: AdmissionRules,
    /// Destination keys in `listeners`, with listener id and flags.
    keys: BTreeMap<SocketAddr, (ListenerId, u32)>,
    /// The cache in front of `listeners`.
    listener_cache: ListenerCache,
    /// The other keys in `listeners`.
    marks: BTreeSet<KeyMark>,
    /// Tells the program whether any device is marked as an L3 device.
    links: MappedArray<types::link_flags>,
    /// The program may be running: changes to the cache wait for RCU grace periods.
    exposed: bool,
    loaded: LoadedProgram,
    /// The plan that each listener was last programmed with.
    programmed: BTreeMap<ListenerId, Arc<ListenerPlan>>,
    /// Listeners whose state in the kernel is uncertain, because a step of their last update failed.
    unfinished: BTreeSet<ListenerId>,
    setup: KernelSetup,
    handover: HandoverState,
}

/// Settings that are fixed when the program is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelSetup {
    /// Numbers of map entries.
    pub sizes: MapSizes,
    /// The kernel has `bpf_redirect_neigh` and `bpf_redirect_peer` (Linux 5.10).
    pub redirects: bool,
    /// The kernel has ring buffers (Linux 5.8), which carry events.
    pub ring_buffer: bool,
    /// The kernel has TCX (Linux 6.6).
    pub tcx: bool,
    /// How long to wait for the next fragment of a datagram.
    pub fragment_timeout: Duration,
}

impl KernelSetup {
    /// The settings for a current kernel.
    #[must_use]
    pub fn new(limits: &MapLimits) -> KernelSetup {
        KernelSetup {
            sizes: MapSizes::of(limits),
            redirects: true,
            ring_buffer: true,
            tcx: true,
            // Fragments of a datagram arrive close together, and their ID is soon reused.
            fragment_timeout: Duration::from_secs(2),
        }
    }
}

impl KernelDatapath {
    /// [`KernelDatapath::open`] with [`KernelSetup::new`].
    ///
    /// # Errors
    /// As for [`KernelDatapath::open`].
    pub fn new(limits: &MapLimits) -> Result<KernelDatapath> {
        Self::open(&KernelSetup::new(limits))
    }

    /// Loads the program and creates its maps. Attaches nothing yet.
    ///
    /// # Errors
    /// With the kernel's reason: no privilege, a missing feature, no memory.
    pub fn open(setup: &KernelSetup) -> Result<KernelDatapath> {
        let loaded = skel::load(setup)?;
        let tables = KernelTables::new(&loaded, setup.sizes)?;
        let events = EventReader::new(&loaded)?;
        let handover = HandoverState::new(&loaded)?;
        Ok(KernelDatapath {
            attachments: Vec::new(),
            tables,
            events,
            admissions: AdmissionRules::default(),
            keys: BTreeMap::new(),
            listener_cache: ListenerCache::new(&loaded)?,
            marks: BTreeSet::new(),
            links: MappedArray::new(&loaded.links)?,
            exposed: false,
            loaded,
            programmed: BTreeMap::new(),
            unfinished: BTreeSet::new(),
            setup: *setup,
            handover,
        })
    }

    /// True if the program has the kernel resolve neighbours. If not, user space must.
    #[must_use]
    pub fn resolves_neighbours(&self) -> bool {
        self.setup.redirects
    }

    /// The loaded program, for tests that feed it packets.
    #[must_use]
    pub fn program(&self) -> BorrowedFd<'_> {
        self.loaded.program.as_fd()
    }

    /// The events of the program, and the trace filter.
    pub fn events(&mut self) -> &mut EventReader {
        &mut self.events
    }

    /// True while the program is on every interface it was attached to.
    #[must_use]
    pub fn attached_everywhere(&self) -> bool {
        self.attachments.iter().all(Attachment::in_place)
    }

    /// For each interface with the program, descriptions of the programs that see packets before it.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn preceding_programs(&self) -> Result<BTreeMap<String, Vec<String>>> {
        let preceding =
            |attachment: &Attachment| Ok((attachment.link().name.clone(), attachment.preceding_programs()?));
        self.attachments.iter().map(preceding).collect()
    }

    /// Publishes a listener's admission rules and table.
    fn publish(&mut self, listener: &ListenerPlan) -> Result<()> {
        let admission = self.admissions.prepare(&self.loaded, listener)?;
        self.tables.publish(&self.loaded, listener).context("cannot update its table")?;
        self.tables.set_admission(listener.id, &admission);
        self.admissions.set_current(listener.id, admission, listener.meter);
        counters::set_name(&self.loaded, listener.id, &listener.name)
    }

    /// Applies the plan's destination keys. New keys are added before old ones are deleted, so an address that moves
    /// between listeners always has one; its mark stays as long as it has keys. Devices are marked before the program
    /// is attached to them. Old marks go before the program is attached to a device that reuses the index.
    fn apply_keys(&mut self, plan: &[&Arc<ListenerPlan>]) -> Result<()> {
        // Also after an error: the keys that were stored must be found.
        let changed = self.change_keys(plan);
        changed.and(self.update_cache())
    }

    /// Makes the cache agree with the destination keys.
    fn update_cache(&mut self) -> Result<()> {
        let (loaded, exposed) = (&self.loaded, self.exposed);
        self.listener_cache.update(&self.keys, || match exposed {
            true => wait_for_grace_period(&loaded.rcu_barrier, &loaded.barrier_inner),
            false => Ok(()),
        })
    }

    fn change_keys(&mut self, plan: &[&Arc<ListenerPlan>]) -> Result<()> {
        let marks = wanted_marks(plan);
        let has_l3_device = |marks: &BTreeSet<KeyMark>| marks.iter().any(|mark| matches!(mark, KeyMark::L3Device(_)));
        if has_l3_device(&marks) {
            self.links.write(0, types::link_flags { has_l3_device: 1 });
        }
        for &mark in marks.difference(&self.marks.clone()) {
            self.set_key(&mark.key(), (ListenerId(0), 0))
                .with_context(|| format!("cannot add the key of {mark} to map listeners"))?;
            self.marks.insert(mark);
        }
        let wanted = wanted_keys(plan);
        for (&address, &owner) in &wanted {
            if self.keys.get(&address) == Some(&owner) {
                continue;
            }
            self.set_key(&listener_key(address), owner)
                .with_context(|| format!("cannot add the key of {address} to map listeners"))?;
            self.keys.insert(address, owner);
        }
        let gone: Vec<SocketAddr> = self.keys.keys().filter(|key| !wanted.contains_key(key)).copied().collect();
        gone.into_iter().try_for_each(|address| self.remove_key(address))?;
        for &mark in self.marks.clone().difference(&marks) {
            self.delete_key(&mark.key())
                .with_context(|| format!("cannot delete the key of {mark} from map listeners"))?;
            self.marks.remove(&mark);
        }
        if !has_l3_device(&self.marks) {
            self.links.write(0, types::link_flags { has_l3_device: 0 });
        }
        Ok(())
    }

    fn remove_key(&mut self, address: SocketAddr) -> Result<()> {
        self.delete_key(&listener_key(address))
            .with_context(|| format!("cannot delete the key of {address} from map listeners"))?;
        self.keys.remove(&address);
        Ok(())
    }

    fn set_key(&self, key: &types::listener_key, (id, flags): (ListenerId, u32)) -> libbpf_rs::Result<()> {
        let value = types::fanout_listener { id: id.0, flags };
        self.loaded.listeners.update(bytes_of(key), bytes_of(&value), MapFlags::ANY)
    }

    fn delete_key(&self, key: &types::listener_key) -> libbpf_rs::Result<()> {
        self.loaded.listeners.delete(bytes_of(key))
    }

    /// Attaches the program where the plan wants it, and detaches it elsewhere.
    fn apply_links(&mut self, plan: &[&Arc<ListenerPlan>], attach: AttachConfig) -> Result<()> {
        let mode = AttachMode::choose(attach, self.setup.tcx)?;
        let wanted: BTreeSet<&LinkRef> = plan.iter().flat_map(|listener| &listener.links).collect();
        // First drop attachments that something else has removed: they hold the claims on their interfaces.
        self.attachments.retain(Attachment::in_place);
        for &link in &wanted {
            match self.attachments.iter_mut().find(|attachment| attachment.link() == link) {
                None if self.handover.is_deferred(link) => {}
                None => {
                    let mut attachment =
                        Attachment::replacing(self.handover.predecessors(), self.loaded.program.as_fd(), link, mode)?;
                    self.handover.set_persistence_of(&mut attachment);
                    self.attachments.push(attachment);
                }
                Some(attachment) if attachment.mode() != mode => {
                    let loaded = &self.loaded;
                    attachment.move_to(mode, &|| wait_for_grace_period(&loaded.rcu_barrier, &loaded.barrier_inner))?;
                    self.handover.set_persistence_of(attachment);
                }
                Some(_) => {}
            }
        }
        let (keep, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut self.attachments)
            .into_iter()
            .partition(|attachment| wanted.contains(attachment.link()));
        self.attachments = keep;
        gone.into_iter().try_for_each(|attachment| {
            self.handover.unpin_link(&attachment);
            attachment.detach()
        })
    }

    /// Removes listeners. Their ids may be reused, so their counters are cleared once no CPU counts any more. The
    /// wait takes some milliseconds, so it is done once for all of them.
    fn forget(&mut self, ids: &BTreeSet<ListenerId>) -> Result<()> {
        if ids.is_empty() {
            return Ok(());
        }
        let keys = self.keys.iter().filter(|(_, (owner, _))| ids.contains(owner)).map(|(&address, _)| address);
        self.unfinished.extend(ids);
        for address in keys.collect::<Vec<_>>() {
            self.remove_key(address)?;
        }
        self.update_cache()?;
        for &id in ids {
            self.tables.remove(&self.loaded, id);
            self.handover.forget(&self.loaded, id)?;
            self.admissions.forget(id);
        }
        wait_for_grace_period(&self.loaded.rcu_barrier, &self.loaded.barrier_inner)?;
        ids.iter().try_for_each(|&id| self.clear(id))
    }

    fn clear(&mut self, id: ListenerId) -> Result<()> {
        zero_on_all_cpus(&self.loaded.stats, id.0)?;
        for offset in 0..DROP_REASONS {
            zero_on_all_cpus(&self.loaded.drops, id.0 * DROP_REASONS + offset)?;
            zero_on_all_cpus(&self.loaded.copy_drops, id.0 * DROP_REASONS + offset)?;
        }
        self.programmed.remove(&id);
        self.unfinished.remove(&id);
        Ok(())
    }

    fn listener_counters(&self, id: ListenerId) -> Result<ListenerCounters> {
        let mut words = counters::listener_words(&CounterMaps::of(&self.loaded), id.0)?;
        counters::add(&mut words, self.handover.base(id));
        Ok(counters::listener_counters(&words))
    }
}

/// The listener id and flags of each destination in the plan.
fn wanted_keys(plan: &[&Arc<ListenerPlan>]) -> BTreeMap<SocketAddr, (ListenerId, u32)> {
    let mut wanted = BTreeMap::new();
    for listener in plan {
        let flags = if listener.socket_only.is_some() { LISTENER_SOCKET_ONLY } else { 0 };
        for &address in &listener.match_addresses {
            wanted.insert(SocketAddr::new(address, listener.bind.port()), (listener.id, flags));
        }
    }
    wanted
}

fn wanted_marks(plan: &[&Arc<ListenerPlan>]) -> BTreeSet<KeyMark> {
    let addresses = plan.iter().flat_map(|listener| &listener.match_addresses).copied().map(KeyMark::Address);
    let links = plan.iter().flat_map(|listener| &listener.l3_ingress).copied().map(KeyMark::L3Device);
    addresses.chain(links).collect()
}

/// True if the id now belongs to an unrelated listener.
fn is_different_listener(before: &ListenerPlan, now: &ListenerPlan) -> bool {
    before.name != now.name && before.bind != now.bind
}

impl Datapath for KernelDatapath {
    fn apply(&mut self, plan: &Plan) -> Result<()> {
        let ours: Vec<&Arc<ListenerPlan>> =
            plan.listeners.iter().filter(|listener| listener.mode == Mode::TcEbpf).collect();
        let programmed = |id| self.programmed.get(&id);
        let others =
            ours.iter().filter(|now| programmed(now.id).is_some_and(|before| is_different_listener(before, now)));
        let others = others.map(|listener| listener.id).collect();
        self.forget(&others)?;
        for &listener in &ours {
            if self.programmed.get(&listener.id) != Some(listener) || self.unfinished.contains(&listener.id) {
                self.unfinished.insert(listener.id);
                self.publish(listener).with_context(|| format!("listener {:?}", listener.name))?;
                self.programmed.insert(listener.id, Arc::clone(listener));
                self.unfinished.remove(&listener.id);
            }
        }
        self.apply_keys(&ours)?;
        self.exposed = true;
        self.apply_links(&ours, plan.attach)?;
        let wanted: BTreeSet<ListenerId> = ours.iter().map(|listener| listener.id).collect();
        let there = self.programmed.keys().chain(&self.unfinished).copied();
        let gone = there.filter(|id| !wanted.contains(id)).collect();
        self.forget(&gone)?;
        self.admissions.delete_unused(&self.loaded)
    }

    fn counters(&mut self) -> Result<DatapathCounters> {
        let mut counters = DatapathCounters::default();
        for &id in self.programmed.keys() {
            counters.listeners.insert(id, self.listener_counters(id)?);
        }
        for (key, [packets, bytes]) in self.tables.counters(&self.loaded)? {
            counters.downstreams.insert(key, DownstreamCounters { packets, bytes });
        }
        let mut fragments = counters::fragments(&self.loaded.fragment_stats)?;
        counters::add(&mut fragments, self.handover.fragments());
        let [strays, lost] = fragments;
        counters.fragments = FragmentCounters { strays, lost };
        Ok(counters)
    }

    fn shutdown(&mut self) -> Result<()> {
        let mut first_error = Ok(());
        self.events.trace(None)?;
        if self.handover.persists() {
            self.renew_heartbeat();
            self.attachments.clear();
        }
        for attachment in self.attachments.drain(..) {
            if let Err(error) = attachment.detach()
                && first_error.is_ok()
            {
                first_error = Err(error);
            }
        }
        first_error
    }
}
