//! The content of the manifests: names, configurations, privileges. The chart agrees with them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Value, json};
use udp_fanout::testing::config::{Config, DownstreamSource, OnExit, STATUS_SOCKET};

use super::render::{chart, everything, objects, only, overlay, plain, rbac, read, repository, values};

const BPF_FS: &str = "/sys/fs/bpf";

/// The configurations in the ConfigMaps among some objects.
pub fn configurations(objects: &[Value]) -> Vec<Config> {
    let maps = objects.iter().filter(|object| object["kind"] == "ConfigMap");
    let entries = maps.filter_map(|map| map["data"].as_object()).flatten();
    let files = entries.filter(|(name, _)| name.starts_with("config."));
    files
        .map(|(name, text)| {
            let text = text.as_str().unwrap();
            Config::parse(text, Path::new(name)).unwrap_or_else(|error| panic!("{error}\n{text}"))
        })
        .collect()
}

fn daemonset(objects: &[Value]) -> &Value {
    only(objects, "DaemonSet")
}

fn pod(objects: &[Value]) -> &Value {
    &daemonset(objects)["spec"]["template"]["spec"]
}

fn container(objects: &[Value]) -> &Value {
    let containers = pod(objects)["containers"].as_array().unwrap();
    assert_eq!(containers.len(), 1);
    &containers[0]
}

fn manifests() -> Vec<Value> {
    objects(&read("k8s/rbac.yaml")).into_iter().chain(objects(&read("k8s/daemonset.yaml"))).collect()
}

#[test]
fn every_object_has_the_name_that_commands_use() {
    let namespaced = |kind: &'static str, namespace: &'static str| (kind, Some(namespace));
    let all = manifests();
    let expected = [
        ("Namespace", None),
        namespaced("ServiceAccount", "udp-fanout"),
        namespaced("Role", "logging"),
        namespaced("RoleBinding", "logging"),
        namespaced("ConfigMap", "udp-fanout"),
        namespaced("DaemonSet", "udp-fanout"),
    ];
    let found: Vec<(&str, Option<&str>)> = all
        .iter()
        .map(|object| {
            assert_eq!(object["metadata"]["name"], "udp-fanout", "{object}");
            assert_eq!(object["metadata"]["labels"]["app.kubernetes.io/name"], "udp-fanout", "{object}");
            (object["kind"].as_str().unwrap(), object["metadata"]["namespace"].as_str())
        })
        .collect();
    assert_eq!(found, expected);
    let container = container(&all);
    assert_eq!((&container["name"], &container["image"]), (&json!("udp-fanout"), &json!("udp-fanout:latest")));
}

#[test]
fn every_configuration_in_them_is_accepted() {
    let mut accepted = 0;
    for (what, text) in everything("1.30") {
        let all = objects(&text);
        let found = configurations(&all);
        let wanted = usize::from(all.iter().any(|object| object["kind"] == "DaemonSet"));
        assert!(found.len() >= wanted, "{what} has no configuration");
        accepted += found.len();
    }
    assert!(accepted >= 8, "only {accepted}");
}

#[test]
fn the_daemonset_carries_the_example_configuration() {
    let example = Config::load(&repository().join("config/kubernetes.toml")).unwrap();
    for text in [read("k8s/daemonset.yaml"), chart(None, "1.30")] {
        let mut config = configurations(&objects(&text)).pop().unwrap();
        config.path.clone_from(&example.path);
        assert_eq!(config, example);
    }
}

#[test]
fn the_chart_makes_what_the_plain_manifests_make() {
    let (mut plain, mut chart) = (manifests(), objects(&chart(None, "1.30")));
    // It labels its objects, its configuration is in YAML, and a changed one replaces the pods.
    for object in plain.iter_mut().chain(&mut chart) {
        let labels = object["metadata"]["labels"].as_object_mut().unwrap();
        labels.retain(|label, _| label == "app.kubernetes.io/name");
    }
    for object in &mut chart {
        if object["kind"] == "DaemonSet" {
            let template = &mut object["spec"]["template"];
            template["metadata"]["annotations"].as_object_mut().unwrap().remove("checksum/config").unwrap();
            template["spec"]["containers"][0]["args"][2] = json!("/etc/udp-fanout/config.toml");
        }
    }
    for kind in ["ServiceAccount", "Role", "RoleBinding", "DaemonSet"] {
        assert_eq!(only(&chart, kind), only(&plain, kind));
    }
    // Helm creates the namespace.
    assert_eq!(chart.len(), plain.len() - 1);
}

#[test]
fn what_is_off_in_the_chart_can_be_had() {
    let all = objects(&chart(Some("everything-values.yaml"), "1.30"));
    let pod = pod(&all);
    for key in ["imagePullSecrets", "priorityClassName", "nodeSelector", "affinity", "tolerations"] {
        assert!(!pod[key].is_null(), "{key}");
    }
    let container = container(&all);
    assert_eq!(container["image"], format!("registry.example/udp-fanout:{}", env!("CARGO_PKG_VERSION")));
    assert_eq!(container["args"].as_array().unwrap()[5..], ["--log-level", "debug", "--log-format", "json"]);
    assert_eq!(container["ports"][0]["containerPort"], 9190);
    assert_eq!(daemonset(&all)["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"], "9190");
    let settings = &configurations(&all)[0].listeners[1].settings;
    assert_eq!(settings.recv_buf_size, Some(16_777_216), "numbers stay what they are");

    let bare = objects(&chart(Some("bare-values.yaml"), "1.30"));
    let kinds: Vec<&str> = bare.iter().map(|object| object["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["ConfigMap", "DaemonSet"]);
    assert!(self::container(&bare)["readinessProbe"].is_null(), "without its page there is nothing to probe");
    assert!(!self::container(&bare)["livenessProbe"].is_null(), "which needs no page");
}

#[test]
fn the_chart_and_the_package_are_of_one_version() {
    let chart = &objects(&read("deploy/helm/udp-fanout/Chart.yaml"))[0];
    assert_eq!((&chart["version"], &chart["appVersion"]), (&env!("CARGO_PKG_VERSION").into(), &chart["version"]));
}

/// The privileges that a pod may have unless the user asks for more.
#[test]
fn a_pod_may_do_no_more_than_it_needs() {
    let everything = everything("1.30");
    let with_pod: Vec<_> = everything.iter().filter(|(_, text)| text.contains("kind: DaemonSet")).collect();
    assert!(with_pod.len() >= 6);
    for (what, text) in with_pod {
        let all = objects(text);
        let pod = pod(&all);
        let every = |list: &str| pod[list].as_array().cloned().unwrap_or_default();
        for container in every("containers").iter().chain(&every("initContainers")) {
            let context = &container["securityContext"];
            assert_eq!(context["privileged"], false, "{what}");
            assert_eq!(context["allowPrivilegeEscalation"], false, "{what}");
            assert_eq!(context["readOnlyRootFilesystem"], true, "{what}");
            assert_eq!(context["capabilities"]["drop"], json!(["ALL"]), "{what}");
        }
        assert_eq!(pod["hostNetwork"], true, "{what}");
        assert!(pod["hostPID"].is_null() && pod["hostIPC"].is_null(), "{what}");
        assert!(!pod["securityContext"]["seccompProfile"]["type"].is_null(), "{what}");
        let capabilities: BTreeSet<&str> = container(&all)["securityContext"]["capabilities"]["add"]
            .as_array()
            .unwrap()
            .iter()
            .map(|name| name.as_str().unwrap())
            .collect();
        let mut allowed = BTreeSet::from(["BPF", "NET_ADMIN", "NET_RAW", "PERFMON"]);
        if what.contains("sys-admin") || what == "all components" {
            allowed.extend(["SYS_ADMIN", "SYS_RESOURCE"]);
        } else if what.contains("everything") {
            allowed.extend(["NET_BIND_SERVICE", "SYS_ADMIN", "SYS_RESOURCE"]);
        }
        assert_eq!(capabilities, allowed, "{what}");
    }
}

#[test]
fn a_pod_has_what_the_daemon_looks_for() {
    for text in [read("k8s/daemonset.yaml"), chart(None, "1.30")] {
        let all = objects(&text);
        let config = configurations(&all).pop().unwrap();
        let metrics = config.metrics.unwrap();
        let container = container(&all);
        assert_eq!(container["env"][0]["name"], "NODE_NAME");
        assert_eq!(container["env"][0]["valueFrom"]["fieldRef"]["fieldPath"], "spec.nodeName");
        assert_eq!(container["ports"][0]["containerPort"], metrics.bind.port());
        assert_eq!(container["readinessProbe"]["httpGet"], json!({ "path": "/serving", "port": "metrics" }));
        // The liveness probe depends neither on the metrics port nor on the configured path of the socket.
        assert!(container["livenessProbe"]["httpGet"].is_null());
        let [program, check @ .., option, socket] = &words(&container["livenessProbe"]["exec"]["command"])[..] else {
            panic!("{container}")
        };
        assert_eq!(
            (program.as_str(), check, option.as_str()),
            ("udp-fanout", &["status", "--check"].map(String::from)[..], "--socket")
        );
        assert_eq!(words(&container["args"])[3..], ["--status-socket", socket]);
        assert_eq!(socket, STATUS_SOCKET, "`udp-fanout status` in the pod finds it");
        let run = container["volumeMounts"].as_array().unwrap().iter().find(|mount| mount["name"] == "run").unwrap();
        assert_eq!(Path::new(socket).parent().unwrap(), run["mountPath"].as_str().unwrap());
        let annotations = &daemonset(&all)["spec"]["template"]["metadata"]["annotations"];
        assert_eq!(annotations["prometheus.io/scrape"], "true");
        assert_eq!(annotations["prometheus.io/port"], metrics.bind.port().to_string());
        assert_eq!(annotations["prometheus.io/path"], metrics.path);
        assert_eq!(daemonset(&all)["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"], 1);
        // The pin directory is the node's.
        assert_eq!((config.handover.on_exit, config.handover.pin_path.parent()), (OnExit::Keep, Some(BPF_FS.as_ref())));
        let mounts = container["volumeMounts"].as_array().unwrap();
        let mount = mounts.iter().find(|mount| mount["mountPath"] == BPF_FS).unwrap();
        let volumes = pod(&all)["volumes"].as_array().unwrap();
        let volume = volumes.iter().find(|volume| volume["name"] == mount["name"]).unwrap();
        assert_eq!(volume["hostPath"], json!({ "path": BPF_FS, "type": "Directory" }));
        let file = container["args"][2].as_str().unwrap();
        let (directory, name) = file.rsplit_once('/').unwrap();
        assert_eq!(container["volumeMounts"][0]["mountPath"], directory);
        assert!(only(&all, "ConfigMap")["data"][name].is_string(), "{file}");
    }
}

/// A list of strings.
fn words(list: &Value) -> Vec<String> {
    list.as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned()).collect()
}

/// Each Service that a configuration watches, as namespace and name.
pub fn services(config: &Config) -> BTreeSet<(String, String)> {
    let sources = config.listeners.iter().filter_map(|listener| match &listener.source {
        DownstreamSource::Kubernetes(source) => Some(&source.services),
        DownstreamSource::Static(_) | DownstreamSource::Names(_) => None,
    });
    sources
        .flatten()
        .map(|service| (service.namespace.clone().unwrap_or_else(|| "udp-fanout".into()), service.service.clone()))
        .collect()
}

/// Roles and bindings of all kinds, by kind, namespace and name, without labels: the permissions and their subjects.
fn rights(objects: &[Value]) -> BTreeMap<String, Value> {
    let rights = objects.iter().filter(|object| {
        ["Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"].iter().any(|kind| object["kind"] == *kind)
    });
    rights
        .map(|object| {
            let mut object = object.clone();
            object["metadata"].as_object_mut().unwrap().remove("labels");
            let key = format!("{} {}", object["kind"], object["metadata"]);
            (key, object)
        })
        .collect()
}

#[test]
fn the_rights_are_exactly_those_that_the_configuration_needs() {
    let mut renders = vec![("udp-fanout", manifests()), ("udp-fanout", objects(&overlay(&[])))];
    renders.push(("udp-fanout", objects(&chart(None, "1.30"))));
    renders.push(("fanout", objects(&chart(Some("everything-values.yaml"), "1.30"))));
    assert_eq!(values().len(), 2, "a file of values that is not tried here");
    for (account, all) in &renders {
        let needed = rights(&objects(&rbac(all, account)));
        assert!(needed.len() >= 2);
        assert_eq!(rights(all), needed);
    }
    let everything = rights(&renders[3].1);
    assert_eq!(everything.len(), 8, "three namespaces, and nodes: {everything:#?}");
    // MetalLB's example needs the same ones as the DaemonSet.
    let metallb = objects(&read("k8s/example-metallb.yaml"));
    assert_eq!(rights(&objects(&rbac(&metallb, "udp-fanout"))), rights(&manifests()));
}

#[test]
fn the_seccomp_profile_is_one_that_runtimes_read() {
    let profile: Value = serde_json::from_str(&read("k8s/components/seccomp-localhost/udp-fanout.json")).unwrap();
    // The part of the format that the OCI runtime specification and the tools that extend it have in common.
    assert_eq!(profile["defaultAction"], "SCMP_ACT_ERRNO");
    assert_eq!(profile["architectures"], json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"]));
    let groups = profile["syscalls"].as_array().unwrap();
    assert_eq!((groups.len(), &groups[0]["action"]), (1, &json!("SCMP_ACT_ALLOW")));
    let names: Vec<&str> = groups[0]["names"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    assert!(names.is_sorted() && names.windows(2).all(|two| two[0] != two[1]));
    assert!(names.contains(&"bpf"));
    for forbidden in ["mount", "ptrace", "unshare", "setns", "init_module", "kexec_load", "reboot", "pivot_root"] {
        assert!(!names.contains(&forbidden), "{forbidden}");
    }
    let all = objects(&overlay(&["seccomp-localhost"]));
    let path = &container(&all)["securityContext"]["seccompProfile"]["localhostProfile"];
    let installed = pod(&all)["initContainers"][0]["command"].as_array().unwrap().last().unwrap().clone();
    assert_eq!(installed, format!("/seccomp/{}", path.as_str().unwrap()));
    assert_eq!(pod(&all)["initContainers"][0]["image"], container(&all)["image"], "the overlay's image");
}

#[test]
fn the_network_policy_lets_in_what_is_listened_to() {
    let config = configurations(&objects(&read("k8s/daemonset.yaml"))).pop().unwrap();
    let (listener, page) = (config.listeners[0].bind.port(), config.metrics.unwrap().bind.port());
    let policies = objects(&read("k8s/networkpolicy.yaml"));
    let own = &policies[0]["spec"];
    assert_eq!(own["podSelector"]["matchLabels"], json!({ "app.kubernetes.io/name": "udp-fanout" }));
    assert_eq!(own["ingress"][0]["ports"], json!([{ "protocol": "UDP", "port": listener }]));
    assert_eq!(own["ingress"][1]["ports"], json!([{ "protocol": "TCP", "port": page }]));
    assert_eq!(policies[1]["spec"]["ingress"][0]["ports"], own["ingress"][0]["ports"]);
}

#[test]
fn every_plain_file_is_known_here() {
    let names: Vec<String> = plain().into_iter().map(|(name, _)| name).collect();
    let expected = ["daemonset", "example-metallb", "example-vector", "networkpolicy", "rbac"];
    assert_eq!(names, expected.map(|name| format!("k8s/{name}.yaml")));
}
