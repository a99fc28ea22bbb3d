//! What a program has counted and for whom, as its successor finds it in the pinned maps.
//!
//! The program counts by number. What the numbers mean only its daemon knows, so that writes it down: `names` and
//! `stat_owners`. What cannot be counted under a number, because it was counted by an earlier program or the number has been
//! given to somebody else, is in `carried_counts`, to be added. All three are written by user space alone.
//!
//! A daemon may be killed between any two writes, so whatever takes several of them has one that decides: until then the
//! next daemon counts as before them, and from then on as after them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use libbpf_rs::{MapCore, MapHandle};

use super::entries::{address_of, mapped_words};
use super::maps::{MappedArray, bytes_of, lookup, store, sum_over_cpus, value_of};
use super::skel::{
    CARRIED_DOWNSTREAM, CARRIED_FOLDED_DOWNSTREAM, CARRIED_FRAGMENTS, CARRIED_LISTENER, CARRIED_WORDS, DROP_REASONS,
    LoadedProgram, NAME_LENGTH, types,
};
use crate::model::{DropReason, ListenerCounters, ListenerId};

/// What the program counts of a listener, in the order of `ledger_entry`.
pub type ListenerWords = [u64; CARRIED_WORDS];

/// The maps that tell what has been counted.
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
    /// What the ledger says of earlier programs is complete, and theirs no longer counts.
    pub inherited: bool,
}

/// All that has been counted, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CounterSnapshot {
    /// Of listeners.
    pub listeners: BTreeMap<String, ListenerWords>,
    /// Of downstreams: packets and bytes.
    pub downstreams: BTreeMap<(String, SocketAddr), [u64; 2]>,
    /// By `enum fragment_count`.
    pub fragments: [u64; 2],
}

impl CounterSnapshot {
    /// Reads what a program that is no longer attached has counted.
    ///
    /// # Errors
    /// When the kernel refuses to read a map, or one is not as it should be.
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
                lookup(maps.downstreams, &id)?.with_context(|| format!("there is no downstream {id}"))?;
            let key = (name.clone(), address_of(entry.addr_be, entry.port_be));
            add(snapshot.downstreams.entry(key).or_default(), sum_over_cpus(maps.downstream_stats, id)?);
        }
        add(&mut snapshot.fragments, fragments(maps.fragment_stats)?);
        Ok(snapshot)
    }

    /// Adds what is in the ledger. Returns the ids whose own counts are in there already.
    fn add_carried(&mut self, maps: &CounterMaps<'_>, names: &BTreeMap<u32, String>) -> Result<BTreeSet<u32>> {
        let mut folded = BTreeSet::new();
        for key in maps.carried_counts.keys() {
            let key: types::carried_key = value_of(&key).context("the ledger's keys have another size")?;
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
    /// Those of a program of this daemon's own.
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

/// What the program has counted of a listener since its maps were made.
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

/// The same in the program's words. While packets flow, the maps cannot be read at one instant. The parts are taken as they
/// are and the sum made from them, so that every reading balances; at rest it equals `pkts_received`, which a test checks.
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

/// What could not follow its datagram, by `enum fragment_count`.
///
/// # Errors
/// When the kernel refuses to read the map.
pub fn fragments(map: &MapHandle) -> Result<[u64; 2]> {
    let [strays] = sum_over_cpus(map, super::skel::FRAGMENT_STRAY)?;
    let [lost] = sum_over_cpus(map, super::skel::FRAGMENT_LOST)?;
    Ok([strays, lost])
}

/// Writes down whose a listener's number is; nobody's if the name is empty.
///
/// # Errors
/// When the kernel refuses.
pub fn set_name(loaded: &LoadedProgram, id: ListenerId, name: &str) -> Result<()> {
    let mut entry = types::listener_name { name: [0; NAME_LENGTH] };
    ensure!(name.len() < NAME_LENGTH, "listener {name:?} has too long a name");
    for (to, from) in entry.name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    store(&loaded.listener_names, &id.0, &entry)
}

fn name_of(names: &MapHandle, id: u32) -> Result<Option<String>> {
    let entry: types::listener_name = lookup(names, &id)?.context("the names are incomplete")?;
    let bytes: Vec<u8> = entry.name.iter().take_while(|byte| **byte != 0).map(|byte| byte.cast_unsigned()).collect();
    let name = String::from_utf8(bytes).context("a listener's name is no text")?;
    Ok((!name.is_empty()).then_some(name))
}

/// What a ledger's entry is about.
#[derive(Debug, Clone, Copy)]
pub enum CarriedCounter {
    /// A listener.
    Listener(ListenerId),
    /// A downstream of a listener, as far as this program has counted it.
    Downstream(ListenerId, SocketAddr),
    /// A downstream of a listener, as far as earlier programs have counted it.
    Inherited(ListenerId, SocketAddr),
    /// Fragments.
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

/// Writes down what is to be added to what the maps count.
///
/// # Errors
/// When the kernel refuses.
pub fn store_carried(loaded: &LoadedProgram, item: CarriedCounter, counted: &[u64]) -> Result<()> {
    let mut words = [0; CARRIED_WORDS];
    words[..counted.len()].copy_from_slice(counted);
    store(&loaded.carried_counts, &item.key(), &types::carried_entry { words })
}

/// Takes an entry back, if there is one.
pub fn delete_carried(loaded: &LoadedProgram, item: CarriedCounter) {
    // It may never have been there. One that could not be deleted is of a number that means nobody.
    let _ = loaded.carried_counts.delete(bytes_of(&item.key()));
}

/// Adds numbers one by one.
pub fn add<const N: usize>(sum: &mut [u64; N], more: [u64; N]) {
    for (total, n) in sum.iter_mut().zip(more) {
        *total += n;
    }
}
