use super::*;

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn endpoint(text: &str, readiness: EndpointReadiness) -> SliceEndpoint {
    SliceEndpoint { address: address(text), readiness, node: None, zone: None, pod: None }
}

fn at(text: &str, readiness: EndpointReadiness, node: &str, zone: &str) -> SliceEndpoint {
    SliceEndpoint { node: Some(node.into()), zone: Some(zone.into()), ..endpoint(text, readiness) }
}

fn slice(endpoints: Vec<SliceEndpoint>) -> Arc<Slice> {
    Arc::new(Slice {
        addresses: AddressType::Ip(Family::V4),
        ports: vec![port("", 5514)],
        endpoints,
        invalid_addresses: 0,
    })
}

fn port(name: &str, number: u16) -> SlicePort {
    SlicePort { name: name.to_owned(), protocol: Some("UDP".to_owned()), number: Some(number) }
}

const RULES: EndpointRules =
    EndpointRules { family: Family::V4, locality: Locality::Cluster, terminating: Terminating::Fallback };
const HERE: NodeLocation<'_> = NodeLocation { node: Some("here"), zone: Some("west") };

fn run(slices: &[Arc<Slice>], port: &PortRef, rules: &EndpointRules) -> EndpointSelection {
    select_endpoints(&[ServiceSlices { slices, port }], rules, &HERE)
}

fn addresses(outcome: &EndpointSelection) -> Vec<String> {
    outcome.downstreams.iter().map(|downstream| downstream.address.to_string()).collect()
}

use EndpointReadiness::{NotReady, Ready};

#[test]
fn slices_merge_into_one_sorted_list_without_duplicates() {
    let slices = [
        slice(vec![endpoint("10.0.0.10", Ready), endpoint("10.0.0.9", Ready)]),
        slice(vec![endpoint("10.0.0.9", Ready), endpoint("10.0.0.1", Ready)]),
    ];
    let outcome = run(&slices, &PortRef::Number(9000), &RULES);
    assert_eq!(addresses(&outcome), ["10.0.0.1:9000", "10.0.0.9:9000", "10.0.0.10:9000"]);
    assert!(outcome.downstreams.iter().all(|downstream| downstream.weight == 1));
    let backwards: Vec<_> = slices.iter().rev().cloned().collect();
    assert_eq!(run(&backwards, &PortRef::Number(9000), &RULES), outcome);
}

#[test]
fn an_endpoint_being_moved_between_slices_counts_by_the_best_said_of_it() {
    for (a, b) in [(NotReady, Ready), (Ready, NotReady), (EndpointReadiness::Terminating, Ready)] {
        let slices = [slice(vec![endpoint("10.0.0.1", a)]), slice(vec![endpoint("10.0.0.1", b)])];
        assert_eq!(run(&slices, &PortRef::Number(1), &RULES).downstreams.len(), 1, "{a:?} {b:?}");
    }
}

#[test]
fn conditions_are_read_as_the_api_defines_them() {
    let t = Some(true);
    let f = Some(false);
    for (ready, serving, terminating, expected) in [
        (None, None, None, Ready),
        (t, None, None, Ready),
        (f, None, None, NotReady),
        (f, t, t, EndpointReadiness::Terminating),
        (f, f, t, NotReady),
        (f, None, t, NotReady),
        (f, t, f, NotReady),
        (t, t, t, Ready), // publishNotReadyAddresses
        (None, f, t, Ready),
    ] {
        let found = EndpointReadiness::from_conditions(ready, serving, terminating);
        assert_eq!(found, expected, "{ready:?} {serving:?} {terminating:?}");
    }
}

#[test]
fn terminating_endpoints_serve_as_configured() {
    let ready = endpoint("10.0.0.1", Ready);
    let leaving = endpoint("10.0.0.2", EndpointReadiness::Terminating);
    let down = endpoint("10.0.0.3", NotReady);
    let with = |endpoints: &[&SliceEndpoint], terminating| {
        let slices = [slice(endpoints.iter().map(|&endpoint| endpoint.clone()).collect())];
        addresses(&run(&slices, &PortRef::Number(1), &EndpointRules { terminating, ..RULES }))
    };
    let all = [&ready, &leaving, &down];
    assert_eq!(with(&all, Terminating::Never), ["10.0.0.1:1"]);
    assert_eq!(with(&all, Terminating::Fallback), ["10.0.0.1:1"]);
    assert_eq!(with(&all, Terminating::UntilGone), ["10.0.0.1:1", "10.0.0.2:1"]);
    let none_ready = [&leaving, &down];
    assert!(with(&none_ready, Terminating::Never).is_empty());
    assert_eq!(with(&none_ready, Terminating::Fallback), ["10.0.0.2:1"]);
    assert_eq!(with(&none_ready, Terminating::UntilGone), ["10.0.0.2:1"]);
    assert!(with(&[&down], Terminating::UntilGone).is_empty());
}

#[test]
fn locality_prefers_and_overflows() {
    let slices = [slice(vec![
        at("10.0.0.1", Ready, "here", "west"),
        at("10.0.0.2", Ready, "next", "west"),
        at("10.0.0.3", Ready, "far", "east"),
        endpoint("10.0.0.4", Ready),
    ])];
    let found = |slices: &[Arc<Slice>], locality, location: &NodeLocation<'_>| {
        let rules = EndpointRules { locality, ..RULES };
        addresses(&select_endpoints(&[ServiceSlices { slices, port: &PortRef::Number(1) }], &rules, location))
    };
    assert_eq!(found(&slices, Locality::Cluster, &HERE).len(), 4);
    assert_eq!(found(&slices, Locality::PreferNode, &HERE), ["10.0.0.1:1"]);
    assert_eq!(found(&slices, Locality::Node, &HERE), ["10.0.0.1:1"]);
    assert_eq!(found(&slices, Locality::PreferZone, &HERE), ["10.0.0.1:1", "10.0.0.2:1"]);
    let other_nodes_only = NodeLocation { node: Some("lonely"), zone: Some("south") };
    assert_eq!(found(&slices, Locality::PreferNode, &other_nodes_only).len(), 4);
    assert_eq!(found(&slices, Locality::PreferZone, &other_nodes_only).len(), 4);
    assert_eq!(found(&slices, Locality::Node, &other_nodes_only).len(), 0);
    let unknown = NodeLocation::default();
    assert_eq!(found(&slices, Locality::PreferNode, &unknown).len(), 4);
    assert_eq!(found(&slices, Locality::PreferZone, &unknown).len(), 4);
    assert_eq!(found(&slices, Locality::Node, &unknown).len(), 0);
}

#[test]
fn a_ready_endpoint_far_away_is_better_than_one_here_that_is_leaving() {
    let slices = [slice(vec![
        at("10.0.0.1", EndpointReadiness::Terminating, "here", "west"),
        at("10.0.0.3", Ready, "far", "east"),
    ])];
    let found = |locality| addresses(&run(&slices, &PortRef::Number(1), &EndpointRules { locality, ..RULES }));
    assert_eq!(found(Locality::PreferNode), ["10.0.0.3:1"]);
    assert_eq!(found(Locality::PreferZone), ["10.0.0.3:1"]);
    assert_eq!(found(Locality::Node), ["10.0.0.1:1"]);
}

#[test]
fn strict_locality_says_that_endpoints_are_elsewhere() {
    let slices = [slice(vec![at("10.0.0.3", Ready, "far", "east")])];
    let outcome = run(&slices, &PortRef::Number(1), &EndpointRules { locality: Locality::Node, ..RULES });
    assert!(outcome.stats.other_nodes_only);
    assert!(!run(&slices, &PortRef::Number(1), &RULES).stats.other_nodes_only);
}

#[test]
fn named_ports_are_resolved_in_each_slice() {
    let with = |ports, endpoint| {
        let endpoints = vec![endpoint];
        Arc::new(Slice { addresses: AddressType::Ip(Family::V4), ports, endpoints, invalid_addresses: 0 })
    };
    let any = SlicePort { number: None, ..port("syslog", 1) };
    let slices = [
        with(vec![port("metrics", 9090), port("syslog", 5514)], endpoint("10.0.0.1", Ready)),
        with(vec![port("syslog", 6514)], endpoint("10.0.0.2", Ready)),
        with(vec![port("metrics", 9090)], endpoint("10.0.0.3", Ready)),
        with(vec![any], endpoint("10.0.0.4", Ready)),
        with(vec![], endpoint("10.0.0.5", Ready)),
        with(vec![port("", 7777)], endpoint("10.0.0.6", Ready)),
    ];
    let named = run(&slices, &PortRef::Name("syslog".to_owned()), &RULES);
    assert_eq!(addresses(&named), ["10.0.0.1:5514", "10.0.0.2:6514"]);
    assert_eq!(named.stats.without_port, 4);
    assert!(named.stats.available_ports.contains("metrics") && named.stats.missing_ports.contains("syslog"));
    let unnamed = run(&slices, &PortRef::Name(String::new()), &RULES);
    assert_eq!(addresses(&unnamed), ["10.0.0.6:7777"]);
    assert_eq!(run(&slices, &PortRef::Number(1), &RULES).downstreams.len(), 6);
}

#[test]
fn a_named_port_that_is_not_udp_is_used_and_reported() {
    for (protocol, reported) in [(Some("UDP"), false), (None, false), (Some("TCP"), true)] {
        let ports = vec![SlicePort { protocol: protocol.map(str::to_owned), ..port("syslog", 5514) }];
        let endpoints = vec![endpoint("10.0.0.1", Ready)];
        let slices =
            [Arc::new(Slice { addresses: AddressType::Ip(Family::V4), ports, endpoints, invalid_addresses: 0 })];
        let outcome = run(&slices, &PortRef::Name("syslog".to_owned()), &RULES);
        assert_eq!(outcome.downstreams.len(), 1);
        assert_eq!(outcome.stats.non_udp_ports.contains("syslog/TCP"), reported, "{protocol:?}");
    }
}

#[test]
fn only_the_listeners_family_counts() {
    let six = |endpoints| {
        Arc::new(Slice { addresses: AddressType::Ip(Family::V6), ports: vec![], endpoints, invalid_addresses: 0 })
    };
    let names = Arc::new(Slice {
        addresses: AddressType::Other("FQDN".to_owned()),
        ports: vec![],
        endpoints: vec![],
        invalid_addresses: 0,
    });
    let slices = [slice(vec![endpoint("10.0.0.1", Ready)]), six(vec![endpoint("fd00::1", Ready)]), names];
    let four = run(&slices, &PortRef::Number(53), &RULES);
    assert_eq!(addresses(&four), ["10.0.0.1:53"]);
    assert_eq!((four.stats.other_family, four.stats.slices), (1, 3));
    assert!(four.stats.unsupported_types.contains("FQDN"));
    let other = run(&slices, &PortRef::Number(53), &EndpointRules { family: Family::V6, ..RULES });
    assert_eq!(addresses(&other), ["[fd00::1]:53"]);
}

#[test]
fn two_services_on_one_pod_are_two_downstreams_only_with_two_ports() {
    let pod = |text: &str| SliceEndpoint { pod: Some("vector-0".into()), ..endpoint(text, Ready) };
    let slices = [slice(vec![pod("10.0.0.1")])];
    let both = |a: u16, b: u16| {
        let (a, b) = (PortRef::Number(a), PortRef::Number(b));
        select_endpoints(
            &[ServiceSlices { slices: &slices, port: &a }, ServiceSlices { slices: &slices, port: &b }],
            &RULES,
            &HERE,
        )
    };
    assert_eq!(addresses(&both(1, 1)), ["10.0.0.1:1"]);
    let two = both(1, 2);
    assert_eq!(addresses(&two), ["10.0.0.1:1", "10.0.0.1:2"]);
    // The pod's name would not tell them apart.
    assert_eq!(two.downstreams.iter().map(|d| &*d.name).collect::<Vec<_>>(), ["10.0.0.1:1", "10.0.0.1:2"]);
    assert_eq!(&*both(1, 1).downstreams[0].name, "vector-0");
}

#[test]
fn nothing_comes_of_nothing() {
    assert_eq!(run(&[], &PortRef::Number(1), &RULES), EndpointSelection::default());
    assert_eq!(select_endpoints(&[], &RULES, &HERE), EndpointSelection::default());
}
