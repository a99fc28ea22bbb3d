//! Handover from one daemon's program to the next without losing a datagram.
//!
//! ```text
//! find stale pins ─► load, fill ─► replace the filters ─► RCU grace period ─► import the counters ─► unpin
//! ```
//!
//! A new daemon always loads a program and maps of its own, so versions need to agree only on the few maps with
//! counters. Until all steps succeed, the previous program can be restored. The new program counts from zero. Earlier
//! counts are kept in `bases`, in the tables' folded counts and, for the next daemon, in the map `carried_counts`.
//! One write ([`pins::record_imported`]) makes them valid there; until then the stale pins exist and are
//! authoritative. So a daemon may be killed at any moment.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use super::KernelDatapath;
use super::abi::CARRIED_WORDS;
use super::attach::{self, Attachment};
use super::counters::{self, CarriedCounter, CounterSnapshot, ListenerWords};
use super::heartbeat::{self, Heartbeat};
use super::maps::wait_for_grace_period;
use super::pins::{self, OwnerRule, Pins, StalePins, UntrustedDirectory};
use super::skel::LoadedProgram;
use crate::config::{HandoverConfig, OnExit};
use crate::model::ListenerId;
use crate::plan::LinkRef;

/// What the kernel datapath knows about the daemons before and after it. Dropped after the attachments.
#[derive(Debug)]
pub(super) struct HandoverState {
    heartbeat: Heartbeat,
    timeout: Option<Duration>,
    keep: bool,
    pins: Option<Pins>,
    path: PathBuf,
    predecessors: Vec<StalePins>,
    /// The start has succeeded: attachments may persist, and no predecessor is restored.
    committed: bool,
    /// Interfaces, by index, that keep their previous program until all listeners there have receivers.
    deferred: BTreeSet<u32>,
    /// Interfaces, by index, whose deferral has been logged.
    logged: BTreeSet<u32>,
    /// Counts of earlier programs, for listeners and for fragments.
    bases: BTreeMap<ListenerId, ListenerWords>,
    fragments: [u64; 2],
}

/// Pins for a new `pin_path` or `on_exit`, created before anything else changes.
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
            logged: BTreeSet::new(),
            bases: BTreeMap::new(),
            fragments: [0; 2],
        })
    }

    /// True if attachments are to outlive this daemon.
    pub(super) fn persists(&self) -> bool {
        self.keep && self.committed
    }

    /// Earlier counts of a listener, to be added to its counters.
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

    /// The programs that may still be restored.
    pub(super) fn predecessors(&self) -> &[StalePins] {
        if self.committed { &[] } else { &self.predecessors }
    }

    /// True if the previous program stays on the interface for now.
    pub(super) fn is_deferred(&mut self, link: &LinkRef) -> bool {
        let there =
            || attach::has_stale_filter(link) || self.predecessors.iter().any(|stale| stale.has_link(link.index));
        let deferred = self.deferred.contains(&link.index) && there();
        if deferred && self.logged.insert(link.index) {
            tracing::info!(
                interface = link.name,
                "an earlier daemon's TC program keeps forwarding until the receivers of all listeners are known"
            );
        }
        deferred
    }

    /// Unpins an attachment's link before it is detached.
    pub(super) fn unpin_link(&self, attachment: &Attachment) {
        if let Some(pins) = &self.pins {
            pins.unpin_link(attachment.link().index);
        }
    }

    /// Makes an attachment outlive this daemon, if it is to.
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
    /// Prepares the part of a new configuration that can fail.
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

    /// Applies the configuration of pins and heartbeat.
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

    /// Finds the programs of earlier daemons that no longer run, to take over from them.
    ///
    /// # Errors
    /// When `path` cannot be read.
    pub fn find_stale_pins(&mut self, path: &Path) -> Result<()> {
        self.handover.predecessors = find_readable_pins(path)?;
        for stale in &self.handover.predecessors {
            tracing::info!(pins = %stale.path().display(), "found the TC program of an earlier daemon");
        }
        self.renew_heartbeat();
        Ok(())
    }

    /// Renews the heartbeats of this program and of the predecessors.
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

    /// How often to call [`KernelDatapath::renew_heartbeat`]; `None` for never.
    #[must_use]
    pub fn heartbeat_interval(&self) -> Option<Duration> {
        heartbeat::renewal_interval(self.handover.timeout)
    }

    /// Keeps the previous program on these interfaces, by index, for now.
    pub fn defer(&mut self, links: BTreeSet<u32>) {
        self.handover.deferred = links;
    }

    /// Ends the start: nothing is restored from now on, and attachments persist if they are to.
    pub fn commit(&mut self) {
        self.handover.committed = true;
        self.attachments.iter_mut().for_each(Attachment::commit);
        self.handover.set_persistence(&mut self.attachments);
    }

    /// Imports the predecessors' counters and removes the predecessors, once none of them is attached. Does nothing
    /// before that, nor before [`KernelDatapath::commit`].
    ///
    /// # Errors
    /// When the kernel refuses; the predecessors are removed all the same.
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
        let result = wait_for_grace_period(&self.loaded.rcu_barrier, &self.loaded.barrier_inner)
            .and_then(|()| self.import(self.read_stale_counters(&predecessors)))
            .and_then(|()| pins::record_imported(&self.loaded, &ids));
        for stale in predecessors {
            if let Err(error) = stale.remove() {
                tracing::warn!("{error:#}");
            }
        }
        pins::remove_if_empty(&self.handover.path, OwnerRule::Ours);
        result
    }

    /// Sum of the predecessors' counters. One whose counts another has imported is left out.
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
                     read: {error:#}"
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
        self.tables.import(&self.loaded, downstreams.into_iter().filter_map(known))?;
        counters::add(&mut self.handover.fragments, fragments);
        counters::store_carried(&self.loaded, CarriedCounter::Fragments, &self.handover.fragments)
    }

    /// Detaches the program from all interfaces and unpins it, regardless of `on_exit`.
    ///
    /// # Errors
    /// Names what could not be removed; the rest has been.
    pub fn remove(mut self) -> Result<()> {
        self.handover.keep = false;
        self.handover.set_persistence(&mut self.attachments);
        super::Datapath::shutdown(&mut self)
    }
}

/// Finds stale pins of this network namespace. Without permission to read them this daemon could not take over
/// either, so there are none. Nor are there in a directory that another account made.
///
/// # Errors
/// When `path` cannot be read for another reason.
fn find_readable_pins(path: &Path) -> Result<Vec<StalePins>> {
    let forbidden = |error: &anyhow::Error| {
        let cause = error.root_cause().downcast_ref::<io::Error>();
        cause.is_some_and(|cause| cause.kind() == io::ErrorKind::PermissionDenied)
    };
    match StalePins::find(path, false, OwnerRule::Ours) {
        Err(error) if error.is::<UntrustedDirectory>() => {
            tracing::warn!("ignored the pins of earlier daemons: {error:#}");
            Ok(Vec::new())
        }
        Err(error) if forbidden(&error) => {
            tracing::debug!("{error:#}");
            Ok(Vec::new())
        }
        found => found,
    }
}

/// Removes the stale pins of this network namespace below `path`, when there is no program to take over. Logs errors.
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
    pins::remove_if_empty(path, OwnerRule::Ours);
}
