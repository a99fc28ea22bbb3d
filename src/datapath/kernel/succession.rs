//! From one daemon's program to the next one's without losing a datagram, and what the program does meanwhile.
//!
//! ```text
//! find what is left behind ─► load, fill ─► replace the filters ─► RCU grace period ─► take its counts over ─► unpin it
//! ```
//!
//! The new daemon always brings a program and maps of its own, so that versions need to agree on nothing but the few maps
//! with counters. Until all that has succeeded the old one can have its place back. The new program's counters are its own
//! from zero on; what was counted before is kept in `bases`, in the tables' settled counts, and, for the next daemon, in the
//! map `ledger`. A daemon that is killed while it writes there may leave the old counts to be added once more; datagrams
//! are not concerned.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use super::KernelDatapath;
use super::attach::{self, Attachment};
use super::books::{self, Account, Item, ListenerWords};
use super::lease::{self, Lease};
use super::maps::wait_for_readers;
use super::pins::{self, Left, Pins};
use super::skel::{LEDGER_WORDS, Loaded};
use crate::config::{OnExit, Succession};
use crate::model::ListenerId;
use crate::plan::LinkRef;

/// What the kernel datapath knows of those before and after it. Dropped after the attachments.
#[derive(Debug)]
pub(super) struct Line {
    lease: Lease,
    term: Option<Duration>,
    keep: bool,
    pins: Option<Pins>,
    path: PathBuf,
    before: Vec<Left>,
    /// The start has succeeded: what is attached may stay, and nobody gets a place back.
    committed: bool,
    /// Links on which the program before goes on, until all listeners there have their receivers.
    held: BTreeSet<u32>,
    /// Those that the operator has been told of.
    told: BTreeSet<u32>,
    /// What was counted before, of listeners and of fragments.
    bases: BTreeMap<ListenerId, ListenerWords>,
    fragments: [u64; 2],
}

/// What takes a new `pin_path` or `on_exit`, got before anything else is changed.
#[derive(Debug, Default)]
pub struct Prepared(Option<Pins>);

impl Line {
    pub(super) fn new(loaded: &Loaded) -> Result<Line> {
        let Succession { pin_path, .. } = Succession::default();
        Ok(Line {
            lease: Lease::new(&loaded.lease)?,
            term: None,
            keep: false,
            pins: None,
            path: pin_path,
            before: Vec::new(),
            committed: false,
            held: BTreeSet::new(),
            told: BTreeSet::new(),
            bases: BTreeMap::new(),
            fragments: [0; 2],
        })
    }

    /// True if what is attached is to outlive this daemon.
    pub(super) fn stays(&self) -> bool {
        self.keep && self.committed
    }

    /// What is to be added to a listener's counters.
    pub(super) fn base(&self, id: ListenerId) -> ListenerWords {
        self.bases.get(&id).copied().unwrap_or([0; LEDGER_WORDS])
    }

    pub(super) fn fragments(&self) -> [u64; 2] {
        self.fragments
    }

    pub(super) fn forget(&mut self, loaded: &Loaded, id: ListenerId) -> Result<()> {
        if self.bases.remove(&id).is_some() {
            books::strike(loaded, Item::Listener(id));
        }
        books::set_name(loaded, id, "")
    }

    /// The programs that may get their place back.
    pub(super) fn before(&self) -> &[Left] {
        if self.committed { &[] } else { &self.before }
    }

    /// True if the program there is to go on for the time being.
    pub(super) fn leaves(&mut self, link: &LinkRef) -> bool {
        let there = || attach::is_left_behind(link) || self.before.iter().any(|left| left.holds(link.index));
        let leaves = self.held.contains(&link.index) && there();
        if leaves && self.told.insert(link.index) {
            tracing::info!(
                interface = link.name,
                "the TC program of an earlier daemon goes on there until the receivers of all listeners are known"
            );
        }
        leaves
    }

    /// What is attached is about to be taken off.
    pub(super) fn let_go(&self, attachment: &Attachment) {
        if let Some(pins) = &self.pins {
            pins.let_go(attachment.link().index);
        }
    }

    /// Lets what is attached stay, if it is to.
    pub(super) fn apply_to_one(&self, attachment: &mut Attachment) {
        attachment.stay(self.stays());
        let index = attachment.link().index;
        let Some(pins) = self.pins.as_ref().filter(|_| self.stays()) else { return };
        let held = match attachment.tcx_link() {
            Some(link) => pins.hold(index, link),
            None => return pins.let_go(index),
        };
        if let Err(error) = held {
            tracing::error!("{error:#}: the TCX program will not outlive this daemon");
        }
    }

    fn apply_to(&mut self, attachments: &mut [Attachment]) {
        let stays = self.stays();
        attachments.iter_mut().for_each(|attachment| self.apply_to_one(attachment));
        if let Some(pins) = &mut self.pins {
            pins.stay(stays);
        }
    }
}

impl KernelDatapath {
    /// Gets ready what the configuration asks for and may not be had.
    ///
    /// # Errors
    /// When the program cannot be pinned, in one line with the fix.
    pub fn prepare(&self, wanted: &Succession) -> Result<Prepared> {
        let there = self.line.pins.as_ref().map(Pins::path);
        if wanted.on_exit == OnExit::Detach || there == Some(&wanted.pin_path) {
            return Ok(Prepared(None));
        }
        Ok(Prepared(Some(Pins::new(&wanted.pin_path, &self.loaded)?)))
    }

    /// Does from now on as the configuration says.
    pub fn govern(&mut self, wanted: &Succession, Prepared(pins): Prepared) {
        let line = &mut self.line;
        line.keep = wanted.on_exit == OnExit::Keep;
        line.term = wanted.max_headless;
        line.path.clone_from(&wanted.pin_path);
        line.apply_to(&mut self.attachments);
        if pins.is_some() || !line.keep {
            if let Some(before) = &mut line.pins {
                before.stay(false);
            }
            line.pins = pins;
        }
        line.apply_to(&mut self.attachments);
        self.beat();
    }

    /// Looks for programs that daemons which are no more have left behind, to take over from them.
    ///
    /// # Errors
    /// When it cannot be seen what is there.
    pub fn find_predecessors(&mut self, path: &Path) -> Result<()> {
        self.line.before = find_visible(path)?;
        for left in &self.line.before {
            tracing::info!(pins = %left.path().display(), "found the TC program of an earlier daemon");
        }
        self.beat();
        Ok(())
    }

    /// Says that there is a daemon.
    pub fn beat(&mut self) {
        let line = &mut self.line;
        let leases = line.before.iter_mut().filter_map(Left::lease).chain([&mut line.lease]);
        for lease in leases {
            if let Err(error) = lease.renew(line.term) {
                tracing::error!("{error:#}");
            }
        }
    }

    /// How often [`KernelDatapath::beat`] is to be called.
    #[must_use]
    pub fn beat_interval(&self) -> Option<Duration> {
        lease::renewal(self.line.term)
    }

    /// On these links, by index, a program that is there goes on for the time being.
    pub fn hold(&mut self, links: BTreeSet<u32>) {
        self.line.held = links;
    }

    /// The start has succeeded: from now on there is no way back, and what is attached stays if it is to.
    pub fn commit(&mut self) {
        self.line.committed = true;
        self.attachments.iter_mut().for_each(Attachment::commit);
        self.line.apply_to(&mut self.attachments);
    }

    /// Takes the counts of the programs before over and removes them, once none of them is in force any more. Nothing is
    /// done before that, nor before [`KernelDatapath::commit`].
    ///
    /// # Errors
    /// When the kernel refuses; the programs before are removed all the same.
    pub fn settle(&mut self) -> Result<()> {
        if !self.line.committed || !self.line.held.is_empty() || self.line.before.is_empty() {
            return Ok(());
        }
        let before = std::mem::take(&mut self.line.before);
        let ids: Vec<u32> = before.iter().map(Left::id).collect();
        attach::remove_programs(&ids);
        for left in &before {
            if let Err(error) = left.let_all_go() {
                tracing::warn!("{error:#}");
            }
        }
        // Until no CPU is still counting.
        let result = wait_for_readers(&self.loaded.rcu_barrier, &self.loaded.barrier_inner)
            .and_then(|()| self.absorb(self.account(&before)))
            .and_then(|()| pins::note_absorbed(&self.loaded, &ids));
        for left in before {
            if let Err(error) = left.remove() {
                tracing::warn!("{error:#}");
            }
        }
        // Only if nobody has pins there any more.
        let _ = fs::remove_dir(&self.line.path);
        result
    }

    /// What the programs before have counted, each once.
    fn account(&self, before: &[Left]) -> Account {
        let mut sum = Account::default();
        for left in before.iter().filter(|left| !before.iter().any(|other| other.has_absorbed(left.id()))) {
            match left.maps(&self.loaded).and_then(|maps| Account::read(&maps)) {
                Ok(account) => {
                    tracing::info!(pins = %left.path().display(), "took over from an earlier daemon's TC program, counters go on");
                    sum.merge(account);
                }
                Err(error) => tracing::warn!(
                    pins = %left.path().display(),
                    "took over from an earlier daemon's TC program, but counters begin at zero: its maps cannot be \
                     understood, {error:#}"
                ),
            }
        }
        sum
    }

    fn absorb(&mut self, account: Account) -> Result<()> {
        let Account { listeners, downstreams, fragments } = account;
        let ids: BTreeMap<&str, ListenerId> = self.programmed.values().map(|plan| (&*plan.name, plan.id)).collect();
        for (name, words) in listeners {
            let Some(&id) = ids.get(name.as_str()) else { continue };
            let base = self.line.bases.entry(id).or_insert([0; LEDGER_WORDS]);
            books::add(base, words);
            books::enter(&self.loaded, Item::Listener(id), base)?;
        }
        let known = |((name, address), counted): ((String, _), _)| Some(((*ids.get(name.as_str())?, address), counted));
        self.tables.add_settled(&self.loaded, downstreams.into_iter().filter_map(known))?;
        books::add(&mut self.line.fragments, fragments);
        books::enter(&self.loaded, Item::Fragments, &self.line.fragments)
    }

    /// Takes the program off all interfaces and unpins it, whatever is to be kept otherwise.
    ///
    /// # Errors
    /// Names what could not be removed; the rest has been.
    pub fn remove(mut self) -> Result<()> {
        self.line.keep = false;
        self.line.apply_to(&mut self.attachments);
        super::Datapath::shutdown(&mut self)
    }
}

/// What daemons of this network namespace that are no more have left. One who may not look, because only root may, could not
/// take over either: there is nothing for it.
///
/// # Errors
/// When it cannot be seen for another reason.
fn find_visible(path: &Path) -> Result<Vec<Left>> {
    let forbidden = |error: &anyhow::Error| {
        let cause = error.root_cause().downcast_ref::<io::Error>();
        cause.is_some_and(|cause| cause.kind() == io::ErrorKind::PermissionDenied)
    };
    match Left::find(path, false) {
        Err(error) if forbidden(&error) => {
            tracing::debug!("{error:#}");
            Ok(Vec::new())
        }
        found => found,
    }
}

/// Removes what daemons of this network namespace that are no more have left below `path`, when there is no program to
/// take over. Says what goes wrong.
pub fn discard(path: &Path) {
    let all = find_visible(path).unwrap_or_else(|error| {
        tracing::warn!("{error:#}");
        Vec::new()
    });
    for left in all {
        let shown = left.path().display().to_string();
        match left.remove() {
            Ok(()) => tracing::info!(pins = shown, "removed the TC program of an earlier daemon"),
            Err(error) => tracing::warn!("{error:#}"),
        }
    }
    let _ = fs::remove_dir(path);
}
