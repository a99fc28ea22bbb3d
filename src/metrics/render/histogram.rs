//! Renders histograms in Prometheus' text format. The exporter's own cannot be set to existing counts.

use std::fmt::Write as _;

use crate::health::probe_stats::Histogram;
use crate::metrics::names::Metric;

/// A histogram with one label, after an empty line; nothing without series. Label values must not need escapes.
pub(super) fn text<'a>(metric: &Metric, series: impl Iterator<Item = (&'a str, &'a Histogram)>) -> String {
    let name = metric.name;
    let label = metric.labels.first().copied().unwrap_or_default();
    let mut text = String::new();
    // Writing to a string cannot fail.
    for (value, histogram) in series {
        for (bound, count) in histogram.cumulative() {
            let bound = if bound.is_finite() { bound.to_string() } else { "+Inf".to_owned() };
            let _ = writeln!(text, "{name}_bucket{{{label}=\"{value}\",le=\"{bound}\"}} {count}");
        }
        let _ = writeln!(text, "{name}_sum{{{label}=\"{value}\"}} {}", histogram.sum().as_secs_f64());
        let _ = writeln!(text, "{name}_count{{{label}=\"{value}\"}} {}", histogram.count());
    }
    if text.is_empty() {
        return text;
    }
    format!("\n\n# HELP {name} {}\n# TYPE {name} {}\n{text}", metric.help, metric.kind.name())
}
