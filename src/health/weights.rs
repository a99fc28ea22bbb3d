//! Turns health into weights: which downstreams of a listener get datagrams, and how large a share. Pure.
//!
//! The controller calls [`effective_weights`] before it compiles a listener's plan. An unhealthy downstream gets weight 0, unless
//! all are unhealthy and `fail_open` keeps them: then the checks are more likely wrong than all receivers dead (a firewall that
//! drops pings must not stop the logs). A downstream that has recovered starts with a small share (slow start).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;

use crate::model::{Downstream, ListenerId};

/// The number of equal steps in which the share of a recovered downstream grows to its full size.
pub const SLOW_START_STEPS: u32 = 10;

/// The reason why a downstream does not have its full weight. Times are durations since the daemon's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HealthMark {
    /// Unhealthy since that time.
    Unhealthy(Duration),
    /// Healthy again since that time; in slow start for a while.
    Recovering(Duration),
}

/// The marked downstreams, by listener and address. A downstream without a mark has never been unhealthy, or is not checked.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HealthMap {
    marks: BTreeMap<(ListenerId, SocketAddr), HealthMark>,
}

impl HealthMap {
    /// The mark of a downstream.
    #[must_use]
    pub fn get(&self, listener: ListenerId, downstream: SocketAddr) -> Option<HealthMark> {
        self.marks.get(&(listener, downstream)).copied()
    }

    /// Sets or removes a mark. True if that changed anything.
    pub(super) fn set(&mut self, listener: ListenerId, downstream: SocketAddr, mark: Option<HealthMark>) -> bool {
        let key = (listener, downstream);
        let before = match mark {
            Some(mark) => self.marks.insert(key, mark),
            None => self.marks.remove(&key),
        };
        before != mark
    }
}

impl FromIterator<((ListenerId, SocketAddr), HealthMark)> for HealthMap {
    fn from_iter<I: IntoIterator<Item = ((ListenerId, SocketAddr), HealthMark)>>(marks: I) -> Self {
        HealthMap { marks: marks.into_iter().collect() }
    }
}

/// The weights of a listener's downstreams after health is applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EffectiveWeights {
    /// For each downstream in order, its weight in the table, 0 for those left out; at most [`SLOW_START_STEPS`] times the
    /// configured weight. Only the proportions matter.
    pub weights: Vec<u32>,
    /// All downstreams are unhealthy, and `fail_open` keeps them all.
    pub failing_open: bool,
    /// When the next slow-start step changes the weights.
    pub next_change: Option<Duration>,
}

/// The weights of a listener's downstreams at the time `now`.
///
/// `fail_open` and `slow_start` are the listener's; see [`HealthSettings`](super::settings::HealthSettings). Without
/// health checks, pass an empty map.
#[must_use]
pub fn effective_weights(
    listener: ListenerId,
    downstreams: &[Downstream],
    map: &HealthMap,
    fail_open: bool,
    slow_start: Duration,
    now: Duration,
) -> EffectiveWeights {
    let marks: Vec<Option<HealthMark>> =
        downstreams.iter().map(|downstream| map.get(listener, downstream.address)).collect();
    let out = |mark: &Option<HealthMark>| matches!(mark, Some(HealthMark::Unhealthy(_)));
    let weights = || downstreams.iter().map(|downstream| downstream.weight.max(1));
    if !downstreams.is_empty() && marks.iter().all(out) {
        let weights = weights().map(|weight| if fail_open { weight } else { 0 }).collect();
        return EffectiveWeights { weights, failing_open: fail_open, next_change: None };
    }
    let ramp = |mark: &Option<HealthMark>| match mark {
        Some(HealthMark::Unhealthy(_)) => SlowStartRamp { step: 0, until: None },
        Some(HealthMark::Recovering(since)) => SlowStartRamp::at(*since, slow_start, now),
        None => SlowStartRamp::FULL,
    };
    let ramps: Vec<SlowStartRamp> = marks.iter().map(ramp).collect();
    let next_change = ramps.iter().filter_map(|ramp| ramp.until).min();
    // Weights are scaled up only during a slow start. Otherwise they stay as configured.
    let scale = |step| if next_change.is_some() { step } else { u32::from(step > 0) };
    let weights = weights().zip(&ramps).map(|(weight, ramp)| weight.saturating_mul(scale(ramp.step))).collect();
    EffectiveWeights { weights, failing_open: false, next_change }
}

/// The progress of a slow start: `step` of [`SLOW_START_STEPS`], until some time.
#[derive(Debug, Clone, Copy)]
struct SlowStartRamp {
    step: u32,
    until: Option<Duration>,
}

impl SlowStartRamp {
    const FULL: SlowStartRamp = SlowStartRamp { step: SLOW_START_STEPS, until: None };

    fn at(since: Duration, slow_start: Duration, now: Duration) -> SlowStartRamp {
        let step_length = slow_start / SLOW_START_STEPS;
        let past = now.saturating_sub(since);
        if step_length.is_zero() || past >= step_length * (SLOW_START_STEPS - 1) {
            return SlowStartRamp::FULL;
        }
        // Less than SLOW_START_STEPS, so it fits.
        let steps = u32::try_from(past.as_nanos() / step_length.as_nanos()).unwrap_or(SLOW_START_STEPS - 1);
        SlowStartRamp { step: steps + 1, until: Some(since + step_length * (steps + 1)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ID: ListenerId = ListenerId(3);

    fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    fn downstreams(weights: &[u32]) -> Vec<Downstream> {
        let downstream = |(n, &weight): (u8, _)| Downstream {
            name: "d".into(),
            address: SocketAddr::from(([10, 0, 0, n], 514)),
            weight,
            sample: Downstream::ALL,
        };
        (0u8..).zip(weights).map(downstream).collect()
    }

    fn map(marks: &[Option<HealthMark>]) -> HealthMap {
        let address = |n| SocketAddr::from(([10, 0, 0, n], 514));
        (0u8..).zip(marks).filter_map(|(n, mark)| Some(((ID, address(n)), (*mark)?))).collect()
    }

    fn weights(weights: &[u32], marks: &[Option<HealthMark>], slow_start: u64, now: u64) -> Vec<u32> {
        effective_weights(ID, &downstreams(weights), &map(marks), true, secs(slow_start), secs(now)).weights
    }

    const UNHEALTHY: Option<HealthMark> = Some(HealthMark::Unhealthy(Duration::from_secs(5)));
    const RECOVERING: Option<HealthMark> = Some(HealthMark::Recovering(Duration::from_secs(100)));

    #[test]
    fn the_unhealthy_are_out_and_the_rest_keep_their_weights() {
        assert_eq!(weights(&[1, 2, 3], &[None, None, None], 0, 9), [1, 2, 3]);
        assert_eq!(weights(&[1, 2, 3], &[None, UNHEALTHY, None], 30, 9), [1, 0, 3]);
        assert_eq!(weights(&[1, 2, 3], &[UNHEALTHY, UNHEALTHY, None], 0, 9), [0, 0, 3]);
        assert_eq!(weights(&[], &[], 0, 9), [0; 0]);
        let elsewhere =
            effective_weights(ListenerId(4), &downstreams(&[1]), &map(&[UNHEALTHY]), false, secs(0), secs(9));
        assert_eq!(elsewhere.weights, [1]);
    }

    #[test]
    fn when_all_are_out_fail_open_decides() {
        let of = |fail_open| {
            effective_weights(ID, &downstreams(&[1, 2]), &map(&[UNHEALTHY, UNHEALTHY]), fail_open, secs(30), secs(9))
        };
        assert_eq!(of(true), EffectiveWeights { weights: vec![1, 2], failing_open: true, next_change: None });
        assert_eq!(of(false), EffectiveWeights { weights: vec![0, 0], failing_open: false, next_change: None });
    }

    #[test]
    fn a_recovered_share_grows_in_steps() {
        let at =
            |now| effective_weights(ID, &downstreams(&[2, 3]), &map(&[RECOVERING, None]), true, secs(50), secs(now));
        assert_eq!(
            at(100),
            EffectiveWeights { weights: vec![2, 30], failing_open: false, next_change: Some(secs(105)) }
        );
        assert_eq!(at(104).weights, [2, 30]);
        assert_eq!(at(105).weights, [4, 30]);
        assert_eq!(
            at(144),
            EffectiveWeights { weights: vec![18, 30], failing_open: false, next_change: Some(secs(145)) }
        );
        assert_eq!(at(145), EffectiveWeights { weights: vec![2, 3], failing_open: false, next_change: None });
        assert_eq!(weights(&[2, 3], &[RECOVERING, None], 0, 100), [2, 3]);
        assert_eq!(weights(&[2, 3], &[RECOVERING, UNHEALTHY], 50, 100), [2, 0]);
    }

    proptest! {
        #[test]
        fn shares_grow_to_full_and_someone_always_takes_part(
            marks in prop::collection::vec(
                prop_oneof![Just(None), (0u64..100).prop_map(|s| Some(HealthMark::Unhealthy(secs(s)))),
                    (0u64..100).prop_map(|s| Some(HealthMark::Recovering(secs(s))))], 1..8),
            weights in prop::collection::vec(1u32..=65_535, 8),
            slow_start in 0u64..100,
            fail_open: bool,
        ) {
            let downstreams = downstreams(&weights[..marks.len()]);
            let map = map(&marks);
            let mut now = secs(100);
            let mut last: Option<Vec<f64>> = None;
            loop {
                let seen = effective_weights(ID, &downstreams, &map, fail_open, secs(slow_start), now);
                let all_out = marks.iter().all(|s| matches!(s, Some(HealthMark::Unhealthy(_))));
                prop_assert_eq!(seen.failing_open, all_out && fail_open);
                for ((weight, mark), downstream) in seen.weights.iter().zip(&marks).zip(&downstreams) {
                    let out = matches!(mark, Some(HealthMark::Unhealthy(_))) && !seen.failing_open;
                    prop_assert_eq!(*weight == 0, out);
                    prop_assert!(*weight <= downstream.weight * SLOW_START_STEPS);
                }
                // Relative to its configured weight, nobody's share shrinks compared with the fullest.
                let relative: Vec<f64> =
                    seen.weights.iter().zip(&downstreams).map(|(w, d)| f64::from(*w) / f64::from(d.weight)).collect();
                let fullest = relative.iter().copied().fold(1.0, f64::max);
                let fullest = if seen.next_change.is_some() { f64::from(SLOW_START_STEPS) } else { fullest };
                let relative: Vec<f64> = relative.into_iter().map(|share| share / fullest).collect();
                if let Some(last) = last {
                    prop_assert!(relative.iter().zip(&last).all(|(new, old)| new >= old), "{:?} {:?}", last, relative);
                }
                let Some(next) = seen.next_change else { break };
                prop_assert!(next > now && next <= now + secs(slow_start));
                now = next;
                last = Some(relative);
            }
            prop_assert!(now <= secs(200));
        }
    }
}
