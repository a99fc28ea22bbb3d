//! What health means for a listener: which of its downstreams take part in the round, and with what share. Pure.
//!
//! The controller asks [`shares`] before it compiles a listener's plan. Two rules beyond "the unhealthy are out": when
//! all are out, `fail_open` decides whether all stay in instead, since then the checks are more likely wrong than all
//! receivers dead (a firewall that eats pings must not stop the logs); and one that has recovered starts small.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;

use crate::model::{Downstream, ListenerId};

/// In how many equal steps the share of a recovered downstream grows to its full size.
pub const STEPS: u32 = 10;

/// What the health checks say against a downstream. Times are durations since the daemon started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// Unhealthy since then.
    Out(Duration),
    /// Healthy again since then.
    Back(Duration),
}

/// The downstreams about which there is something to say, by listener and address. Those not named have never failed
/// since they are checked, or are not checked.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HealthMap {
    standings: BTreeMap<(ListenerId, SocketAddr), Standing>,
}

impl HealthMap {
    /// What there is to say about a downstream.
    #[must_use]
    pub fn get(&self, listener: ListenerId, downstream: SocketAddr) -> Option<Standing> {
        self.standings.get(&(listener, downstream)).copied()
    }

    /// Sets what there is to say. True if it was something else.
    pub(super) fn set(&mut self, listener: ListenerId, downstream: SocketAddr, standing: Option<Standing>) -> bool {
        let key = (listener, downstream);
        let before = match standing {
            Some(standing) => self.standings.insert(key, standing),
            None => self.standings.remove(&key),
        };
        before != standing
    }
}

impl FromIterator<((ListenerId, SocketAddr), Standing)> for HealthMap {
    fn from_iter<I: IntoIterator<Item = ((ListenerId, SocketAddr), Standing)>>(standings: I) -> Self {
        HealthMap { standings: standings.into_iter().collect() }
    }
}

/// The part each downstream of a listener takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shares {
    /// For each downstream in order, its weight in the table; 0 for those left out. Only the weights' proportions
    /// matter. At most [`STEPS`] times the configured ones.
    pub weights: Vec<u32>,
    /// All are unhealthy, and all are kept because of `fail_open`.
    pub failing_open: bool,
    /// When the shares will be others because a recovered downstream's has grown.
    pub next_change: Option<Duration>,
}

/// The part each downstream of a listener takes at the time `now`.
///
/// `fail_open` and `slow_start` are the listener's; see [`HealthSettings`](super::settings::HealthSettings). Without
/// health checks, ask with an empty map.
#[must_use]
pub fn shares(
    listener: ListenerId,
    downstreams: &[Downstream],
    map: &HealthMap,
    fail_open: bool,
    slow_start: Duration,
    now: Duration,
) -> Shares {
    let standings: Vec<Option<Standing>> =
        downstreams.iter().map(|downstream| map.get(listener, downstream.address)).collect();
    let out = |standing: &Option<Standing>| matches!(standing, Some(Standing::Out(_)));
    let weights = || downstreams.iter().map(|downstream| downstream.weight.max(1));
    if !downstreams.is_empty() && standings.iter().all(out) {
        let weights = weights().map(|weight| if fail_open { weight } else { 0 }).collect();
        return Shares { weights, failing_open: fail_open, next_change: None };
    }
    let ramp = |standing: &Option<Standing>| match standing {
        Some(Standing::Out(_)) => Ramp { step: 0, until: None },
        Some(Standing::Back(since)) => Ramp::at(*since, slow_start, now),
        None => Ramp::FULL,
    };
    let ramps: Vec<Ramp> = standings.iter().map(ramp).collect();
    let next_change = ramps.iter().filter_map(|ramp| ramp.until).min();
    // Weights are scaled up only while someone's is smaller: else they stay what the operator has written.
    let scale = |step| if next_change.is_some() { step } else { u32::from(step > 0) };
    let weights = weights().zip(&ramps).map(|(weight, ramp)| weight.saturating_mul(scale(ramp.step))).collect();
    Shares { weights, failing_open: false, next_change }
}

/// How far someone's share has grown: `step` of [`STEPS`], until some time.
#[derive(Debug, Clone, Copy)]
struct Ramp {
    step: u32,
    until: Option<Duration>,
}

impl Ramp {
    const FULL: Ramp = Ramp { step: STEPS, until: None };

    fn at(since: Duration, slow_start: Duration, now: Duration) -> Ramp {
        let step_length = slow_start / STEPS;
        let past = now.saturating_sub(since);
        if step_length.is_zero() || past >= step_length * (STEPS - 1) {
            return Ramp::FULL;
        }
        // Less than STEPS, so it fits.
        let steps = u32::try_from(past.as_nanos() / step_length.as_nanos()).unwrap_or(STEPS - 1);
        Ramp { step: steps + 1, until: Some(since + step_length * (steps + 1)) }
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

    fn map(standings: &[Option<Standing>]) -> HealthMap {
        let address = |n| SocketAddr::from(([10, 0, 0, n], 514));
        (0u8..).zip(standings).filter_map(|(n, standing)| Some(((ID, address(n)), (*standing)?))).collect()
    }

    fn weights(weights: &[u32], standings: &[Option<Standing>], slow_start: u64, now: u64) -> Vec<u32> {
        shares(ID, &downstreams(weights), &map(standings), true, secs(slow_start), secs(now)).weights
    }

    const OUT: Option<Standing> = Some(Standing::Out(Duration::from_secs(5)));
    const BACK: Option<Standing> = Some(Standing::Back(Duration::from_secs(100)));

    #[test]
    fn the_unhealthy_are_out_and_the_rest_keep_their_weights() {
        assert_eq!(weights(&[1, 2, 3], &[None, None, None], 0, 9), [1, 2, 3]);
        assert_eq!(weights(&[1, 2, 3], &[None, OUT, None], 30, 9), [1, 0, 3]);
        assert_eq!(weights(&[1, 2, 3], &[OUT, OUT, None], 0, 9), [0, 0, 3]);
        assert_eq!(weights(&[], &[], 0, 9), [0; 0]);
        let elsewhere = shares(ListenerId(4), &downstreams(&[1]), &map(&[OUT]), false, secs(0), secs(9));
        assert_eq!(elsewhere.weights, [1]);
    }

    #[test]
    fn when_all_are_out_fail_open_decides() {
        let of = |fail_open| shares(ID, &downstreams(&[1, 2]), &map(&[OUT, OUT]), fail_open, secs(30), secs(9));
        assert_eq!(of(true), Shares { weights: vec![1, 2], failing_open: true, next_change: None });
        assert_eq!(of(false), Shares { weights: vec![0, 0], failing_open: false, next_change: None });
    }

    #[test]
    fn a_recovered_share_grows_in_steps() {
        let at = |now| shares(ID, &downstreams(&[2, 3]), &map(&[BACK, None]), true, secs(50), secs(now));
        assert_eq!(at(100), Shares { weights: vec![2, 30], failing_open: false, next_change: Some(secs(105)) });
        assert_eq!(at(104).weights, [2, 30]);
        assert_eq!(at(105).weights, [4, 30]);
        assert_eq!(at(144), Shares { weights: vec![18, 30], failing_open: false, next_change: Some(secs(145)) });
        assert_eq!(at(145), Shares { weights: vec![2, 3], failing_open: false, next_change: None });
        assert_eq!(weights(&[2, 3], &[BACK, None], 0, 100), [2, 3]);
        assert_eq!(weights(&[2, 3], &[BACK, OUT], 50, 100), [2, 0]);
    }

    proptest! {
        #[test]
        fn shares_grow_to_full_and_someone_always_takes_part(
            standings in prop::collection::vec(
                prop_oneof![Just(None), (0u64..100).prop_map(|s| Some(Standing::Out(secs(s)))),
                    (0u64..100).prop_map(|s| Some(Standing::Back(secs(s))))], 1..8),
            weights in prop::collection::vec(1u32..=65_535, 8),
            slow_start in 0u64..100,
            fail_open: bool,
        ) {
            let downstreams = downstreams(&weights[..standings.len()]);
            let map = map(&standings);
            let mut now = secs(100);
            let mut last: Option<Vec<f64>> = None;
            loop {
                let seen = shares(ID, &downstreams, &map, fail_open, secs(slow_start), now);
                let all_out = standings.iter().all(|s| matches!(s, Some(Standing::Out(_))));
                prop_assert_eq!(seen.failing_open, all_out && fail_open);
                for ((weight, standing), downstream) in seen.weights.iter().zip(&standings).zip(&downstreams) {
                    let out = matches!(standing, Some(Standing::Out(_))) && !seen.failing_open;
                    prop_assert_eq!(*weight == 0, out);
                    prop_assert!(*weight <= downstream.weight * STEPS);
                }
                // Relative to its configured weight, nobody's share shrinks compared with the fullest.
                let relative: Vec<f64> =
                    seen.weights.iter().zip(&downstreams).map(|(w, d)| f64::from(*w) / f64::from(d.weight)).collect();
                let fullest = relative.iter().copied().fold(1.0, f64::max);
                let fullest = if seen.next_change.is_some() { f64::from(STEPS) } else { fullest };
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
