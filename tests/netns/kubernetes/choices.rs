//! Which endpoints a listener takes: ports by name, several Services, locality, and never itself.

use std::net::SocketAddr;

use serde_json::{Value, json};

use super::world::{NAMESPACE, SERVICE, World, binary, shares};
use udp_fanout_lab::apiserver::{Kind, Rule};
use udp_fanout_lab::cluster::{at, leaving, node, ready, slice, unready};
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, ListenerSpec, Place, Surroundings};

/// A slice whose endpoints have a port of this name and number.
fn slice_with_port(name: &str, endpoints: Vec<Value>, port: (&str, u16)) -> Value {
    let mut slice = slice(NAMESPACE, SERVICE, name, endpoints);
    let other = json!({"name": "admin", "protocol": "TCP", "port": 80});
    slice["ports"] = json!([other, {"name": port.0, "protocol": "UDP", "port": port.1}]);
    slice
}

/// What these collectors get of a round.
fn counts(world: &World, collectors: Collectors) -> Vec<u64> {
    let sender = world.rounds(&collectors);
    let report = collectors.finish(&[&sender]).unwrap();
    // Several workers keep no order.
    assert!(report.is_complete(), "{report}");
    report.counts()
}

fn at_lab(world: &World) -> Vec<u64> {
    counts(world, Collectors::start(&world.lab, Expect::OneOfThem).unwrap())
}

#[test]
fn netns_a_port_by_name_is_what_each_slice_says() {
    for mode in ["tc_ebpf", "userspace"] {
        let world = World::new(mode, [Place::OtherInterface, Place::Pod]);
        let listening = |ports: [u16; 2]| {
            let place = |(site, port): (&'_ udp_fanout_lab::Site, u16)| SocketAddr::new(site.address.ip(), port);
            let places = world.lab.sites.iter().zip(ports);
            let sites = places.map(|pair| (pair.0.name.as_str(), world.lab.namespace_of(pair.0), place(pair)));
            Collectors::start_at(sites, Expect::OneOfThem).unwrap()
        };
        let publish = |name: &str, receiver: usize, port: u16| {
            let object = slice_with_port(name, world.ready(&[receiver]), ("syslog", port));
            world.server.apply(Kind::EndpointSlice, object);
        };
        publish("a", 0, 6001);
        publish("b", 1, 6002);
        let keys = format!("namespace = \"{NAMESPACE}\", service = \"{SERVICE}\", port = \"syslog\"");
        let mut daemon = world.start(&world.config(&keys), 2);
        assert_eq!(counts(&world, listening([6001, 6002])), shares(2, &[0, 1]), "{mode}");
        // A roll-out moves the port of one of them.
        publish("a", 0, 6003);
        daemon.wait_for_line(&world.updated(2)).unwrap();
        assert_eq!(counts(&world, listening([6003, 6002])), shares(2, &[0, 1]), "{mode}");
        // A Service without that port has no receivers, and the log says why.
        for (name, receiver) in [("a", 0), ("b", 1)] {
            let object = slice_with_port(name, world.ready(&[receiver]), ("syslogs", 6001));
            world.server.apply(Kind::EndpointSlice, object);
        }
        let line = daemon.wait_for_line("endpoints=0").unwrap();
        assert!(line.contains("WARN") && line.contains("the slices have no port \"syslog\""), "{line}");
        assert!(line.contains("\"admin\", \"syslogs\""), "{line}");
        daemon.stop().unwrap();
    }
}

#[test]
fn netns_several_services_are_one_set_of_receivers() {
    let places = [Place::OtherInterface, Place::Pod, Place::BehindRouter, Place::SameInterface];
    let world = World::new("tc_ebpf", places);
    let publish = |namespace: &str, service: &str, receivers: &[usize]| {
        let object = slice(namespace, service, &format!("{service}-1"), world.ready(receivers));
        world.server.apply(Kind::EndpointSlice, object);
    };
    publish("logging", "blue", &[0, 1]);
    // One of them is in both: it is one receiver.
    publish("canary", "green", &[1, 2]);
    // The third may not be looked at, which withholds nobody else's endpoints.
    publish("secret", "red", &[3]);
    let rule = || Rule::new(&["list", "watch"], "endpointslices");
    world.server.set_rules(&[rule().within("logging"), rule().within("canary")]);
    let keys = "namespace = \"logging\", port = 5514, services = [\"blue\", { service = \"green\", namespace = \"canary\" }, \
                { service = \"red\", namespace = \"secret\" }]";
    let mut daemon = world.start(&world.config(keys), 3);
    let line = daemon.wait_for_logged("missing rule").unwrap();
    assert!(line.contains("in namespace \"secret\""), "{line}");
    assert_eq!(at_lab(&world), shares(4, &[0, 1, 2]));
    world.server.allow(rule().within("secret"));
    daemon.wait_for_line(&world.updated(4)).unwrap();
    assert_eq!(at_lab(&world), shares(4, &[0, 1, 2, 3]));
    publish("logging", "blue", &[]);
    daemon.wait_for_line(&world.updated(3)).unwrap();
    assert_eq!(at_lab(&world), shares(4, &[1, 2, 3]));
    let page = world.metrics();
    let followed = page.select("udp_fanout_discovery_synced", &[]).map(|sample| sample.labels.clone());
    let followed: Vec<String> = followed.map(|labels| format!("{}/{}", labels[0].1, labels[1].1)).collect();
    assert_eq!(followed, ["canary/green", "logging/blue", "secret/red"]);
}

#[test]
fn netns_listeners_that_share_a_service_change_together() {
    for mode in ["tc_ebpf", "userspace"] {
        let world = World::new(mode, [Place::OtherInterface, Place::Pod]);
        world.apply("a", world.ready(&[0]));
        let mut config = world.config(&World::by_number());
        for port in [5515, 5516] {
            let listener = &config.listeners[0];
            let (name, bind) = (format!("lab-{port}"), listener.bind.replace("5514", &port.to_string()));
            config.listeners.push(ListenerSpec { name, bind, ..listener.clone() });
        }
        let mut daemon = world.start(&config, 1);
        let applied = || world.metrics().sum("udp_fanout_plan_apply_total", &[("result", "success")]);
        let before = applied();
        world.apply("a", world.ready(&[0, 1]));
        for listener in 0..3 {
            let line = world.updated(2).replace("listener_id=0", &format!("listener_id={listener}"));
            daemon.wait_for_logged(&line).unwrap();
        }
        assert_eq!(applied() - before, 1, "{mode}: one look at the host, one plan");
        let watches = world.server.seen().iter().filter(|seen| seen.is_watch()).count();
        assert_eq!(watches, 1, "{mode}: one watch");
        assert_eq!(at_lab(&world), shares(2, &[0, 1]), "{mode}");
        daemon.stop().unwrap();
    }
}

/// Starts the daemon on a node.
fn start_on(world: &World, node: Option<&str>, config: &DaemonConfig) -> Daemon {
    let mut surroundings = world.surroundings();
    surroundings.environment.extend(node.map(|node| ("NODE_NAME".to_owned(), node.to_owned())));
    Daemon::spawn_in(&world.lab.gateway, binary(), config, &surroundings).unwrap()
}

#[test]
fn netns_locality_prefers_what_is_near() {
    let places = [Place::Pod, Place::OtherInterface, Place::BehindRouter, Place::SameInterface];
    let world = World::new("tc_ebpf", places);
    let [here, zone, far, gone] = [0, 1, 2, 3].map(|receiver| world.ip(receiver));
    let all = |first: Value| {
        let others = [at(ready(&zone), "n2", "west"), at(ready(&far), "n3", "east"), at(unready(&gone), "n1", "west")];
        [vec![at(first, "n1", "west")], others.to_vec()].concat()
    };
    let keys = |locality: &str| format!("{}, locality = \"{locality}\"", World::by_number());
    world.server.apply(Kind::Node, node("n1", "west"));
    world.server.allow(Rule::new(&["get"], "nodes"));
    // What takes part while the endpoint here is ready, while it is shutting down, and once it is not ready.
    for (locality, near, leaves, without) in [
        ("cluster", &[0, 1, 2][..], &[1, 2][..], &[1, 2][..]),
        ("prefer_node", &[0], &[1, 2], &[1, 2]),
        ("prefer_zone", &[0, 1], &[1], &[1]),
        ("node", &[0], &[0], &[]),
    ] {
        world.apply("a", all(ready(&here)));
        let mut daemon = start_on(&world, Some("n1"), &world.config(&keys(locality)));
        daemon.wait_until_ready(&world.lab.gateway, 1).unwrap();
        daemon.wait_for_logged(&world.updated(near.len())).unwrap();
        assert_eq!(at_lab(&world), shares(4, near), "{locality}");
        world.apply("a", all(leaving(&here)));
        // The strict one has nothing else, so for it nothing changes.
        if leaves != near {
            daemon.wait_for_line(&world.updated(leaves.len())).unwrap();
        }
        assert_eq!(at_lab(&world), shares(4, leaves), "{locality}");
        world.apply("a", all(unready(&here)));
        if without.is_empty() {
            let line = daemon.wait_for_line("endpoints=0").unwrap();
            assert!(line.contains("locality = \"node\" and no usable endpoint is on node \"n1\""), "{line}");
        } else {
            assert_eq!(at_lab(&world), shares(4, without), "{locality}");
        }
        daemon.stop().unwrap();
    }
}

#[test]
fn netns_locality_without_the_nodes_name_says_what_to_set() {
    let world = World::new("tc_ebpf", [Place::Pod, Place::OtherInterface]);
    world.apply("a", world.ready(&[0, 1]));
    let config = |locality: &str| world.config(&format!("{}, locality = \"{locality}\"", World::by_number()));
    for locality in ["prefer_node", "prefer_zone"] {
        let mut daemon = start_on(&world, None, &config(locality));
        let line = daemon.wait_for_line("NODE_NAME").unwrap();
        assert!(line.contains("WARN") && line.contains("treats all endpoints alike"), "{line}");
        daemon.wait_for_logged(&world.updated(2)).unwrap();
        assert_eq!(at_lab(&world), shares(2, &[0, 1]), "{locality}");
        daemon.stop().unwrap();
    }
    // What only this node's endpoints may serve cannot be guessed.
    let mut daemon = start_on(&world, None, &config("node"));
    assert_eq!(daemon.wait().unwrap().code(), Some(1));
    let errors: Vec<&str> = daemon.log().lines().filter(|line| line.contains("ERROR")).collect();
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert!(errors[0].contains("listener 0: locality = \"node\" needs the node's name"), "{errors:?}");
    assert!(errors[0].contains("downward API (fieldPath: spec.nodeName)"), "{errors:?}");
    let filters = world.lab.gateway.tc("filter show dev eth0 ingress").unwrap();
    assert!(!filters.contains("udp_fanout"), "{filters}");
}

#[test]
fn netns_a_listener_is_never_its_own_receiver() {
    for mode in ["tc_ebpf", "userspace"] {
        let world = World::new(mode, [Place::OtherInterface, Place::Pod]);
        let mut config = world.config(&World::by_number());
        config.listeners[0].bind = "0.0.0.0:5514".into();
        let itself = || ready("10.0.0.1");
        world.apply("a", [world.ready(&[0, 1]), vec![itself()]].concat());
        let mut daemon = world.start(&config, 2);
        let warned = "downstream 10.0.0.1:5514 is the listener itself";
        daemon.wait_for_logged(warned).unwrap();
        assert_eq!(at_lab(&world), shares(2, &[0, 1]), "{mode}");
        world.apply("a", [world.ready(&[1]), vec![itself()]].concat());
        daemon.wait_for_line(&world.updated(1)).unwrap();
        assert_eq!(at_lab(&world), shares(2, &[1]), "{mode}");
        assert_eq!(daemon.log().matches(warned).count(), 1, "{}", daemon.log());
        daemon.stop().unwrap();
    }
}

#[test]
fn netns_kubeconfig_comes_from_the_environment_too() {
    let world = World::new("userspace", [Place::OtherInterface]);
    world.apply("a", world.ready(&[0]));
    let kubeconfig = world.server.kubeconfig().display().to_string();
    let environment = vec![("KUBECONFIG".to_owned(), kubeconfig)];
    let surroundings = Surroundings { arguments: Vec::new(), environment };
    let config = world.config(&World::by_number());
    let mut daemon = Daemon::spawn_in(&world.lab.gateway, binary(), &config, &surroundings).unwrap();
    daemon.wait_for_line(&world.updated(1)).unwrap();
    assert_eq!(at_lab(&world), shares(1, &[0]));
    daemon.stop().unwrap();

    // With neither, the start is refused in one line.
    let mut daemon = Daemon::spawn_in(&world.lab.gateway, binary(), &config, &Surroundings::default()).unwrap();
    assert_eq!(daemon.wait().unwrap().code(), Some(1));
    let errors: Vec<&str> = daemon.log().lines().filter(|line| line.contains("ERROR")).collect();
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert!(errors[0].contains("name one with --kubeconfig FILE"), "{errors:?}");
}
