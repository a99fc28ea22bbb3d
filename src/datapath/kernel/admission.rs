//! Who may send, in the kernel: the rules in the map `sources`, and the numbers by which listeners name them.
//!
//! A set of rules is written whole under a number of its own and never changed. One store to a listener's state puts it
//! in force, so that every datagram is judged by the old rules or by the new ones. What no state names any more is
//! deleted after an RCU grace period. Listeners with the same rules share them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags};

use super::entries::mapped_words;
use super::listener_state::ListenerAdmission;
use super::maps::{bytes_of, wait_for_readers};
use super::skel::{LoadedProgram, SOURCE_ALLOWED, SOURCE_DENIED, types};
use crate::admission::{Meter, Prefix, Sources, Verdict};
use crate::model::ListenerId;
use crate::plan::ListenerPlan;

/// Bits of the rules' number in front of an address in a key.
const NUMBER_BITS: u32 = 32;
/// What a v4-mapped address begins with, in bits.
const MAPPED_BITS: u32 = 96;

/// What is in the kernel, and under which number.
#[derive(Debug, Default)]
pub struct AdmissionRules {
    rules: BTreeMap<u32, Arc<Sources>>,
    current: BTreeMap<ListenerId, (ListenerAdmission, Option<Meter>)>,
    last_number: u32,
}

impl AdmissionRules {
    /// Writes the listener's rules, unless they are there already. They are in force once the listener's state says
    /// what this returns and [`AdmissionRules::set_current`] has been told.
    ///
    /// # Errors
    /// When there is no room; nothing has changed then.
    pub fn prepare(&mut self, loaded: &LoadedProgram, plan: &ListenerPlan) -> Result<ListenerAdmission> {
        let rules = self.store_rules(loaded, &plan.sources)?;
        let Some(meter) = plan.meter else { return Ok(ListenerAdmission { rules, ..ListenerAdmission::default() }) };
        let number = match self.current.get(&plan.id) {
            Some((before, Some(same))) if *same == meter => before.meter,
            // New buckets, all full: those of another rate would not be comparable.
            _ => self.next_number(),
        };
        Ok(ListenerAdmission {
            rules,
            meter: number,
            interval: meter.interval,
            depth: meter.depth,
            sender_mask_be: sender_mask(&meter, plan.bind.ip()),
        })
    }

    /// Notes what a listener's state says from now on.
    pub fn set_current(&mut self, id: ListenerId, admission: ListenerAdmission, meter: Option<Meter>) {
        self.current.insert(id, (admission, meter));
    }

    /// Notes that a listener's state says nothing any more.
    pub fn forget(&mut self, id: ListenerId) {
        self.current.remove(&id);
    }

    /// Deletes the rules that no listener's state names, once no CPU is still reading them.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn delete_unused(&mut self, loaded: &LoadedProgram) -> Result<()> {
        let named = |number: &u32| self.current.values().any(|(admission, _)| admission.rules == *number);
        let unused: Vec<u32> = self.rules.keys().filter(|number| !named(number)).copied().collect();
        if unused.is_empty() {
            return Ok(());
        }
        wait_for_readers(&loaded.rcu_barrier, &loaded.barrier_inner)?;
        for number in unused {
            if let Some(sources) = self.rules.remove(&number) {
                delete(loaded, number, &sources);
            }
        }
        Ok(())
    }

    /// The number of these rules, after they have been written.
    fn store_rules(&mut self, loaded: &LoadedProgram, sources: &Arc<Sources>) -> Result<u32> {
        if sources.is_open() {
            return Ok(0);
        }
        if let Some((&number, _)) = self.rules.iter().find(|(_, there)| *there == sources) {
            return Ok(number);
        }
        let number = self.next_number();
        // Counted as there from the first entry on, so that what a failure leaves behind is swept away.
        self.rules.insert(number, Arc::clone(sources));
        let written = entries(number, sources)
            .try_for_each(|(key, verdict)| loaded.sources.update(bytes_of(&key), bytes_of(&verdict), MapFlags::ANY));
        if let Err(error) = written {
            self.rules.remove(&number);
            delete(loaded, number, sources);
            return Err(error).context("no room for its sources: raise limits.max_sources and restart");
        }
        Ok(number)
    }

    fn next_number(&mut self) -> u32 {
        self.last_number = self.last_number.wrapping_add(1).max(1);
        self.last_number
    }
}

/// What the map holds of a set of rules.
fn entries(number: u32, sources: &Sources) -> impl Iterator<Item = (types::source_key, u32)> {
    let value = |verdict| match verdict {
        Verdict::Allow => SOURCE_ALLOWED,
        Verdict::Deny => SOURCE_DENIED,
    };
    let others = types::source_key { prefixlen: NUMBER_BITS, rules: number, addr_be: [0; 4] };
    let rules = sources.rules().into_iter().map(move |(prefix, verdict)| (key(number, prefix), value(verdict)));
    // Where a rule is for everybody, it is written over what would hold for others.
    [(others, value(sources.others()))].into_iter().chain(rules)
}

fn key(number: u32, prefix: Prefix) -> types::source_key {
    let mapped = if prefix.address().is_ipv4() { MAPPED_BITS } else { 0 };
    types::source_key {
        prefixlen: NUMBER_BITS + mapped + u32::from(prefix.length()),
        rules: number,
        addr_be: mapped_words(prefix.address()),
    }
}

/// Deletes what is there of a set of rules that nobody reads. What cannot be deleted takes up room and does no harm.
fn delete(loaded: &LoadedProgram, number: u32, sources: &Sources) {
    for (key, _) in entries(number, sources) {
        let _ = loaded.sources.delete(bytes_of(&key));
    }
}

/// The bits of a v4-mapped or IPv6 address that tell senders apart.
fn sender_mask(meter: &Meter, listener: IpAddr) -> [u32; 4] {
    match meter.mask(listener) {
        IpAddr::V4(v4) => [u32::MAX, u32::MAX, u32::MAX, u32::from_ne_bytes(v4.octets())],
        mask => mapped_words(mask),
    }
}
