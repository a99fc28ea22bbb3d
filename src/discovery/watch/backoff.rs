//! Exponential backoff with jitter.

use std::time::Duration;

use rand::RngExt;

/// The shortest and the longest wait.
#[derive(Debug, Clone, Copy)]
pub(super) struct Backoff {
    min: Duration,
    max: Duration,
}

impl Backoff {
    pub(super) fn new(min: Duration, max: Duration) -> Backoff {
        Backoff { min, max: max.max(min) }
    }

    /// The wait after this many failures in a row, from 1: between half and all of `min · 2^(failures - 1)`, at
    /// most `max`. The random half keeps the nodes of a cluster from retrying all at once.
    pub(super) fn wait(self, failures: u32) -> Duration {
        self.draw(failures, &mut rand::rng())
    }

    fn draw(self, failures: u32, rng: &mut impl RngExt) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        let longest = self.min.saturating_mul(1 << doublings).min(self.max);
        longest.mul_f64(rng.random_range(0.5..=1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    #[test]
    fn waits_double_up_to_the_longest_and_are_spread_over_a_half() {
        let mut rng = StdRng::seed_from_u64(7);
        let backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));
        for (failures, ms) in [(0, 200), (1, 200), (2, 400), (3, 800), (8, 25_600), (9, 30_000), (u32::MAX, 30_000)] {
            let longest = Duration::from_millis(ms);
            let waits: Vec<Duration> = (0..200).map(|_| backoff.draw(failures, &mut rng)).collect();
            assert!(waits.iter().all(|wait| (longest / 2..=longest).contains(wait)), "{failures}: {waits:?}");
            assert!(waits.iter().max() > waits.iter().min());
        }
    }

    #[test]
    fn a_longest_below_the_shortest_gives_way() {
        let backoff = Backoff::new(Duration::from_secs(2), Duration::from_secs(1));
        assert!(backoff.wait(1) >= Duration::from_secs(1));
    }
}
