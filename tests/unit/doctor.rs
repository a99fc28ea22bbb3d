//! `udp-fanout doctor` against an API server: permissions to list and watch, missing endpoints, and no server.

use std::fs;
use std::path::Path;
use std::process::Command;

use udp_fanout_lab::apiserver::{ApiServer, Kind, Rule};
use udp_fanout_lab::cluster::{namespace, ready, service, slice};

const CONFIG: &str = r#"
[[listeners]]
name = "syslog"
bind = "127.0.0.1:0"
mode = "userspace"
kubernetes = { namespace = "logging", service = "vector", port = 5514 }
"#;

/// The doctor's findings about Kubernetes, level and text with fix, and about the routes to the endpoints.
fn doctor(kubeconfig: &Path) -> (String, String, String) {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config.toml");
    let socket = directory.path().join("status.sock");
    let text = CONFIG.replace("127.0.0.1:0", "127.0.0.1:15999");
    fs::write(&config, format!("status_socket = {socket:?}\n{text}")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_udp-fanout"));
    command.args(["doctor", "--json", "--config"]).arg(&config);
    let output = command.env("KUBECONFIG", kubeconfig).env_remove("KUBERNETES_SERVICE_HOST").output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    let of = |check: &str| {
        let all = report["findings"].as_array().unwrap();
        let mut found = all.iter().filter(|finding| finding["check"] == check);
        let finding = found.next().unwrap_or_else(|| panic!("no {check}: {report:#}"));
        assert!(found.next().is_none(), "{report:#}");
        let fix = finding["fix"].as_str().unwrap_or_default();
        (finding["level"].as_str().unwrap().to_owned(), format!("{}; {fix}", finding["text"].as_str().unwrap()))
    };
    let (level, text) = of("kubernetes");
    (level, text, of("route").1)
}

#[test]
fn a_reachable_cluster_is_ok_and_its_endpoints_are_checked() {
    let server = ApiServer::start();
    server.apply(Kind::EndpointSlice, slice("logging", "vector", "vector-a", [ready("127.0.0.1"), ready("127.0.0.2")]));
    let (level, text, routes) = doctor(&server.kubeconfig());
    assert_eq!(level, "ok", "{text}");
    assert!(text.contains("lists and watches all 1 Services: 2 endpoints"), "{text}");
    assert!(routes.contains("there are routes to all 2 downstreams"), "{routes}");
}

#[test]
fn the_services_port_in_place_of_the_containers_is_named() {
    let server = ApiServer::start();
    let mut wrong = slice("logging", "vector", "vector-a", [ready("127.0.0.1")]);
    wrong["ports"] = serde_json::json!([{"name": "syslog", "protocol": "UDP", "port": 6514}]);
    server.apply(Kind::EndpointSlice, wrong);
    let (level, text, _) = doctor(&server.kubeconfig());
    assert_eq!(level, "warning", "{text}");
    for part in ["have no UDP port 5514, only 6514", "set `port = \"syslog\"`"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
}

#[test]
fn missing_rights_are_named_with_the_command_that_grants_them() {
    let server = ApiServer::start();
    server.apply(Kind::EndpointSlice, slice("logging", "vector", "vector-a", [ready("127.0.0.1")]));
    for rules in [&[][..], &[Rule::new(&["list"], "endpointslices")], &[Rule::new(&["watch"], "endpointslices")]] {
        server.set_rules(rules);
        let (level, text, _) = doctor(&server.kubeconfig());
        assert_eq!(level, "problem", "{rules:?}: {text}");
        assert!(text.contains("may not list and watch endpointslices in namespace \"logging\""), "{text}");
        assert!(text.contains("fix: udp-fanout rbac --config ") && text.contains(" | kubectl apply -f -"), "{text}");
    }
}

#[test]
fn a_missing_service_is_told_from_one_without_endpoints() {
    let server = ApiServer::start();
    server.allow(Rule::new(&["get"], "namespaces"));
    server.allow(Rule::new(&["get"], "services"));
    server.apply(Kind::Namespace, namespace("logging"));
    let (level, text, routes) = doctor(&server.kubeconfig());
    assert_eq!(level, "problem");
    assert!(text.contains("service \"vector\" does not exist in namespace \"logging\""), "{text}");
    assert!(routes.contains("has no downstream: all its datagrams are dropped"), "{routes}");
    server.apply(Kind::Service, service("logging", "vector"));
    let (_, text, _) = doctor(&server.kubeconfig());
    assert!(text.contains("exists but has no EndpointSlices"), "{text}");
}

#[test]
fn an_unreachable_api_server_is_a_problem() {
    let server = ApiServer::start();
    let kubeconfig = server.kubeconfig();
    server.accept_token("another");
    let (level, text, _) = doctor(&kubeconfig);
    assert!(level == "problem" && text.contains("401") && text.contains("credentials"), "{text}");

    let nowhere = tempfile::tempdir().unwrap();
    let (level, text, _) = doctor(&nowhere.path().join("kubeconfig"));
    assert!(level == "problem" && text.contains("finds no API server"), "{text}");
}
