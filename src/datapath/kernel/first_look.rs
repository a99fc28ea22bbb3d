//! The map `first_look`, where the program finds most destinations without asking the hash map `listeners`.
//!
//! A destination's place follows from its address and port ([`place`], as in `bpf/match.h`). A place says that nobody is
//! there, or names the one destination that is, or, where several are, sends the program on to `listeners`, which has all of
//! them. What is in `listeners` is right at any moment; a place that is about to name another destination sends everybody
//! on until no CPU looks at it any more.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::mem::offset_of;
use std::net::SocketAddr;

use anyhow::Result;

use super::maps::{MappedArray, listener_key};
use super::skel::{FIRST_LOOK_BITS, FIRST_LOOK_FACTOR, LOOK_FURTHER, LOOK_NOBODY, LOOK_ONE, Loaded, types};
use crate::model::ListenerId;

/// The map, in memory.
#[derive(Debug)]
pub(super) struct FirstLook(MappedArray<types::first_look>);

impl FirstLook {
    /// That of a program.
    ///
    /// # Errors
    /// When the kernel refuses to map it.
    pub(super) fn new(loaded: &Loaded) -> Result<FirstLook> {
        Ok(FirstLook(MappedArray::new(&loaded.first_look)?))
    }

    /// Makes every place right for these destinations, all of which are in `listeners`. `wait` waits until no CPU looks at what
    /// was there before.
    ///
    /// # Errors
    /// Those of `wait`. Then the places send the program on to `listeners`.
    pub(super) fn follow(
        &mut self,
        keys: &BTreeMap<SocketAddr, (ListenerId, u32)>,
        wait: impl Fn() -> Result<()>,
    ) -> Result<()> {
        let wanted = wanted(keys);
        let nobody = types::first_look { found: LOOK_NOBODY, ..Default::default() };
        let (mut changed, mut in_use) = (Vec::new(), false);
        for place in 0..self.0.entries() {
            let (now, wanted) = (self.0.read(place), wanted.get(&place).unwrap_or(&nobody));
            if wanted.found != LOOK_ONE {
                if now.found != wanted.found {
                    self.say(place, wanted.found);
                }
            } else if !same(&now, wanted) {
                self.say(place, LOOK_FURTHER);
                in_use |= !same(&now, &types::first_look { found: now.found, ..nobody });
                changed.push((place, *wanted));
            }
        }
        if changed.is_empty() {
            return Ok(());
        }
        if in_use {
            wait()?;
        }
        for &(place, one) in &changed {
            self.0.write(place, types::first_look { found: LOOK_FURTHER, ..one });
        }
        // Nobody has seen half of it.
        wait()?;
        changed.iter().for_each(|&(place, _)| self.say(place, LOOK_ONE));
        Ok(())
    }

    fn say(&mut self, place: u32, found: u16) {
        self.0.store_short(place, offset_of!(types::first_look, found), found);
    }
}

/// What the places of these destinations are to say; all others: nobody.
fn wanted(keys: &BTreeMap<SocketAddr, (ListenerId, u32)>) -> BTreeMap<u32, types::first_look> {
    let mut places = BTreeMap::new();
    for (&address, &(id, flags)) in keys {
        match places.entry(place(address)) {
            Entry::Vacant(free) => {
                let types::listener_key { addr_be, port_be, .. } = listener_key(address);
                let listener = types::fanout_listener { id: id.0, flags };
                free.insert(types::first_look { addr_be, port_be, found: LOOK_ONE, unused: 0, listener });
            }
            Entry::Occupied(taken) => taken.into_mut().found = LOOK_FURTHER,
        }
    }
    places
}

/// The place of a destination.
fn place(address: SocketAddr) -> u32 {
    let types::listener_key { addr_be, port_be, .. } = listener_key(address);
    addr_be[3].wrapping_add(port_be.into()).wrapping_mul(FIRST_LOOK_FACTOR) >> (32 - FIRST_LOOK_BITS)
}

fn same(one: &types::first_look, other: &types::first_look) -> bool {
    let parts =
        |look: &types::first_look| (look.addr_be, look.port_be, look.found, look.listener.id, look.listener.flags);
    parts(one) == parts(other)
}
