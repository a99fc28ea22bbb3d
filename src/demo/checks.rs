//! The checks of the demo: every statement that it makes about the result, and whether it holds.

use std::fmt::Write;
use std::net::IpAddr;

use udp_fanout_lab::Lab;

use super::report::with_thousands;
use super::{DemoOptions, DemoResult};
use crate::model::Mode;

/// A statement about the result.
pub(super) struct DemoCheck {
    pub(super) passed: bool,
    statement: String,
}

impl DemoCheck {
    fn new(passed: bool, statement: impl Into<String>) -> Self {
        DemoCheck { passed, statement: statement.into() }
    }
}

/// Makes every check, in the order in which the demo prints them.
pub(super) fn check(result: &DemoResult, options: DemoOptions) -> Vec<DemoCheck> {
    let mut checks = check_receivers(result, options);
    checks.extend(check_counters(result, options.mode));
    checks.extend(check_kernel(result, options.mode));
    checks
}

/// One line for each check.
pub(super) fn render(checks: &[DemoCheck]) -> String {
    let mut text = String::new();
    for check in checks {
        let verdict = if check.passed { "  ok    " } else { "  FAILED" };
        let _ = writeln!(text, "{verdict} {}", check.statement);
    }
    if !checks.iter().all(|check| check.passed) {
        text.push_str("\nFAILED: not every check passed.\n");
    }
    text
}

/// What the receivers got, against what was sent.
fn check_receivers(result: &DemoResult, options: DemoOptions) -> Vec<DemoCheck> {
    let report = &result.report;
    let counts = report.counts();
    let spread = counts.iter().max().unwrap_or(&0) - counts.iter().min().unwrap_or(&0);
    let source = match options.mode {
        Mode::TcEbpf => "every receiver saw the sender's own address",
        Mode::Userspace => "every receiver saw an address of the gateway",
    };
    let sent = format!("{} datagrams were sent", with_thousands(options.count));
    vec![
        DemoCheck::new(report.sent == options.count, sent),
        DemoCheck::new(report.lost == 0 && report.duplicated == 0, "each arrived exactly once"),
        DemoCheck::new(report.reordered == 0, "each receiver got its share in the order of sending"),
        DemoCheck::new(report.unexpected == 0, "nothing else arrived, and nothing damaged"),
        DemoCheck::new(spread <= 1, "the receivers got equal shares"),
        DemoCheck::new(sources_match(result, options.mode), source),
    ]
}

fn sources_match(result: &DemoResult, mode: Mode) -> bool {
    let matches = |ip: IpAddr| match mode {
        Mode::TcEbpf => ip == Lab::SENDER,
        Mode::Userspace => result.gateway_addresses.contains(&ip),
    };
    result.report.receivers.iter().all(|receiver| receiver.sources.iter().all(|source| matches(source.ip())))
}

/// The daemon's counters, against what the receivers got.
fn check_counters(result: &DemoResult, mode: Mode) -> Vec<DemoCheck> {
    let DemoResult { report, metrics, .. } = result;
    let labels = [("listener", "lab"), ("mode", mode.name())];
    let sum = |name: &str| metrics.sum(&format!("udp_fanout_{name}_total"), &labels);
    let arrived: u64 = report.counts().iter().sum();
    let bytes: u64 = report.receivers.iter().map(|receiver| receiver.bytes).sum();
    let packets = sum("packets_received") == report.sent && sum("packets_forwarded") == arrived;
    let each = report.receivers.iter().all(|receiver| {
        let endpoint = receiver.address.map(|address| address.to_string()).unwrap_or_default();
        let labels = [("listener", "lab"), ("endpoint", endpoint.as_str())];
        metrics.sum("udp_fanout_downstream_packets_total", &labels) == receiver.received
    });
    let no_drops = metrics.sum("udp_fanout_packets_dropped_total", &[]) == 0;
    vec![
        DemoCheck::new(packets, "the daemon counted what was sent as received and what arrived as forwarded"),
        DemoCheck::new(sum("bytes_received") == bytes && sum("bytes_forwarded") == bytes, "and the same bytes"),
        DemoCheck::new(no_drops, "it counted no drops"),
        DemoCheck::new(each, "its count for each receiver is the receiver's own"),
    ]
}

/// The kernel's filter, while the daemon ran and after it.
fn check_kernel(result: &DemoResult, mode: Mode) -> Vec<DemoCheck> {
    let filter = match mode {
        Mode::TcEbpf => DemoCheck::new(
            result.filter.contains("pref 49152 bpf") && result.filter.contains("udp_fanout"),
            "the kernel shows the filter udp_fanout at pref 49152",
        ),
        Mode::Userspace => DemoCheck::new(result.filter.is_empty(), "the kernel shows no filter"),
    };
    let exit = result.exit_status == "exit status: 0";
    vec![
        filter,
        DemoCheck::new(exit, "the daemon ended with exit code 0 when asked to"),
        DemoCheck::new(result.filter_afterwards.is_empty(), "no filter is left after it"),
    ]
}
