//! Prints findings as lines of text or as JSON. Pure.

use std::collections::HashMap;

use anyhow::{Context, Result};
use serde::Serialize;

use super::{DoctorFinding, Findings, Severity};

/// The most lines printed for one severity and check. A fault of a thousand downstreams shows in the first ten.
const MAX_ALIKE: usize = 10;

/// One line for each finding, and one with the totals.
pub(super) fn text(findings: &Findings) -> String {
    let mut text = String::new();
    let mut seen: HashMap<(Severity, &str), usize> = HashMap::new();
    for DoctorFinding { level, check, text: what, fix } in &findings.0 {
        let alike = seen.entry((*level, check)).or_default();
        *alike += 1;
        if *alike > MAX_ALIKE {
            continue;
        }
        let fix = fix.as_ref().map_or_else(String::new, |fix| format!("; {fix}"));
        text += &format!("{:<8} {check:<11} {what}{fix}\n", level.name());
    }
    let mut more: Vec<_> = seen.into_iter().filter(|(_, n)| *n > MAX_ALIKE).collect();
    more.sort_unstable();
    for ((level, check), n) in more {
        text += &format!(
            "{:<8} {check:<11} {} more like these; `udp-fanout doctor --json` shows all\n",
            level.name(),
            n - MAX_ALIKE
        );
    }
    let count = |level, one: &str| {
        let n = findings.count(level);
        if n == 1 { format!("1 {one}") } else { format!("{n} {one}s") }
    };
    text + &format!("{}, {}\n", count(Severity::Problem, "problem"), count(Severity::Warning, "warning"))
}

#[derive(Serialize)]
struct FindingsJson<'a> {
    problems: usize,
    warnings: usize,
    findings: &'a [DoctorFinding],
}

/// One line of JSON.
pub(super) fn json(findings: &Findings) -> Result<String> {
    let json = FindingsJson {
        problems: findings.count(Severity::Problem),
        warnings: findings.count(Severity::Warning),
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
        assert_eq!(lines[12], "problem  route       3 more like these; `udp-fanout doctor --json` shows all");
        assert_eq!(lines[13..], ["13 problems, 1 warning"]);
        let value: serde_json::Value = serde_json::from_str(&json(&findings).unwrap()).unwrap();
        assert_eq!((&value["problems"], value["findings"].as_array().unwrap().len()), (&13.into(), 15));
        assert_eq!(value["findings"][0]["fix"], serde_json::Value::Null);
    }
}
