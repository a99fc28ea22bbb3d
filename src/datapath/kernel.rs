//! The TC program of `bpf/`: loads it, keeps its maps in step with the plan, attaches it, reads its counters.
//!
//! - `skel`: the compiled program, its types and its loading. `maps`: typed access to maps; `entries`: their keys and values.
//! - `table`: listeners' tables and downstreams; `slot_allocator`: free array entries; `listener_state`: publishes tables.
//! - `listener_cache`: fast lookup of destinations. `admission`: source rules and rate limits.
//! - `handover`: from one daemon to the next. `pins`: the BPF file system; `counters`: what a program has counted;
//!   `heartbeat`: how long the program acts without a daemon.
//! - `attach`: filters and TCX programs on interfaces. `events`: single datagrams. `libbpf_log`: libbpf's messages.
//!
//! A listener's table is published by one 64-bit store and the entries it replaces are reused only after an RCU grace
//! period, so a datagram sees the old table or the new one, whole. The order at start is table, then destination keys,
//! then attachment: the program never sees a listener without its table.

pub mod admission;
pub mod attach;
pub mod counters;
mod entries;
pub mod events;
pub mod handover;
pub mod heartbeat;
mod libbpf_log;
mod listener_cache;
mod listener_state;
pub mod maps;
pub mod pins;
pub mod skel;
pub mod slot_allocator;
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags};

use self::admission::AdmissionRules;
use self::attach::{AttachMode, Attachment};
use self::counters::CounterMaps;
use self::entries::{KeyMark, listener_key};
use self::events::EventReader;
use self::handover::HandoverState;
use self::listener_cache::ListenerCache;
use self::maps::{MappedArray, bytes_of, sum_over_cpus, wait_for_readers, zero_on_all_cpus};
use self::skel::{DROP_REASONS, LISTENER_SOCKET_ONLY, LoadedProgram, MapSizes, types};
use self::table::KernelTables;
use super::{Counters, Datapath};
use crate::config::{AttachConfig, MapLimits};
use crate::model::{DownstreamCounters, FragmentCounters, ListenerCounters, ListenerId, Mode};
use crate::plan::{LinkRef, ListenerPlan, Plan};

/// The kernel datapath. Dropping it detaches the program everywhere and frees it.
#[derive(Debug)]
pub struct KernelDatapath {
    // Fields are dropped in this order: off the interfaces first.
    attachments: Vec<Attachment>,
    tables: KernelTables,
    events: EventReader,
    admissions: AdmissionRules,
    /// Destination keys in the kernel, with the listener and flags behind each.
    keys: BTreeMap<SocketAddr, (ListenerId, u32)>,
    /// Where the program looks for them first.
    listener_cache: ListenerCache,
    /// What else has a key in the kernel.
    marks: BTreeSet<KeyMark>,
    /// Whether the program has to ask if a link is marked.
    links: MappedArray<types::link_flags>,
    /// Something may run the program.
    exposed: bool,
    loaded: LoadedProgram,
    /// What each listener was last programmed with.
    programmed: BTreeMap<ListenerId, ListenerPlan>,
    /// Those of which the kernel may have more or less than that, because it has refused something on the way.
    unfinished: BTreeSet<ListenerId>,
    setup: KernelSetup,
    handover: HandoverState,
}

/// What is fixed when the program is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelSetup {
    /// How many entries the maps get.
    pub sizes: MapSizes,
    /// The kernel can find neighbours for the program (`bpf_redirect_neigh`, Linux 5.10), and hand packets straight into
    /// pods (`bpf_redirect_peer`, likewise).
    pub redirects: bool,
    /// The kernel has ring buffers (Linux 5.8), through which the program tells of single datagrams.
    pub ring_buffer: bool,
    /// The kernel has lists of TCX programs (Linux 6.6).
    pub tcx: bool,
    /// How long after the latest fragment of a datagram another is waited for.
    pub fragment_timeout: Duration,
}

impl KernelSetup {
    /// For a current kernel.
    #[must_use]
    pub fn new(limits: &MapLimits) -> KernelSetup {
        KernelSetup {
            sizes: MapSizes::of(limits),
            redirects: true,
            ring_buffer: true,
            tcx: true,
            // Fragments of one datagram follow each other closely, and its number is used again soon.
            fragment_timeout: Duration::from_secs(2),
        }
    }
}

impl KernelDatapath {
    /// [`KernelDatapath::open`] for a current kernel.
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

    /// True if the traffic itself makes the kernel find and keep the neighbours that it needs.
    #[must_use]
    pub fn resolves_neighbours(&self) -> bool {
        self.setup.redirects
    }

    /// The loaded program, for tests that feed it packets.
    #[must_use]
    pub fn program(&self) -> BorrowedFd<'_> {
        self.loaded.program.as_fd()
    }

    /// Single datagrams that the program tells of, and the switch for traces.
    pub fn events(&mut self) -> &mut EventReader {
        &mut self.events
    }

    /// True while the program is on every interface it was attached to.
    #[must_use]
    pub fn attached_everywhere(&self) -> bool {
        self.attachments.iter().all(Attachment::in_place)
    }

    /// For each interface that the program is attached to, who sees its packets before, in words.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn preceding_programs(&self) -> Result<BTreeMap<String, Vec<String>>> {
        let preceding =
            |attachment: &Attachment| Ok((attachment.link().name.clone(), attachment.preceding_programs()?));
        self.attachments.iter().map(preceding).collect()
    }

    /// The raw `STATS` entry of a listener, summed over CPUs: received, forwarded, dropped, passed, bytes received,
    /// bytes forwarded.
    ///
    /// # Errors
    /// When the kernel refuses to read it.
    pub fn raw_stats(&self, id: ListenerId) -> Result<[u64; 6]> {
        sum_over_cpus(&self.loaded.stats, id.0)
    }

    /// Puts a listener's table in force, and who may send to it.
    fn publish(&mut self, listener: &ListenerPlan) -> Result<()> {
        let admission = self.admissions.prepare(&self.loaded, listener)?;
        self.tables.publish(&self.loaded, listener).context("cannot update its table")?;
        self.tables.admit(listener.id, &admission);
        self.admissions.set_current(listener.id, admission, listener.meter);
        counters::set_name(&self.loaded, listener.id, &listener.name)
    }

    /// Makes the kernel's destination keys those of the plan. New ones are added before old ones go, so that an
    /// address that moves between listeners is never without an owner; it is marked for as long as it has keys. Links are
    /// marked before the program is attached to them, and before it is to others that have got such a one's index.
    fn apply_keys(&mut self, plan: &[&ListenerPlan]) -> Result<()> {
        // Also when the kernel has refused something on the way: what it has taken is to be found.
        let changed = self.change_keys(plan);
        changed.and(self.update_cache())
    }

    /// Lets the program find the destination keys as they are now.
    fn update_cache(&mut self) -> Result<()> {
        let (loaded, exposed) = (&self.loaded, self.exposed);
        self.listener_cache.update(&self.keys, || match exposed {
            true => wait_for_readers(&loaded.rcu_barrier, &loaded.barrier_inner),
            false => Ok(()),
        })
    }

    fn change_keys(&mut self, plan: &[&ListenerPlan]) -> Result<()> {
        let marks = wanted_marks(plan);
        let has_l3_device = |marks: &BTreeSet<KeyMark>| marks.iter().any(|mark| matches!(mark, KeyMark::L3Device(_)));
        if has_l3_device(&marks) {
            self.links.write(0, types::link_flags { has_l3_device: 1 });
        }
        for &mark in marks.difference(&self.marks.clone()) {
            self.set_key(&mark.key(), (ListenerId(0), 0))
                .with_context(|| format!("cannot tell the TC program about {mark}"))?;
            self.marks.insert(mark);
        }
        let wanted = wanted_keys(plan);
        for (&address, &owner) in &wanted {
            if self.keys.get(&address) == Some(&owner) {
                continue;
            }
            self.set_key(&listener_key(address), owner)
                .with_context(|| format!("cannot tell the TC program about {address}"))?;
            self.keys.insert(address, owner);
        }
        let gone: Vec<SocketAddr> = self.keys.keys().filter(|key| !wanted.contains_key(key)).copied().collect();
        gone.into_iter().try_for_each(|address| self.remove_key(address))?;
        for &mark in self.marks.clone().difference(&marks) {
            self.delete_key(&mark.key()).with_context(|| format!("cannot make the TC program forget {mark}"))?;
            self.marks.remove(&mark);
        }
        if !has_l3_device(&self.marks) {
            self.links.write(0, types::link_flags { has_l3_device: 0 });
        }
        Ok(())
    }

    fn remove_key(&mut self, address: SocketAddr) -> Result<()> {
        self.delete_key(&listener_key(address))
            .with_context(|| format!("cannot make the TC program forget {address}"))?;
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

    /// Attaches where the plan says and is not attached, detaches where it no longer says.
    fn apply_links(&mut self, plan: &[&ListenerPlan], attach: AttachConfig) -> Result<()> {
        let mode = AttachMode::choose(attach, self.setup.tcx)?;
        let wanted: BTreeSet<&LinkRef> = plan.iter().flat_map(|listener| &listener.links).collect();
        // One that someone has taken off goes first: it holds its interface's claim.
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
                    attachment.move_to(mode, &|| wait_for_readers(&loaded.rcu_barrier, &loaded.barrier_inner))?;
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

    /// Removes listeners. Their numbers may be other listeners' later, so their counters are cleared, once no CPU is still
    /// counting. To wait for that takes some milliseconds, so it is done once for all of them.
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
        wait_for_readers(&self.loaded.rcu_barrier, &self.loaded.barrier_inner)?;
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

/// Each destination's listener and flags.
fn wanted_keys(plan: &[&ListenerPlan]) -> BTreeMap<SocketAddr, (ListenerId, u32)> {
    let mut wanted = BTreeMap::new();
    for listener in plan {
        let flags = if listener.socket_only.is_some() { LISTENER_SOCKET_ONLY } else { 0 };
        for &address in &listener.match_addresses {
            wanted.insert(SocketAddr::new(address, listener.bind.port()), (listener.id, flags));
        }
    }
    wanted
}

fn wanted_marks(plan: &[&ListenerPlan]) -> BTreeSet<KeyMark> {
    let addresses = plan.iter().flat_map(|listener| &listener.match_addresses).copied().map(KeyMark::Address);
    let links = plan.iter().flat_map(|listener| &listener.headerless).copied().map(KeyMark::L3Device);
    addresses.chain(links).collect()
}

/// True if the number has passed on to a listener that has nothing to do with the one before.
fn is_different_listener(before: &ListenerPlan, now: &ListenerPlan) -> bool {
    before.name != now.name && before.bind != now.bind
}

impl Datapath for KernelDatapath {
    fn mode(&self) -> Mode {
        Mode::TcEbpf
    }

    fn apply(&mut self, plan: &Plan) -> Result<()> {
        let ours: Vec<&ListenerPlan> = plan.listeners.iter().filter(|listener| listener.mode == Mode::TcEbpf).collect();
        let programmed = |id| self.programmed.get(&id);
        let others =
            ours.iter().filter(|now| programmed(now.id).is_some_and(|before| is_different_listener(before, now)));
        let others = others.map(|listener| listener.id).collect();
        self.forget(&others)?;
        for &listener in &ours {
            if self.programmed.get(&listener.id) != Some(listener) || self.unfinished.contains(&listener.id) {
                self.unfinished.insert(listener.id);
                self.publish(listener).with_context(|| format!("listener {:?}", listener.name))?;
                self.programmed.insert(listener.id, listener.clone());
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

    fn counters(&mut self) -> Result<Counters> {
        let mut counters = Counters::default();
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
