//! Maglev hashing (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016). The table
//! gives each downstream its share of the slots, and few slots change their downstream when the set changes.
//!
//! Every downstream has its own permutation of the slots, derived from its address. Downstreams take turns at claiming
//! the first free slot of their permutation. A downstream of weight w gets w turns for each turn of one of weight 1.
//! Turns go in the order of the addresses, so the order in the configuration does not matter.

use std::net::SocketAddr;

use crate::net::{endpoint_hash, mix};

/// Table sizes: primes, each about four times the one before.
const SIZES: [usize; 5] = [4_099, 16_411, 65_537, 262_147, 1_048_583];
/// Slots that a table has per downstream, at least. More slots bring the shares closer to the weights and move fewer
/// senders needlessly.
const SLOTS_EACH: usize = 100;
/// From this size on, a table has only [`LEAST_SLOTS_EACH`] slots per downstream.
const LONG: usize = 65_537;
/// Slots per downstream in long tables, at least.
const LEAST_SLOTS_EACH: usize = 16;

/// The size of a table for this many downstreams, if the previous table was not larger.
#[must_use]
pub fn table_size(downstreams: usize) -> usize {
    let wanted = (downstreams * SLOTS_EACH).min(LONG).max(downstreams * LEAST_SLOTS_EACH);
    SIZES.into_iter().find(|&size| size >= wanted).unwrap_or(SIZES[SIZES.len() - 1])
}

/// The table for downstreams and their weights: for each slot, an index into `downstreams`. Empty for no downstreams.
///
/// Tables of different sizes have little in common, so a set that shrinks keeps its table's size: `at_least` is the
/// size of the previous table, 0 if there was none.
#[must_use]
pub fn table(downstreams: &[(SocketAddr, u32)], at_least: usize) -> Vec<u32> {
    if downstreams.is_empty() {
        return Vec::new();
    }
    let wanted = at_least.max(table_size(downstreams.len()));
    let size = SIZES.into_iter().find(|&size| size >= wanted).unwrap_or(SIZES[SIZES.len() - 1]);
    let heaviest = downstreams.iter().map(|(_, weight)| u64::from(*weight)).max().unwrap_or(1).max(1);
    let mut permutations: Vec<SlotPermutation> = downstreams
        .iter()
        .zip(0..)
        .map(|(&(address, weight), index)| SlotPermutation::new(address, weight, index, size))
        .collect();
    permutations.sort_by_key(|permutation| permutation.address);
    let mut table = vec![u32::MAX; size];
    let mut free = size;
    loop {
        for permutation in &mut permutations {
            permutation.credit += permutation.weight;
            if permutation.credit < heaviest {
                continue;
            }
            permutation.credit -= heaviest;
            permutation.claim(&mut table);
            free -= 1;
            if free == 0 {
                return table;
            }
        }
    }
}

struct SlotPermutation {
    address: SocketAddr,
    index: u32,
    weight: u64,
    credit: u64,
    next: usize,
    skip: usize,
}

impl SlotPermutation {
    fn new(address: SocketAddr, weight: u32, index: u32, size: usize) -> SlotPermutation {
        let seed = endpoint_hash(address);
        let offset = mix(seed ^ 0x9e37_79b9_7f4a_7c15) % size as u64;
        let skip = mix(seed ^ 0xd1b5_4a32_d192_ed03) % (size as u64 - 1) + 1;
        let weight = u64::from(weight.max(1));
        SlotPermutation { address, index, weight, credit: 0, next: offset as usize, skip: skip as usize }
    }

    /// Claims the first free slot of the permutation. The caller makes sure that there is one.
    fn claim(&mut self, table: &mut [u32]) {
        while table[self.next] != u32::MAX {
            self.next = (self.next + self.skip) % table.len();
        }
        table[self.next] = self.index;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn downstreams(n: usize) -> Vec<(SocketAddr, u32)> {
        (0..n).map(|i| (SocketAddr::from(([10, 1, (i >> 8) as u8, i as u8], 514)), 1)).collect()
    }

    fn shares(table: &[u32], n: usize) -> Vec<usize> {
        let mut shares = vec![0; n];
        table.iter().for_each(|&index| shares[index as usize] += 1);
        shares
    }

    #[test]
    fn shares_are_even() {
        for n in [1, 2, 3, 10, 100, 1000, 10_000] {
            let table = table(&downstreams(n), 0);
            let fair = table.len() as f64 / n as f64;
            for share in shares(&table, n) {
                assert!((share as f64 - fair).abs() <= 1.0 + fair * 0.01, "{share} of {fair} with {n}");
            }
        }
    }

    #[test]
    fn a_table_for_many_has_places_for_each() {
        for (count, expected) in
            [(1, 4_099), (41, 16_411), (655, 65_537), (4_096, 65_537), (4_097, 262_147), (16_384, 262_147)]
        {
            assert_eq!(table_size(count), expected, "{count}");
        }
        assert!(table_size(1_000_000) >= 1_000_000);
    }

    #[test]
    fn weights_are_respected() {
        let mut set = downstreams(3);
        set[1].1 = 2;
        set[2].1 = 5;
        let table = table(&set, 0);
        let shares = shares(&table, 3);
        for (share, weight) in shares.iter().zip([1.0, 2.0, 5.0]) {
            let fair = table.len() as f64 * weight / 8.0;
            assert!((*share as f64 - fair).abs() < 2.0 + fair * 0.01, "{share} of {fair}");
        }
    }

    #[test]
    fn when_one_leaves_only_about_its_share_moves() {
        for n in [2, 3, 5, 10, 50, 200, 4_096, 10_000] {
            let before = downstreams(n);
            let old = table(&before, 0);
            for gone in [0, n / 2, n - 1] {
                let mut after = before.clone();
                after.remove(gone);
                let new = table(&after, old.len());
                // Slots stand for equal ranges of hashes, so compare along the hash space, not slot by slot.
                let samples = 100_000u64;
                let at = |table: &[u32], set: &[(SocketAddr, u32)], i: u64| {
                    set[table[(i * table.len() as u64 / samples) as usize] as usize].0
                };
                let moved = (0..samples).filter(|&i| at(&old, &before, i) != at(&new, &after, i)).count();
                let moved = moved as f64 / samples as f64;
                assert!(moved <= 1.0 / n as f64 + 0.02, "{moved} moved when one of {n} left");
            }
        }
    }

    proptest! {
        #[test]
        fn order_does_not_matter(n in 1usize..40, rotate in 0usize..40) {
            let set = downstreams(n);
            let mut turned = set.clone();
            turned.rotate_left(rotate % n);
            let by_address = |set: &[(SocketAddr, u32)]| -> Vec<SocketAddr> { table(set, 0).iter().map(|&i| set[i as usize].0).collect() };
            prop_assert_eq!(by_address(&set), by_address(&turned));
        }
    }
}
