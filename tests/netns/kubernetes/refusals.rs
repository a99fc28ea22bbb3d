//! Forbidden and missing objects: logged once, with the cause and the fix, and picked up once that is applied.

use std::fs;
use std::process::Command;

use serde_json::Value;

use super::kubernetes_lab::{KubernetesLab, NAMESPACE, SERVICE, binary};
use udp_fanout_lab::apiserver::{Kind, Rule};
use udp_fanout_lab::cluster::{at, namespace, node, ready, service, slice};
use udp_fanout_lab::{DaemonConfig, Place};

/// The objects that `udp-fanout rbac` prints for a configuration.
fn rbac(config: &DaemonConfig, more: &[&str]) -> Vec<Value> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.toml");
    fs::write(&path, config.to_toml()).unwrap();
    let output = Command::new(binary()).args(["rbac", "--config"]).arg(&path).args(more).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    serde_saphyr::from_multiple(&String::from_utf8(output.stdout).unwrap()).unwrap()
}

/// The permissions of the daemon's user once these objects have been applied.
fn rules(objects: &[Value]) -> Vec<Rule> {
    let texts = |value: &Value| -> Vec<String> {
        value.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
    };
    let mut rules = Vec::new();
    for role in objects.iter().filter(|object| !object["kind"].as_str().unwrap().ends_with("Binding")) {
        let binding = objects.iter().find(|binding| {
            binding["kind"] == format!("{}Binding", role["kind"].as_str().unwrap())
                && binding["metadata"]["namespace"] == role["metadata"]["namespace"]
                && binding["roleRef"]["kind"] == role["kind"]
                && binding["roleRef"]["name"] == role["metadata"]["name"]
        });
        let subject = &binding.expect("a binding for each role")["subjects"][0];
        assert_eq!(format!("{}:{}", subject["namespace"], subject["name"]), "\"udp-fanout\":\"udp-fanout\"");
        for rule in role["rules"].as_array().unwrap() {
            for resource in texts(&rule["resources"]) {
                let verbs = texts(&rule["verbs"]);
                let mut allowed = Rule::new(&verbs.iter().map(String::as_str).collect::<Vec<_>>(), &resource);
                if let Some(namespace) = role["metadata"]["namespace"].as_str() {
                    allowed = allowed.within(namespace);
                }
                if !rule["resourceNames"].is_null() {
                    allowed = allowed.named(&texts(&rule["resourceNames"]));
                }
                rules.push(allowed);
            }
        }
    }
    rules
}

#[test]
fn netns_what_rbac_prints_is_what_the_daemon_needs() {
    let k8s = KubernetesLab::new("tc_ebpf", [Place::OtherInterface, Place::Pod]);
    let (here, elsewhere) = (at(ready(&k8s.ip(0)), "n1", "west"), at(ready(&k8s.ip(1)), "n2", "east"));
    k8s.apply("a", vec![here, elsewhere]);
    k8s.server.apply(Kind::Node, node("n3", "west"));
    k8s.server.set_rules(&[]);
    let config = k8s.config(&format!("{}, locality = \"prefer_zone\"", KubernetesLab::by_number()));
    let mut surroundings = k8s.surroundings();
    surroundings.environment.push(("NODE_NAME".to_owned(), "n3".to_owned()));
    let spawn = || udp_fanout_lab::Daemon::spawn_in(&k8s.lab.gateway, binary(), &config, &surroundings).unwrap();

    let mut daemon = spawn();
    let line = daemon.wait_for_line("EndpointSlice not found").unwrap();
    assert!(line.contains("system:serviceaccount:udp-fanout:udp-fanout may not list and watch"), "{line}");
    let fix = line.split_once("; fix: ").unwrap().1.split_once(';').unwrap().0;
    let shown = fix.strip_suffix(" | kubectl apply -f -").unwrap().strip_prefix("udp-fanout rbac --config ").unwrap();
    assert!(fs::read_to_string(shown).unwrap().contains("prefer_zone"), "{shown} is the daemon's own file");
    assert_eq!(k8s.readyz(), 503);

    // The printed objects are applied, and the daemon notices without a restart.
    k8s.server.set_rules(&rules(&rbac(&config, &[])));
    daemon.wait_for_line("are being followed again").unwrap();
    // Also the zone: one of the two endpoints is in this node's.
    daemon.wait_for_logged(&k8s.updated(1)).unwrap();
    daemon.stop().unwrap();

    // A fresh start is refused nothing.
    let seen = k8s.server.seen().len();
    let mut daemon = spawn();
    daemon.wait_for_line(&k8s.updated(1)).unwrap();
    assert!(k8s.server.seen()[seen..].iter().all(|seen| seen.code == 200), "{:?}", &k8s.server.seen()[seen..]);
    // The daemon may also look up why there are no endpoints.
    k8s.server.delete(Kind::EndpointSlice, NAMESPACE, "a");
    let line = daemon.wait_for_line("EndpointSlice not found: service").unwrap();
    assert!(line.contains("service \"receivers\" does not exist in namespace \"logging\""), "{line}");
    daemon.stop().unwrap();
}

#[test]
fn netns_what_is_missing_is_named_and_picked_up() {
    let k8s = KubernetesLab::new("tc_ebpf", [Place::OtherInterface]);
    for resource in ["namespaces", "services"] {
        k8s.server.allow(Rule::new(&["get"], resource));
    }
    let mut daemon = k8s.spawn(&k8s.config(&KubernetesLab::by_number()));
    let line = daemon.wait_for_line("EndpointSlice not found: namespace \"logging\" does not exist").unwrap();
    assert!(line.contains("WARN"), "{line}");
    // The first set is empty, and the log states the likely cause.
    let line = daemon.wait_for_logged("endpoints=0").unwrap();
    assert!(line.contains("WARN") && line.contains("EndpointSlice not found"), "{line}");

    k8s.server.apply(Kind::Namespace, namespace(NAMESPACE));
    k8s.server.apply(Kind::Service, service(NAMESPACE, SERVICE));
    // A Service that has just been made and has no pods yet.
    k8s.server.apply(Kind::EndpointSlice, slice(NAMESPACE, SERVICE, "a", []));
    k8s.apply("a", k8s.ready(&[0]));
    daemon.wait_for_line("discovered endpoints listener_id=0 endpoints=1").unwrap();
    daemon.wait_for_logged(&k8s.updated(1)).unwrap();
    // Scaled down to nothing: the slice stays, without endpoints.
    k8s.apply("a", Vec::new());
    let line = daemon.wait_for_line("endpoints=0").unwrap();
    assert!(line.contains("the services have no pods"), "{line}");
    assert_eq!(
        k8s.wait_for_metrics("no endpoints", |page| {
            page.sum("udp_fanout_downstream_active", &[("listener", "lab")]) == 0
        })
        .sum("udp_fanout_discovery_errors_total", &[]),
        0
    );
    daemon.stop().unwrap();
}
