//! The alerts and the dashboard against the program: every series that they query is exported, with the same names,
//! labels and values; alerts fire when they should, and only then; the documents agree.
//!
//! - `promql`: the names in a query.
//! - `dashboard`: `deploy/grafana/udp-fanout.json`.
//! - `alerts`: `deploy/prometheus/udp-fanout.rules.yaml`, and its documentation.

mod alerts;
mod dashboard;
mod promql;

use std::path::Path;
use std::process::{Command, Output};

/// Runs promtool in the repository.
fn promtool(arguments: &[&str], file: &Path) -> Output {
    let promtool = &crate::manifests::render::tool("promtool", "promtool")[0];
    Command::new(promtool)
        .current_dir(crate::manifests::render::repository())
        .args(arguments)
        .arg(file)
        .output()
        .unwrap()
}

/// Its output, for failure messages.
fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}
