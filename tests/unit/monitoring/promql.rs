//! The names in a query of Prometheus: metrics, labels and their values. promtool checks the syntax.

use udp_fanout::testing::discovery::ErrorKind;
use udp_fanout::testing::health::model::ProbeOutcome;
use udp_fanout::testing::health::settings::ProbeKind;
use udp_fanout::testing::metrics::names::{self, Metric, MetricKind};
use udp_fanout::testing::model::{DropReason, Mode};

/// Labels that Prometheus adds to scraped series.
const TARGET: [&str; 2] = ["job", "instance"];

/// Names in our queries that are not metrics. A misspelt name is not among them.
const WORDS: [&str; 20] = [
    "sum",
    "max",
    "count",
    "rate",
    "increase",
    "changes",
    "absent",
    "max_over_time",
    "histogram_quantile",
    "label_values",
    "vector",
    "by",
    "on",
    "and",
    "or",
    "unless",
    "group_left",
    "instance",
    "listener",
    "__rate_interval",
];

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Word(String),
    Text(String),
    Sign(String),
}

fn tokens(query: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut rest = query.trim_start();
    while let Some(first) = rest.chars().next() {
        let length = |inside: fn(char) -> bool| rest.find(|c| !inside(c)).unwrap_or(rest.len());
        let (token, taken) = if first.is_ascii_alphabetic() || first == '_' {
            let end = length(|c| c.is_ascii_alphanumeric() || c == '_');
            (Token::Word(rest[..end].to_owned()), end)
        } else if first.is_ascii_digit() {
            // A duration, with its unit.
            let end = length(|c| c.is_ascii_alphanumeric() || c == '.');
            (Token::Sign(rest[..end].to_owned()), end)
        } else if first == '"' {
            let end = rest[1..].find('"').unwrap_or_else(|| panic!("unterminated string in {query}")) + 2;
            (Token::Text(rest[1..end - 1].to_owned()), end)
        } else {
            let end = length(|c| "=~!<>".contains(c)).max(1);
            (Token::Sign(rest[..end].to_owned()), end)
        };
        tokens.push(token);
        rest = rest[taken..].trim_start();
    }
    tokens
}

/// The names in a query.
#[derive(Debug, Default)]
pub struct Names {
    /// The metrics, in order.
    pub metrics: Vec<&'static Metric>,
    /// The labels by which its result is grouped, if any.
    pub grouped: Vec<String>,
    /// The labels that its metrics have.
    pub labels: Vec<&'static str>,
}

impl Names {
    /// Parses a query. Panics on any name that the program does not export.
    pub fn of(query: &str) -> Names {
        let tokens = tokens(query);
        let mut names = Names { labels: TARGET.to_vec(), ..Names::default() };
        let mut at = 0;
        while at < tokens.len() {
            let next = tokens.get(at + 1);
            at += 1;
            let Token::Word(word) = &tokens[at - 1] else { continue };
            let opens = |sign: &str| next == Some(&Token::Sign(sign.into()));
            if let Some((metric, extra)) = metric(word) {
                names.metrics.push(metric);
                names.labels.extend(metric.labels.iter().chain(extra));
                if opens("{") {
                    at = matchers(&tokens, at + 1, metric, query);
                }
            } else if ["by", "on"].contains(&word.as_str()) && opens("(") {
                let end = tokens[at..].iter().position(|token| *token == Token::Sign(")".into())).unwrap() + at;
                names.grouped.extend(tokens[at..end].iter().filter_map(|token| match token {
                    Token::Word(label) => Some(label.clone()),
                    Token::Text(_) | Token::Sign(_) => None,
                }));
                at = end;
            } else {
                assert!(WORDS.contains(&word.as_str()), "no metric and no function: {word} in {query}");
            }
        }
        for label in &names.grouped {
            assert!(names.labels.contains(&label.as_str()), "no metric has the label {label}: {query}");
        }
        names
    }

    /// Whether its result can have the label.
    pub fn has_label(&self, label: &str) -> bool {
        if self.grouped.is_empty() { self.labels.contains(&label) } else { self.grouped.iter().any(|by| by == label) }
    }
}

/// The metric of a series name, and the labels that the suffix adds.
fn metric(name: &str) -> Option<(&'static Metric, &'static [&'static str])> {
    let exact = names::ALL.into_iter().find(|metric| metric.name == name);
    let series = |suffix: &str| {
        let metric = name.strip_suffix(suffix)?;
        names::ALL.into_iter().find(|known| known.name == metric && known.kind == MetricKind::Histogram)
    };
    if let Some(metric) = exact.filter(|metric| metric.kind != MetricKind::Histogram) {
        return Some((metric, &[]));
    }
    let buckets = series("_bucket").map(|metric| (metric, &["le"][..]));
    buckets.or_else(|| series("_sum").or_else(|| series("_count")).map(|metric| (metric, &[][..])))
}

/// Checks the matchers from an offset on. Returns where they end.
fn matchers(tokens: &[Token], mut at: usize, metric: &Metric, query: &str) -> usize {
    loop {
        let [Token::Word(label), Token::Sign(sign), Token::Text(value), Token::Sign(then)] = &tokens[at..at + 4] else {
            panic!("{:?} in {query}", &tokens[at..at + 4]);
        };
        let own = metric.labels.contains(&label.as_str());
        assert!(own || TARGET.contains(&label.as_str()), "{} has no label {label}: {query}", metric.name);
        if let Some(known) = values(metric, label).filter(|_| !value.starts_with('$')) {
            let wanted: Vec<&str> = if sign.ends_with('~') { value.split('|').collect() } else { vec![value] };
            for value in wanted {
                assert!(known.contains(&value), "{label} of {} is never {value}: {query}", metric.name);
            }
        }
        at += 4;
        if then == "}" {
            return at;
        }
    }
}

/// The fixed values of a label, if it has any.
pub fn values(metric: &Metric, label: &str) -> Option<Vec<&'static str>> {
    let values = match label {
        "mode" => [Mode::TcEbpf, Mode::Userspace].map(Mode::name).to_vec(),
        "reason" if metric.name != names::LISTENER_MODE.name => DropReason::ALL.map(DropReason::label).to_vec(),
        "result" if metric.name == names::HEALTH_PROBES.name => ProbeOutcome::ALL.map(ProbeOutcome::label).to_vec(),
        "result" => vec!["success", "error"],
        "kind" => ErrorKind::ALL.map(ErrorKind::label).to_vec(),
        "protocol" => ProbeKind::ALL.map(ProbeKind::name).to_vec(),
        "to" => vec!["healthy", "unhealthy"],
        _ => return None,
    };
    Some(values)
}

#[test]
fn names_that_are_not_exported_are_found() {
    for wrong in [
        "rate(udp_fanout_packets_recieved_total[5m])",
        "sum by (endpoint) (udp_fanout_packets_received_total)",
        "udp_fanout_downstream_health{mode=\"tc_ebpf\"}",
        "udp_fanout_packets_dropped_total{reason=\"no_rout\"}",
        "udp_fanout_packets_dropped_total{reason=~\"no_route|nothing\"}",
        "udp_fanout_health_probes_total{result=\"success\"}",
        "udp_fanout_health_probe_round_trip_seconds",
        "udp_fanout_downstream_active_bucket",
        "sum by (le) (udp_fanout_health_probe_round_trip_seconds_sum)",
        "up == 0",
    ] {
        assert!(std::panic::catch_unwind(|| Names::of(wrong)).is_err(), "{wrong}");
    }
    let query = "sum by (listener) (rate(udp_fanout_packets_dropped_total{reason=~\"no_route|refused\"}[5m])) > 0.01";
    let names = Names::of(query);
    assert_eq!(names.metrics, [&names::PACKETS_DROPPED]);
    assert!(names.has_label("listener") && !names.has_label("reason"));
}
