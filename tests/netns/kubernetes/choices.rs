//! Which endpoints a listener uses: ports by name, several Services, locality, and never itself.

use std::net::SocketAddr;

use serde_json::{Value, json};

use super::kubernetes_lab::{KubernetesLab, NAMESPACE, SERVICE, binary, shares};
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

/// How many of the datagrams of a round these collectors get.
fn counts(k8s: &KubernetesLab, collectors: Collectors) -> Vec<u64> {
    let sender = k8s.rounds(&collectors);
    let report = collectors.finish(&[&sender]).unwrap();
    // Several workers keep no order.
    assert!(report.is_complete(), "{report}");
    report.counts()
}

fn at_lab(k8s: &KubernetesLab) -> Vec<u64> {
    counts(k8s, Collectors::start(&k8s.lab, Expect::OneOfThem).unwrap())
}

#[test]
fn netns_a_port_by_name_is_what_each_slice_says() {
    for mode in ["tc_ebpf", "userspace"] {
        let k8s = KubernetesLab::new(mode, [Place::OtherInterface, Place::Pod]);
        let listening = |ports: [u16; 2]| {
            let place = |(site, port): (&'_ udp_fanout_lab::Site, u16)| SocketAddr::new(site.address.ip(), port);
            let places = k8s.lab.sites.iter().zip(ports);
            let sites = places.map(|pair| (pair.0.name.as_str(), k8s.lab.namespace_of(pair.0), place(pair)));
            Collectors::start_at(sites, Expect::OneOfThem).unwrap()
        };
        let publish = |name: &str, receiver: usize, port: u16| {
            let object = slice_with_port(name, k8s.ready(&[receiver]), ("syslog", port));
            k8s.server.apply(Kind::EndpointSlice, object);
        };
        publish("a", 0, 6001);
        publish("b", 1, 6002);
        let keys = format!("namespace = \"{NAMESPACE}\", service = \"{SERVICE}\", port = \"syslog\"");
        let mut daemon = k8s.start(&k8s.config(&keys), 2);
        assert_eq!(counts(&k8s, listening([6001, 6002])), shares(2, &[0, 1]), "{mode}");
        // A roll-out moves the port of one of them.
        publish("a", 0, 6003);
        daemon.wait_for_line(&k8s.updated(2)).unwrap();
        assert_eq!(counts(&k8s, listening([6003, 6002])), shares(2, &[0, 1]), "{mode}");
        // A Service without that port has no receivers, and the log says why.
        for (name, receiver) in [("a", 0), ("b", 1)] {
            let object = slice_with_port(name, k8s.ready(&[receiver]), ("syslogs", 6001));
            k8s.server.apply(Kind::EndpointSlice, object);
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
    let k8s = KubernetesLab::new("tc_ebpf", places);
    let publish = |namespace: &str, service: &str, receivers: &[usize]| {
        let object = slice(namespace, service, &format!("{service}-1"), k8s.ready(receivers));
        k8s.server.apply(Kind::EndpointSlice, object);
    };
    publish("logging", "blue", &[0, 1]);
    // One of them is in both: it is one receiver.
    publish("canary", "green", &[1, 2]);
    // The third one is forbidden, which does not affect the endpoints of the others.
    publish("secret", "red", &[3]);
    let rule = || Rule::new(&["list", "watch"], "endpointslices");
    k8s.server.set_rules(&[rule().within("logging"), rule().within("canary")]);
    let keys = "namespace = \"logging\", port = 5514, services = [\"blue\", { service = \"green\", namespace = \"canary\" }, \
                { service = \"red\", namespace = \"secret\" }]";
    let mut daemon = k8s.start(&k8s.config(keys), 3);
    let line = daemon.wait_for_logged("missing rule").unwrap();
    assert!(line.contains("in namespace \"secret\""), "{line}");
    assert_eq!(at_lab(&k8s), shares(4, &[0, 1, 2]));
    k8s.server.allow(rule().within("secret"));
    daemon.wait_for_line(&k8s.updated(4)).unwrap();
    assert_eq!(at_lab(&k8s), shares(4, &[0, 1, 2, 3]));
    publish("logging", "blue", &[]);
    daemon.wait_for_line(&k8s.updated(3)).unwrap();
    assert_eq!(at_lab(&k8s), shares(4, &[1, 2, 3]));
    let page = k8s.metrics();
    let followed = page.select("udp_fanout_discovery_synced", &[]).map(|sample| sample.labels.clone());
    let followed: Vec<String> = followed.map(|labels| format!("{}/{}", labels[0].1, labels[1].1)).collect();
    assert_eq!(followed, ["canary/green", "logging/blue", "secret/red"]);
}

#[test]
fn netns_listeners_that_share_a_service_change_together() {
    for mode in ["tc_ebpf", "userspace"] {
        let k8s = KubernetesLab::new(mode, [Place::OtherInterface, Place::Pod]);
        k8s.apply("a", k8s.ready(&[0]));
        let mut config = k8s.config(&KubernetesLab::by_number());
        for port in [5515, 5516] {
            let listener = &config.listeners[0];
            let (name, bind) = (format!("lab-{port}"), listener.bind.replace("5514", &port.to_string()));
            config.listeners.push(ListenerSpec { name, bind, ..listener.clone() });
        }
        let mut daemon = k8s.start(&config, 1);
        let applied = || k8s.metrics().sum("udp_fanout_plan_apply_total", &[("result", "success")]);
        let before = applied();
        k8s.apply("a", k8s.ready(&[0, 1]));
        for listener in 0..3 {
            let line = k8s.updated(2).replace("listener_id=0", &format!("listener_id={listener}"));
            daemon.wait_for_logged(&line).unwrap();
        }
        assert_eq!(applied() - before, 1, "{mode}: one read of the host state, one plan");
        let watches = k8s.server.seen().iter().filter(|seen| seen.is_watch()).count();
        assert_eq!(watches, 1, "{mode}: one watch");
        assert_eq!(at_lab(&k8s), shares(2, &[0, 1]), "{mode}");
        daemon.stop().unwrap();
    }
}

/// Starts the daemon on a node.
fn start_on(k8s: &KubernetesLab, node: Option<&str>, config: &DaemonConfig) -> Daemon {
    let mut surroundings = k8s.surroundings();
    surroundings.environment.extend(node.map(|node| ("NODE_NAME".to_owned(), node.to_owned())));
    Daemon::spawn_in(&k8s.lab.gateway, binary(), config, &surroundings).unwrap()
}

#[test]
fn netns_locality_prefers_what_is_near() {
    let places = [Place::Pod, Place::OtherInterface, Place::BehindRouter, Place::SameInterface];
    let k8s = KubernetesLab::new("tc_ebpf", places);
    let [here, zone, far, gone] = [0, 1, 2, 3].map(|receiver| k8s.ip(receiver));
    let all = |first: Value| {
        let others = [at(ready(&zone), "n2", "west"), at(ready(&far), "n3", "east"), at(unready(&gone), "n1", "west")];
        [vec![at(first, "n1", "west")], others.to_vec()].concat()
    };
    let keys = |locality: &str| format!("{}, locality = \"{locality}\"", KubernetesLab::by_number());
    k8s.server.apply(Kind::Node, node("n1", "west"));
    k8s.server.allow(Rule::new(&["get"], "nodes"));
    // The active endpoints while the local one is ready, while it is terminating, and once it is not ready.
    for (locality, near, leaves, without) in [
        ("cluster", &[0, 1, 2][..], &[1, 2][..], &[1, 2][..]),
        ("prefer_node", &[0], &[1, 2], &[1, 2]),
        ("prefer_zone", &[0, 1], &[1], &[1]),
        ("node", &[0], &[0], &[]),
    ] {
        k8s.apply("a", all(ready(&here)));
        let mut daemon = start_on(&k8s, Some("n1"), &k8s.config(&keys(locality)));
        daemon.wait_until_ready(&k8s.lab.gateway, 1).unwrap();
        daemon.wait_for_logged(&k8s.updated(near.len())).unwrap();
        assert_eq!(at_lab(&k8s), shares(4, near), "{locality}");
        k8s.apply("a", all(leaving(&here)));
        // The strict one has nothing else, so for it nothing changes.
        if leaves != near {
            daemon.wait_for_line(&k8s.updated(leaves.len())).unwrap();
        }
        assert_eq!(at_lab(&k8s), shares(4, leaves), "{locality}");
        k8s.apply("a", all(unready(&here)));
        if without.is_empty() {
            let line = daemon.wait_for_line("endpoints=0").unwrap();
            assert!(line.contains("locality = \"node\" and no usable endpoint is on node \"n1\""), "{line}");
        } else {
            assert_eq!(at_lab(&k8s), shares(4, without), "{locality}");
        }
        daemon.stop().unwrap();
    }
}

#[test]
fn netns_locality_without_the_nodes_name_says_what_to_set() {
    let k8s = KubernetesLab::new("tc_ebpf", [Place::Pod, Place::OtherInterface]);
    k8s.apply("a", k8s.ready(&[0, 1]));
    let config = |locality: &str| k8s.config(&format!("{}, locality = \"{locality}\"", KubernetesLab::by_number()));
    for locality in ["prefer_node", "prefer_zone"] {
        let mut daemon = start_on(&k8s, None, &config(locality));
        let line = daemon.wait_for_line("NODE_NAME").unwrap();
        assert!(line.contains("WARN") && line.contains("treats all endpoints alike"), "{line}");
        daemon.wait_until_ready(&k8s.lab.gateway, 1).unwrap();
        daemon.wait_for_logged(&k8s.updated(2)).unwrap();
        assert_eq!(at_lab(&k8s), shares(2, &[0, 1]), "{locality}");
        daemon.stop().unwrap();
    }
    // `node` needs NODE_NAME.
    let mut daemon = start_on(&k8s, None, &config("node"));
    assert_eq!(daemon.wait().unwrap().code(), Some(1));
    let errors: Vec<&str> = daemon.log().lines().filter(|line| line.contains("ERROR")).collect();
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert!(errors[0].contains("listener 0: locality = \"node\" needs the node's name"), "{errors:?}");
    assert!(errors[0].contains("downward API (fieldPath: spec.nodeName)"), "{errors:?}");
    let filters = k8s.lab.gateway.tc("filter show dev eth0 ingress").unwrap();
    assert!(!filters.contains("udp_fanout"), "{filters}");
}

#[test]
fn netns_a_listener_is_never_its_own_receiver() {
    for mode in ["tc_ebpf", "userspace"] {
        let k8s = KubernetesLab::new(mode, [Place::OtherInterface, Place::Pod]);
        let mut config = k8s.config(&KubernetesLab::by_number());
        config.listeners[0].bind = "0.0.0.0:5514".into();
        let itself = || ready("10.0.0.1");
        k8s.apply("a", [k8s.ready(&[0, 1]), vec![itself()]].concat());
        let mut daemon = k8s.start(&config, 2);
        let warned = "downstream 10.0.0.1:5514 is the listener itself";
        daemon.wait_for_logged(warned).unwrap();
        assert_eq!(at_lab(&k8s), shares(2, &[0, 1]), "{mode}");
        k8s.apply("a", [k8s.ready(&[1]), vec![itself()]].concat());
        daemon.wait_for_line(&k8s.updated(1)).unwrap();
        assert_eq!(at_lab(&k8s), shares(2, &[1]), "{mode}");
        assert_eq!(daemon.log().matches(warned).count(), 1, "{}", daemon.log());
        daemon.stop().unwrap();
    }
}

#[test]
fn netns_kubeconfig_comes_from_the_environment_too() {
    let k8s = KubernetesLab::new("userspace", [Place::OtherInterface]);
    k8s.apply("a", k8s.ready(&[0]));
    let kubeconfig = k8s.server.kubeconfig().display().to_string();
    let environment = vec![("KUBECONFIG".to_owned(), kubeconfig)];
    let surroundings = Surroundings { arguments: Vec::new(), environment };
    let config = k8s.config(&KubernetesLab::by_number());
    let mut daemon = Daemon::spawn_in(&k8s.lab.gateway, binary(), &config, &surroundings).unwrap();
    daemon.wait_for_line(&k8s.updated(1)).unwrap();
    assert_eq!(at_lab(&k8s), shares(1, &[0]));
    daemon.stop().unwrap();

    // With neither, the start is refused in one line.
    let mut daemon = Daemon::spawn_in(&k8s.lab.gateway, binary(), &config, &Surroundings::default()).unwrap();
    assert_eq!(daemon.wait().unwrap().code(), Some(1));
    let errors: Vec<&str> = daemon.log().lines().filter(|line| line.contains("ERROR")).collect();
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert!(errors[0].contains("name one with --kubeconfig FILE"), "{errors:?}");
}
