//! `udp-fanout rbac`: its output agrees with the manifests, and it reports what it cannot print.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// Runs `rbac` on a configuration with these further arguments.
fn rbac(config: &str, more: &[&str]) -> Output {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.toml");
    fs::write(&path, config).unwrap();
    Command::new(env!("CARGO_BIN_EXE_udp-fanout")).args(["rbac", "--config"]).arg(&path).args(more).output().unwrap()
}

fn objects(text: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn printed(config: &str, more: &[&str]) -> Vec<Value> {
    let output = rbac(config, more);
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    objects(std::str::from_utf8(&output.stdout).unwrap())
}

fn manifest(name: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("k8s").join(name);
    objects(&fs::read_to_string(path).unwrap())
}

#[test]
fn the_example_needs_what_its_manifest_grants() {
    let all = manifest("daemonset.yaml");
    let map = all.iter().find(|object| object["kind"] == "ConfigMap").unwrap();
    let printed = printed(map["data"]["config.toml"].as_str().unwrap(), &[]);
    let is_rbac = |object: &&Value| object["apiVersion"] == "rbac.authorization.k8s.io/v1";
    let granted: Vec<Value> = manifest("rbac.yaml").iter().filter(is_rbac).cloned().collect();
    assert_eq!(printed, granted);
    // The account that gets the permissions is the pods' account.
    let account = &granted.iter().find(|object| object["kind"] == "RoleBinding").unwrap()["subjects"][0];
    let daemonset = all.iter().find(|object| object["kind"] == "DaemonSet").unwrap();
    assert_eq!(account["name"], daemonset["spec"]["template"]["spec"]["serviceAccountName"]);
    assert_eq!(account["namespace"], daemonset["metadata"]["namespace"]);
}

const TWO: &str = r#"
[[listeners]]
name = "a"
bind = "0.0.0.0:5514"
[listeners.kubernetes]
services = ["on", { service = "b", namespace = "1" }]
port = 5514
locality = "prefer_zone"
"#;

const STATIC: &str = r#"
[[listeners]]
name = "static"
bind = "0.0.0.0:5515"
downstream = [{ address = "10.0.0.1:1" }]
"#;

#[test]
fn names_that_yaml_would_take_for_something_else_stay_names() {
    let printed = printed(TWO, &["--service-account", "fan", "--service-account-namespace", "7e1"]);
    let shown: Vec<String> = printed
        .iter()
        .map(|object| format!("{} {} {}", object["kind"], object["metadata"]["namespace"], object["metadata"]["name"]))
        .collect();
    assert_eq!(
        shown,
        [
            "\"Role\" \"1\" \"udp-fanout-7e1-fan\"",
            "\"RoleBinding\" \"1\" \"udp-fanout-7e1-fan\"",
            "\"Role\" \"7e1\" \"udp-fanout-7e1-fan\"",
            "\"RoleBinding\" \"7e1\" \"udp-fanout-7e1-fan\"",
            "\"ClusterRole\" null \"udp-fanout-7e1-fan-nodes\"",
            "\"ClusterRoleBinding\" null \"udp-fanout-7e1-fan-nodes\"",
        ]
    );
    assert_eq!(printed[2]["rules"][1]["resourceNames"], serde_json::json!(["on"]));
    let subjects = serde_json::json!([{"kind": "ServiceAccount", "name": "fan", "namespace": "7e1"}]);
    for binding in printed.iter().skip(1).step_by(2) {
        assert_eq!(binding["subjects"], subjects);
    }
}

#[test]
fn a_second_installation_leaves_the_first_ones_objects_alone() {
    let names = |more: &[&str]| -> Vec<String> {
        let all = printed(TWO, more);
        assert!(all.iter().all(|object| {
            let role = object["roleRef"]["name"].as_str();
            role.is_none_or(|role| object["metadata"]["name"] == role)
        }));
        all.iter().map(|object| object["metadata"]["name"].to_string()).collect()
    };
    let first = names(&[]);
    for second in [&["--service-account-namespace", "edge"][..], &["--name", "edge"]] {
        assert!(names(second).iter().all(|name| !first.contains(name)), "{second:?}");
    }
    let output = rbac(TWO, &["--name", "edge"]);
    let text = String::from_utf8(output.stdout).unwrap();
    let leftovers = "-l app.kubernetes.io/name=udp-fanout,app.kubernetes.io/instance=edge\n---\n";
    assert!(text.starts_with("# ") && text.contains(leftovers), "{text}");
}

#[test]
fn what_cannot_be_printed_is_said_in_one_line() {
    let nothing = rbac(STATIC, &[]);
    let said = String::from_utf8_lossy(&nothing.stderr).into_owned();
    assert!(nothing.status.success() && nothing.stdout.is_empty(), "{nothing:?}");
    assert!(
        said.ends_with("config.toml: no listener follows a Kubernetes Service, so no permissions are needed\n"),
        "{said}"
    );
    for (config, more, expected) in [
        (TWO, &["--service-account", "A"][..], "--service-account: \"A\" is not a service account's name; use"),
        (
            TWO,
            &["--service-account-namespace", "a.b"],
            "--service-account-namespace: \"a.b\" is not a namespace's name; use",
        ),
        (TWO, &["--name", "B"], "--name: \"B\" cannot name a Role; use"),
        ("", &[], "listeners: no listeners; add one"),
    ] {
        let output = rbac(config, more);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(expected) && said.lines().count() == 1 && output.stdout.is_empty(), "{said}");
    }
}
