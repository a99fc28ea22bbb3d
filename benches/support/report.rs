//! The report: results.json, the tables on the terminal and in `docs/BENCHMARKS.md`, and the plots.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::plots;
use super::results::{
    CPU, DUPLICATED, Goal, HALF, LOSS, LOSSLESS, MODEST, Measure, OVERLOAD, REORDERED, Results, Row, Table,
};

/// The tables between these lines of the document are replaced.
const BEGIN: &str = "<!-- figures: written by `make bench` -->";
const END: &str = "<!-- end of figures -->";

/// Writes everything into a directory: `results.json`, `tables.md` and the plots.
///
/// # Errors
/// When a file cannot be written.
pub fn write(results: &Results, directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let json = serde_json::to_string_pretty(results)? + "\n";
    for (name, text) in [("results.json", json), ("tables.md", tables(results, "."))] {
        let path = directory.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    plots::draw(results, directory)
}

/// Replaces the tables of a document. `plots` is the path of the plots relative to the document.
///
/// # Errors
/// When the document cannot be read or written, or has no lines that mark the tables.
pub fn insert(results: &Results, document: &Path, plots: &str) -> Result<()> {
    let tables = tables(results, plots);
    let text = format!("All of it, for programs: [results.json]({plots}/results.json).\n\n{tables}");
    splice(document, [BEGIN, END], &text)
}

/// Replaces the text between two lines of a document.
///
/// # Errors
/// When the document cannot be read or written, or lacks the lines.
pub fn splice(document: &Path, [begin, end]: [&str; 2], text: &str) -> Result<()> {
    let name = document.display();
    let old = fs::read_to_string(document).with_context(|| format!("cannot read {name}"))?;
    let (before, rest) = old.split_once(begin).with_context(|| format!("{name} has no line {begin}"))?;
    let (_, after) = rest.split_once(end).with_context(|| format!("{name} has no line {end}"))?;
    let new = format!("{before}{begin}\n\n{text}\n{end}{after}");
    fs::write(document, new).with_context(|| format!("cannot write {name}"))
}

/// All tables, in Markdown.
pub fn tables(results: &Results, plots: &str) -> String {
    let mut text = machine(results);
    for table in &results.tables {
        let _ = write!(text, "\n### {}\n\n{}", table.title, one(table));
        if plots::worth_a_plot(table) {
            let _ = writeln!(text, "\n![Lossless rates: {}]({plots}/{}.svg)", table.title, table.key);
        }
        let latencies = latencies(table);
        if !latencies.is_empty() {
            let _ = write!(text, "\n{latencies}\n![Latencies: {}]({plots}/{}-latency.svg)\n", table.title, table.key);
        }
    }
    if plots::growing(results).next().is_some() {
        let _ = writeln!(text, "\n![Lossless rates by the number of downstreams]({plots}/downstreams.svg)");
    }
    if !results.control.is_empty() {
        let _ = write!(text, "\n### The daemon itself\n\n{}", goals(&results.control));
    }
    text
}

fn machine(results: &Results) -> String {
    let Results { machine, rounds, disturbed, .. } = results;
    let packages: Vec<String> = machine.packages.iter().map(|(name, version)| format!("{name} {version}")).collect();
    let mut text = format!(
        "{} CPUs ({}), Linux {}, load average before the run {:.2}. Medians of {rounds}, with the lowest and the highest \
         in brackets where they differ by more than a tenth. {}.\n",
        machine.cpus,
        machine.architecture,
        machine.kernel,
        machine.load_before,
        packages.join(", ")
    );
    let share = disturbed * 100.0;
    if !results.to_be_trusted() {
        let _ = writeln!(text, "\n**These figures say nothing**: other programs disturbed {share:.0} % of the trials.");
    } else if *disturbed > 0.0 {
        let _ = writeln!(text, "\nOther programs disturbed {share:.1} % of the trials.");
    }
    text
}

fn one(table: &Table) -> String {
    let columns: Vec<Measure> = [LOSSLESS, OVERLOAD, LOSS, CPU]
        .into_iter()
        .filter(|measure| table.rows.iter().any(|row| row.median(*measure).is_some()))
        .collect();
    let ratio = format!("x {}", table.beside);
    let heads = [ratio.as_str()].into_iter().chain(columns.iter().map(|measure| measure.title));
    let mut text = head(heads);
    for row in &table.rows {
        if let Some(why) = &row.not_run {
            let _ =
                writeln!(text, "| {} | not run: {} |{}", row.name, why.replace('|', "/"), " |".repeat(columns.len()));
            continue;
        }
        let ratio = table.ratio(row).map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
        let cells: Vec<String> = columns.iter().map(|measure| cell(row, *measure)).collect();
        let _ = writeln!(text, "| {} | **{ratio}** | {} |", row.name, cells.join(" | "));
    }
    text
}

/// The table of rows whose datagrams could be recognised; empty without such a row.
fn latencies(table: &Table) -> String {
    let columns: Vec<Measure> = MODEST.into_iter().chain(HALF).chain([REORDERED, DUPLICATED]).collect();
    let mut text = head(columns.iter().map(|measure| measure.title));
    let mut any = false;
    for row in table.rows.iter().filter(|row| row.not_run.is_none() && row.median(HALF[0]).is_some()) {
        let cells: Vec<String> = columns.iter().map(|measure| cell(row, *measure)).collect();
        let _ = writeln!(text, "| {} | {} |", row.name, cells.join(" | "));
        any = true;
    }
    if any { text } else { String::new() }
}

fn goals(goals: &[Goal]) -> String {
    let mut text = head(["measured", "goal", ""]);
    for Goal { title, unit, figure, below } in goals {
        let (goal, verdict) = match below {
            Some(below) => (format!("under {below} {unit}"), if figure.median < *below { "met" } else { "**missed**" }),
            None => (String::new(), ""),
        };
        let measured = format!("{} {unit}", spread(figure.median, figure.low, figure.high, 2));
        let _ = writeln!(text, "| {title} | {measured} | {goal} | {verdict} |");
    }
    text
}

/// The head of a table whose first column names rows and has no title.
fn head<'a>(titles: impl IntoIterator<Item = &'a str>) -> String {
    let titles: Vec<&str> = titles.into_iter().collect();
    format!("| | {} |\n| --- |{}\n", titles.join(" | "), " ---: |".repeat(titles.len()))
}

fn cell(row: &Row, measure: Measure) -> String {
    let Some(figure) = row.figures.get(measure.key) else { return "-".to_owned() };
    spread(figure.median, figure.low, figure.high, measure.digits)
}

fn spread(median: f64, low: f64, high: f64, digits: usize) -> String {
    let middle = grouped(median, digits);
    if high - low <= median.abs() * 0.1 {
        return middle;
    }
    format!("{middle} ({} to {})", grouped(low, digits), grouped(high, digits))
}

/// With commas between thousands.
fn grouped(value: f64, digits: usize) -> String {
    let text = format!("{value:.digits$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut out = String::new();
    for (at, digit) in whole.chars().enumerate() {
        if at > 0 && (whole.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out + rest
}
