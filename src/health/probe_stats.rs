//! Statistics of probes, for metrics: outcomes and round-trip times.

use std::time::Duration;

use super::model::ProbeOutcome;
use super::settings::ProbeKind;

/// Upper bounds of the buckets of a [`Histogram`], in seconds.
pub const BOUNDS: [f64; 14] =
    [0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5];

/// A histogram of durations.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Histogram {
    /// The last bucket holds durations above all bounds.
    buckets: [u64; BOUNDS.len() + 1],
    sum: Duration,
}

impl Histogram {
    /// Counts one duration.
    pub fn observe(&mut self, value: Duration) {
        let seconds = value.as_secs_f64();
        self.buckets[BOUNDS.partition_point(|&bound| bound < seconds)] += 1;
        self.sum = self.sum.saturating_add(value);
    }

    /// Each upper bound in seconds with the number of durations up to it, infinity last: cumulative, as Prometheus expects.
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> + '_ {
        let bounds = BOUNDS.into_iter().chain([f64::INFINITY]);
        bounds.zip(self.buckets).scan(0, |sum, (bound, count)| {
            *sum += count;
            Some((bound, *sum))
        })
    }

    /// The number of durations.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The sum of all durations.
    #[must_use]
    pub fn sum(&self) -> Duration {
        self.sum
    }
}

/// The probes of one protocol since the start.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ProbeStats {
    sent: u64,
    ended: [u64; ProbeOutcome::ALL.len()],
    /// Time from sending a probe to its reply, without replies that cannot be matched to one probe.
    pub round_trips: Histogram,
}

impl ProbeStats {
    pub(crate) fn record_sent(&mut self) {
        self.sent += 1;
    }

    pub(crate) fn record_outcome(&mut self, outcome: ProbeOutcome) {
        self.ended[outcome as usize] += 1;
    }

    /// The number of probes per outcome, in the order of [`ProbeOutcome::ALL`].
    pub fn outcomes(&self) -> impl Iterator<Item = (ProbeOutcome, u64)> + '_ {
        ProbeOutcome::ALL.into_iter().zip(self.ended)
    }

    /// Probes sent or attempted.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent
    }
}

/// The statistics of all protocols.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ProbeStatsByKind([ProbeStats; ProbeKind::ALL.len()]);

impl ProbeStatsByKind {
    /// The statistics of one protocol.
    #[must_use]
    pub fn of(&self, kind: ProbeKind) -> &ProbeStats {
        &self.0[kind as usize]
    }

    pub(crate) fn of_mut(&mut self, kind: ProbeKind) -> &mut ProbeStats {
        &mut self.0[kind as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_and_outcomes_are_numbered_in_order() {
        assert!(ProbeKind::ALL.iter().enumerate().all(|(i, kind)| *kind as usize == i));
        assert!(ProbeOutcome::ALL.iter().enumerate().all(|(i, outcome)| *outcome as usize == i));
    }

    #[test]
    fn a_histogram_counts_up_to_each_bound() {
        let mut histogram = Histogram::default();
        for micros in [0, 100, 101, 2_500_000, 2_500_001, 9_000_000] {
            histogram.observe(Duration::from_micros(micros));
        }
        let buckets: Vec<_> = histogram.cumulative().collect();
        assert_eq!(buckets.len(), 15);
        assert_eq!(buckets[0], (0.0001, 2));
        assert_eq!(buckets[1], (0.000_25, 3));
        assert_eq!(buckets[13], (2.5, 4));
        assert_eq!(buckets[14], (f64::INFINITY, 6));
        assert_eq!(histogram.count(), 6);
        assert_eq!(histogram.sum(), Duration::from_micros(14_000_202));
    }
}
