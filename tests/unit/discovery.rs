//! Discovery against an API server that speaks the real wire protocol: the published sets without faults.

use serde_json::json;
use udp_fanout::testing::discovery::{DiscoveryRequest, DiscoveryTimeouts, Locality, PortRef, ServiceRef, Terminating};
use udp_fanout::testing::model::ListenerId;
use udp_fanout::testing::net::Family;
use udp_fanout_lab::apiserver::{ApiServer, Kind, Rule};
use udp_fanout_lab::cluster::{at, leaving, namespace, node, placeholder, ready, service, slice, slices_of, unready};
use udp_fanout_testkit::watching::{Watching, addresses, limits, log_count, logged, request, request_of};

#[test]
fn endpoints_come_go_and_change() {
    let server = ApiServer::start();
    server.apply(Kind::EndpointSlice, slice("logging", "come", "come-a", [ready("10.0.0.2"), unready("10.0.0.1")]));
    server.apply(Kind::EndpointSlice, slice("logging", "other", "other-a", [ready("10.9.9.9")]));
    server.apply(Kind::EndpointSlice, slice("elsewhere", "come", "come-a", [ready("10.8.8.8")]));
    let mut watching = Watching::start(&server, vec![request("come")]);
    let first = watching.next_update();
    assert_eq!(addresses(&first), ["10.0.0.2:5514"]);
    assert_eq!((first.set.generation, &*first.set.downstreams[0].name), (1, "pod-10-0-0-2"));
    assert!(watching.is_woken());

    server.apply(Kind::EndpointSlice, slice("logging", "come", "come-a", [ready("10.0.0.2"), ready("10.0.0.1")]));
    assert_eq!(watching.next_addresses(), ["10.0.0.1:5514", "10.0.0.2:5514"]);
    server.apply(Kind::EndpointSlice, slice("logging", "come", "come-b", [ready("10.0.0.3")]));
    assert_eq!(watching.next_addresses(), ["10.0.0.1:5514", "10.0.0.2:5514", "10.0.0.3:5514"]);
    server.delete(Kind::EndpointSlice, "logging", "come-a");
    assert_eq!(watching.next_addresses(), ["10.0.0.3:5514"]);
    // The label moves: the slice is no longer the service's.
    server.apply(Kind::EndpointSlice, slice("logging", "other", "come-b", [ready("10.0.0.3")]));
    assert_eq!(watching.next_addresses(), Vec::<String>::new());
    watching.discovery.shutdown();
}

#[test]
fn requests_are_what_the_api_documents() {
    let server = ApiServer::start();
    server.apply(Kind::EndpointSlice, slice("logging", "wire", "wire-a", [ready("10.0.0.1")]));
    let mut watching = Watching::start(&server, vec![request("wire")]);
    watching.next_update();
    server.wait_for_watches(1);
    let seen = server.seen();
    let paths: Vec<&str> = seen.iter().map(|seen| seen.path.as_str()).collect();
    let slices = "/apis/discovery.k8s.io/v1/namespaces/logging/endpointslices";
    assert_eq!(paths, ["/apis/discovery.k8s.io", slices, slices]);
    for request in &seen[1..] {
        assert_eq!(request.get("labelSelector"), Some("kubernetes.io/service-name=wire"));
    }
    let watch = &seen[2];
    assert!(watch.is_watch());
    assert_eq!(watch.get("allowWatchBookmarks"), Some("true"));
    assert_eq!(watch.get("resourceVersion"), Some(server.resource_version().to_string().as_str()));
    let seconds: u32 = watch.get("timeoutSeconds").unwrap().parse().unwrap();
    assert!((232..=290).contains(&seconds), "{seconds}");
}

#[test]
fn one_watch_serves_all_listeners_of_a_service() {
    let server = ApiServer::start();
    server.apply(Kind::EndpointSlice, slice("logging", "one", "one-a", [ready("10.0.0.1")]));
    server.apply(Kind::EndpointSlice, slice("tenant", "two", "two-a", [ready("10.0.0.2")]));
    let both = request_of(1, &[("logging", "one"), ("tenant", "two")]);
    let mut watching = Watching::start(&server, vec![request("one"), both]);
    watching.until_listener(0, &["10.0.0.1:5514"]);
    watching.until_listener(1, &["10.0.0.1:5514", "10.0.0.2:5514"]);
    server.wait_for_watches(2);
    assert_eq!(server.seen().iter().filter(|seen| seen.is_watch()).count(), 2);
    server.apply(Kind::EndpointSlice, slice("logging", "one", "one-a", [ready("10.0.0.3")]));
    watching.until_listener(0, &["10.0.0.3:5514"]);
    watching.until_listener(1, &["10.0.0.2:5514", "10.0.0.3:5514"]);
    let status = watching.discovery.status().services();
    assert!(status.iter().all(|service| service.synced && service.last_event_age.is_some()), "{status:?}");
    assert_eq!(status.len(), 2);
}

#[test]
fn a_service_without_a_namespace_is_looked_for_in_our_own() {
    let server = ApiServer::start();
    server.apply(Kind::EndpointSlice, slice("default", "own", "own-a", [ready("10.0.0.1")]));
    let mut wanted = request("own");
    wanted.services[0].namespace = None;
    assert_eq!(Watching::start(&server, vec![wanted]).next_addresses(), ["10.0.0.1:5514"]);
}

#[test]
fn an_older_server_is_spoken_to_in_v1beta1() {
    let server = ApiServer::start();
    server.serve_versions(&["v1beta1"]);
    let endpoints = [at(ready("10.0.0.1"), "here", "west"), at(ready("10.0.0.2"), "there", "east")];
    server.apply(Kind::EndpointSlice, slice("logging", "old", "old-a", endpoints));
    server.apply(Kind::EndpointSlice, placeholder("logging", "old", "old-b"));
    let wanted = DiscoveryRequest { locality: Locality::Node, ..request("old") };
    let mut watching = Watching::with(&server.kubeconfig(), vec![wanted], Some("there"), limits());
    assert_eq!(watching.next_addresses(), ["10.0.0.2:5514"]);
    server.apply(Kind::EndpointSlice, slice("logging", "old", "old-b", [at(ready("10.0.0.3"), "there", "east")]));
    assert_eq!(watching.next_addresses(), ["10.0.0.2:5514", "10.0.0.3:5514"]);
    assert!(server.seen().iter().skip(1).all(|seen| seen.path.contains("/v1beta1/")));
    // The control plane is upgraded, past the version that dropped v1beta1.
    server.stop();
    server.serve_versions(&["v1"]);
    server.restart();
    server.apply(Kind::EndpointSlice, slice("logging", "old", "old-b", [at(ready("10.0.0.4"), "there", "east")]));
    assert_eq!(watching.next_addresses(), ["10.0.0.2:5514", "10.0.0.4:5514"]);
    assert!(server.seen().last().unwrap().path.contains("/v1/"));
}

#[test]
fn ports_by_name_families_and_odd_slices() {
    let server = ApiServer::start();
    let mut named = slice("logging", "odd", "odd-a", [ready("10.0.0.1")]);
    named["ports"] = json!([{"name": "metrics", "protocol": "TCP", "port": 9090}, {"name": "syslog", "protocol": "UDP", "port": 6514}]);
    let mut six = slice("logging", "odd", "odd-6", [ready("fd00::1")]);
    six["addressType"] = json!("IPv6");
    six["ports"] = json!([{"name": "syslog", "protocol": "UDP", "port": 7514}]);
    let mut names = slice("logging", "odd", "odd-n", [ready("pod.example")]);
    names["addressType"] = json!("FQDN");
    // No conditions at all: ready.
    let mut bare = slice("logging", "odd", "odd-b", [json!({"addresses": ["10.0.0.2", "10.0.0.99"]})]);
    bare["ports"] = json!([{"name": "syslog", "port": 8514}]);
    server.apply_all(Kind::EndpointSlice, [named, six, names, bare]);
    let by_name = |listener, family| DiscoveryRequest {
        services: vec![ServiceRef {
            namespace: Some("logging".to_owned()),
            service: "odd".to_owned(),
            port: PortRef::Name("syslog".to_owned()),
        }],
        family,
        ..request_of(listener, &[("logging", "odd")])
    };
    let mut watching = Watching::start(&server, vec![by_name(70, Family::V4), by_name(71, Family::V6)]);
    watching.until_listener(70, &["10.0.0.1:6514", "10.0.0.2:8514"]);
    watching.until_listener(71, &["[fd00::1]:7514"]);
    logged(&["WARN", "listener_id=70", "addressType FQDN"]);
    server.apply(Kind::EndpointSlice, slice("logging", "odd", "odd-c", []));
    server.delete(Kind::EndpointSlice, "logging", "odd-b");
    watching.until_listener(70, &["10.0.0.1:6514"]);
    assert_eq!(log_count(&["listener_id=70", "FQDN"]), 1);
}

#[test]
fn the_last_endpoints_serve_until_they_are_gone() {
    let server = ApiServer::start();
    let all = |endpoints: [serde_json::Value; 2]| slice("logging", "leave", "leave-a", endpoints);
    server.apply(Kind::EndpointSlice, all([ready("10.0.0.1"), ready("10.0.0.2")]));
    let until_gone = DiscoveryRequest { terminating: Terminating::UntilGone, ..request_of(1, &[("logging", "leave")]) };
    let never = DiscoveryRequest { terminating: Terminating::Never, ..request_of(2, &[("logging", "leave")]) };
    let mut watching = Watching::start(&server, vec![request("leave"), until_gone, never]);
    let (one, two) = ("10.0.0.1:5514", "10.0.0.2:5514");
    (0..3).for_each(|listener| _ = watching.until_listener(listener, &[one, two]));
    server.apply(Kind::EndpointSlice, all([leaving("10.0.0.1"), ready("10.0.0.2")]));
    watching.until_listener(0, &[two]);
    watching.until_listener(2, &[two]);
    server.apply(Kind::EndpointSlice, all([leaving("10.0.0.1"), leaving("10.0.0.2")]));
    watching.until_listener(0, &[one, two]);
    watching.until_listener(2, &[]);
    server.apply(Kind::EndpointSlice, all([leaving("10.0.0.1"), unready("10.0.0.2")]));
    (0..2).for_each(|listener| _ = watching.until_listener(listener, &[one]));
}

#[test]
fn the_zone_comes_from_the_node_object() {
    let server = ApiServer::start();
    server.allow(Rule::new(&["get"], "nodes"));
    server.apply(Kind::Node, node("n1", "west"));
    let endpoints = || [at(ready("10.0.0.1"), "n2", "west"), at(ready("10.0.0.2"), "n3", "east")];
    server.apply(Kind::EndpointSlice, slice("logging", "zone", "zone-a", endpoints()));
    let wanted = || vec![DiscoveryRequest { locality: Locality::PreferZone, ..request("zone") }];
    let mut watching = Watching::with(&server.kubeconfig(), wanted(), Some("n1"), limits());
    assert_eq!(watching.next_addresses(), ["10.0.0.1:5514"], "the first set already knows the zone");
    server.apply(Kind::EndpointSlice, slice("logging", "zone", "zone-a", endpoints().into_iter().skip(1)));
    assert_eq!(watching.next_addresses(), ["10.0.0.2:5514"], "overflow");
}

#[test]
fn a_zone_that_may_be_read_later_is_found_later() {
    let server = ApiServer::start();
    let endpoints = || [at(ready("10.0.0.1"), "n2", "west"), at(ready("10.0.0.2"), "n3", "east")];
    server.apply(Kind::EndpointSlice, slice("logging", "late", "late-a", endpoints()));
    let wanted = vec![DiscoveryRequest { locality: Locality::PreferZone, ..request("late") }];
    let mut watching = Watching::with(&server.kubeconfig(), wanted, Some("late-node"), limits());
    watching.until(&["10.0.0.1:5514", "10.0.0.2:5514"]);
    logged(&["WARN", "may not get node \"late-node\""]);
    // Allowed, but the node does not exist yet.
    server.allow(Rule::new(&["get"], "nodes"));
    logged(&["WARN", "there is no node \"late-node\""]);
    server.apply(Kind::Node, node("late-node", "east"));
    watching.until(&["10.0.0.2:5514"]);
    assert_eq!(log_count(&["may not get node \"late-node\""]), 1);
    assert_eq!(log_count(&["there is no node \"late-node\""]), 1);
}

#[test]
fn without_access_to_the_node_the_zone_comes_from_the_slices() {
    let server = ApiServer::start();
    let endpoints = || [at(ready("10.0.0.1"), "n2", "west"), at(ready("10.0.0.2"), "n3", "east")];
    server.apply(Kind::EndpointSlice, slice("logging", "zoneless", "zoneless-a", endpoints()));
    let wanted = vec![DiscoveryRequest { locality: Locality::PreferZone, ..request("zoneless") }];
    let mut watching = Watching::with(&server.kubeconfig(), wanted, Some("node-without-rights"), limits());
    assert_eq!(watching.next_addresses(), ["10.0.0.1:5514", "10.0.0.2:5514"]);
    let line = logged(&["WARN", "node-without-rights"]);
    assert!(line.contains("missing rule: apiGroups [\"\"], resources [\"nodes\"], verbs [\"get\"]"), "{line}");
    assert!(line.contains("fix: udp-fanout rbac --config /etc/udp-fanout/config.toml | kubectl apply -f -"), "{line}");
    let here = at(unready("10.0.0.3"), "node-without-rights", "east");
    server.apply(Kind::EndpointSlice, slice("logging", "zoneless", "zoneless-b", [here]));
    assert_eq!(watching.next_addresses(), ["10.0.0.2:5514"]);
}

#[test]
fn a_missing_namespace_service_or_slice_is_told_once_and_picked_up() {
    let server = ApiServer::start();
    server.allow(Rule::new(&["get"], "namespaces"));
    server.allow(Rule::new(&["get"], "services"));
    server.apply(Kind::Namespace, namespace("logging"));
    server.apply(Kind::Service, service("logging", "idle"));
    let named = |listener, namespace, service| request_of(listener, &[(namespace, service)]);
    let requests = vec![named(10, "nowhere", "any"), named(11, "logging", "absent"), named(12, "logging", "idle")];
    let mut watching = Watching::start(&server, requests);
    for listener in [10, 11, 12] {
        watching.until_listener(listener, &[]);
        logged(&["WARN", &format!("listener_id={listener}"), "endpoints=0", "EndpointSlice not found"]);
    }
    logged(&["WARN EndpointSlice not found: namespace \"nowhere\" does not exist"]);
    logged(&["WARN EndpointSlice not found: service \"absent\" does not exist in namespace \"logging\""]);
    logged(&["WARN EndpointSlice not found: service logging/idle exists but has no EndpointSlices"]);
    // Another list does not log it again.
    server.wait_for_watches(3);
    server.compact();
    server.apply(Kind::EndpointSlice, slice("x", "unrelated", "unrelated", []));
    server.compact();
    server.end_watches();
    server.wait_for("a second list of each", |seen| seen.iter().filter(|seen| seen.is_list()).count() >= 6);
    server.wait_for_watches(3);
    for (listener, namespace, service) in [(10, "nowhere", "any"), (11, "logging", "absent"), (12, "logging", "idle")] {
        server.apply(Kind::EndpointSlice, slice(namespace, service, service, [ready("10.0.0.1")]));
        watching.until_listener(listener, &["10.0.0.1:5514"]);
    }
    assert_eq!(log_count(&["WARN EndpointSlice not found: namespace \"nowhere\""]), 1);
    assert_eq!(log_count(&["WARN EndpointSlice not found: service \"absent\""]), 1);
    assert_eq!(log_count(&["WARN EndpointSlice not found: service logging/idle"]), 1);
}

#[test]
fn the_cause_of_absence_is_asked_for_again() {
    let server = ApiServer::start();
    server.allow(Rule::new(&["get"], "namespaces"));
    server.allow(Rule::new(&["get"], "services"));
    server.apply(Kind::Namespace, namespace("logging"));
    let often = DiscoveryTimeouts { request_timeout: std::time::Duration::from_secs(1), ..limits() };
    let watching = Watching::with(&server.kubeconfig(), vec![request("appearing")], None, often);
    logged(&["WARN EndpointSlice not found: service \"appearing\" does not exist"]);
    server.apply(Kind::Service, service("logging", "appearing"));
    logged(&["WARN EndpointSlice not found: service logging/appearing exists but has no EndpointSlices"]);
    let present = || watching.discovery.status().problems();
    let until = std::time::Instant::now() + udp_fanout_lab::apiserver::DEADLINE;
    while !matches!(&present()[..], [(_, text)] if text.contains("exists but has no EndpointSlices")) {
        assert!(std::time::Instant::now() < until, "{:?}", present());
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

#[test]
fn with_least_rights_the_cause_of_absence_cannot_be_told() {
    let server = ApiServer::start();
    let mut watching = Watching::start(&server, vec![request("mute")]);
    assert_eq!(watching.next_addresses(), Vec::<String>::new());
    logged(&["WARN EndpointSlice not found: no slice in namespace \"logging\"", "service-name=mute", "RBAC denies"]);
}

#[test]
fn requests_can_be_replaced_while_running() {
    let server = ApiServer::start();
    for (name, address) in [("keep", "10.0.0.1"), ("drop", "10.0.0.2"), ("add", "10.0.0.3")] {
        server.apply(Kind::EndpointSlice, slice("logging", name, name, [ready(address)]));
    }
    let of = |listener, name| request_of(listener, &[("logging", name)]);
    let mut watching = Watching::start(&server, vec![of(0, "keep"), of(1, "drop")]);
    watching.until_listener(0, &["10.0.0.1:5514"]);
    watching.until_listener(1, &["10.0.0.2:5514"]);
    server.wait_for_watches(2);
    watching.discovery.update_requests(vec![of(0, "keep"), of(1, "add")]).unwrap();
    watching.until_listener(1, &["10.0.0.3:5514"]);
    server.wait_for("the new watch", |seen| {
        seen.iter().any(|seen| seen.is_watch() && seen.get("labelSelector") == Some("kubernetes.io/service-name=add"))
    });
    server.wait_for_watches(2);
    let names: Vec<String> = watching.discovery.status().services().into_iter().map(|status| status.service).collect();
    assert_eq!(names, ["add", "keep"]);
    let keep =
        server.seen().into_iter().filter(|seen| seen.get("labelSelector") == Some("kubernetes.io/service-name=keep"));
    assert_eq!(keep.count(), 2, "one list and one watch: the first watch continued");
    assert!(watching.discovery.update_requests(vec![of(0, "Bad.Name")]).is_err());
    server.apply(Kind::EndpointSlice, slice("logging", "keep", "keep", [ready("10.0.0.9")]));
    watching.until_listener(0, &["10.0.0.9:5514"]);
}

#[test]
fn a_large_service_is_listed_in_pages_and_published_once() {
    let server = ApiServer::start();
    // 600 slices of one endpoint: more than a page.
    let one = |n: usize| slice("logging", "large", &format!("large-{n:04}"), [ready(&udp_fanout_lab::cluster::nth(n))]);
    server.apply_all(Kind::EndpointSlice, (0..600).map(one));
    let mut watching = Watching::start(&server, vec![request("large")]);
    assert_eq!(watching.next_update().set.downstreams.len(), 600, "a set is published only when complete");
    let lists: Vec<_> = server.seen().into_iter().filter(udp_fanout_lab::apiserver::Seen::is_list).collect();
    assert_eq!(lists.len(), 2);
    assert!(lists[1].get("continue").is_some() && lists[1].get("resourceVersion").is_none());
}

#[test]
fn a_rolling_restart_of_a_thousand_pods_never_empties_the_set() {
    let server = ApiServer::start();
    server.apply_all(Kind::EndpointSlice, slices_of("logging", "roll", 0, 1000));
    let mut watching = Watching::start(&server, vec![request("roll")]);
    assert_eq!(watching.next_update().set.downstreams.len(), 1000);
    // Slice by slice, pods terminate and others replace them: 2,000 changes of endpoints.
    for step in 0..10 {
        let name = format!("roll-{step:04}");
        for change in 0..100 {
            let pod = |i: usize| match i {
                i if i < change => ready(&udp_fanout_lab::cluster::nth(2000 + step * 100 + i)),
                i if i == change => leaving(&udp_fanout_lab::cluster::nth(step * 100 + i)),
                i => ready(&udp_fanout_lab::cluster::nth(step * 100 + i)),
            };
            server.apply(Kind::EndpointSlice, slice("logging", "roll", &name, (0..100).map(pod)));
        }
        let new = (0..100).map(|i| ready(&udp_fanout_lab::cluster::nth(2000 + step * 100 + i)));
        server.apply(Kind::EndpointSlice, slice("logging", "roll", &name, new));
    }
    let expected: Vec<String> = (2000..3000).map(|n| format!("{}:5514", udp_fanout_lab::cluster::nth(n))).collect();
    let started = std::time::Instant::now();
    let mut updates = 0;
    loop {
        let update = watching.next_update();
        updates += 1;
        assert!(update.set.downstreams.len() >= 999, "{}", update.set.downstreams.len());
        let mut found = addresses(&update);
        found.sort();
        let mut wanted = expected.clone();
        wanted.sort();
        if found == wanted {
            break;
        }
    }
    println!("1,010 changes of slices became {updates} updates in {:?}", started.elapsed());
    assert!(updates < 1010);
}

#[test]
fn the_services_port_in_place_of_the_containers_is_reported() {
    let server = ApiServer::start();
    let mut wrong = slice("logging", "mistaken", "mistaken-a", [ready("10.0.0.1")]);
    wrong["ports"] = json!([{"name": "syslog", "protocol": "UDP", "port": 6514}]);
    server.apply(Kind::EndpointSlice, wrong);
    let mut watching = Watching::start(&server, vec![request("mistaken")]);
    assert_eq!(watching.next_addresses(), ["10.0.0.1:5514"], "it is forwarded as configured");
    let line = logged(&["WARN", "logging/mistaken have no UDP port 5514, only 6514", "set `port = \"syslog\"`"]);
    watching.wait_status("the mismatch", |status| status.port_mismatch);
    let problems = watching.discovery.status().problems();
    assert!(matches!(&problems[..], [(ListenerId(0), text)] if line.contains(text)), "{problems:?}");
    server.apply(Kind::EndpointSlice, slice("logging", "mistaken", "mistaken-a", [ready("10.0.0.1")]));
    watching.wait_status("the end of the mismatch", |status| !status.port_mismatch);
    assert_eq!(watching.discovery.status().problems(), []);
}
