//! The alerts: their queries, when they fire, and that the documents describe the same ones.

use std::collections::BTreeMap;
use std::fs;

use serde_json::Value;

use super::dashboard::placeholders;
use super::promql::Names;
use super::{promtool, said};
use crate::manifests::render::{objects, read, repository};

const RULES: &str = "deploy/prometheus/udp-fanout.rules.yaml";
const TESTS: &str = "tests/unit/monitoring/alerts.yaml";

fn rules() -> Vec<Value> {
    let file = objects(&read(RULES)).pop().unwrap();
    let groups = file["groups"].as_array().unwrap();
    let rules: Vec<Value> = groups.iter().flat_map(|group| group["rules"].as_array().unwrap().clone()).collect();
    assert!(rules.len() >= 15);
    rules
}

fn name(rule: &Value) -> &str {
    rule["alert"].as_str().unwrap()
}

#[test]
fn every_alert_queries_exported_series() {
    for rule in rules() {
        let names = Names::of(rule["expr"].as_str().unwrap());
        assert!(!names.metrics.is_empty(), "{rule}");
        let severity = rule["labels"]["severity"].as_str().unwrap();
        assert!(["critical", "warning", "info"].contains(&severity), "{rule}");
        let annotations = rule["annotations"].as_object().unwrap();
        let keys: Vec<&str> = annotations.keys().map(String::as_str).collect();
        assert_eq!(keys, ["description", "summary"], "{rule}");
        for text in annotations.values().map(|text| text.as_str().unwrap()) {
            for placeholder in placeholders(text) {
                let label = placeholder.strip_prefix("$labels.");
                assert!(
                    label.is_some_and(|label| names.has_label(label)) || placeholder.starts_with("$value"),
                    "{text}"
                );
            }
        }
        // The labels that locate the problem.
        let summary = annotations["summary"].as_str().unwrap();
        assert!(summary.contains("{{ $labels.instance }}") || name(&rule) == "UdpFanoutAbsent", "{summary}");
    }
}

/// The documents, metrics and settings that they mention exist.
#[test]
fn every_alert_mentions_existing_names() {
    let (configuration, help) = (read("docs/CONFIGURATION.md"), read("src/cli.rs"));
    for rule in rules() {
        let text = rule["annotations"]["description"].as_str().unwrap();
        for word in text.split([' ', ':', ',', ';', '(', ')']).map(|word| word.trim_end_matches('.')) {
            if word.starts_with("docs/") {
                assert!(repository().join(word).exists(), "{word}");
            } else if word.starts_with("udp_fanout_") {
                Names::of(word);
            } else if word.contains('_') && word != "tc_ebpf" {
                let key = word.rsplit('.').next().unwrap();
                assert!(configuration.contains(&format!("`{key}`")), "no setting {word}: {text}");
            }
        }
        for command in text.split('`').skip(1).step_by(2) {
            let subcommand = command.strip_prefix("udp-fanout ").unwrap();
            let variant = subcommand[..1].to_uppercase() + &subcommand[1..];
            assert!(help.contains(&format!("    {variant}")), "{command}");
        }
    }
}

#[test]
fn alerts_fire_when_they_should_and_only_then() {
    let output = promtool(&["check", "rules"], &repository().join(RULES));
    assert!(output.status.success(), "{}", said(&output));
    let output = promtool(&["test", "rules"], &repository().join(TESTS));
    assert!(output.status.success(), "{}", said(&output));
}

#[test]
fn every_alert_is_tried_where_it_fires_and_where_it_does_not() {
    let file = objects(&read(TESTS)).pop().unwrap();
    let groups = file["tests"].as_array().unwrap();
    let mut tried: BTreeMap<String, [usize; 2]> = BTreeMap::new();
    for test in groups.iter().flat_map(|group| group["alert_rule_test"].as_array().unwrap()) {
        let fires = !test["exp_alerts"].as_array().unwrap().is_empty();
        tried.entry(test["alertname"].as_str().unwrap().to_owned()).or_default()[usize::from(fires)] += 1;
    }
    for rule in rules() {
        let tries = tried.remove(name(&rule)).unwrap_or_default();
        assert!(tries.iter().all(|&times| times > 0), "{}: not and firing: {tries:?}", name(&rule));
    }
    assert!(tried.is_empty(), "no such alerts: {tried:?}");
    // The series in their tests are the program's too.
    for series in groups.iter().flat_map(|group| group["input_series"].as_array().unwrap()) {
        let series = series["series"].as_str().unwrap();
        if series.starts_with("up{") {
            continue;
        }
        // A label of the target's that Kubernetes gives.
        let series = series.split(", pod=").next().unwrap().trim_end_matches('}');
        Names::of(&format!("{series}}}"));
    }
}

/// The tests cover each rule: without its threshold or its condition, they fail.
#[test]
fn the_tests_fail_for_rules_that_are_wrong() {
    let good = read(RULES);
    let faults = [
        ("total[5m])) > 0.01", "total[5m])) > 100"),
        ("_health[15m]) > 4", "_health[15m]) > 1"),
        ("|receive_queue_full\"}", "\"}"),
        ("expr: udp_fanout_downstream_active == 0", "expr: udp_fanout_downstream_active < 2"),
        (
            "max by (job, instance, listener) (udp_fanout_downstream_health)",
            "min by (job, instance, listener) (udp_fanout_downstream_health)",
        ),
        ("configured|bound to a loopback address", "configured"),
        ("for: 1m", "for: 1h"),
        ("severity: info", "severity: critical"),
    ];
    for (from, to) in faults {
        assert!(good.contains(from), "{from}");
        let directory = tempfile::tempdir().unwrap();
        let tests = directory.path().join("tests.yaml");
        fs::write(directory.path().join("rules.yaml"), good.replacen(from, to, 1)).unwrap();
        fs::write(&tests, read(TESTS).replace(&format!("../../../{RULES}"), "rules.yaml")).unwrap();
        let output = promtool(&["test", "rules"], &tests);
        assert!(!output.status.success() && said(&output).contains("FAILED"), "{from}: {}", said(&output));
    }
}

#[test]
fn the_documents_describe_the_same_alerts() {
    let page = read("docs/METRICS.md");
    let lines = page.lines().skip_while(|line| !line.starts_with("| Alert |")).skip(2);
    let rows = lines.take_while(|line| line.starts_with('|'));
    let documented: Vec<Vec<String>> =
        rows.map(|row| row.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()).collect();
    let rules = rules();
    let names: Vec<String> = rules.iter().map(|rule| format!("`{}`", name(rule))).collect();
    assert_eq!(documented.iter().map(|row| row[0].as_str()).collect::<Vec<_>>(), names, "in the order of the file");
    for (row, rule) in documented.iter().zip(&rules) {
        assert_eq!(row[1], rule["labels"]["severity"].as_str().unwrap(), "{}", row[0]);
        let after = rule["for"].as_str().map_or("at once".to_owned(), |time| time.replace('m', " min"));
        assert_eq!(row[2], after, "{}", row[0]);
        assert!(row.len() == 4 && !row[3].is_empty(), "{}", row[0]);
    }
    // The deployment guide shows one of them.
    let guide = read("docs/DEPLOYMENT.md");
    let block = guide.split("```").find(|block| block.contains("- alert:")).unwrap();
    let shown = objects(block.strip_prefix("yaml\n").unwrap()).pop().unwrap()[0].clone();
    let rule = rules.iter().find(|rule| name(rule) == name(&shown)).unwrap();
    let one_line = |value: &Value| value["expr"].as_str().unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(one_line(&shown), one_line(rule));
    assert_eq!(shown["annotations"]["summary"], rule["annotations"]["summary"]);
}
