//! Groups datagrams by downstream, so that those for the same downstream can share messages.

use super::super::mmsg::incoming::Segment;

/// Marks the end of a queue, and an empty queue.
const NONE: u32 = u32::MAX;

/// Datagrams of a batch in one queue per downstream. Allocates its memory once.
#[derive(Debug)]
pub struct Grouping {
    entries: Vec<GroupingEntry>,
    room: usize,
    /// For each downstream, its first and its last entry.
    queues: Vec<(u32, u32)>,
    /// The downstreams whose queue is not empty.
    active: Vec<u32>,
}

#[derive(Debug, Clone, Copy)]
struct GroupingEntry {
    segment: Segment,
    /// The next entry for the same downstream.
    next: u32,
}

impl Grouping {
    /// Room for this many datagrams.
    pub fn new(room: usize, downstreams: usize) -> Self {
        let mut grouping = Grouping { entries: Vec::with_capacity(room), room, queues: Vec::new(), active: Vec::new() };
        grouping.resize(downstreams);
        grouping
    }

    /// Changes the number of downstreams. Must be empty.
    pub fn resize(&mut self, downstreams: usize) {
        self.queues.resize(downstreams, (NONE, NONE));
        self.active.reserve(downstreams);
    }

    /// True if there is no room for another datagram.
    pub fn full(&self) -> bool {
        self.entries.len() == self.room
    }

    /// Adds a datagram.
    pub fn add(&mut self, downstream: u32, segment: Segment) {
        let entry = self.entries.len() as u32;
        self.entries.push(GroupingEntry { segment, next: NONE });
        let (first, last) = &mut self.queues[downstream as usize];
        if *first == NONE {
            *first = entry;
            self.active.push(downstream);
        } else {
            self.entries[*last as usize].next = entry;
        }
        *last = entry;
    }

    /// The downstreams that have datagrams, in the order of their first ones.
    pub fn downstreams(&self) -> &[u32] {
        &self.active
    }

    /// A downstream's datagrams, in the order in which they were added.
    pub fn segments(&self, downstream: u32) -> impl Iterator<Item = Segment> + '_ {
        let mut next = self.queues[downstream as usize].0;
        std::iter::from_fn(move || {
            let entry = self.entries.get(next as usize)?;
            next = entry.next;
            Some(entry.segment)
        })
    }

    /// Removes all datagrams.
    pub fn clear(&mut self) {
        for &downstream in &self.active {
            self.queues[downstream as usize] = (NONE, NONE);
        }
        self.active.clear();
        self.entries.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::mmsg::incoming::tests::segment;
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn each_gets_what_is_its_own_in_order(rounds in prop::collection::vec(prop::collection::vec(0u32..9, 0..40), 1..4)) {
            let mut grouping = Grouping::new(40, 9);
            for targets in rounds {
                let mut expected: BTreeMap<u32, Vec<Segment>> = BTreeMap::new();
                for (number, &target) in targets.iter().enumerate() {
                    prop_assert!(!grouping.full());
                    grouping.add(target, segment(number as u32, 7));
                    expected.entry(target).or_default().push(segment(number as u32, 7));
                }
                prop_assert_eq!(grouping.full(), targets.len() == 40);
                let dealt: BTreeMap<u32, Vec<Segment>> =
                    grouping.downstreams().iter().map(|&target| (target, grouping.segments(target).collect())).collect();
                prop_assert_eq!(dealt.len(), grouping.downstreams().len());
                prop_assert_eq!(dealt, expected);
                grouping.clear();
                prop_assert!(grouping.downstreams().is_empty());
                prop_assert_eq!(grouping.segments(3).count(), 0);
            }
        }
    }
}
