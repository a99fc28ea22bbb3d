//! Grafana's dashboard: Grafana can load it, and each of its queries is valid.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;

use serde_json::{Value, json};
use udp_fanout::testing::metrics::names;

use super::promql::Names;
use super::{promtool, said};
use crate::manifests::render::read;

fn dashboard() -> Value {
    serde_json::from_str(&read("deploy/grafana/udp-fanout.json")).unwrap()
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().unwrap_or_else(|| panic!("no {key} in {value}"))
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_else(|| panic!("no {key} in {value}"))
}

/// Every panel and annotation with a Prometheus query, and the legend of its results.
fn queries(dashboard: &Value) -> Vec<(String, String)> {
    let targets = list(dashboard, "panels").iter().filter(|panel| panel["type"] != "row");
    let targets = targets.flat_map(|panel| list(panel, "targets")).map(|target| (target, "legendFormat"));
    let annotations = list(&dashboard["annotations"], "list").iter().map(|annotation| (annotation, "textFormat"));
    targets.chain(annotations).map(|(from, legend)| (text(from, "expr").into(), text(from, legend).into())).collect()
}

/// The names in double braces.
pub fn placeholders(text: &str) -> impl Iterator<Item = &str> {
    text.split("{{").skip(1).map(|rest| rest.split("}}").next().unwrap().trim())
}

#[test]
fn every_query_uses_exported_series() {
    let dashboard = dashboard();
    let queries = queries(&dashboard);
    assert!(queries.len() >= 30, "{}", queries.len());
    let mut asked = BTreeSet::new();
    for (query, legend) in &queries {
        let names = Names::of(query);
        assert!(query.contains("instance=~\"$instance\""), "for all of them, whichever is chosen: {query}");
        let of_listener = names.metrics.iter().any(|metric| metric.labels.contains(&"listener"));
        assert_eq!(of_listener, query.contains("listener=~\"$listener\""), "{query}");
        for label in placeholders(legend) {
            assert!(names.has_label(label), "{legend}: the result has no {label}: {query}");
        }
        asked.extend(names.metrics.iter().map(|metric| metric.name));
    }
    for metric in names::ALL {
        assert!(asked.contains(metric.name), "nothing shows {}", metric.name);
    }
}

#[test]
fn every_variable_is_asked_of_what_is_exported() {
    let dashboard = dashboard();
    let variables = list(&dashboard["templating"], "list");
    assert_eq!(variables[0]["type"], "datasource");
    assert_eq!((text(&variables[0], "name"), text(&variables[0], "query")), ("datasource", "prometheus"));
    let names: Vec<&str> = variables[1..].iter().map(|variable| text(variable, "name")).collect();
    assert_eq!(names, ["instance", "listener"]);
    for variable in &variables[1..] {
        let query = text(&variable["query"], "query");
        let label = query.trim_end_matches(')').rsplit(", ").next().unwrap();
        assert_eq!(label, text(variable, "name"));
        assert!(query.starts_with("label_values(") && Names::of(query).has_label(label), "{query}");
        assert_eq!(variable["definition"], query);
    }
}

/// The dashboard names no data source: the user selects it.
#[test]
fn everything_asks_the_data_source_that_is_chosen() {
    fn sources<'a>(value: &'a Value, found: &mut Vec<&'a Value>) {
        match value {
            Value::Object(object) => {
                found.extend(object.get("datasource"));
                object.values().for_each(|value| sources(value, found));
            }
            Value::Array(all) => all.iter().for_each(|value| sources(value, found)),
            _ => {}
        }
    }
    let dashboard = dashboard();
    let mut found = Vec::new();
    sources(&dashboard, &mut found);
    let shown = list(&dashboard, "panels").iter().filter(|panel| panel["type"] != "row").count();
    assert!(found.len() >= 2 * shown, "{}", found.len());
    for source in found {
        assert_eq!(source, &json!({ "type": "prometheus", "uid": "${datasource}" }));
    }
}

#[test]
fn every_panel_has_a_number_a_title_a_unit_and_a_place() {
    let dashboard = dashboard();
    assert_eq!((text(&dashboard, "uid"), text(&dashboard, "title")), ("udp-fanout", "udp-fanout"));
    assert!(dashboard["id"].is_null(), "Grafana assigns the ID");
    let panels = list(&dashboard, "panels");
    let (mut numbers, mut cells) = (BTreeSet::new(), BTreeSet::new());
    for panel in panels {
        let title = text(panel, "title");
        assert!(!title.is_empty() && numbers.insert(panel["id"].as_u64().unwrap()), "{title}");
        let [x, y, w, h] = ["x", "y", "w", "h"].map(|key| panel["gridPos"][key].as_u64().unwrap());
        assert!(w > 0 && h > 0 && x + w <= 24, "{title}");
        for cell in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
            assert!(cells.insert(cell), "{title} overlaps another panel");
        }
        if panel["type"] != "row" {
            let unit = text(&panel["fieldConfig"]["defaults"], "unit");
            assert!(["pps", "Bps", "ops", "s", "percentunit", "none"].contains(&unit), "{title}: {unit}");
            let letters: BTreeSet<&str> = list(panel, "targets").iter().map(|target| text(target, "refId")).collect();
            assert!(!letters.is_empty() && letters.len() == list(panel, "targets").len(), "{title}");
        }
    }
    let rows: Vec<&str> =
        panels.iter().filter(|panel| panel["type"] == "row").map(|panel| text(panel, "title")).collect();
    let expected = [
        "Overview",
        "Drops by reason",
        "Downstreams",
        "Health probes",
        "Discovery",
        "Plans, reloads and datapath",
        "Fragments",
    ];
    assert_eq!(rows, expected);
}

/// Rates are of counters, and of nothing else.
#[test]
fn every_unit_is_that_of_the_metric() {
    let dashboard = dashboard();
    for panel in list(&dashboard, "panels").iter().filter(|panel| panel["type"] != "row") {
        let unit = text(&panel["fieldConfig"]["defaults"], "unit");
        for target in list(panel, "targets") {
            let query = text(target, "expr");
            for metric in Names::of(query).metrics {
                let grows = metric.kind != names::MetricKind::Gauge;
                let rated = query.contains("rate(") || query.contains("increase(");
                assert_eq!(grows, rated, "{query}");
                let per_second = ["pps", "Bps", "ops"].contains(&unit);
                assert!(!per_second || query.contains("rate("), "{unit}: {query}");
                assert_eq!(unit == "Bps", metric.name.contains("_bytes_"), "{unit}: {query}");
            }
        }
    }
}

#[test]
fn prometheus_understands_every_query() {
    let dashboard = dashboard();
    let mut rules = "groups:\n  - name: dashboard\n    rules:\n".to_owned();
    for (i, (query, _)) in queries(&dashboard).iter().enumerate() {
        // As Grafana fills it in. JSON is YAML.
        let query = query.replace("$__rate_interval", "5m").replace("\"$instance\"", "\"a|b\"");
        let query = query.replace("\"$listener\"", "\".*\"");
        assert!(!query.contains('$'), "{query}");
        writeln!(rules, "      - {}", json!({ "record": format!("query_{i}"), "expr": query })).unwrap();
    }
    let file = tempfile::NamedTempFile::with_suffix(".yaml").unwrap();
    fs::write(file.path(), rules).unwrap();
    let output = promtool(&["check", "rules"], file.path());
    assert!(output.status.success(), "{}", said(&output));
}
