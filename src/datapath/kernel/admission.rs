//! Source rules in the kernel: the map `sources`, and the numbers by which listeners refer to their rules.
//!
//! A rule set is written completely under a new number and never changed. One store to a listener's state puts it in
//! force, so each datagram is judged by the old rules or by the new ones. Rule sets that no state names are deleted
//! after an RCU grace period. Listeners with the same rules share a set.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags};

use super::abi::{SOURCE_ALLOWED, SOURCE_DENIED};
use super::entries::mapped_words;
use super::listener_state::ListenerAdmission;
use super::maps::{bytes_of, wait_for_grace_period};
use super::skel::{LoadedProgram, types};
use crate::admission::{Meter, Prefix, SourceRules, SourceVerdict};
use crate::model::ListenerId;
use crate::plan::ListenerPlan;

/// Bits of the rule set's number, before the address in a key.
const NUMBER_BITS: u32 = 32;
/// Length of the prefix of v4-mapped addresses, in bits.
const MAPPED_BITS: u32 = 96;

/// The rule sets in the kernel, by number, and the admission of each listener.
#[derive(Debug, Default)]
pub struct AdmissionRules {
    rules: BTreeMap<u32, Arc<SourceRules>>,
    current: BTreeMap<ListenerId, (ListenerAdmission, Option<Meter>)>,
    last_number: u32,
}

impl AdmissionRules {
    /// Stores the listener's rules unless they are in the kernel already. They are in force once the listener's state
    /// holds the result; then call [`AdmissionRules::set_current`].
    ///
    /// # Errors
    /// When the map is full; nothing has changed then.
    pub fn prepare(&mut self, loaded: &LoadedProgram, plan: &ListenerPlan) -> Result<ListenerAdmission> {
        let rules = self.store_rules(loaded, &plan.sources)?;
        let Some(meter) = plan.meter else { return Ok(ListenerAdmission { rules, ..ListenerAdmission::default() }) };
        let number = match self.current.get(&plan.id) {
            Some((before, Some(same))) if *same == meter => before.meter,
            // New buckets, all full: those of another rate are not comparable.
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

    /// Records what a listener's state now holds.
    pub fn set_current(&mut self, id: ListenerId, admission: ListenerAdmission, meter: Option<Meter>) {
        self.current.insert(id, (admission, meter));
    }

    /// Records that a listener is gone.
    pub fn forget(&mut self, id: ListenerId) {
        self.current.remove(&id);
    }

    /// Deletes the rule sets that no listener's state names, after an RCU grace period.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn delete_unused(&mut self, loaded: &LoadedProgram) -> Result<()> {
        let named = |number: &u32| self.current.values().any(|(admission, _)| admission.rules == *number);
        let unused: Vec<u32> = self.rules.keys().filter(|number| !named(number)).copied().collect();
        if unused.is_empty() {
            return Ok(());
        }
        wait_for_grace_period(&loaded.rcu_barrier, &loaded.barrier_inner)?;
        for number in unused {
            if let Some(sources) = self.rules.remove(&number) {
                delete(loaded, number, &sources);
            }
        }
        Ok(())
    }

    /// Stores a rule set unless it is there, and returns its number.
    fn store_rules(&mut self, loaded: &LoadedProgram, sources: &Arc<SourceRules>) -> Result<u32> {
        if sources.allows_everyone() {
            return Ok(0);
        }
        if let Some((&number, _)) = self.rules.iter().find(|(_, there)| *there == sources) {
            return Ok(number);
        }
        let number = self.next_number();
        // Recorded before the first entry is written, so that a failure leaves nothing behind.
        self.rules.insert(number, Arc::clone(sources));
        let written = entries(number, sources)
            .try_for_each(|(key, verdict)| loaded.sources.update(bytes_of(&key), bytes_of(&verdict), MapFlags::ANY));
        if let Err(error) = written {
            self.rules.remove(&number);
            delete(loaded, number, sources);
            return Err(error).context("map sources is full: raise limits.max_sources and restart");
        }
        Ok(number)
    }

    fn next_number(&mut self) -> u32 {
        self.last_number = self.last_number.wrapping_add(1).max(1);
        self.last_number
    }
}

/// The map entries of a rule set.
fn entries(number: u32, sources: &SourceRules) -> impl Iterator<Item = (types::source_key, u32)> {
    let value = |verdict| match verdict {
        SourceVerdict::Allow => SOURCE_ALLOWED,
        SourceVerdict::Deny => SOURCE_DENIED,
    };
    let others = types::source_key { prefixlen: NUMBER_BITS, rules: number, addr_be: [0; 4] };
    let rules = sources.rules().into_iter().map(move |(prefix, verdict)| (key(number, prefix), value(verdict)));
    // A rule for all addresses overwrites the default verdict.
    [(others, value(sources.default_verdict()))].into_iter().chain(rules)
}

fn key(number: u32, prefix: Prefix) -> types::source_key {
    let mapped = if prefix.address().is_ipv4() { MAPPED_BITS } else { 0 };
    types::source_key {
        prefixlen: NUMBER_BITS + mapped + u32::from(prefix.length()),
        rules: number,
        addr_be: mapped_words(prefix.address()),
    }
}

/// Deletes the entries of a rule set that is not in use. A failure costs map entries and is otherwise harmless.
fn delete(loaded: &LoadedProgram, number: u32, sources: &SourceRules) {
    for (key, _) in entries(number, sources) {
        let _ = loaded.sources.delete(bytes_of(&key));
    }
}

/// The mask of the address bits that identify a sender, v4-mapped for IPv4.
fn sender_mask(meter: &Meter, listener: IpAddr) -> [u32; 4] {
    match meter.mask(listener) {
        IpAddr::V4(v4) => [u32::MAX, u32::MAX, u32::MAX, u32::from_ne_bytes(v4.octets())],
        mask => mapped_words(mask),
    }
}
