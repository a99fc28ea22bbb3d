//! Which senders may send to a listener, and how fast, as its workers ask: the counterpart of `bpf/admission.h`.
//!
//! All workers of a listener share one instance, because a sender's datagrams may arrive at any of them. The token
//! buckets are in small sets, each with its own lock, which is held for nanoseconds. Without a rate limit, nothing is
//! locked. When a set is full, a new sender replaces the one whose bucket is fullest, which loses the least.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::mmsg::AddrPort;
use crate::admission::{Meter, SourceRanges, SourceRules, SourceVerdict, TICKS_PER_SECOND};
use crate::plan::ListenerPlan;

/// Buckets in a set.
const SET_SIZE: usize = 8;

/// Decides which datagrams a listener accepts.
#[derive(Debug)]
pub struct UserAdmission {
    sources: Arc<SourceRules>,
    /// None if every sender is allowed.
    ranges: Option<Arc<SourceRanges>>,
    buckets: Option<Arc<SenderBuckets>>,
}

impl UserAdmission {
    /// The admission of a plan. Parts of `before` that the plan does not change are kept, so buckets are not refilled.
    #[must_use]
    pub fn new(plan: &ListenerPlan, before: Option<&UserAdmission>) -> Self {
        let same_sources = before.filter(|admission| admission.sources == plan.sources);
        let ranges = match same_sources {
            Some(admission) => admission.ranges.clone(),
            None => (!plan.sources.allows_everyone()).then(|| Arc::new(plan.sources.ranges())),
        };
        let same_meter = before.filter(|admission| admission.meter() == plan.meter);
        let buckets = match same_meter {
            Some(admission) => admission.buckets.clone(),
            None => plan.meter.map(|meter| Arc::new(SenderBuckets::new(meter))),
        };
        UserAdmission { sources: Arc::clone(&plan.sources), ranges, buckets }
    }

    /// True if the plan has other rules or limits.
    #[must_use]
    pub fn differs_from(&self, plan: &ListenerPlan) -> bool {
        self.sources != plan.sources || self.meter() != plan.meter
    }

    /// True if every datagram is accepted, so senders need not be known.
    #[must_use]
    pub fn admits_all(&self) -> bool {
        self.ranges.is_none() && self.buckets.is_none()
    }

    /// True if the plan accepts every datagram.
    #[must_use]
    pub fn would_admit_all(plan: &ListenerPlan) -> bool {
        plan.sources.allows_everyone() && plan.meter.is_none()
    }

    fn meter(&self) -> Option<Meter> {
        self.buckets.as_ref().map(|buckets| buckets.meter)
    }

    /// True if this sender is denied.
    #[must_use]
    pub fn denies(&self, sender: Option<AddrPort>) -> bool {
        // Unknown senders are denied.
        sender.is_none_or(|(sender, _)| {
            self.ranges.as_ref().is_some_and(|ranges| ranges.verdict(sender) == SourceVerdict::Deny)
        })
    }

    /// True if this sender exceeds its rate. Call it once for each datagram that is not denied, with `now` from
    /// [`UserAdmission::now`].
    #[must_use]
    pub fn exceeds_rate(&self, sender: Option<AddrPort>, now: u64) -> bool {
        let buckets = self.buckets.as_ref().zip(sender);
        buckets.is_some_and(|(buckets, (sender, _))| !buckets.take(sender, now))
    }

    /// The time by the meter's clock, in ticks.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.buckets.as_ref().map_or(0, |buckets| buckets.now())
    }
}

/// The senders' token buckets.
#[derive(Debug)]
struct SenderBuckets {
    meter: Meter,
    start: Instant,
    /// Randomly seeded, so that senders cannot choose addresses that share a set.
    hash: RandomState,
    sets: Box<[Mutex<[TokenBucket; SET_SIZE]>]>,
}

/// The bucket of one sender.
#[derive(Debug, Clone, Copy)]
struct TokenBucket {
    sender: IpAddr,
    /// The tick at which it is full again; 0 if this place is free.
    full_at: u64,
}

impl TokenBucket {
    const EMPTY: TokenBucket = TokenBucket { sender: IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), full_at: 0 };
}

impl SenderBuckets {
    fn new(meter: Meter) -> Self {
        let sets = (meter.senders as usize).div_ceil(SET_SIZE).max(1);
        SenderBuckets {
            meter,
            start: Instant::now(),
            hash: RandomState::new(),
            sets: (0..sets).map(|_| Mutex::new([TokenBucket::EMPTY; SET_SIZE])).collect(),
        }
    }

    /// Ticks since the start, plus one so that no bucket is full at tick 0.
    fn now(&self) -> u64 {
        let since = self.start.elapsed();
        let below_a_second = u64::from(since.subsec_nanos()) * (TICKS_PER_SECOND / 1_000_000_000);
        since.as_secs() * TICKS_PER_SECOND + below_a_second + 1
    }

    /// Takes the cost of a datagram from its sender's bucket. False if the bucket does not hold enough.
    #[expect(clippy::cast_possible_truncation, reason = "a part of the hash is as good as the whole")]
    fn take(&self, source: IpAddr, now: u64) -> bool {
        let sender = self.meter.sender(source);
        let set = &self.sets[self.hash.hash_one(sender) as usize % self.sets.len()];
        let mut set = set.lock().unwrap_or_else(PoisonError::into_inner);
        let own = set.iter().position(|bucket| bucket.full_at > 0 && bucket.sender == sender);
        let Some(at) = own.or_else(|| (0..SET_SIZE).min_by_key(|&at| set[at].full_at)) else { return true };
        let full_at = if own.is_some() { set[at].full_at } else { 0 };
        let after = self.meter.take(full_at, now);
        if let Some(full_at) = after {
            set[at] = TokenBucket { sender, full_at };
        }
        after.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::plan;
    use super::*;
    use crate::admission::{Prefix, SenderRateLimit};
    use crate::model::DropReason;

    fn limited(burst: u32, senders: u32) -> ListenerPlan {
        let mut plan = plan("192.0.2.1:514".parse().unwrap(), &[]);
        let limit = SenderRateLimit { packets_per_second: 1, burst, ipv4_prefix: 32, ipv6_prefix: 64, senders };
        plan.meter = Some(limit.meter(plan.bind.ip()));
        plan
    }

    /// Why a datagram is refused, if it is.
    fn refusal(admission: &UserAdmission, sender: Option<AddrPort>, now: u64) -> Option<DropReason> {
        if admission.denies(sender) {
            return Some(DropReason::SourceDenied);
        }
        admission.exceeds_rate(sender, now).then_some(DropReason::RateLimited)
    }

    fn from(last: u8) -> Option<AddrPort> {
        Some(([10, 0, 0, last].into(), 4000))
    }

    #[test]
    fn each_sender_has_a_bucket_of_its_own() {
        let admission = UserAdmission::new(&limited(2, 64), None);
        let now = admission.now();
        let mut passed = |last| refusal(&admission, from(last), now).is_none();
        assert_eq!([1, 1, 1, 2, 2, 2, 1].map(&mut passed), [true, true, false, true, true, false, false]);
        assert_eq!(refusal(&admission, from(1), now), Some(DropReason::RateLimited));
        assert_eq!(refusal(&admission, from(1), now + TICKS_PER_SECOND), None);
        assert_eq!(refusal(&admission, from(1), now + TICKS_PER_SECOND), Some(DropReason::RateLimited));
    }

    #[test]
    fn too_many_senders_take_the_places_of_those_nearest_to_a_full_bucket() {
        let admission = UserAdmission::new(&limited(4, 1), None);
        let now = admission.now();
        let mut busy = |last| (0..4).for_each(|_| assert_eq!(refusal(&admission, from(last), now), None));
        (1..=7).for_each(&mut busy);
        // The eighth sender has sent one datagram only.
        assert_eq!(refusal(&admission, from(8), now), None);
        for newcomer in 20..=255 {
            assert_eq!(refusal(&admission, from(newcomer), now), None);
        }
        for last in 1..=7 {
            assert_eq!(refusal(&admission, from(last), now), Some(DropReason::RateLimited), "{last} was forgotten");
        }
    }

    #[test]
    fn sources_come_before_rates_and_cost_nothing() {
        let mut plan = limited(1, 64);
        plan.sources = SourceRules { allow: vec![Prefix::parse("10.0.0.1").unwrap()], deny: Vec::new() }.into();
        let admission = UserAdmission::new(&plan, None);
        assert_eq!(refusal(&admission, from(2), 1), Some(DropReason::SourceDenied));
        assert_eq!(refusal(&admission, None, 1), Some(DropReason::SourceDenied));
        assert_eq!(refusal(&admission, from(1), 1), None);
        assert_eq!(refusal(&admission, from(1), 1), Some(DropReason::RateLimited));
    }

    #[test]
    fn what_stays_the_same_goes_on() {
        let mut plan = limited(1, 64);
        let admission = UserAdmission::new(&plan, None);
        assert!(!admission.differs_from(&plan) && !admission.admits_all() && !UserAdmission::would_admit_all(&plan));
        assert_eq!(refusal(&admission, from(1), 1), None);
        plan.sources = SourceRules { allow: Vec::new(), deny: vec![Prefix::parse("10.0.0.9").unwrap()] }.into();
        assert!(admission.differs_from(&plan));
        let next = UserAdmission::new(&plan, Some(&admission));
        assert_eq!(refusal(&next, from(1), 1), Some(DropReason::RateLimited));
        assert_eq!(refusal(&next, from(9), 1), Some(DropReason::SourceDenied));
        plan.meter = None;
        let unlimited = UserAdmission::new(&plan, Some(&next));
        assert_eq!([refusal(&unlimited, from(1), 1), refusal(&unlimited, from(1), 1)], [None, None]);
        plan.sources = Arc::default();
        assert!(UserAdmission::new(&plan, Some(&unlimited)).admits_all());
    }
}
