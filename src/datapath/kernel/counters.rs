//! What a program has counted, as its successor finds it in the pinned maps.
//!
//! The program counts by id. Only its daemon knows what the ids mean, so it writes that down: `listener_names` and
//! `stat_owners`. Counts that no id can hold, of earlier programs or of ids that were reused, are in
//! `carried_counts`, to be added. User space alone writes these three maps.
//!
//! A daemon may be killed between any two writes. A multi-step update ends with one commit write; without it, the
//! successor ignores the rest.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use libbpf_rs::{MapCore, MapHandle};

use super::abi::{
    CARRIED_DOWNSTREAM, CARRIED_FOLDED_DOWNSTREAM, CARRIED_FRAGMENTS, CARRIED_LISTENER, CARRIED_WORDS, DROP_REASONS,
    NAME_LENGTH,
};
use super::entries::{address_of, mapped_words};
use super::maps::{MappedArray, bytes_of, lookup, store, sum_over_cpus, value_of};
use super::skel::{LoadedProgram, types};
use crate::model::{DropReason, ListenerCounters, ListenerId};

/// Counters of a listener, in the order of `struct carried_entry`.
pub type ListenerWords = [u64; CARRIED_WORDS];

/// The maps that hold counters.
#[derive(Debug)]
pub struct CounterMaps<'a> {
    /// Listener id to counters.
    pub stats: &'a MapHandle,
    /// Listener id and reason to drops.
    pub drops: &'a MapHandle,
    /// Listener id and reason to copies dropped.
    pub copy_drops: &'a MapHandle,
    /// Downstream id to counters.
    pub downstream_stats: &'a MapHandle,
    /// By `enum fragment_count`.
    pub fragment_stats: &'a MapHandle,
    /// Downstream id to receiver.
    pub downstreams: &'a MapHandle,
    /// Listener id to name.
    pub listener_names: &'a MapHandle,
    /// Downstream id to listener.
    pub stat_owners: &'a MapHandle,
    /// What was counted before.
    pub carried_counts: &'a MapHandle,
    /// The inherited counts in `carried_counts` are complete and replace those of the earlier programs.
    pub inherited: bool,
}

/// All counters, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CounterSnapshot {
    /// By listener name.
    pub listeners: BTreeMap<String, ListenerWords>,
    /// By listener name and downstream address: packets and bytes.
    pub downstreams: BTreeMap<(String, SocketAddr), [u64; 2]>,
    /// By `enum fragment_count`.
    pub fragments: [u64; 2],
}

impl CounterSnapshot {
    /// Reads the counters of a program that is no longer attached.
    ///
    /// # Errors
    /// When the kernel refuses to read a map, or a map has unexpected contents.
    pub fn read(maps: &CounterMaps<'_>) -> Result<CounterSnapshot> {
        let mut snapshot = CounterSnapshot::default();
        let mut names = BTreeMap::new();
        for id in 0..maps.listener_names.max_entries() {
            let Some(name) = name_of(maps.listener_names, id)? else { continue };
            add(snapshot.listeners.entry(name.clone()).or_insert([0; CARRIED_WORDS]), listener_words(maps, id)?);
            names.insert(id, name);
        }
        let folded = snapshot.add_carried(maps, &names)?;
        let stat_owners: MappedArray<u32> = MappedArray::new(maps.stat_owners)?;
        for id in (0..stat_owners.entries()).filter(|id| !folded.contains(id)) {
            let Some(name) = stat_owners.read(id).checked_sub(1).and_then(|owner| names.get(&owner)) else { continue };
            let entry: types::downstream =
                lookup(maps.downstreams, &id)?.with_context(|| format!("map downstreams has no entry {id}"))?;
            let key = (name.clone(), address_of(entry.addr_be, entry.port_be));
            add(snapshot.downstreams.entry(key).or_default(), sum_over_cpus(maps.downstream_stats, id)?);
        }
        add(&mut snapshot.fragments, fragments(maps.fragment_stats)?);
        Ok(snapshot)
    }

    /// Adds `carried_counts`. Returns the downstream ids whose own counters are included in it.
    fn add_carried(&mut self, maps: &CounterMaps<'_>, names: &BTreeMap<u32, String>) -> Result<BTreeSet<u32>> {
        let mut folded = BTreeSet::new();
        for key in maps.carried_counts.keys() {
            let key: types::carried_key = value_of(&key).context("map carried_counts has keys of another size")?;
            let Some(types::carried_entry { words }) = lookup(maps.carried_counts, &key)? else { continue };
            let name = names.get(&key.listener);
            match (key.kind, name) {
                (CARRIED_LISTENER | CARRIED_FRAGMENTS | CARRIED_DOWNSTREAM, _) if !maps.inherited => {}
                (CARRIED_LISTENER, Some(name)) => {
                    add(self.listeners.entry(name.clone()).or_insert([0; CARRIED_WORDS]), words);
                }
                (CARRIED_FRAGMENTS, _) => add(&mut self.fragments, [words[0], words[1]]),
                (CARRIED_FOLDED_DOWNSTREAM | CARRIED_DOWNSTREAM, Some(name)) => {
                    if key.kind == CARRIED_FOLDED_DOWNSTREAM {
                        folded.extend(words[2].checked_sub(1).and_then(|id| u32::try_from(id).ok()));
                    }
                    let key = (name.clone(), address_of(key.addr_be, key.port_be));
                    add(self.downstreams.entry(key).or_default(), [words[0], words[1]]);
                }
                _ => {}
            }
        }
        Ok(folded)
    }

    /// Adds another snapshot to this one.
    pub fn merge(&mut self, other: CounterSnapshot) {
        for (name, words) in other.listeners {
            add(self.listeners.entry(name).or_insert([0; CARRIED_WORDS]), words);
        }
        for (key, counted) in other.downstreams {
            add(self.downstreams.entry(key).or_default(), counted);
        }
        add(&mut self.fragments, other.fragments);
    }
}

impl<'a> CounterMaps<'a> {
    /// The maps of this daemon's own program.
    #[must_use]
    pub fn of(loaded: &'a LoadedProgram) -> CounterMaps<'a> {
        CounterMaps {
            stats: &loaded.stats,
            drops: &loaded.drops,
            copy_drops: &loaded.copy_drops,
            downstream_stats: &loaded.downstream_stats,
            fragment_stats: &loaded.fragment_stats,
            downstreams: &loaded.downstreams,
            listener_names: &loaded.listener_names,
            stat_owners: &loaded.stat_owners,
            carried_counts: &loaded.carried_counts,
            inherited: true,
        }
    }
}

/// What the program has counted for a listener since its maps were created.
///
/// # Errors
/// When the kernel refuses to read a map.
pub fn listener_words(maps: &CounterMaps<'_>, id: u32) -> Result<ListenerWords> {
    let [_, forwarded, _, passed, bytes_received, bytes_forwarded] = sum_over_cpus::<6>(maps.stats, id)?;
    let mut words = [0; CARRIED_WORDS];
    words[..4].copy_from_slice(&[forwarded, passed, bytes_received, bytes_forwarded]);
    let (drops, copies) = words[4..].split_at_mut(DROP_REASONS as usize);
    for ((offset, drops), copies) in (0..).zip(drops).zip(copies) {
        [*drops] = sum_over_cpus(maps.drops, id * DROP_REASONS + offset)?;
        [*copies] = sum_over_cpus(maps.copy_drops, id * DROP_REASONS + offset)?;
    }
    Ok(words)
}

/// Converts the words to counters. While packets flow, the maps cannot be read at one instant. The total is computed
/// from its parts, so every reading balances; at rest it equals `pkts_received`, which a test checks.
#[must_use]
pub fn listener_counters(words: &ListenerWords) -> ListenerCounters {
    let [packets_forwarded, packets_passed, bytes_received, bytes_forwarded, ..] = *words;
    let mut counters = ListenerCounters {
        packets_forwarded,
        packets_passed,
        bytes_received,
        bytes_forwarded,
        ..ListenerCounters::default()
    };
    let (drops, copies) = words[4..].split_at(DROP_REASONS as usize);
    for ((&reason, &drops), &copies) in DropReason::ALL.iter().zip(drops).zip(copies) {
        counters.dropped.add(reason, drops);
        counters.copies_dropped.add(reason, copies);
    }
    counters.packets_received = packets_forwarded + packets_passed + counters.dropped.total();
    counters
}

/// Fragments that could not follow their datagram, by `enum fragment_count`.
///
/// # Errors
/// When the kernel refuses to read the map.
pub fn fragments(map: &MapHandle) -> Result<[u64; 2]> {
    let [strays] = sum_over_cpus(map, super::abi::FRAGMENT_STRAY)?;
    let [lost] = sum_over_cpus(map, super::abi::FRAGMENT_LOST)?;
    Ok([strays, lost])
}

/// Stores the name of a listener id; an empty name frees the id.
///
/// # Errors
/// When the kernel refuses.
pub fn set_name(loaded: &LoadedProgram, id: ListenerId, name: &str) -> Result<()> {
    let mut entry = types::listener_name { name: [0; NAME_LENGTH] };
    ensure!(name.len() < NAME_LENGTH, "listener {name:?} has a name of more than {} bytes", NAME_LENGTH - 1);
    for (to, from) in entry.name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    store(&loaded.listener_names, &id.0, &entry)
}

fn name_of(names: &MapHandle, id: u32) -> Result<Option<String>> {
    let entry: types::listener_name = lookup(names, &id)?.context("map listener_names is too short")?;
    let bytes: Vec<u8> = entry.name.iter().take_while(|byte| **byte != 0).map(|byte| byte.cast_unsigned()).collect();
    let name = String::from_utf8(bytes).context("a listener's name is not UTF-8")?;
    Ok((!name.is_empty()).then_some(name))
}

/// Key of `carried_counts`.
#[derive(Debug, Clone, Copy)]
pub enum CarriedCounter {
    /// A listener: counts of earlier programs.
    Listener(ListenerId),
    /// A downstream: counts of this program under ids that were reused.
    Downstream(ListenerId, SocketAddr),
    /// A downstream: counts of earlier programs.
    Inherited(ListenerId, SocketAddr),
    /// All fragments: counts of earlier programs.
    Fragments,
}

impl CarriedCounter {
    fn key(self) -> types::carried_key {
        let key = types::carried_key { addr_be: [0; 4], port_be: 0, kind: CARRIED_FRAGMENTS, listener: 0 };
        let downstream = |kind, ListenerId(listener), address: SocketAddr| types::carried_key {
            addr_be: mapped_words(address.ip()),
            port_be: address.port().to_be(),
            kind,
            listener,
        };
        match self {
            CarriedCounter::Listener(ListenerId(listener)) => {
                types::carried_key { kind: CARRIED_LISTENER, listener, ..key }
            }
            CarriedCounter::Downstream(listener, address) => downstream(CARRIED_FOLDED_DOWNSTREAM, listener, address),
            CarriedCounter::Inherited(listener, address) => downstream(CARRIED_DOWNSTREAM, listener, address),
            CarriedCounter::Fragments => key,
        }
    }
}

/// Stores counts that are to be added to those in the maps.
///
/// # Errors
/// When the kernel refuses.
pub fn store_carried(loaded: &LoadedProgram, item: CarriedCounter, counted: &[u64]) -> Result<()> {
    let mut words = [0; CARRIED_WORDS];
    words[..counted.len()].copy_from_slice(counted);
    store(&loaded.carried_counts, &item.key(), &types::carried_entry { words })
}

/// Deletes an entry, if it exists.
pub fn delete_carried(loaded: &LoadedProgram, item: CarriedCounter) {
    // A failure is harmless: the entry did not exist, or its listener id has no name.
    let _ = loaded.carried_counts.delete(bytes_of(&item.key()));
}

/// Adds two arrays element by element.
pub fn add<const N: usize>(sum: &mut [u64; N], more: [u64; N]) {
    for (total, n) in sum.iter_mut().zip(more) {
        *total += n;
    }
}
