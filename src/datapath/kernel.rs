//! The TC program of `bpf/`: loads it, keeps its maps in step with the plan, attaches it, reads its counters.
//!
//! - `skel`: the compiled program and its types. `maps`: typed access. `arena`: which array entries are in use.
//! - `first_look`: where most destinations are found. `table`: one listener's table and downstreams. `admission`: who may send.
//! - `succession`: from one daemon to the next. `pins`: where it finds what; `books`: what was counted; `lease`: until when
//!   the program acts without a daemon.
//! - `attach`: interfaces. `events`: single datagrams it tells of. `quiet`: libbpf's messages.
//!
//! A listener's table is published by one 64-bit store and the entries it replaces are reused only after an RCU grace
//! period, so a datagram sees the old table or the new one, whole. The order at start is table, then destination keys,
//! then attachment: the program never sees a listener without its table.

pub mod admission;
pub mod arena;
pub mod attach;
pub mod books;
pub mod events;
mod first_look;
pub mod lease;
pub mod maps;
pub mod pins;
mod quiet;
pub mod skel;
pub mod succession;
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags};

use self::admission::Admissions;
use self::attach::{Attachment, Way};
use self::books::Maps;
use self::events::Events;
use self::first_look::FirstLook;
use self::maps::{MappedArray, Mark, bytes_of, listener_key, sum_over_cpus, wait_for_readers, zero_on_all_cpus};
use self::skel::{DROP_REASONS, LISTENER_SOCKET_ONLY, Loaded, Sizes, types};
use self::succession::Line;
use self::table::Tables;
use super::{Counters, Datapath};
use crate::config::{Attach, Limits};
use crate::model::{DownstreamCounters, FragmentCounters, ListenerCounters, ListenerId, Mode};
use crate::plan::{LinkRef, ListenerPlan, Plan};

/// The kernel datapath. Dropping it detaches the program everywhere and frees it.
#[derive(Debug)]
pub struct KernelDatapath {
    // Fields are dropped in this order: off the interfaces first.
    attachments: Vec<Attachment>,
    tables: Tables,
    events: Events,
    admissions: Admissions,
    /// Destination keys in the kernel, with the listener and flags behind each.
    keys: BTreeMap<SocketAddr, (ListenerId, u32)>,
    /// Where the program looks for them first.
    first_look: FirstLook,
    /// What else has a key in the kernel.
    marks: BTreeSet<Mark>,
    /// Whether the program has to ask if a link is marked.
    links: MappedArray<types::links>,
    /// Something may run the program.
    exposed: bool,
    loaded: Loaded,
    /// What each listener was last programmed with.
    programmed: BTreeMap<ListenerId, ListenerPlan>,
    /// Those of which the kernel may have more or less than that, because it has refused something on the way.
    unfinished: BTreeSet<ListenerId>,
    setup: Setup,
    line: Line,
}

/// What is fixed when the program is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setup {
    /// How many entries the maps get.
    pub sizes: Sizes,
    /// The kernel can find neighbours for the program (`bpf_redirect_neigh`, Linux 5.10), and hand packets straight into
    /// pods (`bpf_redirect_peer`, likewise).
    pub redirects: bool,
    /// The kernel has ring buffers (Linux 5.8), through which the program tells of single datagrams.
    pub ring_buffer: bool,
    /// The kernel has lists of TCX programs (Linux 6.6).
    pub tcx: bool,
    /// How long after the latest fragment of a datagram another is waited for.
    pub fragment_patience: Duration,
}

impl Setup {
    /// For a current kernel.
    #[must_use]
    pub fn new(limits: &Limits) -> Setup {
        Setup {
            sizes: Sizes::of(limits),
            redirects: true,
            ring_buffer: true,
            tcx: true,
            // Fragments of one datagram follow each other closely, and its number is used again soon.
            fragment_patience: Duration::from_secs(2),
        }
    }
}

impl KernelDatapath {
    /// [`KernelDatapath::open`] for a current kernel.
    ///
    /// # Errors
    /// As for [`KernelDatapath::open`].
    pub fn new(limits: &Limits) -> Result<KernelDatapath> {
        Self::open(&Setup::new(limits))
    }

    /// Loads the program and creates its maps. Attaches nothing yet.
    ///
    /// # Errors
    /// With the kernel's reason: no privilege, a missing feature, no memory.
    pub fn open(setup: &Setup) -> Result<KernelDatapath> {
        let loaded = skel::load(setup)?;
        let tables = Tables::new(&loaded, setup.sizes)?;
        let events = Events::new(&loaded)?;
        let line = Line::new(&loaded)?;
        Ok(KernelDatapath {
            attachments: Vec::new(),
            tables,
            events,
            admissions: Admissions::default(),
            keys: BTreeMap::new(),
            first_look: FirstLook::new(&loaded)?,
            marks: BTreeSet::new(),
            links: MappedArray::new(&loaded.links)?,
            exposed: false,
            loaded,
            programmed: BTreeMap::new(),
            unfinished: BTreeSet::new(),
            setup: *setup,
            line,
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
    pub fn events(&mut self) -> &mut Events {
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
    pub fn ahead(&self) -> Result<BTreeMap<String, Vec<String>>> {
        let ahead = |attachment: &Attachment| Ok((attachment.link().name.clone(), attachment.ahead()?));
        self.attachments.iter().map(ahead).collect()
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
        self.admissions.in_force(listener.id, admission, listener.meter);
        books::set_name(&self.loaded, listener.id, &listener.name)
    }

    /// Makes the kernel's destination keys those of the plan. New ones are added before old ones go, so that an
    /// address that moves between listeners is never without an owner; it is marked for as long as it has keys. Links are
    /// marked before the program is attached to them, and before it is to others that have got such a one's index.
    fn apply_keys(&mut self, plan: &[&ListenerPlan]) -> Result<()> {
        // Also when the kernel has refused something on the way: what it has taken is to be found.
        let changed = self.change_keys(plan);
        changed.and(self.show_keys())
    }

    /// Lets the program find the destination keys as they are now.
    fn show_keys(&mut self) -> Result<()> {
        let (loaded, exposed) = (&self.loaded, self.exposed);
        self.first_look.follow(&self.keys, || match exposed {
            true => wait_for_readers(&loaded.rcu_barrier, &loaded.barrier_inner),
            false => Ok(()),
        })
    }

    fn change_keys(&mut self, plan: &[&ListenerPlan]) -> Result<()> {
        let marks = wanted_marks(plan);
        let headerless = |marks: &BTreeSet<Mark>| marks.iter().any(|mark| matches!(mark, Mark::Headerless(_)));
        if headerless(&marks) {
            self.links.write(0, types::links { headerless: 1 });
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
        if !headerless(&self.marks) {
            self.links.write(0, types::links { headerless: 0 });
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
    fn apply_links(&mut self, plan: &[&ListenerPlan], attach: Attach) -> Result<()> {
        let way = Way::choose(attach, self.setup.tcx)?;
        let wanted: BTreeSet<&LinkRef> = plan.iter().flat_map(|listener| &listener.links).collect();
        // One that someone has taken off goes first: it holds its interface's claim.
        self.attachments.retain(Attachment::in_place);
        for &link in &wanted {
            match self.attachments.iter_mut().find(|attachment| attachment.link() == link) {
                None if self.line.leaves(link) => {}
                None => {
                    let mut attachment =
                        Attachment::instead_of(self.line.before(), self.loaded.program.as_fd(), link, way)?;
                    self.line.apply_to_one(&mut attachment);
                    self.attachments.push(attachment);
                }
                Some(attachment) if attachment.way() != way => {
                    let loaded = &self.loaded;
                    attachment.move_to(way, &|| wait_for_readers(&loaded.rcu_barrier, &loaded.barrier_inner))?;
                    self.line.apply_to_one(attachment);
                }
                Some(_) => {}
            }
        }
        let (keep, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut self.attachments)
            .into_iter()
            .partition(|attachment| wanted.contains(attachment.link()));
        self.attachments = keep;
        gone.into_iter().try_for_each(|attachment| {
            self.line.let_go(&attachment);
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
        self.show_keys()?;
        for &id in ids {
            self.tables.remove(&self.loaded, id);
            self.line.forget(&self.loaded, id)?;
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
        let mut words = books::listener_words(&Maps::of(&self.loaded), id.0)?;
        books::add(&mut words, self.line.base(id));
        Ok(books::listener_counters(&words))
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

fn wanted_marks(plan: &[&ListenerPlan]) -> BTreeSet<Mark> {
    let addresses = plan.iter().flat_map(|listener| &listener.match_addresses).copied().map(Mark::Address);
    let links = plan.iter().flat_map(|listener| &listener.headerless).copied().map(Mark::Headerless);
    addresses.chain(links).collect()
}

/// True if the number has passed on to a listener that has nothing to do with the one before.
fn is_another(before: &ListenerPlan, now: &ListenerPlan) -> bool {
    before.name != now.name && before.bind != now.bind
}

impl Datapath for KernelDatapath {
    fn mode(&self) -> Mode {
        Mode::TcEbpf
    }

    fn apply(&mut self, plan: &Plan) -> Result<()> {
        let ours: Vec<&ListenerPlan> = plan.listeners.iter().filter(|listener| listener.mode == Mode::TcEbpf).collect();
        let programmed = |id| self.programmed.get(&id);
        let others = ours.iter().filter(|now| programmed(now.id).is_some_and(|before| is_another(before, now)));
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
        self.admissions.sweep(&self.loaded)
    }

    fn counters(&mut self) -> Result<Counters> {
        let mut counters = Counters::default();
        for &id in self.programmed.keys() {
            counters.listeners.insert(id, self.listener_counters(id)?);
        }
        for (key, [packets, bytes]) in self.tables.counters(&self.loaded)? {
            counters.downstreams.insert(key, DownstreamCounters { packets, bytes });
        }
        let mut fragments = books::fragments(&self.loaded.fragment_stats)?;
        books::add(&mut fragments, self.line.fragments());
        let [strays, lost] = fragments;
        counters.fragments = FragmentCounters { strays, lost };
        Ok(counters)
    }

    fn shutdown(&mut self) -> Result<()> {
        let mut first_error = Ok(());
        self.events.trace(None)?;
        if self.line.stays() {
            self.beat();
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
