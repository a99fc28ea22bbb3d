//! The documents against the code: exactly the metrics and the drop reasons have rows, every file that is
//! mentioned exists, every link has a target.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use udp_fanout::testing::discovery::ErrorKind;
use udp_fanout::testing::health::model::ProbeOutcome;
use udp_fanout::testing::metrics::names;
use udp_fanout::testing::model::DropReason;

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(repository().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The rows of the table whose first column has this title, cell by cell.
fn table(text: &str, title: &str) -> Vec<Vec<String>> {
    let head = format!("| {title} |");
    let lines = text.lines().skip_while(|line| !line.starts_with(&head));
    let rows = lines.skip(2).take_while(|line| line.starts_with('|'));
    let cells = |row: &str| row.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect();
    let rows: Vec<Vec<String>> = rows.map(cells).collect();
    assert!(!rows.is_empty(), "no table of {title:?}");
    rows
}

fn code(text: &str) -> String {
    format!("`{text}`")
}

#[test]
fn every_metric_has_its_row() {
    let rows = table(&read("docs/METRICS.md"), "Metric");
    let documented: Vec<&str> = rows.iter().map(|row| row[0].as_str()).collect();
    let exported: Vec<String> = names::ALL.iter().map(|metric| code(metric.name)).collect();
    assert_eq!(documented, exported, "in the order of the page");
    for (row, metric) in rows.iter().zip(names::ALL) {
        assert_eq!(row[1], metric.kind.name(), "{}", metric.name);
        let labels: Vec<String> = metric.labels.iter().map(|label| code(label)).collect();
        assert_eq!(row[2], labels.join(", "), "{}", metric.name);
        assert!(!row[3].is_empty(), "{}", metric.name);
    }
}

#[test]
fn every_drop_reason_has_its_row() {
    let rows = table(&read("docs/METRICS.md"), "Reason");
    let documented: Vec<&str> = rows.iter().map(|row| row[0].as_str()).collect();
    let counted: Vec<String> = DropReason::ALL.iter().map(|reason| code(reason.label())).collect();
    assert_eq!(documented, counted, "in numeric order");
    for (row, reason) in rows.iter().zip(DropReason::ALL) {
        assert!(row.len() == 3 && row.iter().all(|cell| !cell.is_empty()), "what to do about {}", reason.label());
    }
}

#[test]
fn every_result_of_a_probe_has_its_row() {
    let rows = table(&read("docs/METRICS.md"), "Result");
    let documented: Vec<&str> = rows.iter().map(|row| row[0].as_str()).collect();
    let counted: Vec<String> = ProbeOutcome::ALL.iter().map(|outcome| code(outcome.label())).collect();
    assert_eq!(documented, counted, "in numeric order");
}

#[test]
fn every_kind_of_error_has_its_row() {
    let rows = table(&read("docs/METRICS.md"), "Kind");
    let documented: Vec<&str> = rows.iter().map(|row| row[0].as_str()).collect();
    let counted: Vec<String> = ErrorKind::ALL.iter().map(|kind| code(kind.label())).collect();
    assert_eq!(documented, counted, "in numeric order");
    assert!(rows.iter().all(|row| row.len() == 3 && row.iter().all(|cell| !cell.is_empty())));
}

#[test]
fn every_map_has_its_row() {
    let maps = read("bpf/maps.h");
    let names = maps.lines().filter_map(|line| line.strip_prefix("} ")?.split(" SEC(\".maps\")").next());
    let rows = table(&read("docs/ARCHITECTURE.md"), "Map");
    let mut documented: Vec<&str> = rows.iter().flat_map(|row| row[0].split(", ")).collect();
    let mut defined: Vec<String> = names.map(code).collect();
    documented.sort_unstable();
    defined.sort_unstable();
    assert_eq!(documented, defined);
}

/// Every Markdown document of the repository's own.
fn documents() -> Vec<PathBuf> {
    let in_directory = |directory: &str| {
        let entries = fs::read_dir(repository().join(directory)).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect::<Vec<_>>()
    };
    let files = [".", "docs"].into_iter().flat_map(in_directory);
    files.filter(|path| path.extension().is_some_and(|extension| extension == "md")).collect()
}

/// The targets of a document's links.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](").skip(1).filter_map(|rest| rest.split(')').next())
}

/// The anchor of a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_link_leads_somewhere() {
    let mut followed = 0;
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        for link in links(&text).filter(|link| !link.starts_with("http")) {
            let (path, fragment) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { document.clone() } else { document.parent().unwrap().join(path) };
            assert!(target.exists(), "{}: {link}", document.display());
            if !fragment.is_empty() {
                let there = fs::read_to_string(&target).unwrap();
                let anchors: BTreeSet<String> =
                    there.lines().filter(|line| line.starts_with('#')).map(anchor).collect();
                assert!(anchors.contains(fragment), "{}: {link}", document.display());
            }
            followed += 1;
        }
    }
    assert!(followed >= 10, "only {followed} links were found");
}

/// Names in backquotes that must be files of this repository.
fn files_spoken_of(text: &str) -> impl Iterator<Item = &str> {
    let directories = [
        "src/",
        "bpf/",
        "tests/",
        "scripts/",
        "config/",
        "docs/",
        "systemd/",
        "examples/",
        "vmlinux/",
        "k8s/",
        "deploy/",
    ];
    let in_quotes = text.split('`').skip(1).step_by(2);
    in_quotes.filter(move |name| {
        let is_path = !name.contains(char::is_whitespace) && !name.contains(['*', '…', '{', '<']);
        is_path && directories.iter().any(|directory| name.starts_with(directory))
    })
}

#[test]
fn every_file_spoken_of_is_there() {
    let mut seen = 0;
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        for name in files_spoken_of(&text) {
            assert!(repository().join(name).exists(), "{} speaks of {name}", document.display());
            seen += 1;
        }
    }
    assert!(seen >= 20, "only {seen} names were found");
}

/// The functions in a row of the table of events, by the file that defines them.
fn functions_named(cell: &str) -> Vec<(&str, &str)> {
    let mut file = None;
    let mut functions = Vec::new();
    for name in cell.split('`').skip(1).step_by(2) {
        if name.contains('/') {
            file = Some(name);
        } else {
            functions.push((file.unwrap_or_else(|| panic!("{name} stands before any file: {cell}")), name));
        }
    }
    functions
}

/// Whether a source file defines a function.
fn defines(source: &str, path: &str, function: &str) -> bool {
    if path.ends_with(".rs") {
        return source.contains(&format!("fn {function}(")) || source.contains(&format!("fn {function}<"));
    }
    let call = format!("{function}(");
    // In C, a definition starts at the beginning of a line.
    source.lines().any(|line| {
        let starts = line.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        starts && line.split(['\t', ' ', '*']).any(|word| word.starts_with(&call))
    })
}

#[test]
fn every_function_in_the_table_of_events_is_where_it_is_said_to_be() {
    let rows = table(&read("docs/ARCHITECTURE.md"), "Event");
    assert!(rows.len() >= 20, "only {} events", rows.len());
    for row in rows {
        assert_eq!(row.len(), 3, "{row:?}");
        for cell in &row[1..] {
            let functions = functions_named(cell);
            assert!(!functions.is_empty(), "no function: {cell}");
            for (path, function) in functions {
                assert!(defines(&read(path), path, function), "{path} defines no {function}: {row:?}");
            }
        }
    }
}
