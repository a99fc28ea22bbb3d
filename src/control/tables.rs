//! Renders a [`StatusReport`] as tables. Pure; the caller decides whether to colour them.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};

use super::report::{DownstreamReport, ListenerReport, Rates, StatusReport};

const BOLD: &str = "\u{1b}[1m";
const RED: &str = "\u{1b}[31m";
const YELLOW: &str = "\u{1b}[33m";
const PLAIN: &str = "\u{1b}[0m";

/// How a row is coloured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RowStyle {
    Plain,
    Warning,
    Problem,
}

/// The report as text, with a line feed at its end.
#[must_use]
pub fn render(report: &StatusReport, colour: bool) -> String {
    let mut text = String::new();
    let daemon = &report.daemon;
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "udp-fanout {}, pid {}, up {}, {}\n",
        daemon.version,
        daemon.pid,
        span(daemon.uptime_secs),
        daemon.config.display()
    );
    text += &listeners(report, colour);
    text += &notes(report);
    text.push('\n');
    text += &downstreams(report, colour);
    if !report.services.is_empty() {
        text.push('\n');
        text += &services(report, colour);
    }
    if !report.problems.is_empty() {
        text.push('\n');
    }
    for problem in &report.problems {
        let line = format!("! {problem}");
        text += &painted(&line, if colour { RED } else { "" });
    }
    text
}

fn listeners(report: &StatusReport, colour: bool) -> String {
    let head = [
        "LISTENER",
        "BIND",
        "MODE",
        "INTERFACE",
        "POLICY",
        "<IN/s",
        "<OUT/s",
        "<DROP/s",
        "<BIT/s",
        "<RECEIVED",
        "<DROPPED",
    ];
    let row = |listener: &ListenerReport| {
        let rate = |of: fn(&Rates) -> f64| listener.rates.as_ref().map_or_else(|| "-".to_owned(), |r| scaled(of(r)));
        let cells = vec![
            listener.name.clone(),
            listener.bind.clone(),
            listener.mode.clone(),
            listed(&listener.interfaces),
            listener.policy.clone(),
            rate(|rates| rates.packets),
            rate(|rates| rates.forwarded),
            rate(|rates| rates.dropped),
            rate(|rates| rates.bytes * 8.0),
            listener.received.to_string(),
            listener.dropped.to_string(),
        ];
        let dropping = listener.rates.is_some_and(|rates| rates.dropped > 0.0);
        let style = if listener.waits_for.is_some() || dropping { RowStyle::Problem } else { RowStyle::Plain };
        (cells, style)
    };
    table(&head, report.listeners.iter().map(row), colour)
}

/// What does not fit into a column: the reason for a listener's mode, its drops by reason, and what it waits for.
fn notes(report: &StatusReport) -> String {
    let mut text = String::new();
    for listener in &report.listeners {
        let name = &listener.name;
        let mut note = |words: String| text += &format!("  {name}: {words}\n");
        note(format!("{}: {}", listener.mode, listener.mode_reason));
        if let Some(reason) = &listener.socket_only {
            note(format!("its socket forwards everything: {reason}"));
        }
        if !listener.drops.is_empty() {
            note(format!("dropped: {}", counted(&listener.drops)));
        }
        if !listener.copies_dropped.is_empty() {
            note(format!("copies dropped: {}", counted(&listener.copies_dropped)));
        }
        if let Some(reason) = &listener.waits_for {
            note(format!("not ready: {reason}"));
        }
    }
    text
}

fn downstreams(report: &StatusReport, colour: bool) -> String {
    let head = ["LISTENER", "DOWNSTREAM", "ADDRESS", "HEALTH", "<AGE", "<SHARE", "<OUT/s", "<SENT", "VIA"];
    let all = report.listeners.iter().flat_map(|listener| listener.downstreams.iter().map(move |to| (listener, to)));
    let row = |(listener, to): (&ListenerReport, &DownstreamReport)| {
        let state = to.health.as_ref().map_or("", |health| health.state.as_str());
        let style = match (state, to.share > 0.0) {
            ("unhealthy", _) => RowStyle::Problem,
            (_, false) => RowStyle::Warning,
            _ => RowStyle::Plain,
        };
        let cells = vec![
            listener.name.clone(),
            to.name.clone(),
            to.address.to_string(),
            health(to),
            span(to.age_secs),
            percent(to.share),
            to.rates.map_or_else(|| "-".to_owned(), |rates| scaled(rates.packets)),
            to.packets.to_string(),
            to.way.clone().unwrap_or_else(|| "-".to_owned()),
        ];
        (cells, style)
    };
    table(&head, all.map(row), colour)
}

fn health(to: &DownstreamReport) -> String {
    let Some(health) = &to.health else { return "-".to_owned() };
    let mut text = health.state.clone();
    if health.state != "unknown" {
        text += &format!(" {}", span(health.for_secs));
    }
    match &health.failure {
        Some(failure) if health.state == "unhealthy" => text + ": " + failure,
        _ => text,
    }
}

fn services(report: &StatusReport, colour: bool) -> String {
    let head = ["SERVICE", "SYNCED", "<LAST EVENT", "ERRORS"];
    let row = |service: &super::report::ServiceReport| {
        let cells = vec![
            format!("{}/{}", service.namespace, service.service),
            if service.synced { "yes" } else { "no" }.to_owned(),
            service.last_event_secs.map_or_else(|| "never".to_owned(), |secs| format!("{} ago", span(secs))),
            if service.errors.is_empty() { "-".to_owned() } else { counted(&service.errors) },
        ];
        (cells, if service.synced { RowStyle::Plain } else { RowStyle::Problem })
    };
    table(&head, report.services.iter().map(row), colour)
}

/// Columns are separated by two blanks; those whose title starts with `<` are aligned to the right.
fn table(head: &[&str], rows: impl Iterator<Item = (Vec<String>, RowStyle)>, colour: bool) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(head.iter().map(|title| Cell::new(title.trim_start_matches('<'))));
    let mut styles = vec![BOLD];
    for (cells, style) in rows {
        table.add_row(cells);
        styles.push(match style {
            RowStyle::Plain => "",
            RowStyle::Warning => YELLOW,
            RowStyle::Problem => RED,
        });
    }
    for (column, title) in table.column_iter_mut().zip(head) {
        column.set_padding((0, 2));
        if title.starts_with('<') {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    // Cells contain no line feeds, so each row is one line.
    table.lines().zip(styles).map(|(line, style)| painted(line.trim_end(), if colour { style } else { "" })).collect()
}

fn painted(line: &str, style: &str) -> String {
    if style.is_empty() { format!("{line}\n") } else { format!("{style}{line}{PLAIN}\n") }
}

fn listed(names: &[String]) -> String {
    if names.is_empty() { "-".to_owned() } else { names.join(",") }
}

fn counted(counts: &BTreeMap<String, u64>) -> String {
    let counts: Vec<String> = counts.iter().map(|(what, n)| format!("{n} {what}")).collect();
    counts.join(", ")
}

/// A rate in three digits or so: `0`, `4.2`, `950`, `12.3k`, `1.25M`.
fn scaled(rate: f64) -> String {
    const STEPS: [(f64, &str); 4] = [(1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")];
    if rate < 0.05 {
        return "0".to_owned();
    }
    // What would round to 1000 of one unit is 1.00 of the next.
    let (unit, suffix) = STEPS.into_iter().find(|(unit, _)| rate >= unit * 0.9995).unwrap_or((1.0, ""));
    let value = rate / unit;
    let digits = match value {
        _ if suffix.is_empty() && value >= 99.95 => 0,
        _ if suffix.is_empty() => 1,
        ..9.995 => 2,
        ..99.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$}{suffix}")
}

fn percent(share: f64) -> String {
    let percent = share * 100.0;
    if percent == 0.0 || percent >= 9.95 { format!("{percent:.0}%") } else { format!("{percent:.1}%") }
}

/// A duration in its two largest units: `45s`, `3m 12s`, `2d 4h`.
fn span(seconds: f64) -> String {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates, and is never negative")]
    let seconds = seconds.max(0.0) as u64;
    let units = [(86_400, 'd'), (3_600, 'h'), (60, 'm'), (1, 's')];
    let first = units.iter().position(|(length, _)| seconds >= *length).unwrap_or(units.len() - 1);
    let mut rest = seconds;
    let parts = units[first..].iter().take(2).map(|(length, unit)| {
        let n = rest / length;
        rest %= length;
        (n, unit)
    });
    let parts: Vec<String> = parts
        .enumerate()
        .filter(|(nth, (n, _))| *nth == 0 || *n > 0)
        .map(|(_, (n, unit))| format!("{n}{unit}"))
        .collect();
    parts.join(" ")
}

#[cfg(test)]
mod tests;
