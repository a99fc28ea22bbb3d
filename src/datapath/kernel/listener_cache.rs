//! The map `listener_cache`, which answers most lookups without the hash map `listeners`.
//!
//! A destination's index follows from its address and port ([`index`], as in `bpf/match.h`). An entry is empty, holds
//! the one destination with that index, or sends the program to `listeners`, which has all destinations and is always
//! right. An entry that is about to hold another destination is in the last state until no CPU reads the previous
//! one.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::mem::offset_of;
use std::net::SocketAddr;

use anyhow::Result;

use super::abi::{CACHE_COLLISION, CACHE_EMPTY, CACHE_SINGLE, LISTENER_CACHE_BITS, LISTENER_CACHE_FACTOR};
use super::entries::listener_key;
use super::maps::MappedArray;
use super::skel::{LoadedProgram, types};
use crate::model::ListenerId;

/// The mapped map.
#[derive(Debug)]
pub(super) struct ListenerCache(MappedArray<types::cached_listener>);

impl ListenerCache {
    /// # Errors
    /// When the kernel refuses to map it.
    pub(super) fn new(loaded: &LoadedProgram) -> Result<ListenerCache> {
        Ok(ListenerCache(MappedArray::new(&loaded.listener_cache)?))
    }

    /// Makes every entry agree with these destinations, all of which are in `listeners`. `wait` waits for an RCU
    /// grace period.
    ///
    /// # Errors
    /// Those of `wait`. Then the entries concerned send the program to `listeners`.
    pub(super) fn update(
        &mut self,
        keys: &BTreeMap<SocketAddr, (ListenerId, u32)>,
        wait: impl Fn() -> Result<()>,
    ) -> Result<()> {
        let wanted = wanted(keys);
        let empty = types::cached_listener { state: CACHE_EMPTY, ..Default::default() };
        let (mut changed, mut in_use) = (Vec::new(), false);
        for index in 0..self.0.entries() {
            let (now, wanted) = (self.0.read(index), wanted.get(&index).unwrap_or(&empty));
            if wanted.state != CACHE_SINGLE {
                if now.state != wanted.state {
                    self.set_state(index, wanted.state);
                }
            } else if !same(&now, wanted) {
                self.set_state(index, CACHE_COLLISION);
                in_use |= !same(&now, &types::cached_listener { state: now.state, ..empty });
                changed.push((index, *wanted));
            }
        }
        if changed.is_empty() {
            return Ok(());
        }
        if in_use {
            wait()?;
        }
        for &(index, one) in &changed {
            self.0.write(index, types::cached_listener { state: CACHE_COLLISION, ..one });
        }
        // No CPU reads an entry that is half written.
        wait()?;
        changed.iter().for_each(|&(index, _)| self.set_state(index, CACHE_SINGLE));
        Ok(())
    }

    fn set_state(&mut self, index: u32, state: u16) {
        self.0.store_field(index, offset_of!(types::cached_listener, state), state);
    }
}

/// The entries of these destinations; all others are empty.
fn wanted(keys: &BTreeMap<SocketAddr, (ListenerId, u32)>) -> BTreeMap<u32, types::cached_listener> {
    let mut entries = BTreeMap::new();
    for (&address, &(id, flags)) in keys {
        match entries.entry(index(address)) {
            Entry::Vacant(free) => {
                let types::listener_key { addr_be, port_be, .. } = listener_key(address);
                let listener = types::fanout_listener { id: id.0, flags };
                free.insert(types::cached_listener { addr_be, port_be, state: CACHE_SINGLE, unused: 0, listener });
            }
            Entry::Occupied(taken) => taken.into_mut().state = CACHE_COLLISION,
        }
    }
    entries
}

/// Index of a destination.
fn index(address: SocketAddr) -> u32 {
    let types::listener_key { addr_be, port_be, .. } = listener_key(address);
    addr_be[3].wrapping_add(port_be.into()).wrapping_mul(LISTENER_CACHE_FACTOR) >> (32 - LISTENER_CACHE_BITS)
}

fn same(one: &types::cached_listener, other: &types::cached_listener) -> bool {
    let parts = |entry: &types::cached_listener| {
        (entry.addr_be, entry.port_be, entry.state, entry.listener.id, entry.listener.flags)
    };
    parts(one) == parts(other)
}
