//! How long to wait before the next attempt: exponential backoff with jitter, capped by the kind of failure.

use std::time::Duration;

use rand::RngExt;

use super::super::DiscoveryTimeouts;
use super::super::status::ErrorKind;

/// The longest wait while the API server cannot be reached. A failed attempt costs the server nothing, and its return is noticed soon.
const UNREACHABLE_MAX: Duration = Duration::from_secs(1);
/// The longest wait after a failure that a change of credentials, rules or server version ends.
const REJECTED_MAX: Duration = Duration::from_secs(5);
/// The longest `Retry-After` that is respected.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// A 403 is reported after this many in a row: after 3 to 6 seconds. An API server that starts denies everything until it has
/// read its rules.
pub(super) const FORBIDDEN_ATTEMPTS: u32 = 6;

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

/// Failures since the last working watch, by kind. Each kind has its own count, so that a server that answers again after a
/// long outage is not approached with the outage's backoff.
#[derive(Debug, Default)]
pub(super) struct FailureCounts([u32; ErrorKind::ALL.len()]);

impl FailureCounts {
    /// The number of failures of this kind.
    pub(super) fn of(&self, kind: ErrorKind) -> u32 {
        self.0[kind as usize]
    }

    /// A watch has worked.
    pub(super) fn reset(&mut self) {
        *self = FailureCounts::default();
    }

    /// Counts a failure and computes the wait before the next attempt. The first 410 waits for nothing: the next attempt is a
    /// list. A `Retry-After` is lengthened by up to a quarter at random.
    pub(super) fn next_wait(
        &mut self,
        kind: ErrorKind,
        retry_after: Option<Duration>,
        limits: &DiscoveryTimeouts,
        rng: &mut impl RngExt,
    ) -> Duration {
        let count = &mut self.0[kind as usize];
        *count = count.saturating_add(1);
        let longest = match kind {
            ErrorKind::Throttled | ErrorKind::Server | ErrorKind::Expired => limits.backoff_max,
            ErrorKind::Connect | ErrorKind::Stalled => limits.backoff_max.min(UNREACHABLE_MAX),
            _ => limits.backoff_max.min(REJECTED_MAX),
        };
        let backoff = Backoff::new(limits.backoff_min, longest);
        let wait = match (kind, *count) {
            (ErrorKind::Expired, 1) => Duration::ZERO,
            (ErrorKind::Expired, count) => backoff.draw(count - 1, rng),
            (_, count) => backoff.draw(count, rng),
        };
        let asked = retry_after.unwrap_or_default().min(RETRY_AFTER_MAX);
        wait.max(asked.mul_f64(rng.random_range(1.0..=1.25)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    /// The waits after this many failures of one kind, in milliseconds.
    fn waits(counts: &mut FailureCounts, kind: ErrorKind, failures: u32) -> Vec<u128> {
        let mut rng = StdRng::seed_from_u64(11);
        let limits = DiscoveryTimeouts::default();
        (0..failures).map(|_| counts.next_wait(kind, None, &limits, &mut rng).as_millis()).collect()
    }

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

    #[test]
    fn the_kind_of_failure_caps_the_wait() {
        use ErrorKind as Kind;
        for kind in Kind::ALL {
            let longest = match kind {
                Kind::Connect | Kind::Stalled => 1000,
                Kind::Throttled | Kind::Server | Kind::Expired => 30_000,
                _ => 5000,
            };
            let mut counts = FailureCounts::default();
            let waits = waits(&mut counts, kind, 500);
            assert!(waits.iter().all(|wait| *wait <= longest), "{kind}");
            assert!(waits[20..].iter().all(|wait| *wait >= longest / 2), "{kind}: spread over half of the longest");
            assert_eq!(counts.0[kind as usize], 500);
        }
    }

    #[test]
    fn a_long_outage_does_not_slow_down_what_follows_it() {
        let mut counts = FailureCounts::default();
        assert!(waits(&mut counts, ErrorKind::Connect, 5000).into_iter().all(|wait| wait <= 1000));
        // The server starts: it answers, and not yet what it is asked.
        for kind in [ErrorKind::Server, ErrorKind::Forbidden] {
            let first = waits(&mut counts, kind, 3);
            assert!(first[0] <= 200 && first[1] <= 400 && first[2] <= 800, "{kind}: {first:?}");
        }
        counts.reset();
        assert!(waits(&mut counts, ErrorKind::Connect, 1)[0] <= 200);
    }

    #[test]
    fn the_first_410_waits_for_nothing_and_the_next_ones_back_off() {
        let waits = waits(&mut FailureCounts::default(), ErrorKind::Expired, 4);
        assert_eq!(waits[0], 0);
        for (wait, longest) in waits[1..].iter().zip([200, 400, 800]) {
            assert!((longest / 2..=longest).contains(wait), "{waits:?}");
        }
    }

    #[test]
    fn retry_after_is_the_least_wait_and_has_a_bound() {
        let mut rng = StdRng::seed_from_u64(3);
        let limits = DiscoveryTimeouts::default();
        for (asked, longest) in [(1, 1250), (40, 50_000), (86_400, 75_000)] {
            let mut counts = FailureCounts::default();
            let asked = Duration::from_secs(asked);
            let wait = counts.next_wait(ErrorKind::Throttled, Some(asked), &limits, &mut rng);
            assert!(wait >= asked.min(RETRY_AFTER_MAX) && wait.as_millis() <= longest, "{asked:?}: {wait:?}");
        }
    }
}
