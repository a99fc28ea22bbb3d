//! What the demo prints: the network, the table of the receivers, the filter and the counters.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};

use udp_fanout_lab::scrape::Sample;
use udp_fanout_lab::{INGRESS, Lab, Metrics};

use super::{DemoOptions, DemoResult};
use crate::model::Mode;

/// The participants and their addresses, before anything is sent.
pub(super) fn picture(lab: &Lab, options: DemoOptions) -> String {
    let mut text = format!(
        "udp-fanout in {} mode: {} datagrams from one socket, in network namespaces of their own\n\n",
        options.mode.name(),
        with_thousands(options.count)
    );
    let start = format!("  sender {} ──► gateway {} ─┬", Lab::SENDER, lab.listener());
    let indent = " ".repeat(start.chars().count() - 1);
    for (position, site) in lab.sites.iter().enumerate() {
        let lead = match position {
            0 => start.clone(),
            _ if position + 1 == lab.sites.len() => format!("{indent}└"),
            _ => format!("{indent}├"),
        };
        let _ = writeln!(text, "{lead}─► {} {}", site.name, site.address);
    }
    text.push('\n');
    text
}

/// The table of what the receivers got, and the rate.
pub(super) fn table(result: &DemoResult, mode: Mode) -> String {
    let report = &result.report;
    let header = ["", "datagrams", "lost", "duplicated", "reordered", "source seen"].map(String::from);
    let mut rows = vec![header];
    for receiver in &report.receivers {
        let [received, duplicated, reordered] =
            [receiver.received, receiver.duplicated, receiver.reordered].map(with_thousands);
        // A loss belongs to no single receiver: which one the datagram was meant for is unknown.
        let lost = "-".to_owned();
        let sources = distinct_ips(receiver.sources.iter().map(SocketAddr::ip));
        rows.push([receiver.name.clone(), received, lost, duplicated, reordered, sources]);
    }
    let arrived = report.counts().iter().sum();
    let [received, lost, duplicated, reordered] =
        [arrived, report.lost, report.duplicated, report.reordered].map(with_thousands);
    rows.push(["all".into(), received, lost, duplicated, reordered, String::new()]);
    let mut text = align(&rows);
    let _ = writeln!(
        text,
        "\nThe source is {}.",
        match mode {
            Mode::TcEbpf => "the sender's own address: the kernel program keeps it",
            Mode::Userspace => "the gateway's address: the daemon's sockets send anew",
        }
    );
    let seconds = result.duration.as_secs_f64();
    let _ = writeln!(
        text,
        "{} datagrams in {seconds:.2} s: {} a second, waiting for the receivers after every few dozen.",
        with_thousands(report.sent),
        with_thousands((report.sent as f64 / seconds) as u64)
    );
    text
}

/// The kernel's filter and the daemon's counters, under the commands that print them.
pub(super) fn evidence(result: &DemoResult) -> String {
    let filter = if result.filter.is_empty() { "(no filter)" } else { result.filter.trim() };
    let mut text =
        format!("\n$ tc filter show dev {INGRESS} ingress\n{filter}\n\n$ curl http://127.0.0.1:9090/metrics\n");
    for sample in traffic_counters(&result.metrics) {
        let _ = writeln!(text, "{sample}");
    }
    text.push('\n');
    text
}

/// The samples that count traffic and are not zero.
fn traffic_counters(metrics: &Metrics) -> impl Iterator<Item = &Sample> {
    let prefixes = ["udp_fanout_packets_", "udp_fanout_bytes_", "udp_fanout_downstream_"];
    let counts_traffic = move |name: &str| prefixes.iter().any(|prefix| name.starts_with(prefix));
    metrics.samples.iter().filter(move |sample| sample.value != 0.0 && counts_traffic(&sample.name))
}

/// Lays out rows in columns: the first and last to the left, numbers to the right.
fn align<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = width(column);
            let _ = match column {
                0 => write!(line, "  {cell:<width$}"),
                _ if column == N - 1 => write!(line, "   {cell}"),
                _ => write!(line, "   {cell:>width$}"),
            };
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

fn distinct_ips(addresses: impl Iterator<Item = IpAddr>) -> String {
    let distinct: BTreeSet<_> = addresses.map(|ip| ip.to_string()).collect();
    distinct.into_iter().collect::<Vec<_>>().join(", ")
}

/// A number with commas between its thousands.
pub(super) fn with_thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
