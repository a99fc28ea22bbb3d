//! Findings for people, a line each, and for programs, as JSON. Pure.

use std::collections::HashMap;

use anyhow::{Context, Result};
use serde::Serialize;

use super::{Finding, Findings, Level};

/// Most lines of one sort: what is wrong with a thousand downstreams is wrong with the first ten as well.
const MOST_ALIKE: usize = 10;

/// A line for each finding, and one that counts.
pub(super) fn text(findings: &Findings) -> String {
    let mut text = String::new();
    let mut seen: HashMap<(Level, &str), usize> = HashMap::new();
    for Finding { level, check, text: what, fix } in &findings.0 {
        let alike = seen.entry((*level, check)).or_default();
        *alike += 1;
        if *alike > MOST_ALIKE {
            continue;
        }
        let fix = fix.as_ref().map_or_else(String::new, |fix| format!("; {fix}"));
        text += &format!("{:<8} {check:<11} {what}{fix}\n", level.name());
    }
    let mut more: Vec<_> = seen.into_iter().filter(|(_, n)| *n > MOST_ALIKE).collect();
    more.sort_unstable();
    for ((level, check), n) in more {
        text += &format!("{:<8} {check:<11} {} more like these; --json shows all\n", level.name(), n - MOST_ALIKE);
    }
    let count = |level, one: &str| {
        let n = findings.count(level);
        if n == 1 { format!("1 {one}") } else { format!("{n} {one}s") }
    };
    text + &format!("{}, {}\n", count(Level::Problem, "problem"), count(Level::Warning, "warning"))
}

#[derive(Serialize)]
struct Json<'a> {
    problems: usize,
    warnings: usize,
    findings: &'a [Finding],
}

/// One line of JSON.
pub(super) fn json(findings: &Findings) -> Result<String> {
    let json = Json {
        problems: findings.count(Level::Problem),
        warnings: findings.count(Level::Warning),
        findings: &findings.0,
    };
    Ok(serde_json::to_string(&json).context("cannot write the findings as JSON")? + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_lines_and_many_alike_are_counted() {
        let mut findings = Findings::default();
        findings.ok("kernel", "it is new enough");
        findings.warning("mtu", "it narrows", "widen it");
        for n in 0..13 {
            findings.problem("route", format!("no route to {n}"), "add one");
        }
        let shown = text(&findings);
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines[0], "ok       kernel      it is new enough");
        assert_eq!(lines[1], "warning  mtu         it narrows; widen it");
        assert_eq!(lines[11], "problem  route       no route to 9; add one");
        assert_eq!(lines[12], "problem  route       3 more like these; --json shows all");
        assert_eq!(lines[13..], ["13 problems, 1 warning"]);
        let value: serde_json::Value = serde_json::from_str(&json(&findings).unwrap()).unwrap();
        assert_eq!((&value["problems"], value["findings"].as_array().unwrap().len()), (&13.into(), 15));
        assert_eq!(value["findings"][0]["fix"], serde_json::Value::Null);
    }
}
