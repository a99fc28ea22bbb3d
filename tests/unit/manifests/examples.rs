//! The examples fit the projects that they are for.

use serde_json::{Value, json};
use udp_fanout::testing::config::{Config, DownstreamSource, RequestedMode};
use udp_fanout::testing::discovery::PortRef;

use super::content::{configurations, services};
use super::render::{objects, only, read};

fn of(objects: &[Value], kind: &str, name: &str) -> Value {
    let found = objects.iter().find(|object| object["kind"] == kind && object["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("no {kind} {name}")).clone()
}

fn daemonset() -> Config {
    configurations(&objects(&read("k8s/daemonset.yaml"))).pop().unwrap()
}

#[test]
fn vector_receives_what_the_daemonset_sends() {
    let all = objects(&read("k8s/example-vector.yaml"));
    let (service, deployment) = (of(&all, "Service", "vector-aggregators"), only(&all, "Deployment"));
    let followed = services(&daemonset());
    let there = |object: &Value| {
        let part = |key: &str| object["metadata"][key].as_str().unwrap().to_owned();
        (part("namespace"), part("name"))
    };
    assert!(followed.contains(&there(&service)));
    assert_eq!(service["spec"]["clusterIP"], "None");

    let pod = &deployment["spec"]["template"];
    assert_eq!(pod["metadata"]["labels"], service["spec"]["selector"]);
    assert_eq!(pod["metadata"]["labels"], deployment["spec"]["selector"]["matchLabels"]);
    let policies = objects(&read("k8s/networkpolicy.yaml"));
    assert_eq!(pod["metadata"]["labels"], policies[1]["spec"]["podSelector"]["matchLabels"]);

    let DownstreamSource::Kubernetes(source) = &daemonset().listeners[0].source else { panic!("static") };
    let PortRef::Number(port) = source.services[0].port else { panic!("a named port") };
    assert_eq!(
        pod["spec"]["containers"][0]["ports"][0],
        json!({ "name": "syslog", "containerPort": port, "protocol": "UDP" })
    );
    assert_eq!(service["spec"]["ports"][0]["targetPort"], "syslog");
    let config = of(&all, "ConfigMap", "vector-config");
    let vector = objects(config["data"]["vector.yaml"].as_str().unwrap());
    let address = vector[0]["sources"]["syslog"]["address"].as_str().unwrap();
    assert_eq!(address, format!("0.0.0.0:{port}"));
    let health = pod["spec"]["containers"][0]["readinessProbe"]["httpGet"]["port"].as_str().unwrap();
    assert_eq!((health, &vector[0]["api"]["address"]), ("api", &json!("0.0.0.0:8686")));
}

#[test]
fn metallb_announces_what_is_bound() {
    let all = objects(&read("k8s/example-metallb.yaml"));
    let service = only(&all, "Service");
    let config = configurations(&all).pop().unwrap();
    let [announced, rest] = &config.listeners[..] else { panic!("two listeners") };
    let port = &service["spec"]["ports"][0];
    assert_eq!(service["spec"]["loadBalancerIP"], announced.bind.ip().to_string());
    assert_eq!(service["spec"]["externalTrafficPolicy"], "Local");
    assert_eq!((&port["port"], &port["targetPort"]), (&json!(announced.bind.port()), &json!(rest.bind.port())));
    assert_eq!((announced.mode, rest.mode), (RequestedMode::TcEbpf, RequestedMode::Userspace));
    assert!(rest.bind.ip().is_unspecified(), "the translated address is the node's own");
    assert_eq!(announced.source, rest.source);

    let plain = objects(&read("k8s/daemonset.yaml"));
    let pod = &only(&plain, "DaemonSet")["spec"]["template"];
    assert_eq!(service["spec"]["selector"], pod["metadata"]["labels"]);
    // It replaces the DaemonSet's, and needs no other permissions.
    assert_eq!(only(&all, "ConfigMap")["metadata"], only(&plain, "ConfigMap")["metadata"]);
    assert_eq!(services(&config), services(&daemonset()));
}
