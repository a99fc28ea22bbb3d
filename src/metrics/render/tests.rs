//! The page is read back with a small parser of the text format and compared with the snapshot it was made from.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, UNIX_EPOCH};

use proptest::prelude::*;

use super::*;
use crate::discovery::ErrorKind;
use crate::health::listeners::Transitions;
use crate::health::model::ProbeOutcome;
use crate::health::probe_stats::{BOUNDS, ProbeStatsByKind};
use crate::health::settings::ProbeKind;
use crate::metrics::{DownstreamHealthSnapshot, DownstreamSnapshot, PlanApplyCounts, ReloadCounts};
use crate::model::{DownstreamCounters, DropReason, Drops, FragmentCounters, ListenerCounters, Mode};

/// Label values by label name.
type Labels = BTreeMap<String, String>;

/// One metric as read back from a page.
#[derive(Debug, Default)]
struct Family {
    help: String,
    kind: String,
    series: BTreeMap<Labels, String>,
}

/// Reads a page of the text format; panics on whatever Prometheus would refuse.
fn parse(page: &str) -> BTreeMap<String, Family> {
    assert!(page.ends_with('\n'));
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').expect("help text");
            let family = Family { help: help.to_owned(), ..Family::default() };
            assert!(families.insert(name.to_owned(), family).is_none(), "{name} comes twice");
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("type");
            let family = families.get_mut(name).expect("HELP before TYPE");
            assert!(family.kind.is_empty() && family.series.is_empty(), "{name}: late or second TYPE");
            kind.clone_into(&mut family.kind);
        } else {
            let (name, labels, value) = parse_series(line);
            // The parts of a histogram stand under its name, told apart by a label that it cannot have.
            let part = ["bucket", "sum", "count"].into_iter().find_map(|part| {
                let whole = name.strip_suffix(part)?.strip_suffix('_')?;
                families.get(whole).is_some_and(|family| family.kind == "histogram").then_some((whole, part))
            });
            let (name, labels) = match part {
                Some((whole, part)) => (whole, labels.into_iter().chain([("part".into(), part.into())]).collect()),
                None => (name, labels),
            };
            let family = families.get_mut(name).unwrap_or_else(|| panic!("{name} has no HELP"));
            assert!(!family.kind.is_empty(), "{name} has no TYPE");
            assert!(family.series.insert(labels, value.to_owned()).is_none(), "series comes twice: {line}");
        }
    }
    families
}

fn parse_series(line: &str) -> (&str, Labels, &str) {
    let name_end = line.find(['{', ' ']).expect("a value");
    let (name, mut rest) = line.split_at(name_end);
    let mut labels = Labels::new();
    while rest.starts_with(['{', ',']) {
        let (label, after) = rest[1..].split_once("=\"").expect("a label's value");
        let mut value = String::new();
        let mut chars = after.char_indices();
        let end = loop {
            match chars.next().expect("a closing quote") {
                (at, '"') => break at,
                (_, '\\') => value.push(match chars.next().expect("an escaped character").1 {
                    'n' => '\n',
                    c @ ('\\' | '"') => c,
                    c => panic!("unknown escape \\{c}"),
                }),
                (_, c) => value.push(c),
            }
        };
        assert!(labels.insert(label.to_owned(), value).is_none(), "label comes twice: {line}");
        rest = &after[end + 1..];
    }
    let rest = rest.strip_prefix('}').unwrap_or(rest);
    (name, labels, rest.strip_prefix(' ').expect("a space before the value"))
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
}

fn listener(name: &str) -> ListenerSnapshot {
    let mut dropped = Drops::default();
    dropped.add(DropReason::NoRoute, 3);
    let mut copies_dropped = Drops::default();
    copies_dropped.add(DropReason::RedirectFailed, 4);
    let counters = ListenerCounters {
        packets_received: 1_000,
        packets_forwarded: 990,
        packets_passed: 7,
        bytes_received: 100_000,
        bytes_forwarded: 99_000,
        dropped,
        copies_dropped,
    };
    let endpoint = |last, packets| DownstreamSnapshot {
        endpoint: SocketAddr::from(([10, 0, 0, last], 514)),
        counters: DownstreamCounters { packets, bytes: packets * 100 },
    };
    ListenerSnapshot {
        name: name.into(),
        mode: Mode::TcEbpf,
        mode_reason: "configured".into(),
        replicates: true,
        active: 2,
        counters: vec![(Mode::TcEbpf, counters), (Mode::Userspace, ListenerCounters::default())],
        downstreams: vec![endpoint(1, 400), endpoint(2, 590)],
    }
}

/// Of ICMP, four: two answered, one not, one under way.
fn probes() -> ProbeStatsByKind {
    let mut stats = ProbeStatsByKind::default();
    let icmp = stats.of_mut(ProbeKind::Icmp);
    (0..4).for_each(|_| icmp.record_sent());
    for (outcome, millis) in
        [(ProbeOutcome::Answered, Some(1)), (ProbeOutcome::Answered, Some(3_000)), (ProbeOutcome::NoAnswer, None)]
    {
        icmp.record_outcome(outcome);
        if let Some(millis) = millis {
            icmp.round_trips.observe(Duration::from_millis(millis));
        }
    }
    stats
}

fn snapshot(listeners: Vec<ListenerSnapshot>) -> MetricsSnapshot {
    MetricsSnapshot {
        started: UNIX_EPOCH + Duration::from_millis(1_700_000_000_250),
        plan_applies: PlanApplyCounts { success: 5, error: 1 },
        reloads: ReloadCounts {
            success: 2,
            error: 1,
            last_good: false,
            last_success: UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        },
        listeners,
        fragments: FragmentCounters { strays: 6, lost: 1 },
        programs_ahead: vec![("eth0".into(), 2)],
        health: vec![DownstreamHealthSnapshot {
            listener: "syslog".into(),
            endpoint: SocketAddr::from(([10, 0, 0, 2], 514)),
            healthy: false,
        }],
        health_transitions: vec![("syslog".into(), Transitions { failed: 3, recovered: 2 })],
        probes: probes(),
        discovery: vec![ServiceStatus {
            namespace: "logging".to_owned(),
            service: "vector".to_owned(),
            synced: true,
            last_event_age: Some(Duration::from_millis(1_500)),
            watch_restarts: 3,
            port_mismatch: true,
            errors: ErrorKind::ALL.iter().map(|&kind| (kind, kind as u64)).collect(),
        }],
    }
}

#[test]
fn a_service_that_has_never_been_heard_of_has_no_age() {
    let mut snapshot = snapshot(Vec::new());
    snapshot.discovery[0].last_event_age = None;
    let page = parse(&render(&snapshot));
    assert!(!page.contains_key(names::DISCOVERY_LAST_EVENT_AGE.name));
    let of = labels(&[("namespace", "logging"), ("service", "vector")]);
    assert_eq!(page[names::DISCOVERY_WATCH_RESTARTS.name].series[&of], "3");
    let forbidden = labels(&[("namespace", "logging"), ("service", "vector"), ("kind", "forbidden")]);
    assert_eq!(page[names::DISCOVERY_ERRORS.name].series[&forbidden], "3");
}

#[test]
fn every_metric_is_there_with_its_type_help_and_labels() {
    let page = parse(&render(&snapshot(vec![listener("syslog")])));
    let expected: Vec<_> = names::ALL.iter().map(|metric| metric.name).collect();
    let mut found: Vec<_> = page.keys().map(String::as_str).collect();
    found.sort_by_key(|name| expected.iter().position(|e| e == name));
    assert_eq!(found, expected);
    for metric in names::ALL {
        let family = &page[metric.name];
        assert_eq!(family.help, metric.help);
        assert_eq!(family.kind, metric.kind.name());
        for series in family.series.keys() {
            let mut wanted = metric.labels.to_vec();
            if metric.kind == MetricKind::Histogram {
                wanted.push("part");
                wanted.extend((series["part"] == "bucket").then_some("le"));
            }
            wanted.sort_unstable();
            assert!(series.keys().eq(wanted), "{}: {series:?}", metric.name);
        }
    }
}

#[test]
fn values_are_those_of_the_snapshot() {
    let page = parse(&render(&snapshot(vec![listener("syslog")])));
    let tc = labels(&[("listener", "syslog"), ("mode", "tc_ebpf")]);
    assert_eq!(page["udp_fanout_packets_received_total"].series[&tc], "1000");
    assert_eq!(page["udp_fanout_packets_forwarded_total"].series[&tc], "990");
    assert_eq!(page["udp_fanout_packets_passed_total"].series[&tc], "7");
    assert_eq!(page["udp_fanout_bytes_received_total"].series[&tc], "100000");
    assert_eq!(page["udp_fanout_bytes_forwarded_total"].series[&tc], "99000");
    let active = labels(&[("listener", "syslog")]);
    assert_eq!(page["udp_fanout_downstream_active"].series[&active], "2");
    let endpoint = labels(&[("listener", "syslog"), ("endpoint", "10.0.0.2:514")]);
    assert_eq!(page["udp_fanout_downstream_packets_total"].series[&endpoint], "590");
    assert_eq!(page["udp_fanout_downstream_bytes_total"].series[&endpoint], "59000");
    let mode = labels(&[("listener", "syslog"), ("mode", "tc_ebpf"), ("reason", "configured")]);
    assert_eq!(page["udp_fanout_listener_mode_info"].series[&mode], "1");
    assert_eq!(page["udp_fanout_plan_apply_total"].series[&labels(&[("result", "success")])], "5");
    assert_eq!(page["udp_fanout_plan_apply_total"].series[&labels(&[("result", "error")])], "1");
    assert_eq!(page["udp_fanout_config_reloads_total"].series[&labels(&[("result", "success")])], "2");
    assert_eq!(page["udp_fanout_config_reloads_total"].series[&labels(&[("result", "error")])], "1");
    assert_eq!(page["udp_fanout_config_last_reload_successful"].series[&Labels::new()], "0");
    let last = &page["udp_fanout_config_last_reload_success_timestamp_seconds"].series[&Labels::new()];
    assert_eq!(last, "1700000000");
    assert_eq!(page["udp_fanout_start_time_seconds"].series[&Labels::new()], "1700000000.25");
    let build = page["udp_fanout_build_info"].series.first_key_value().expect("a series");
    assert_eq!(build.0["version"], env!("CARGO_PKG_VERSION"));
    assert!(!build.0["revision"].is_empty());
}

#[test]
fn health_checks_are_counted_for_the_protocols_in_use() {
    let text = render(&snapshot(vec![listener("syslog")]));
    let page = parse(&text);
    let to = |to| page[names::HEALTH_TRANSITIONS.name].series[&labels(&[("listener", "syslog"), ("to", to)])].as_str();
    assert_eq!((to("unhealthy"), to("healthy")), ("3", "2"));
    let probes = &page[names::HEALTH_PROBES.name].series;
    assert_eq!(probes.len(), ProbeOutcome::ALL.len());
    for outcome in ProbeOutcome::ALL {
        let expected = match outcome {
            ProbeOutcome::Answered => "2",
            ProbeOutcome::NoAnswer => "1",
            _ => "0",
        };
        assert_eq!(probes[&labels(&[("protocol", "icmp"), ("result", outcome.label())])], expected);
    }
    // As Prometheus wants it: cumulative, in order, up to infinity.
    let name = names::HEALTH_ROUND_TRIP.name;
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with(name)).collect();
    let bounds = BOUNDS.iter().map(|bound| format!("{name}_bucket{{protocol=\"icmp\",le=\"{bound}\"}} "));
    let counts = BOUNDS.iter().map(|bound| u64::from(*bound >= 0.001));
    let mut expected: Vec<String> = bounds.zip(counts).map(|(series, count)| format!("{series}{count}")).collect();
    expected.push(format!("{name}_bucket{{protocol=\"icmp\",le=\"+Inf\"}} 2"));
    expected.push(format!("{name}_sum{{protocol=\"icmp\"}} 3.001"));
    expected.push(format!("{name}_count{{protocol=\"icmp\"}} 2"));
    assert_eq!(lines, expected);
    let unused = MetricsSnapshot { probes: ProbeStatsByKind::default(), ..snapshot(Vec::new()) };
    assert!(!render(&unused).contains("udp_fanout_health_probe"));
}

#[test]
fn every_drop_reason_is_there_even_at_zero() {
    let page = parse(&render(&snapshot(vec![listener("syslog")])));
    let drops = &page["udp_fanout_packets_dropped_total"].series;
    assert_eq!(drops.len(), 2 * DropReason::COUNT);
    for reason in DropReason::ALL {
        let series = labels(&[("listener", "syslog"), ("mode", "tc_ebpf"), ("reason", reason.label())]);
        assert_eq!(drops[&series], if reason == DropReason::NoRoute { "3" } else { "0" });
    }
}

#[test]
fn copies_are_counted_for_listeners_that_replicate_and_no_others() {
    let mut other = listener("other");
    other.replicates = false;
    let page = parse(&render(&snapshot(vec![listener("tee"), other.clone()])));
    let copies = &page["udp_fanout_copies_dropped_total"].series;
    assert_eq!(copies.len(), 2 * DropReason::COUNT);
    for reason in DropReason::ALL {
        let series = labels(&[("listener", "tee"), ("mode", "tc_ebpf"), ("reason", reason.label())]);
        assert_eq!(copies[&series], if reason == DropReason::RedirectFailed { "4" } else { "0" });
    }
    assert!(!render(&snapshot(vec![other])).contains("copies_dropped"));
}

#[test]
fn counters_are_exact_up_to_the_last_of_64_bits() {
    for value in [0, (1 << 53) + 1, u64::MAX - 1, u64::MAX] {
        let mut listener = listener("syslog");
        listener.counters[0].1.bytes_received = value;
        let page = parse(&render(&snapshot(vec![listener])));
        let tc = labels(&[("listener", "syslog"), ("mode", "tc_ebpf")]);
        assert_eq!(page["udp_fanout_bytes_received_total"].series[&tc], value.to_string());
    }
}

#[test]
fn what_is_gone_from_the_snapshot_is_gone_from_the_page() {
    let mut listener = listener("syslog");
    assert!(render(&snapshot(vec![listener.clone()])).contains("10.0.0.1:514"));
    listener.downstreams.remove(0);
    assert!(!render(&snapshot(vec![listener])).contains("10.0.0.1:514"));
}

#[test]
fn equal_snapshots_give_equal_pages_in_the_documented_order() {
    let snapshot = snapshot(vec![listener("b"), listener("a")]);
    let page = render(&snapshot);
    assert_eq!(page, render(&snapshot));
    let order: Vec<_> = page.lines().filter_map(|line| line.strip_prefix("# HELP ")?.split(' ').next()).collect();
    let expected: Vec<_> = names::ALL.iter().map(|metric| metric.name).collect();
    assert_eq!(order, expected);
}

#[test]
fn names_with_unusual_characters_survive() {
    for name in ["tenant-a syslog", "a\"b", "a\\b", "line\nfeed", "ünï", "{x=\"y\"} 1", "a,b=c", "\\"] {
        let page = parse(&render(&snapshot(vec![listener(name)])));
        let series = labels(&[("listener", name)]);
        assert_eq!(page["udp_fanout_downstream_active"].series[&series], "2", "{name:?}");
    }
}

fn any_drops() -> impl Strategy<Value = Drops> {
    proptest::collection::vec(any::<u32>(), DropReason::COUNT).prop_map(|counts| {
        let mut drops = Drops::default();
        for (reason, n) in DropReason::ALL.into_iter().zip(counts) {
            drops.add(reason, n.into());
        }
        drops
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn any_snapshot_reads_back_as_it_was(
        counts in any::<[u64; 5]>(),
        dropped in any_drops(),
        copies_dropped in any_drops(),
        endpoints in proptest::collection::btree_map(any::<SocketAddr>(), any::<(u64, u64)>(), 0..40),
    ) {
        let counters = ListenerCounters {
            packets_received: counts[0],
            packets_forwarded: counts[1],
            packets_passed: counts[2],
            bytes_received: counts[3],
            bytes_forwarded: counts[4],
            dropped,
            copies_dropped,
        };
        let downstreams: Vec<_> = endpoints
            .iter()
            .map(|(&endpoint, &(packets, bytes))| {
                DownstreamSnapshot { endpoint, counters: DownstreamCounters { packets, bytes } }
            })
            .collect();
        let listener = ListenerSnapshot {
            active: downstreams.len(),
            counters: vec![(Mode::Userspace, counters)],
            downstreams,
            ..listener("x")
        };
        let page = parse(&render(&snapshot(vec![listener])));
        let user = labels(&[("listener", "x"), ("mode", "userspace")]);
        let names = ["packets_received", "packets_forwarded", "packets_passed", "bytes_received", "bytes_forwarded"];
        for (name, count) in names.into_iter().zip(counts) {
            prop_assert_eq!(&page[&format!("udp_fanout_{name}_total")].series[&user], &count.to_string());
        }
        for (reason, count) in dropped.iter() {
            let series = labels(&[("listener", "x"), ("mode", "userspace"), ("reason", reason.label())]);
            prop_assert_eq!(&page["udp_fanout_packets_dropped_total"].series[&series], &count.to_string());
            let copies = copies_dropped.get(reason).to_string();
            prop_assert_eq!(&page["udp_fanout_copies_dropped_total"].series[&series], &copies);
        }
        let handed = page.get("udp_fanout_downstream_packets_total").map_or(0, |family| family.series.len());
        prop_assert_eq!(handed, endpoints.len());
        for (endpoint, (packets, bytes)) in endpoints {
            let series = labels(&[("listener", "x"), ("endpoint", &endpoint.to_string())]);
            prop_assert_eq!(&page["udp_fanout_downstream_packets_total"].series[&series], &packets.to_string());
            prop_assert_eq!(&page["udp_fanout_downstream_bytes_total"].series[&series], &bytes.to_string());
        }
    }
}
