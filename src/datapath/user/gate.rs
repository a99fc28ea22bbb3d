//! Who may send to a listener, and how fast, as its workers ask: the other half of `bpf/admission.h`.
//!
//! The workers of a listener share one gate, since a sender's datagrams may come to any of them. Its buckets stand in
//! sets of a few, each behind a lock of its own that is held for some nanoseconds; nothing is locked where there is no
//! limit. A sender for whom a set has no room takes the place of the one whose bucket is nearest to being full, which loses
//! least: nothing, if it is full.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::mmsg::Endpoint;
use crate::admission::{Meter, Ranges, Sources, TICKS_PER_SECOND, Verdict};
use crate::plan::ListenerPlan;

/// Buckets in a set.
const WAYS: usize = 8;

/// Decides which datagrams a listener takes.
#[derive(Debug)]
pub struct Gate {
    sources: Arc<Sources>,
    /// None where everybody may send.
    ranges: Option<Arc<Ranges>>,
    buckets: Option<Arc<Buckets>>,
}

impl Gate {
    /// The gate of a plan. What `before` has and the plan still wants goes on: its buckets do not become full again.
    #[must_use]
    pub fn new(plan: &ListenerPlan, before: Option<&Gate>) -> Self {
        let same_sources = before.filter(|gate| gate.sources == plan.sources);
        let ranges = match same_sources {
            Some(gate) => gate.ranges.clone(),
            None => (!plan.sources.is_open()).then(|| Arc::new(plan.sources.ranges())),
        };
        let same_meter = before.filter(|gate| gate.meter() == plan.meter);
        let buckets = match same_meter {
            Some(gate) => gate.buckets.clone(),
            None => plan.meter.map(|meter| Arc::new(Buckets::new(meter))),
        };
        Gate { sources: Arc::clone(&plan.sources), ranges, buckets }
    }

    /// True if datagrams would be judged differently under the plan.
    #[must_use]
    pub fn differs_from(&self, plan: &ListenerPlan) -> bool {
        self.sources != plan.sources || self.meter() != plan.meter
    }

    /// True if every datagram is taken, so that nobody need ask whose it is.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.ranges.is_none() && self.buckets.is_none()
    }

    /// True if the plan's gate takes every datagram.
    #[must_use]
    pub fn would_be_open(plan: &ListenerPlan) -> bool {
        plan.sources.is_open() && plan.meter.is_none()
    }

    fn meter(&self) -> Option<Meter> {
        self.buckets.as_ref().map(|buckets| buckets.meter)
    }

    /// True if this sender may not send.
    #[must_use]
    pub fn denies(&self, sender: Option<Endpoint>) -> bool {
        // Whoever cannot be told is nobody who may send.
        sender.is_none_or(|(sender, _)| {
            self.ranges.as_ref().is_some_and(|ranges| ranges.verdict(sender) == Verdict::Deny)
        })
    }

    /// True if this sender is too fast: to be asked for each datagram that is not denied. `now` is from [`Gate::now`].
    #[must_use]
    pub fn limits(&self, sender: Option<Endpoint>, now: u64) -> bool {
        let buckets = self.buckets.as_ref().zip(sender);
        buckets.is_some_and(|(buckets, (sender, _))| !buckets.take(sender, now))
    }

    /// The time by the meter's clock.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.buckets.as_ref().map_or(0, |buckets| buckets.now())
    }
}

/// The senders' buckets.
#[derive(Debug)]
struct Buckets {
    meter: Meter,
    start: Instant,
    /// Nobody who chooses addresses can choose which of them share a set.
    hash: RandomState,
    sets: Box<[Mutex<[Bucket; WAYS]>]>,
}

/// One sender's.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    sender: IpAddr,
    /// The tick at which it is full again; 0 where there is no bucket.
    due: u64,
}

impl Bucket {
    const NONE: Bucket = Bucket { sender: IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), due: 0 };
}

impl Buckets {
    fn new(meter: Meter) -> Self {
        let sets = (meter.senders as usize).div_ceil(WAYS).max(1);
        Buckets {
            meter,
            start: Instant::now(),
            hash: RandomState::new(),
            sets: (0..sets).map(|_| Mutex::new([Bucket::NONE; WAYS])).collect(),
        }
    }

    /// Ticks since the start, and one more, so that no bucket is due at 0.
    fn now(&self) -> u64 {
        let since = self.start.elapsed();
        let below_a_second = u64::from(since.subsec_nanos()) * (TICKS_PER_SECOND / 1_000_000_000);
        since.as_secs() * TICKS_PER_SECOND + below_a_second + 1
    }

    /// Takes a datagram's cost out of its sender's bucket; false if there is not enough in it.
    #[expect(clippy::cast_possible_truncation, reason = "a part of the hash is as good as the whole")]
    fn take(&self, source: IpAddr, now: u64) -> bool {
        let sender = self.meter.sender(source);
        let set = &self.sets[self.hash.hash_one(sender) as usize % self.sets.len()];
        let mut set = set.lock().unwrap_or_else(PoisonError::into_inner);
        let own = set.iter().position(|bucket| bucket.due > 0 && bucket.sender == sender);
        let Some(at) = own.or_else(|| (0..WAYS).min_by_key(|&at| set[at].due)) else { return true };
        let due = if own.is_some() { set[at].due } else { 0 };
        let after = self.meter.take(due, now);
        if let Some(due) = after {
            set[at] = Bucket { sender, due };
        }
        after.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::plan;
    use super::*;
    use crate::admission::{Prefix, RateLimit};
    use crate::model::DropReason;

    fn limited(burst: u32, senders: u32) -> ListenerPlan {
        let mut plan = plan("192.0.2.1:514".parse().unwrap(), &[]);
        let limit = RateLimit { packets_per_second: 1, burst, ipv4_prefix: 32, ipv6_prefix: 64, senders };
        plan.meter = Some(limit.meter(plan.bind.ip()));
        plan
    }

    /// Why a datagram is not taken, if it is not.
    fn refusal(gate: &Gate, sender: Option<Endpoint>, now: u64) -> Option<DropReason> {
        if gate.denies(sender) {
            return Some(DropReason::SourceDenied);
        }
        gate.limits(sender, now).then_some(DropReason::RateLimited)
    }

    fn from(last: u8) -> Option<Endpoint> {
        Some(([10, 0, 0, last].into(), 4000))
    }

    #[test]
    fn each_sender_has_a_bucket_of_its_own() {
        let gate = Gate::new(&limited(2, 64), None);
        let now = gate.now();
        let mut passed = |last| refusal(&gate, from(last), now).is_none();
        assert_eq!([1, 1, 1, 2, 2, 2, 1].map(&mut passed), [true, true, false, true, true, false, false]);
        assert_eq!(refusal(&gate, from(1), now), Some(DropReason::RateLimited));
        assert_eq!(refusal(&gate, from(1), now + TICKS_PER_SECOND), None);
        assert_eq!(refusal(&gate, from(1), now + TICKS_PER_SECOND), Some(DropReason::RateLimited));
    }

    #[test]
    fn too_many_senders_take_the_places_of_those_nearest_to_a_full_bucket() {
        let gate = Gate::new(&limited(4, 1), None);
        let now = gate.now();
        let mut busy = |last| (0..4).for_each(|_| assert_eq!(refusal(&gate, from(last), now), None));
        (1..=7).for_each(&mut busy);
        // The eighth place has seen one datagram only.
        assert_eq!(refusal(&gate, from(8), now), None);
        for newcomer in 20..=255 {
            assert_eq!(refusal(&gate, from(newcomer), now), None);
        }
        for last in 1..=7 {
            assert_eq!(refusal(&gate, from(last), now), Some(DropReason::RateLimited), "{last} was forgotten");
        }
    }

    #[test]
    fn sources_come_before_rates_and_cost_nothing() {
        let mut plan = limited(1, 64);
        plan.sources = Sources { allow: vec![Prefix::parse("10.0.0.1").unwrap()], deny: Vec::new() }.into();
        let gate = Gate::new(&plan, None);
        assert_eq!(refusal(&gate, from(2), 1), Some(DropReason::SourceDenied));
        assert_eq!(refusal(&gate, None, 1), Some(DropReason::SourceDenied));
        assert_eq!(refusal(&gate, from(1), 1), None);
        assert_eq!(refusal(&gate, from(1), 1), Some(DropReason::RateLimited));
    }

    #[test]
    fn what_stays_the_same_goes_on() {
        let mut plan = limited(1, 64);
        let gate = Gate::new(&plan, None);
        assert!(!gate.differs_from(&plan) && !gate.is_open() && !Gate::would_be_open(&plan));
        assert_eq!(refusal(&gate, from(1), 1), None);
        plan.sources = Sources { allow: Vec::new(), deny: vec![Prefix::parse("10.0.0.9").unwrap()] }.into();
        assert!(gate.differs_from(&plan));
        let next = Gate::new(&plan, Some(&gate));
        assert_eq!(refusal(&next, from(1), 1), Some(DropReason::RateLimited));
        assert_eq!(refusal(&next, from(9), 1), Some(DropReason::SourceDenied));
        plan.meter = None;
        let unlimited = Gate::new(&plan, Some(&next));
        assert_eq!([refusal(&unlimited, from(1), 1), refusal(&unlimited, from(1), 1)], [None, None]);
        plan.sources = Arc::default();
        assert!(Gate::new(&plan, Some(&unlimited)).is_open());
    }
}
