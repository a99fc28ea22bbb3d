//! The documentation of metrics is held to the code.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use udp_fanout::metrics::names;
use udp_fanout::model::DropReason;

fn page() -> String {
    std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/METRICS.md")).unwrap()
}

/// The cells of the table row that begins with this code.
fn row(code: &str) -> Vec<String> {
    let start = format!("| `{code}` |");
    let page = page();
    let rows: Vec<&str> = page.lines().filter(|line| line.starts_with(&start)).collect();
    assert_eq!(rows.len(), 1, "docs/METRICS.md has {} rows for {code}", rows.len());
    rows[0].trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()
}

#[test]
fn every_metric_has_a_row_with_its_type_and_labels() {
    for metric in names::ALL {
        let cells = row(metric.name);
        assert_eq!(cells[1], metric.kind.name(), "{}", metric.name);
        let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        assert_eq!(cells[2], labels.join(", "), "{}", metric.name);
    }
}

#[test]
fn every_drop_reason_has_a_row_that_says_what_to_do() {
    for reason in DropReason::ALL {
        let cells = row(reason.label());
        assert!(cells.len() == 3 && cells.iter().all(|cell| !cell.is_empty()), "{}", reason.label());
    }
}
