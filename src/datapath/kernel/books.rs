//! What a program has counted and for whom, as its successor finds it in the pinned maps.
//!
//! The program counts by number. What the numbers mean only its daemon knows, so that writes it down: `names` and
//! `owners`. What cannot be counted under a number, because it was counted by an earlier program or the number has been
//! given to somebody else, is in `ledger`, to be added. All three are written by user space alone.
//!
//! A daemon may be killed between any two writes, so whatever takes several of them has one that decides: until then the
//! next daemon counts as before them, and from then on as after them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use libbpf_rs::{MapCore, MapHandle};

use super::maps::{MappedArray, address_of, bytes_of, look_up, mapped_words, store, sum_over_cpus, value_of};
use super::skel::{
    DROP_REASONS, LEDGER_DOWNSTREAM, LEDGER_FRAGMENTS, LEDGER_INHERITED_DOWNSTREAM, LEDGER_LISTENER, LEDGER_WORDS,
    Loaded, NAME_LENGTH, types,
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
    /// What the ledger says of earlier programs is complete, and theirs no longer counts.
    pub inherited: bool,
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
        let settled = account.add_ledger(maps, &names)?;
        let owners: MappedArray<u32> = MappedArray::new(maps.owners)?;
        for id in (0..owners.entries()).filter(|id| !settled.contains(id)) {
            let Some(name) = owners.read(id).checked_sub(1).and_then(|owner| names.get(&owner)) else { continue };
            let entry: types::downstream =
                look_up(maps.downstreams, &id)?.with_context(|| format!("there is no downstream {id}"))?;
            let key = (name.clone(), address_of(entry.addr_be, entry.port_be));
            add(account.downstreams.entry(key).or_default(), sum_over_cpus(maps.downstream_stats, id)?);
        }
        add(&mut account.fragments, fragments(maps.fragment_stats)?);
        Ok(account)
    }

    /// Adds what is in the ledger. Returns the ids whose own counts are in there already.
    fn add_ledger(&mut self, maps: &Maps<'_>, names: &BTreeMap<u32, String>) -> Result<BTreeSet<u32>> {
        let mut settled = BTreeSet::new();
        for key in maps.ledger.keys() {
            let key: types::ledger_key = value_of(&key).context("the ledger's keys have another size")?;
            let Some(types::ledger_entry { words }) = look_up(maps.ledger, &key)? else { continue };
            let name = names.get(&key.listener);
            match (key.kind, name) {
                (LEDGER_LISTENER | LEDGER_FRAGMENTS | LEDGER_INHERITED_DOWNSTREAM, _) if !maps.inherited => {}
                (LEDGER_LISTENER, Some(name)) => {
                    add(self.listeners.entry(name.clone()).or_insert([0; LEDGER_WORDS]), words);
                }
                (LEDGER_FRAGMENTS, _) => add(&mut self.fragments, [words[0], words[1]]),
                (LEDGER_DOWNSTREAM | LEDGER_INHERITED_DOWNSTREAM, Some(name)) => {
                    if key.kind == LEDGER_DOWNSTREAM {
                        settled.extend(words[2].checked_sub(1).and_then(|id| u32::try_from(id).ok()));
                    }
                    let key = (name.clone(), address_of(key.addr_be, key.port_be));
                    add(self.downstreams.entry(key).or_default(), [words[0], words[1]]);
                }
                _ => {}
            }
        }
        Ok(settled)
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
            inherited: true,
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
    /// A downstream of a listener, as far as this program has counted it.
    Downstream(ListenerId, SocketAddr),
    /// A downstream of a listener, as far as earlier programs have counted it.
    Inherited(ListenerId, SocketAddr),
    /// Fragments.
    Fragments,
}

impl Item {
    fn key(self) -> types::ledger_key {
        let key = types::ledger_key { addr_be: [0; 4], port_be: 0, kind: LEDGER_FRAGMENTS, listener: 0 };
        let downstream = |kind, ListenerId(listener), address: SocketAddr| types::ledger_key {
            addr_be: mapped_words(address.ip()),
            port_be: address.port().to_be(),
            kind,
            listener,
        };
        match self {
            Item::Listener(ListenerId(listener)) => types::ledger_key { kind: LEDGER_LISTENER, listener, ..key },
            Item::Downstream(listener, address) => downstream(LEDGER_DOWNSTREAM, listener, address),
            Item::Inherited(listener, address) => downstream(LEDGER_INHERITED_DOWNSTREAM, listener, address),
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
