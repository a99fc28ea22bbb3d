//! The lab's arithmetic: a report that misses a lost, duplicated or reordered datagram would make every network
//! test worthless.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use proptest::prelude::*;
use udp_fanout_lab::report::{ReceiverStats, RunStats};
use udp_fanout_lab::traffic::{decode, encode};
use udp_fanout_lab::{Expect, Metrics, Report, scrape};

const RUN: u64 = 7;

fn source() -> SocketAddr {
    "10.0.0.2:4000".parse().unwrap()
}

fn tally(name: &str, sequence_numbers: &[u64]) -> ReceiverStats {
    let mut tally = ReceiverStats::new(name, "10.0.1.2:5514".parse().unwrap());
    for &number in sequence_numbers {
        tally.note(RUN, number, source(), 100);
    }
    tally
}

fn report(sent: u64, receivers: &[&[u64]], expect: Expect) -> Report {
    let tallies: Vec<_> = receivers.iter().map(|numbers| tally("r", numbers)).collect();
    Report::new(&BTreeMap::from([(RUN, sent)]), &tallies, expect)
}

fn summary(report: &Report) -> (u64, u64, u64, u64) {
    (report.lost, report.duplicated, report.reordered, report.unexpected)
}

#[test]
fn report_of_a_perfect_round() {
    let report = report(6, &[&[0, 3], &[1, 4], &[2, 5]], Expect::OneOfThem);
    assert!(report.is_perfect());
    assert_eq!(report.counts(), [2, 2, 2]);
    assert_eq!(report.receivers[0].bytes, 200);
    assert_eq!(report.receivers[0].sources.iter().copied().collect::<Vec<_>>(), [source()]);
}

#[test]
fn report_finds_what_is_lost() {
    let report = report(6, &[&[0, 3], &[4], &[2]], Expect::OneOfThem);
    assert_eq!(summary(&report), (2, 0, 0, 0));
    assert_eq!(report.missing, [1, 5]);
    assert!(!report.is_complete());
}

#[test]
fn report_finds_copies_at_one_receiver_and_at_two() {
    let same = report(3, &[&[0, 0, 1], &[2]], Expect::OneOfThem);
    assert_eq!(summary(&same), (0, 1, 0, 0));
    assert_eq!(same.receivers[0].duplicated, 1);
    let other = report(3, &[&[0, 1], &[1, 2]], Expect::OneOfThem);
    assert_eq!(summary(&other), (0, 1, 0, 0));
    assert_eq!(other.receivers[0].duplicated, 0);
}

#[test]
fn report_finds_what_was_overtaken() {
    // 3 and 4 come after 5; a repeat of 1 is a copy, not disorder.
    let report = report(6, &[&[0, 1, 5, 3, 4, 1, 2]], Expect::OneOfThem);
    assert_eq!(summary(&report), (0, 1, 3, 0));
    assert!(!report.is_perfect());
}

#[test]
fn report_expects_a_copy_at_each_receiver_when_told() {
    assert!(report(2, &[&[0, 1], &[0, 1]], Expect::EachOfThem).is_perfect());
    let uneven = report(2, &[&[0, 1, 1], &[1]], Expect::EachOfThem);
    assert_eq!(summary(&uneven), (1, 1, 0, 0));
}

#[test]
fn report_does_not_take_foreign_datagrams_for_ours() {
    let mut stranger = tally("r", &[0, 1, 2]);
    stranger.note(RUN + 1, 0, source(), 100);
    stranger.note_unexpected(source(), || "damaged".into());
    let report = Report::new(&BTreeMap::from([(RUN, 2)]), &[stranger], Expect::OneOfThem);
    assert_eq!(summary(&report), (0, 0, 0, 3), "one of another run, one damaged, one never sent");
}

proptest! {
    /// For any losses and duplicates, the report's sums are those of a straightforward count.
    #[test]
    fn report_agrees_with_a_plain_count(outcomes in prop::collection::vec((0..3usize, 0..4usize), 0..200), seed: u64) {
        let mut arrivals = [Vec::new(), Vec::new(), Vec::new()];
        for (number, (receiver, copies)) in outcomes.iter().enumerate() {
            arrivals[*receiver].extend(std::iter::repeat_n(number as u64, *copies));
        }
        for numbers in &mut arrivals {
            // Any order will do as long as it is the same on every run of this case.
            numbers.sort_by_key(|number| (number ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        }
        let [a, b, c] = &arrivals;
        let report = report(outcomes.len() as u64, &[a, b, c], Expect::OneOfThem);
        prop_assert_eq!(report.lost, outcomes.iter().filter(|(_, copies)| *copies == 0).count() as u64);
        prop_assert_eq!(report.duplicated, outcomes.iter().map(|(_, copies)| copies.saturating_sub(1) as u64).sum::<u64>());
        let overtaken = |numbers: &Vec<u64>| {
            let first = |i: &usize| !numbers[..*i].contains(&numbers[*i]);
            let late = |i: &usize| numbers[..*i].iter().any(|before| *before > numbers[*i]);
            (0..numbers.len()).filter(first).filter(late).count() as u64
        };
        prop_assert_eq!(report.reordered, arrivals.iter().map(overtaken).sum::<u64>());
    }

    /// A datagram parses as what was written, and does not parse once a byte is removed, added or changed.
    #[test]
    fn datagrams_are_recognised_and_damage_is_seen(run: u64, number in 0..1u64 << 28, size in 20..2000usize, at: usize) {
        let mut datagram = Vec::new();
        encode(&mut datagram, run, number, size);
        prop_assert_eq!(datagram.len(), size);
        prop_assert_eq!(decode(&datagram), Ok((run, number)));
        prop_assert!(decode(&datagram[..size - 1]).is_err());
        let at = at % size;
        datagram[at] ^= 1;
        prop_assert_ne!(decode(&datagram), Ok((run, number)));
        datagram[at] ^= 1;
        datagram.push(0);
        prop_assert!(decode(&datagram).is_err());
    }
}

#[test]
fn tally_counts_only_first_arrivals_as_reordered() {
    let mut run = RunStats::default();
    for number in [1, 1, 0, 0] {
        run.note(number);
    }
    assert_eq!((run.received, run.duplicated, run.reordered), (4, 2, 1));
}

#[test]
fn metrics_pages_are_read() {
    let page = "# HELP a_total words\n# TYPE a_total counter\n\
        a_total{listener=\"x\",mode=\"tc_ebpf\"} 3\na_total{listener=\"y, \\\"z\\\"}\",mode=\"userspace\"} 4\n\nb 1.5\n";
    let metrics = Metrics::parse(page).unwrap();
    assert_eq!(metrics.samples.len(), 3);
    assert_eq!(metrics.sum("a_total", &[]), 7);
    assert_eq!(metrics.sum("a_total", &[("listener", "y, \"z\"}")]), 4);
    assert_eq!(metrics.sum("a_total", &[("listener", "x"), ("mode", "userspace")]), 0);
    assert!(metrics.has("b", &[]));
    assert!(Metrics::parse("a_total{listener=\"x} 3").is_err());
    assert_eq!(scrape::parse_answer("HTTP/1.1 503 Busy\r\nA: b\r\n\r\nno\r\n\r\nyet").unwrap().status, 503);
    assert!(scrape::parse_answer("SSH-2.0-OpenSSH_9.2\r\n\r\n").is_err());
}
