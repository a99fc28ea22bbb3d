//! From one daemon's program to the next one's without losing a datagram, and what the program does meanwhile.
//!
//! ```text
//! find what is left behind ─► load, fill ─► replace the filters ─► RCU grace period ─► take its counts over ─► unpin it
//! ```
//!
//! The new daemon always brings a program and maps of its own, so that versions need to agree on nothing but the few maps
//! with counters. Until all that has succeeded the old one can have its place back. The new program's counters are its own
//! from zero on; what was counted before is kept in `bases`, in the tables' settled counts, and, for the next daemon, in the
//! map `ledger`. What is written there counts from one write on ([`pins::record_imported`]), and as long as that has not been
//! made, the old programs' pins are there and count. So a daemon may be killed at any moment of all this.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use super::KernelDatapath;
use super::attach::{self, Attachment};
use super::counters::{self, CarriedCounter, CounterSnapshot, ListenerWords};
use super::heartbeat::{self, Heartbeat};
use super::maps::wait_for_readers;
use super::pins::{self, Pins, StalePins};
use super::skel::{CARRIED_WORDS, LoadedProgram};
use crate::config::{HandoverConfig, OnExit};
use crate::model::ListenerId;
use crate::plan::LinkRef;

/// What the kernel datapath knows of those before and after it. Dropped after the attachments.
#[derive(Debug)]
pub(super) struct HandoverState {
    heartbeat: Heartbeat,
    timeout: Option<Duration>,
    keep: bool,
    pins: Option<Pins>,
    path: PathBuf,
    predecessors: Vec<StalePins>,
    /// The start has succeeded: what is attached may stay, and nobody gets a place back.
    committed: bool,
    /// Links on which the program before goes on, until all listeners there have their receivers.
    deferred: BTreeSet<u32>,
    /// Those that the operator has been told of.
    told: BTreeSet<u32>,
    /// What was counted before, of listeners and of fragments.
    bases: BTreeMap<ListenerId, ListenerWords>,
    fragments: [u64; 2],
}

/// What takes a new `pin_path` or `on_exit`, got before anything else is changed.
#[derive(Debug, Default)]
pub struct PreparedPins(Option<Pins>);

impl HandoverState {
    pub(super) fn new(loaded: &LoadedProgram) -> Result<HandoverState> {
        let HandoverConfig { pin_path, .. } = HandoverConfig::default();
        Ok(HandoverState {
            heartbeat: Heartbeat::new(&loaded.heartbeat)?,
            timeout: None,
            keep: false,
            pins: None,
            path: pin_path,
            predecessors: Vec::new(),
            committed: false,
            deferred: BTreeSet::new(),
            told: BTreeSet::new(),
            bases: BTreeMap::new(),
            fragments: [0; 2],
        })
    }

    /// True if what is attached is to outlive this daemon.
    pub(super) fn persists(&self) -> bool {
        self.keep && self.committed
    }

    /// What is to be added to a listener's counters.
    pub(super) fn base(&self, id: ListenerId) -> ListenerWords {
        self.bases.get(&id).copied().unwrap_or([0; CARRIED_WORDS])
    }

    pub(super) fn fragments(&self) -> [u64; 2] {
        self.fragments
    }

    pub(super) fn forget(&mut self, loaded: &LoadedProgram, id: ListenerId) -> Result<()> {
        if self.bases.remove(&id).is_some() {
            counters::delete_carried(loaded, CarriedCounter::Listener(id));
        }
        counters::set_name(loaded, id, "")
    }

    /// The programs that may get their place back.
    pub(super) fn predecessors(&self) -> &[StalePins] {
        if self.committed { &[] } else { &self.predecessors }
    }

    /// True if the program there is to go on for the time being.
    pub(super) fn is_deferred(&mut self, link: &LinkRef) -> bool {
        let there =
            || attach::has_stale_filter(link) || self.predecessors.iter().any(|stale| stale.has_link(link.index));
        let deferred = self.deferred.contains(&link.index) && there();
        if deferred && self.told.insert(link.index) {
            tracing::info!(
                interface = link.name,
                "the TC program of an earlier daemon goes on there until the receivers of all listeners are known"
            );
        }
        deferred
    }

    /// What is attached is about to be taken off.
    pub(super) fn unpin_link(&self, attachment: &Attachment) {
        if let Some(pins) = &self.pins {
            pins.unpin_link(attachment.link().index);
        }
    }

    /// Lets what is attached stay, if it is to.
    pub(super) fn set_persistence_of(&self, attachment: &mut Attachment) {
        attachment.set_persistent(self.persists());
        let index = attachment.link().index;
        let Some(pins) = self.pins.as_ref().filter(|_| self.persists()) else { return };
        let pinned = match attachment.tcx_link() {
            Some(link) => pins.pin_link(index, link),
            None => return pins.unpin_link(index),
        };
        if let Err(error) = pinned {
            tracing::error!("{error:#}: the TCX program will not outlive this daemon");
        }
    }

    fn set_persistence(&mut self, attachments: &mut [Attachment]) {
        let persists = self.persists();
        attachments.iter_mut().for_each(|attachment| self.set_persistence_of(attachment));
        if let Some(pins) = &mut self.pins {
            pins.set_persistent(persists);
        }
    }
}

impl KernelDatapath {
    /// Gets ready what the configuration asks for and may not be had.
    ///
    /// # Errors
    /// When the program cannot be pinned, in one line with the fix.
    pub fn prepare(&self, wanted: &HandoverConfig) -> Result<PreparedPins> {
        let there = self.handover.pins.as_ref().map(Pins::path);
        if wanted.on_exit == OnExit::Detach || there == Some(&wanted.pin_path) {
            return Ok(PreparedPins(None));
        }
        Ok(PreparedPins(Some(Pins::new(&wanted.pin_path, &self.loaded)?)))
    }

    /// Does from now on as the configuration says.
    pub fn configure(&mut self, wanted: &HandoverConfig, PreparedPins(pins): PreparedPins) {
        let handover = &mut self.handover;
        handover.keep = wanted.on_exit == OnExit::Keep;
        handover.timeout = wanted.max_headless;
        handover.path.clone_from(&wanted.pin_path);
        handover.set_persistence(&mut self.attachments);
        if pins.is_some() || !handover.keep {
            if let Some(old) = &mut handover.pins {
                old.set_persistent(false);
            }
            handover.pins = pins;
        }
        handover.set_persistence(&mut self.attachments);
        self.renew_heartbeat();
    }

    /// Looks for programs that daemons which are no more have left behind, to take over from them.
    ///
    /// # Errors
    /// When it cannot be seen what is there.
    pub fn find_stale_pins(&mut self, path: &Path) -> Result<()> {
        self.handover.predecessors = find_readable_pins(path)?;
        for stale in &self.handover.predecessors {
            tracing::info!(pins = %stale.path().display(), "found the TC program of an earlier daemon");
        }
        self.renew_heartbeat();
        Ok(())
    }

    /// Says that there is a daemon.
    pub fn renew_heartbeat(&mut self) {
        let handover = &mut self.handover;
        let heartbeats =
            handover.predecessors.iter_mut().filter_map(StalePins::heartbeat).chain([&mut handover.heartbeat]);
        for heartbeat in heartbeats {
            if let Err(error) = heartbeat.renew(handover.timeout) {
                tracing::error!("{error:#}");
            }
        }
    }

    /// How often [`KernelDatapath::renew_heartbeat`] is to be called.
    #[must_use]
    pub fn heartbeat_interval(&self) -> Option<Duration> {
        heartbeat::renewal_interval(self.handover.timeout)
    }

    /// On these links, by index, a program that is there goes on for the time being.
    pub fn defer(&mut self, links: BTreeSet<u32>) {
        self.handover.deferred = links;
    }

    /// The start has succeeded: from now on there is no way back, and what is attached stays if it is to.
    pub fn commit(&mut self) {
        self.handover.committed = true;
        self.attachments.iter_mut().for_each(Attachment::commit);
        self.handover.set_persistence(&mut self.attachments);
    }

    /// Takes the counts of the programs before over and removes them, once none of them is in force any more. Nothing is
    /// done before that, nor before [`KernelDatapath::commit`].
    ///
    /// # Errors
    /// When the kernel refuses; the programs before are removed all the same.
    pub fn finish_handover(&mut self) -> Result<()> {
        if !self.handover.committed || !self.handover.deferred.is_empty() || self.handover.predecessors.is_empty() {
            return Ok(());
        }
        let predecessors = std::mem::take(&mut self.handover.predecessors);
        let ids: Vec<u32> = predecessors.iter().map(StalePins::id).collect();
        attach::detach_programs(&ids);
        for stale in &predecessors {
            if let Err(error) = stale.detach_all_links() {
                tracing::warn!("{error:#}");
            }
        }
        // Until no CPU is still counting.
        let result = wait_for_readers(&self.loaded.rcu_barrier, &self.loaded.barrier_inner)
            .and_then(|()| self.import(self.read_stale_counters(&predecessors)))
            .and_then(|()| pins::record_imported(&self.loaded, &ids));
        for stale in predecessors {
            if let Err(error) = stale.remove() {
                tracing::warn!("{error:#}");
            }
        }
        // Only if nobody has pins there any more.
        let _ = fs::remove_dir(&self.handover.path);
        result
    }

    /// What the programs before have counted, each once.
    fn read_stale_counters(&self, predecessors: &[StalePins]) -> CounterSnapshot {
        let mut sum = CounterSnapshot::default();
        for stale in
            predecessors.iter().filter(|stale| !predecessors.iter().any(|other| other.has_imported(stale.id())))
        {
            match stale.maps(&self.loaded).and_then(|maps| CounterSnapshot::read(&maps)) {
                Ok(counters) => {
                    tracing::info!(pins = %stale.path().display(), "took over from an earlier daemon's TC program, counters go on");
                    sum.merge(counters);
                }
                Err(error) => tracing::warn!(
                    pins = %stale.path().display(),
                    "took over from an earlier daemon's TC program, but counters begin at zero: its maps cannot be \
                     understood, {error:#}"
                ),
            }
        }
        sum
    }

    fn import(&mut self, counted: CounterSnapshot) -> Result<()> {
        let CounterSnapshot { listeners, downstreams, fragments } = counted;
        let ids: BTreeMap<&str, ListenerId> = self.programmed.values().map(|plan| (&*plan.name, plan.id)).collect();
        for (name, words) in listeners {
            let Some(&id) = ids.get(name.as_str()) else { continue };
            let base = self.handover.bases.entry(id).or_insert([0; CARRIED_WORDS]);
            counters::add(base, words);
            counters::store_carried(&self.loaded, CarriedCounter::Listener(id), base)?;
        }
        let known = |((name, address), counted): ((String, _), _)| Some(((*ids.get(name.as_str())?, address), counted));
        self.tables.inherit(&self.loaded, downstreams.into_iter().filter_map(known))?;
        counters::add(&mut self.handover.fragments, fragments);
        counters::store_carried(&self.loaded, CarriedCounter::Fragments, &self.handover.fragments)
    }

    /// Takes the program off all interfaces and unpins it, whatever is to be kept otherwise.
    ///
    /// # Errors
    /// Names what could not be removed; the rest has been.
    pub fn remove(mut self) -> Result<()> {
        self.handover.keep = false;
        self.handover.set_persistence(&mut self.attachments);
        super::Datapath::shutdown(&mut self)
    }
}

/// What daemons of this network namespace that are no more have left. One who may not look, because only root may, could not
/// take over either: there is nothing for it.
///
/// # Errors
/// When it cannot be seen for another reason.
fn find_readable_pins(path: &Path) -> Result<Vec<StalePins>> {
    let forbidden = |error: &anyhow::Error| {
        let cause = error.root_cause().downcast_ref::<io::Error>();
        cause.is_some_and(|cause| cause.kind() == io::ErrorKind::PermissionDenied)
    };
    match StalePins::find(path, false) {
        Err(error) if forbidden(&error) => {
            tracing::debug!("{error:#}");
            Ok(Vec::new())
        }
        found => found,
    }
}

/// Removes what daemons of this network namespace that are no more have left below `path`, when there is no program to
/// take over. Says what goes wrong.
pub fn remove_stale_pins(path: &Path) {
    let all = find_readable_pins(path).unwrap_or_else(|error| {
        tracing::warn!("{error:#}");
        Vec::new()
    });
    for stale in all {
        let shown = stale.path().display().to_string();
        match stale.remove() {
            Ok(()) => tracing::info!(pins = shown, "removed the TC program of an earlier daemon"),
            Err(error) => tracing::warn!("{error:#}"),
        }
    }
    let _ = fs::remove_dir(path);
}
