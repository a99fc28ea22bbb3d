//! Turns weights into the order of a round.
//!
//! A listener's downstreams with weights w₁ … wₙ become a table that holds downstream i wᵢ times (after dividing by the
//! greatest common divisor), spread as evenly as possible: its k-th slot is due at (k + φᵢ) / wᵢ of the round, and
//! slots are assigned in the order they are due (earliest deadline first). The j-th of m downstreams of one weight has
//! the phase φ = (j + ½) / m, so that they take turns. Any stretch of the table then holds each downstream close to its
//! share: a heavy one never gets a burst.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

/// Longest table built from weights. A round longer than this is scaled down, which changes each share by less than
/// one place in the table; every downstream keeps at least one place.
pub const MAX_SLOTS: u64 = 8_192;

/// The order of one round: indices into `weights`, each index as often as its share demands.
///
/// Empty for no weights. A weight of 0 counts as 1; the configuration refuses it before it gets here.
#[must_use]
pub fn interleave(weights: &[u32]) -> Vec<u32> {
    let shares = shares(weights);
    if shares.iter().all(|&share| share == 1) {
        return (0..).zip(&shares).map(|(index, _)| index).collect();
    }
    let total: u64 = shares.iter().sum();
    let mut classes: BTreeMap<u64, WeightClass> = BTreeMap::new();
    for &share in &shares {
        classes.entry(share).or_default().count += 1;
    }
    let mut due = BinaryHeap::with_capacity(shares.len());
    for (&share, index) in shares.iter().zip(0..) {
        let class_size = classes.entry(share).or_default();
        due.push(Reverse(ScheduledSlot { index, nth: 0, share, rank: class_size.seen, class_size: class_size.count }));
        class_size.seen += 1;
    }
    let mut table = Vec::with_capacity(usize::try_from(total).unwrap_or_default());
    while let Some(Reverse(place)) = due.pop() {
        table.push(place.index);
        if place.nth + 1 < place.share {
            due.push(Reverse(ScheduledSlot { nth: place.nth + 1, ..place }));
        }
    }
    table
}

/// Slots per round: the weights in lowest terms, scaled down to fit [`MAX_SLOTS`] if necessary.
fn shares(weights: &[u32]) -> Vec<u64> {
    let weights: Vec<u64> = weights.iter().map(|&w| u64::from(w.max(1))).collect();
    let divisor = weights.iter().copied().fold(0, gcd).max(1);
    let total: u64 = weights.iter().sum::<u64>() / divisor;
    let room = MAX_SLOTS.max(weights.len() as u64);
    weights
        .iter()
        .map(|&w| {
            let share = w / divisor;
            if total <= room { share } else { (share * room / total).max(1) }
        })
        .collect()
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The downstreams that have the same share.
#[derive(Default)]
struct WeightClass {
    count: u64,
    seen: u64,
}

/// The nth slot of the downstream that is `rank`-th among the `class_size` downstreams of its share. Ordered by when it
/// is due, ties by index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ScheduledSlot {
    index: u32,
    nth: u64,
    share: u64,
    rank: u64,
    class_size: u64,
}

impl ScheduledSlot {
    /// (nth + (rank + ½) / class_size) / share, as numerator and denominator.
    fn due(&self) -> (u64, u64) {
        (2 * (self.nth * self.class_size + self.rank) + 1, 2 * self.class_size * self.share)
    }
}

impl Ord for ScheduledSlot {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let (mine, my_unit) = self.due();
        let (theirs, their_unit) = other.due();
        // Cross-multiplied in 128 bits, so that the comparison is exact for all values.
        let left = u128::from(mine) * u128::from(their_unit);
        let right = u128::from(theirs) * u128::from(my_unit);
        left.cmp(&right).then(self.index.cmp(&other.index))
    }
}

impl PartialOrd for ScheduledSlot {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn equal_weights_are_one_place_each_in_order() {
        assert_eq!(interleave(&[1, 1, 1]), [0, 1, 2]);
        assert_eq!(interleave(&[7, 7, 7]), [0, 1, 2]);
        assert_eq!(interleave(&[]), [0u32; 0]);
    }

    #[test]
    fn a_heavy_downstream_does_not_burst() {
        assert_eq!(interleave(&[5, 1, 1]), [0, 1, 0, 0, 0, 2, 0]);
    }

    proptest! {
        #[test]
        fn every_prefix_is_close_to_each_share(weights in prop::collection::vec(1u32..40, 1..30)) {
            let table = interleave(&weights);
            let total: u32 = weights.iter().sum();
            let divisor = weights.iter().fold(0, |a, &w| gcd(a, u64::from(w)));
            prop_assert_eq!(table.len() as u64, u64::from(total) / divisor);
            let mut seen = vec![0f64; weights.len()];
            for (n, &index) in table.iter().enumerate() {
                seen[index as usize] += 1.0;
                for (i, &w) in weights.iter().enumerate() {
                    let fair = (n + 1) as f64 * f64::from(w) / f64::from(total);
                    // Deadlines bound the lag by the number of competitors that may be due at the same moment.
                    prop_assert!((seen[i] - fair).abs() <= 1.0 + weights.len() as f64 * 0.5);
                }
            }
            for (i, &w) in weights.iter().enumerate() {
                prop_assert_eq!(seen[i] as u64, u64::from(w) / divisor);
            }
        }

        #[test]
        fn no_weights_make_a_table_too_long_or_lose_a_downstream(weights in prop::collection::vec(1u32..=65_535, 1..200)) {
            let table = interleave(&weights);
            prop_assert!(table.len() as u64 <= MAX_SLOTS + weights.len() as u64);
            for i in 0..weights.len() {
                prop_assert!(table.contains(&u32::try_from(i).unwrap()));
            }
        }
    }
}
