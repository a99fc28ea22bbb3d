//! What is not allowed or not there: said once, with the cause and the command that helps, and picked up afterwards.

use std::fs;
use std::process::Command;

use serde_json::Value;

use super::world::{NAMESPACE, SERVICE, World, binary};
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

/// What the API server allows its user once these objects have been applied.
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
    let world = World::new("tc_ebpf", [Place::OtherInterface, Place::Pod]);
    let (here, elsewhere) = (at(ready(&world.ip(0)), "n1", "west"), at(ready(&world.ip(1)), "n2", "east"));
    world.apply("a", vec![here, elsewhere]);
    world.server.apply(Kind::Node, node("n3", "west"));
    world.server.set_rules(&[]);
    let config = world.config(&format!("{}, locality = \"prefer_zone\"", World::by_number()));
    let mut surroundings = world.surroundings();
    surroundings.environment.push(("NODE_NAME".to_owned(), "n3".to_owned()));
    let spawn = || udp_fanout_lab::Daemon::spawn_in(&world.lab.gateway, binary(), &config, &surroundings).unwrap();

    let mut daemon = spawn();
    let line = daemon.wait_for_line("EndpointSlice not found").unwrap();
    assert!(line.contains("system:serviceaccount:udp-fanout:udp-fanout may not list and watch"), "{line}");
    let fix = line.split_once("; fix: ").unwrap().1.split_once(';').unwrap().0;
    let shown = fix.strip_suffix(" | kubectl apply -f -").unwrap().strip_prefix("udp-fanout rbac --config ").unwrap();
    assert!(fs::read_to_string(shown).unwrap().contains("prefer_zone"), "{shown} is the daemon's own file");
    assert_eq!(world.readyz(), 503);

    // The command's objects are applied, and the daemon finds out by itself.
    world.server.set_rules(&rules(&rbac(&config, &[])));
    daemon.wait_for_line("are being followed again").unwrap();
    // The zone as well: one of the two endpoints is in this node's.
    daemon.wait_for_logged(&world.updated(1)).unwrap();
    daemon.stop().unwrap();

    // From the start, nothing that is needed is refused.
    let seen = world.server.seen().len();
    let mut daemon = spawn();
    daemon.wait_for_line(&world.updated(1)).unwrap();
    assert!(world.server.seen()[seen..].iter().all(|seen| seen.code == 200), "{:?}", &world.server.seen()[seen..]);
    // Even the question why there is nothing is answered.
    world.server.delete(Kind::EndpointSlice, NAMESPACE, "a");
    let line = daemon.wait_for_line("EndpointSlice not found: service").unwrap();
    assert!(line.contains("service \"receivers\" does not exist in namespace \"logging\""), "{line}");
    daemon.stop().unwrap();
}

#[test]
fn netns_what_is_missing_is_named_and_picked_up() {
    let world = World::new("tc_ebpf", [Place::OtherInterface]);
    for resource in ["namespaces", "services"] {
        world.server.allow(Rule::new(&["get"], resource));
    }
    let mut daemon = world.spawn(&world.config(&World::by_number()));
    let line = daemon.wait_for_line("EndpointSlice not found: namespace \"logging\" does not exist").unwrap();
    assert!(line.contains("WARN"), "{line}");
    // The first set is an empty one, and its likely cause is said.
    let line = daemon.wait_for_logged("endpoints=0").unwrap();
    assert!(line.contains("WARN") && line.contains("EndpointSlice not found"), "{line}");

    world.server.apply(Kind::Namespace, namespace(NAMESPACE));
    world.server.apply(Kind::Service, service(NAMESPACE, SERVICE));
    // A Service that has just been made and has no pods yet.
    world.server.apply(Kind::EndpointSlice, slice(NAMESPACE, SERVICE, "a", []));
    world.apply("a", world.ready(&[0]));
    daemon.wait_for_line("discovered endpoints listener_id=0 endpoints=1").unwrap();
    daemon.wait_for_logged(&world.updated(1)).unwrap();
    // Scaled down to nothing: the slice stays, without endpoints.
    world.apply("a", Vec::new());
    let line = daemon.wait_for_line("endpoints=0").unwrap();
    assert!(line.contains("the services have no pods"), "{line}");
    assert_eq!(
        world
            .wait_for_metrics("no endpoints", |page| {
                page.sum("udp_fanout_downstream_active", &[("listener", "lab")]) == 0
            })
            .sum("udp_fanout_discovery_errors_total", &[]),
        0
    );
    daemon.stop().unwrap();
}
