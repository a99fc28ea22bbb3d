//! Room in the kernel's flat arrays: which slots of `table_slots` and which ids of `downstreams` are in use.
//!
//! Pure bookkeeping. What is given back is not handed out again at once, because a CPU may still be reading it:
//! it waits in quarantine until the owner has waited out an RCU grace period and calls [`Arena::release`].

use std::collections::BTreeMap;

/// A stretch of entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Region {
    /// The first entry.
    pub start: u32,
    /// How many.
    pub len: u32,
}

/// Which entries of an array of fixed size are free.
#[derive(Debug, Clone)]
pub struct Arena {
    /// Free stretches: start to length; never adjacent, never empty.
    free: BTreeMap<u32, u32>,
    quarantine: Vec<Region>,
}

impl Arena {
    /// All `size` entries free.
    #[must_use]
    pub fn new(size: u32) -> Arena {
        let free = if size == 0 { BTreeMap::new() } else { BTreeMap::from([(0, size)]) };
        Arena { free, quarantine: Vec::new() }
    }

    /// Takes `len` adjacent entries, from the first stretch that has them. None if no stretch has.
    /// A region of no entries takes none and is always to be had.
    pub fn take(&mut self, len: u32) -> Option<Region> {
        if len == 0 {
            return Some(Region::default());
        }
        let (&start, &room) = self.free.iter().find(|&(_, &room)| room >= len)?;
        self.free.remove(&start);
        if room > len {
            self.free.insert(start + len, room - len);
        }
        Some(Region { start, len })
    }

    /// Gives a region back, into quarantine.
    pub fn give_back(&mut self, region: Region) {
        if region.len > 0 {
            self.quarantine.push(region);
        }
    }

    /// What waits in quarantine.
    #[must_use]
    pub fn quarantined(&self) -> &[Region] {
        &self.quarantine
    }

    /// Frees all that is in quarantine. Only right when a grace period has passed since the last `give_back`.
    pub fn release(&mut self) {
        for region in std::mem::take(&mut self.quarantine) {
            self.free_region(region);
        }
    }

    fn free_region(&mut self, Region { mut start, mut len }: Region) {
        if let Some((&before, &room)) = self.free.range(..start).next_back()
            && before + room == start
        {
            self.free.remove(&before);
            start = before;
            len += room;
        }
        if let Some(room) = self.free.remove(&(start + len)) {
            len += room;
        }
        self.free.insert(start, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_given_back_is_free_only_after_release() {
        let mut arena = Arena::new(4);
        let all = arena.take(4).unwrap();
        assert_eq!(arena.take(1), None);
        arena.give_back(all);
        assert_eq!(arena.take(1), None);
        arena.release();
        assert_eq!(arena.take(4), Some(all));
        assert_eq!(arena.take(0), Some(Region::default()));
    }

    proptest! {
        #[test]
        fn regions_never_overlap_and_all_comes_back(steps in prop::collection::vec((any::<bool>(), 0u32..40), 1..200)) {
            let mut arena = Arena::new(256);
            let mut held: Vec<Region> = Vec::new();
            for (take, n) in steps {
                if take {
                    held.extend(arena.take(n).filter(|r| r.len > 0));
                } else if !held.is_empty() {
                    arena.give_back(held.swap_remove(n as usize % held.len()));
                }
                if n % 5 == 0 {
                    arena.release();
                }
                let mut used = [false; 256];
                for region in held.iter().chain(arena.quarantined()) {
                    for entry in region.start..region.start + region.len {
                        prop_assert!(!std::mem::replace(&mut used[entry as usize], true));
                    }
                }
            }
            held.into_iter().for_each(|region| arena.give_back(region));
            arena.release();
            prop_assert_eq!(arena.take(256), Some(Region { start: 0, len: 256 }));
        }
    }
}
