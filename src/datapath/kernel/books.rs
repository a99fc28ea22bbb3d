//! What a program has counted and for whom, as its successor finds it in the pinned maps.
//!
//! The program counts by number. What the numbers mean only its daemon knows, so that writes it down: `names` and
//! `owners`. What cannot be counted under a number, because it was counted by an earlier program or the number has been
//! given to somebody else, is in `ledger`, to be added. All three are written by user space alone.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use libbpf_rs::{MapCore, MapHandle};

use super::maps::{MappedArray, address_of, bytes_of, look_up, mapped_words, store, sum_over_cpus, value_of};
use super::skel::{
    DROP_REASONS, LEDGER_DOWNSTREAM, LEDGER_FRAGMENTS, LEDGER_LISTENER, LEDGER_WORDS, Loaded, NAME_LENGTH, types,
};
use crate::model::{DropReason, ListenerCounters, ListenerId};

/// What the program counts of a listener, in the order of `ledger_entry`.
pub type ListenerWords = [u64; LEDGER_WORDS];

/// The maps that tell what has been counted.
#[derive(Debug)]
pub struct Maps<'a> {
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
    pub names: &'a MapHandle,
    /// Downstream id to listener.
    pub owners: &'a MapHandle,
    /// What was counted before.
    pub ledger: &'a MapHandle,
}

/// All that has been counted, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Account {
    /// Of listeners.
    pub listeners: BTreeMap<String, ListenerWords>,
    /// Of downstreams: packets and bytes.
    pub downstreams: BTreeMap<(String, SocketAddr), [u64; 2]>,
    /// By `enum fragment_count`.
    pub fragments: [u64; 2],
}

impl Account {
    /// Reads what a program that is no longer attached has counted.
    ///
    /// # Errors
    /// When the kernel refuses to read a map, or one is not as it should be.
    pub fn read(maps: &Maps<'_>) -> Result<Account> {
        let mut account = Account::default();
        let mut names = BTreeMap::new();
        for id in 0..maps.names.max_entries() {
            let Some(name) = name_of(maps.names, id)? else { continue };
            add(account.listeners.entry(name.clone()).or_insert([0; LEDGER_WORDS]), listener_words(maps, id)?);
            names.insert(id, name);
        }
        let owners: MappedArray<u32> = MappedArray::new(maps.owners)?;
        for id in 0..owners.entries() {
            let Some(name) = owners.read(id).checked_sub(1).and_then(|owner| names.get(&owner)) else { continue };
            let entry: types::downstream =
                look_up(maps.downstreams, &id)?.with_context(|| format!("there is no downstream {id}"))?;
            let key = (name.clone(), address_of(entry.addr_be, entry.port_be));
            add(account.downstreams.entry(key).or_default(), sum_over_cpus(maps.downstream_stats, id)?);
        }
        account.fragments = fragments(maps.fragment_stats)?;
        for key in maps.ledger.keys() {
            let key: types::ledger_key = value_of(&key).context("the ledger's keys have another size")?;
            let Some(types::ledger_entry { words }) = look_up(maps.ledger, &key)? else { continue };
            let name = names.get(&key.listener);
            match (key.kind, name) {
                (LEDGER_LISTENER, Some(name)) => {
                    add(account.listeners.entry(name.clone()).or_insert([0; LEDGER_WORDS]), words);
                }
                (LEDGER_DOWNSTREAM, Some(name)) => {
                    let key = (name.clone(), address_of(key.addr_be, key.port_be));
                    add(account.downstreams.entry(key).or_default(), [words[0], words[1]]);
                }
                (LEDGER_FRAGMENTS, _) => add(&mut account.fragments, [words[0], words[1]]),
                _ => {}
            }
        }
        Ok(account)
    }

    /// Adds another account to this one.
    pub fn merge(&mut self, other: Account) {
        for (name, words) in other.listeners {
            add(self.listeners.entry(name).or_insert([0; LEDGER_WORDS]), words);
        }
        for (key, counted) in other.downstreams {
            add(self.downstreams.entry(key).or_default(), counted);
        }
        add(&mut self.fragments, other.fragments);
    }
}

impl<'a> Maps<'a> {
    /// Those of a program of this daemon's own.
    #[must_use]
    pub fn of(loaded: &'a Loaded) -> Maps<'a> {
        Maps {
            stats: &loaded.stats,
            drops: &loaded.drops,
            copy_drops: &loaded.copy_drops,
            downstream_stats: &loaded.downstream_stats,
            fragment_stats: &loaded.fragment_stats,
            downstreams: &loaded.downstreams,
            names: &loaded.names,
            owners: &loaded.owners,
            ledger: &loaded.ledger,
        }
    }
}

/// What the program has counted of a listener since its maps were made.
///
/// # Errors
/// When the kernel refuses to read a map.
pub fn listener_words(maps: &Maps<'_>, id: u32) -> Result<ListenerWords> {
    let [_, forwarded, _, passed, bytes_received, bytes_forwarded] = sum_over_cpus::<6>(maps.stats, id)?;
    let mut words = [0; LEDGER_WORDS];
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
pub fn set_name(loaded: &Loaded, id: ListenerId, name: &str) -> Result<()> {
    let mut entry = types::listener_name { name: [0; NAME_LENGTH] };
    ensure!(name.len() < NAME_LENGTH, "listener {name:?} has too long a name");
    for (to, from) in entry.name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    store(&loaded.names, &id.0, &entry)
}

fn name_of(names: &MapHandle, id: u32) -> Result<Option<String>> {
    let entry: types::listener_name = look_up(names, &id)?.context("the names are incomplete")?;
    let bytes: Vec<u8> = entry.name.iter().take_while(|byte| **byte != 0).map(|byte| byte.cast_unsigned()).collect();
    let name = String::from_utf8(bytes).context("a listener's name is no text")?;
    Ok((!name.is_empty()).then_some(name))
}

/// What a ledger's entry is about.
#[derive(Debug, Clone, Copy)]
pub enum Item {
    /// A listener.
    Listener(ListenerId),
    /// A downstream of a listener.
    Downstream(ListenerId, SocketAddr),
    /// Fragments.
    Fragments,
}

impl Item {
    fn key(self) -> types::ledger_key {
        let key = types::ledger_key { addr_be: [0; 4], port_be: 0, kind: LEDGER_FRAGMENTS, listener: 0 };
        match self {
            Item::Listener(ListenerId(listener)) => types::ledger_key { kind: LEDGER_LISTENER, listener, ..key },
            Item::Downstream(ListenerId(listener), address) => types::ledger_key {
                addr_be: mapped_words(address.ip()),
                port_be: address.port().to_be(),
                kind: LEDGER_DOWNSTREAM,
                listener,
            },
            Item::Fragments => key,
        }
    }
}

/// Writes down what is to be added to what the maps count.
///
/// # Errors
/// When the kernel refuses.
pub fn enter(loaded: &Loaded, item: Item, counted: &[u64]) -> Result<()> {
    let mut words = [0; LEDGER_WORDS];
    words[..counted.len()].copy_from_slice(counted);
    store(&loaded.ledger, &item.key(), &types::ledger_entry { words })
}

/// Takes an entry back, if there is one.
pub fn strike(loaded: &Loaded, item: Item) {
    // It may never have been there. One that could not be deleted is of a number that means nobody.
    let _ = loaded.ledger.delete(bytes_of(&item.key()));
}

/// Adds numbers one by one.
pub fn add<const N: usize>(sum: &mut [u64; N], more: [u64; N]) {
    for (total, n) in sum.iter_mut().zip(more) {
        *total += n;
    }
}
