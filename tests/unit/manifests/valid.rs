//! Against the schemas that Kubernetes publishes, by `kubernetes-validate --strict`, for the oldest version that is
//! supported and the newest that the validator knows; and the chart against helm's own rules.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::render::{self, CHART, chart, everything, helm, objects, run, tool, values};

/// The versions, and the validator that has each: no release of it has both.
fn versions() -> Vec<(&'static str, PathBuf)> {
    ["1.19", "1.37"].into_iter().zip(tool("kubernetes-validate", "kubernetes-validate")).collect()
}

fn validate(validator: &Path, version: &str, file: &Path) -> Output {
    Command::new(validator).args(["--strict", "--kubernetes-version", version]).arg(file).output().unwrap()
}

#[test]
fn every_object_is_valid_for_the_oldest_and_the_newest_kubernetes() {
    for (version, validator) in versions() {
        // Most of them occur more than once.
        let mut distinct = BTreeMap::new();
        for (what, text) in everything(version) {
            let objects = objects(&text);
            assert!(!objects.is_empty(), "{what} has no objects");
            distinct.extend(objects.into_iter().map(|object| (object.to_string(), what.clone())));
        }
        let file = tempfile::NamedTempFile::with_suffix(".yaml").unwrap();
        // JSON is YAML.
        fs::write(file.path(), distinct.keys().map(|object| format!("---\n{object}\n")).collect::<String>()).unwrap();
        let output = validate(&validator, version, file.path());
        let log = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        // For an object of an unknown kind it only prints a warning.
        let passed = log.lines().filter(|line| line.contains(" passed for resource ")).count();
        assert!(output.status.success() && passed == distinct.len(), "{passed} have passed: {log}\n{distinct:#?}");
    }
}

#[test]
fn the_validator_refuses_what_is_wrong() {
    let good = render::read("k8s/daemonset.yaml");
    let faults = [
        ("unknown key", "hostNetwork: true", "hostNetwrok: true"),
        ("wrong type", "maxUnavailable: 1", "maxUnavailable: [1]"),
        ("no selector", "  selector:\n    matchLabels:\n      app.kubernetes.io/name: udp-fanout\n", ""),
    ];
    for (version, validator) in versions() {
        for (what, from, to) in faults {
            assert!(good.contains(from), "{from}");
            let file = tempfile::NamedTempFile::with_suffix(".yaml").unwrap();
            fs::write(file.path(), good.replacen(from, to, 1)).unwrap();
            let output = validate(&validator, version, file.path());
            assert!(!output.status.success(), "{version}: {what}");
        }
    }
}

#[test]
fn helm_finds_no_fault_with_the_chart() {
    run(helm().args(["lint", "--strict", "--quiet", CHART]));
    for values in values() {
        run(helm().args(["lint", "--strict", "--quiet", CHART, "--values", &format!("{CHART}/ci/{values}")]));
    }
}

#[test]
fn the_chart_refuses_values_that_it_does_not_know() {
    let faults = [
        "nodeselector={}",
        "image.tga=v1",
        "log.format=xml",
        "securityContext.capabilities={CAP_BPF}",
        "config.listeners=null",
        "loadBalancer.enabled=true",
    ];
    for fault in faults {
        let output = helm().args(["template", "udp-fanout", CHART, "--set", fault]).output().unwrap();
        assert!(!output.status.success(), "{fault}: {}", String::from_utf8_lossy(&output.stdout));
    }
}

#[test]
fn the_chart_renders_the_same_for_every_kubernetes() {
    assert_eq!(chart(None, "1.19.0"), chart(None, "1.37.0"));
}
