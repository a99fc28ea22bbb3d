//! Allocator for the kernel's flat arrays: slots of `table_slots` and ids of `downstreams`.
//!
//! Bookkeeping only. A CPU may still be reading a retired range, so it stays in `pending_reclaim` until the owner has
//! waited for an RCU grace period and calls [`SlotAllocator::reclaim`].

use std::collections::BTreeMap;

/// A range of adjacent entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct SlotRange {
    /// Index of the first entry.
    pub start: u32,
    /// Number of entries.
    pub len: u32,
}

/// The free and retired entries of an array of fixed size.
#[derive(Debug, Clone)]
pub struct SlotAllocator {
    /// Free ranges, start to length; never adjacent, never empty.
    free: BTreeMap<u32, u32>,
    pending_reclaim: Vec<SlotRange>,
}

impl SlotAllocator {
    /// An allocator with all `size` entries free.
    #[must_use]
    pub fn new(size: u32) -> SlotAllocator {
        let free = if size == 0 { BTreeMap::new() } else { BTreeMap::from([(0, size)]) };
        SlotAllocator { free, pending_reclaim: Vec::new() }
    }

    /// Allocates `len` adjacent entries from the first range that is long enough; `None` if there is none. An empty
    /// range is always available.
    pub fn allocate(&mut self, len: u32) -> Option<SlotRange> {
        if len == 0 {
            return Some(SlotRange::default());
        }
        let (&start, &room) = self.free.iter().find(|&(_, &room)| room >= len)?;
        self.free.remove(&start);
        if room > len {
            self.free.insert(start + len, room - len);
        }
        Some(SlotRange { start, len })
    }

    /// Retires a range until [`SlotAllocator::reclaim`].
    pub fn retire(&mut self, region: SlotRange) {
        if region.len > 0 {
            self.pending_reclaim.push(region);
        }
    }

    /// Frees all retired ranges. Only after a grace period since the last [`SlotAllocator::retire`].
    pub fn reclaim(&mut self) {
        for region in std::mem::take(&mut self.pending_reclaim) {
            self.free_region(region);
        }
    }

    fn free_region(&mut self, SlotRange { mut start, mut len }: SlotRange) {
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
        let mut allocator = SlotAllocator::new(4);
        let all = allocator.allocate(4).unwrap();
        assert_eq!(allocator.allocate(1), None);
        allocator.retire(all);
        assert_eq!(allocator.allocate(1), None);
        allocator.reclaim();
        assert_eq!(allocator.allocate(4), Some(all));
        assert_eq!(allocator.allocate(0), Some(SlotRange::default()));
    }

    proptest! {
        #[test]
        fn regions_never_overlap_and_all_comes_back(steps in prop::collection::vec((any::<bool>(), 0u32..40), 1..200)) {
            let mut allocator = SlotAllocator::new(256);
            let mut taken: Vec<SlotRange> = Vec::new();
            for (take, n) in steps {
                if take {
                    taken.extend(allocator.allocate(n).filter(|r| r.len > 0));
                } else if !taken.is_empty() {
                    allocator.retire(taken.swap_remove(n as usize % taken.len()));
                }
                if n % 5 == 0 {
                    allocator.reclaim();
                }
                let mut used = [false; 256];
                for region in taken.iter().chain(&allocator.pending_reclaim) {
                    for entry in region.start..region.start + region.len {
                        prop_assert!(!std::mem::replace(&mut used[entry as usize], true));
                    }
                }
            }
            taken.into_iter().for_each(|region| allocator.retire(region));
            allocator.reclaim();
            prop_assert_eq!(allocator.allocate(256), Some(SlotRange { start: 0, len: 256 }));
        }
    }
}
