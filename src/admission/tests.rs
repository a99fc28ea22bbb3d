use super::*;
use proptest::prelude::*;

fn prefix(text: &str) -> Prefix {
    Prefix::parse(text).unwrap_or_else(|error| panic!("{text}: {error:?}"))
}

fn sources(allow: &[&str], deny: &[&str]) -> SourceRules {
    let read = |texts: &[&str]| texts.iter().map(|text| prefix(text)).collect();
    SourceRules { allow: read(allow), deny: read(deny) }
}

#[test]
fn prefixes_are_read_and_shown() {
    for text in ["10.0.0.0/8", "0.0.0.0/0", "192.0.2.1/32", "2001:db8::/32", "::/0", "2001:db8::1/128"] {
        assert_eq!(prefix(text).to_string(), text);
    }
    assert_eq!(prefix("192.0.2.1").to_string(), "192.0.2.1/32");
    assert_eq!(prefix("2001:db8::1").to_string(), "2001:db8::1/128");
    assert_eq!(Prefix::parse("10.0.0.1/8"), Err(PrefixError::HostBits(prefix("10.0.0.0/8"))));
    assert_eq!(Prefix::parse("2001:db8::1/64"), Err(PrefixError::HostBits(prefix("2001:db8::/64"))));
    for text in ["10.0.0.0/33", "10.0.0.0/999", "::/129"] {
        assert_eq!(Prefix::parse(text), Err(PrefixError::TooLong), "{text}");
    }
    for text in ["", "10", "10.0.0/8", "10.0.0.0/", "10.0.0.0/+8", "10.0.0.0/255.0.0.0", "[::]/0", "a/8"] {
        assert_eq!(Prefix::parse(text), Err(PrefixError::Syntax), "{text}");
    }
}

#[test]
fn the_longest_prefix_decides_and_deny_where_two_are_alike() {
    let rules = sources(&["10.0.0.0/8", "10.1.2.0/24", "192.0.2.1/32"], &["10.1.0.0/16", "192.0.2.1/32"]);
    let ranges = rules.ranges();
    for (sender, verdict) in [
        ("10.0.0.1", SourceVerdict::Allow),
        ("10.1.0.0", SourceVerdict::Deny),
        ("10.1.1.255", SourceVerdict::Deny),
        ("10.1.2.0", SourceVerdict::Allow),
        ("10.1.2.255", SourceVerdict::Allow),
        ("10.1.3.0", SourceVerdict::Deny),
        ("10.2.0.0", SourceVerdict::Allow),
        ("10.255.255.255", SourceVerdict::Allow),
        ("11.0.0.0", SourceVerdict::Deny),
        ("192.0.2.1", SourceVerdict::Deny),
        ("0.0.0.0", SourceVerdict::Deny),
        ("255.255.255.255", SourceVerdict::Deny),
    ] {
        assert_eq!(ranges.verdict(sender.parse().unwrap()), verdict, "{sender}");
    }
}

#[test]
fn without_an_allow_others_are_allowed() {
    let ranges = sources(&[], &["2001:db8::/32"]).ranges();
    assert_eq!(ranges.verdict("2001:db8::1".parse().unwrap()), SourceVerdict::Deny);
    assert_eq!(ranges.verdict("2001:db9::1".parse().unwrap()), SourceVerdict::Allow);
    assert_eq!(sources(&[], &["::/0"]).ranges().verdict("::1".parse().unwrap()), SourceVerdict::Deny);
    assert!(sources(&[], &[]).allows_everyone() && !sources(&["::/0"], &[]).allows_everyone());
    assert_eq!(SourceRules::default().ranges().verdict("192.0.2.1".parse().unwrap()), SourceVerdict::Allow);
}

/// Few addresses and lengths, so that prefixes overlap.
fn some_prefix(v6: bool) -> impl Strategy<Value = Prefix> {
    (0u8..=6, any::<u8>(), any::<bool>()).prop_map(move |(step, byte, far)| match v6 {
        true => {
            let low = if far { u128::MAX } else { u128::from(byte) << 120 | u128::from(byte & 3) };
            cut(Ipv6Addr::from_bits(low).into(), [0, 1, 4, 8, 64, 127, 128][usize::from(step)])
        }
        false => {
            let low = if far { u32::MAX } else { u32::from(byte) << 24 | u32::from(byte & 3) };
            cut(Ipv4Addr::from_bits(low).into(), [0, 1, 4, 8, 16, 31, 32][usize::from(step)])
        }
    })
}

fn cut(address: IpAddr, length: u8) -> Prefix {
    match Prefix::new(address, length) {
        Ok(prefix) | Err(PrefixError::HostBits(prefix)) => prefix,
        Err(other) => panic!("{address}/{length}: {other:?}"),
    }
}

proptest! {
    #[test]
    fn ranges_say_what_the_rules_say(
        (v6, allow, deny) in any::<bool>().prop_flat_map(|v6| {
            let list = || prop::collection::vec(some_prefix(v6), 0..8);
            (Just(v6), list(), list())
        }),
        others in prop::collection::vec(any::<u32>(), 0..8),
    ) {
        let sources = SourceRules { allow, deny };
        let ranges = sources.ranges();
        let edges = sources.rules().into_keys().flat_map(|prefix| {
            let (first, last) = prefix.range();
            [first, last, first.wrapping_sub(1), last.wrapping_add(1)]
        });
        let others = others.into_iter().map(u128::from);
        for number in edges.chain(others) {
            let address: IpAddr = match v6 {
                true => Ipv6Addr::from_bits(number).into(),
                false => Ipv4Addr::from_bits(number as u32).into(),
            };
            let longest = |list: &[Prefix]| list.iter().filter(|p| p.contains(address)).map(|p| p.length).max();
            let expected = match (longest(&sources.allow), longest(&sources.deny)) {
                (None, None) => sources.default_verdict(),
                (allow, deny) if allow > deny => SourceVerdict::Allow,
                _ => SourceVerdict::Deny,
            };
            prop_assert_eq!(ranges.verdict(address), expected, "{}", address);
        }
    }
}

fn meter(packets_per_second: u32, burst: u32) -> Meter {
    let limit = SenderRateLimit { packets_per_second, burst, ipv4_prefix: 24, ipv6_prefix: 64, senders: 1 };
    limit.meter(Ipv4Addr::UNSPECIFIED.into())
}

#[test]
fn a_full_bucket_holds_a_burst_and_fills_at_the_rate() {
    let meter = meter(10, 3);
    let (mut due, start) = (0, 1_000 * TICKS_PER_SECOND);
    let mut passes = |ticks: u64| {
        let after = meter.take(due, start + ticks);
        due = after.unwrap_or(due);
        after.is_some()
    };
    assert_eq!([0; 4].map(&mut passes), [true, true, true, false]);
    let tenth = TICKS_PER_SECOND / 10;
    assert_eq!([tenth - 1, tenth, tenth, 2 * tenth].map(&mut passes), [false, true, false, true]);
    // Full again, and never fuller.
    assert_eq!([100 * tenth; 4].map(&mut passes), [true, true, true, false]);
}

#[test]
fn the_highest_rate_is_exact_to_a_thousandth() {
    for rate in [1, 3, 1_000, 999_999, 9_999_999, 10_000_000] {
        let real = TICKS_PER_SECOND as f64 / meter(rate, 1).interval as f64;
        assert!((real / f64::from(rate) - 1.0).abs() < 0.001, "{rate} becomes {real}");
    }
    assert!(meter(1, 100_000_000).depth > meter(1, 99_999_999).depth);
    // Whatever is asked for, the clock and a bucket together stay below 2^64.
    assert!(meter(1, u32::MAX).depth < 1 << 62);
}

#[test]
fn senders_are_told_apart_by_their_prefix() {
    let v4 = meter(1, 1);
    assert_eq!(v4.sender("192.0.2.77".parse().unwrap()).to_string(), "192.0.2.0");
    assert_eq!(v4.mask(Ipv4Addr::UNSPECIFIED.into()).to_string(), "255.255.255.0");
    let limit = SenderRateLimit { packets_per_second: 1, burst: 1, ipv4_prefix: 0, ipv6_prefix: 64, senders: 1 };
    let v6 = limit.meter(Ipv6Addr::UNSPECIFIED.into());
    assert_eq!(v6.sender("2001:db8:1:2:3::4".parse().unwrap()).to_string(), "2001:db8:1:2::");
    assert_eq!(v6.mask(Ipv6Addr::UNSPECIFIED.into()).to_string(), "ffff:ffff:ffff:ffff::");
    assert_eq!(limit.meter(Ipv4Addr::UNSPECIFIED.into()).sender("192.0.2.77".parse().unwrap()).to_string(), "0.0.0.0");
}

proptest! {
    #[test]
    fn over_any_time_no_more_passes_than_rate_and_burst_allow(
        rate in 1u32..1_000_000,
        burst in 1u32..1_000,
        gaps in prop::collection::vec(0u64..4, 1..300),
    ) {
        let meter = meter(rate, burst);
        let (mut due, mut now, mut passed) = (0, TICKS_PER_SECOND, 0u64);
        let start = now;
        for gap in gaps {
            now += gap * meter.interval / 2;
            let tokens_left = meter.depth.saturating_sub(due.max(now) - now) / meter.interval;
            match meter.take(due, now) {
                Some(after) => (due, passed) = (after, passed + 1),
                None => prop_assert_eq!(tokens_left, 0, "dropped although there was a token"),
            }
            prop_assert!(passed <= u64::from(burst) + (now - start) / meter.interval);
        }
    }
}
