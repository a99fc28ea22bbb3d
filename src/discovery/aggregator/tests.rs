use std::net::IpAddr;

use super::super::slices::{AddressType, EndpointReadiness, SliceEndpoint, SlicePort};
use super::super::{Family, PortRef, Terminating};
use super::*;

fn request(listener: u32, services: &[&str], locality: Locality) -> DiscoveryRequest {
    let service = |name: &&str| ServiceRef { namespace: None, service: (*name).to_owned(), port: PortRef::Number(9) };
    DiscoveryRequest {
        listener: ListenerId(listener),
        services: services.iter().map(service).collect(),
        family: Family::V4,
        locality,
        terminating: Terminating::Fallback,
    }
}

fn aggregator(requests: Vec<DiscoveryRequest>) -> Aggregator {
    let mut aggregator = Aggregator::new("own", Some("here".to_owned()));
    aggregator.replace_requests(requests);
    aggregator
}

fn endpoint(last: u8, node: &str, zone: &str) -> SliceEndpoint {
    SliceEndpoint {
        address: IpAddr::from([10, 0, 0, last]),
        readiness: EndpointReadiness::Ready,
        node: Some(node.into()),
        zone: Some(zone.into()),
        pod: None,
    }
}

fn found(service: &str, endpoints: Vec<SliceEndpoint>) -> WatchEvent {
    let slice = Slice { addresses: AddressType::Ip(Family::V4), ports: vec![], endpoints, invalid_addresses: 0 };
    WatchEvent::Slices(ServiceKey::new("own", service), vec![Arc::new(slice)])
}

fn simple(service: &str, last: &[u8]) -> WatchEvent {
    found(service, last.iter().map(|&last| endpoint(last, "far", "east")).collect())
}

/// FollowedListener, generation, last bytes of the addresses.
fn updates(aggregator: &mut Aggregator) -> Vec<(u32, u64, Vec<u8>)> {
    let last = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets()[3],
        IpAddr::V6(_) => 0,
    };
    aggregator
        .flush()
        .0
        .into_iter()
        .map(|update| {
            let all = update.set.downstreams.iter().map(|downstream| last(downstream.address.ip())).collect();
            (update.listener.0, update.set.generation, all)
        })
        .collect()
}

#[test]
fn one_watch_serves_all_listeners_of_a_service_and_only_they_are_updated() {
    let mut aggregator = aggregator(vec![
        request(0, &["a"], Locality::Cluster),
        request(1, &["a", "b"], Locality::Cluster),
        request(2, &["b"], Locality::Cluster),
    ]);
    assert_eq!(aggregator.wanted_services().map(ToString::to_string).collect::<Vec<_>>(), ["own/a", "own/b"]);
    assert_eq!(updates(&mut aggregator), []);
    aggregator.handle_event(simple("a", &[1]));
    assert_eq!(updates(&mut aggregator), [(0, 1, vec![1])], "listener 1 waits for b");
    aggregator.handle_event(simple("b", &[2]));
    assert_eq!(updates(&mut aggregator), [(1, 2, vec![1, 2]), (2, 3, vec![2])]);
    aggregator.handle_event(simple("b", &[2]));
    assert_eq!(updates(&mut aggregator), [], "nothing has changed");
    aggregator.handle_event(simple("b", &[3]));
    aggregator.handle_event(simple("b", &[4]));
    assert_eq!(updates(&mut aggregator), [(1, 4, vec![1, 4]), (2, 5, vec![4])], "one update for two changes");
}

#[test]
fn an_empty_list_empties_and_a_failure_does_not() {
    let mut aggregator = aggregator(vec![request(0, &["a"], Locality::Cluster)]);
    let key = ServiceKey::new("own", "a");
    aggregator.handle_event(WatchEvent::Failed(key.clone()));
    assert_eq!(updates(&mut aggregator), [], "a failure is not a set");
    aggregator.handle_event(WatchEvent::Slices(key.clone(), vec![]));
    let (sets, notices) = aggregator.flush();
    assert!(sets[0].set.downstreams.is_empty());
    assert!(
        matches!(&notices[..], [DiscoveryNotice::Empty { cause, .. }] if cause.contains("EndpointSlice not found")),
        "{notices:?}"
    );
    aggregator.handle_event(simple("a", &[1]));
    assert_eq!(updates(&mut aggregator), [(0, 2, vec![1])]);
    aggregator.handle_event(WatchEvent::Failed(key.clone()));
    assert_eq!(updates(&mut aggregator), []);
    aggregator.handle_event(WatchEvent::Slices(key, vec![]));
    assert_eq!(updates(&mut aggregator), [(0, 3, vec![])]);
}

#[test]
fn a_service_that_cannot_be_listed_does_not_withhold_the_others() {
    let mut aggregator = aggregator(vec![request(0, &["a", "b"], Locality::Cluster)]);
    aggregator.handle_event(simple("a", &[1]));
    assert_eq!(updates(&mut aggregator), []);
    aggregator.handle_event(WatchEvent::Failed(ServiceKey::new("own", "b")));
    assert_eq!(updates(&mut aggregator), [(0, 1, vec![1])]);
    aggregator.handle_event(simple("b", &[2]));
    assert_eq!(updates(&mut aggregator), [(0, 2, vec![1, 2])]);
}

#[test]
fn a_listener_that_prefers_its_zone_waits_until_the_zone_is_asked_for() {
    let mut aggregator =
        aggregator(vec![request(0, &["a"], Locality::PreferZone), request(1, &["a"], Locality::Cluster)]);
    assert!(aggregator.needs_zone());
    let both = || found("a", vec![endpoint(1, "next", "west"), endpoint(2, "far", "east")]);
    aggregator.handle_event(both());
    assert_eq!(updates(&mut aggregator), [(1, 1, vec![1, 2])]);
    aggregator.handle_event(WatchEvent::Zone(Some("west".into())));
    assert!(!aggregator.needs_zone());
    assert_eq!(updates(&mut aggregator), [(0, 2, vec![1])]);
    aggregator.handle_event(WatchEvent::Zone(Some("east".into())));
    assert_eq!(updates(&mut aggregator), [(0, 3, vec![2])]);
}

#[test]
fn without_the_node_object_an_endpoint_here_tells_the_zone() {
    let mut aggregator =
        aggregator(vec![request(0, &["a"], Locality::PreferZone), request(1, &["b"], Locality::Cluster)]);
    aggregator.handle_event(found("a", vec![endpoint(1, "next", "west"), endpoint(2, "far", "east")]));
    aggregator.handle_event(WatchEvent::Zone(None));
    assert_eq!(updates(&mut aggregator), [(0, 1, vec![1, 2])]);
    // Learnt from another listener's service.
    aggregator.handle_event(found("b", vec![endpoint(9, "here", "east")]));
    assert_eq!(updates(&mut aggregator), [(0, 2, vec![2]), (1, 3, vec![9])]);
}

#[test]
fn replacing_requests_keeps_what_is_the_same() {
    let mut aggregator = aggregator(vec![request(0, &["a"], Locality::Cluster), request(1, &["b"], Locality::Cluster)]);
    aggregator.handle_event(simple("a", &[1]));
    aggregator.handle_event(simple("b", &[2]));
    assert_eq!(updates(&mut aggregator).len(), 2);
    aggregator
        .replace_requests(vec![request(0, &["a"], Locality::Cluster), request(1, &["a", "c"], Locality::Cluster)]);
    assert_eq!(aggregator.wanted_services().map(|key| key.service.to_string()).collect::<Vec<_>>(), ["a", "c"]);
    assert_eq!(updates(&mut aggregator), [], "listener 0 is as it was, listener 1 waits for c");
    aggregator.handle_event(simple("b", &[7]));
    assert_eq!(updates(&mut aggregator), [], "b is forgotten");
    aggregator.handle_event(simple("c", &[3]));
    assert_eq!(updates(&mut aggregator), [(1, 3, vec![1, 3])], "generations go on");
}

#[test]
fn what_is_wrong_is_said_once() {
    let mut aggregator = aggregator(vec![request(0, &["a"], Locality::Cluster)]);
    let odd = |last: &[u8]| {
        let WatchEvent::Slices(key, mut slices) = simple("a", last) else { unreachable!() };
        let addresses = AddressType::Other("FQDN".to_owned());
        slices.push(Arc::new(Slice { addresses, ports: vec![], endpoints: vec![], invalid_addresses: 0 }));
        WatchEvent::Slices(key, slices)
    };
    aggregator.handle_event(odd(&[1]));
    let (_, notices) = aggregator.flush();
    assert!(
        matches!(&notices[..], [DiscoveryNotice::Warning { text, .. }, DiscoveryNotice::Discovered { endpoints: 1, .. }] if text.contains("FQDN"))
    );
    aggregator.handle_event(odd(&[1, 2]));
    assert_eq!(aggregator.flush().1, [DiscoveryNotice::Changed { listener: ListenerId(0), endpoints: 2 }]);
    aggregator.handle_event(simple("a", &[1]));
    aggregator.flush();
    aggregator.handle_event(odd(&[1]));
    assert_eq!(aggregator.flush().1.len(), 1, "said again after it had gone");
}

#[test]
fn a_node_that_is_not_known_is_said_once_and_prefers_nothing() {
    let mut aggregator = Aggregator::new("own", None);
    aggregator
        .replace_requests(vec![request(0, &["a"], Locality::PreferNode), request(1, &["a"], Locality::PreferZone)]);
    assert!(!aggregator.needs_zone());
    aggregator.handle_event(simple("a", &[1, 2]));
    let (sets, notices) = aggregator.flush();
    assert!(sets.iter().all(|update| update.set.downstreams.len() == 2) && sets.len() == 2);
    let warnings = notices
        .iter()
        .filter(|notice| matches!(notice, DiscoveryNotice::Warning { text, .. } if text.contains("NODE_NAME")));
    assert_eq!(warnings.count(), 2);
}

#[test]
fn a_port_that_no_slice_lists_is_reported_while_it_lasts() {
    let port = |name: &str, protocol: &str, number| SlicePort {
        name: name.to_owned(),
        protocol: Some(protocol.to_owned()),
        number,
    };
    let slice = |ports: Vec<SlicePort>, endpoints| {
        let endpoints = (0..endpoints).map(|last| endpoint(last, "far", "east")).collect();
        Arc::new(Slice { addresses: AddressType::Ip(Family::V4), ports, endpoints, invalid_addresses: 0 })
    };
    let (syslog, tcp) = (port("syslog", "UDP", Some(5514)), port("metrics", "TCP", Some(9)));
    let mut aggregator = aggregator(vec![request(0, &["a"], Locality::Cluster)]);
    let key = ServiceKey::new("own", "a");
    for (slices, mismatch) in [
        (vec![slice(vec![syslog.clone(), tcp.clone()], 1)], true),
        (vec![slice(vec![syslog.clone()], 1), slice(vec![], 0)], true),
        // The configured port is there, on one of the slices, or may be there: no UDP port, or one without a number.
        (vec![slice(vec![syslog.clone()], 1), slice(vec![port("x", "UDP", Some(9))], 1)], false),
        (vec![slice(vec![syslog.clone()], 1), slice(vec![tcp], 1)], false),
        (vec![slice(vec![port("any", "UDP", None)], 1)], false),
        (vec![slice(vec![], 1)], false),
        (vec![slice(vec![syslog.clone()], 0)], false),
        (vec![slice(vec![syslog], 1)], true),
    ] {
        aggregator.handle_event(WatchEvent::Slices(key.clone(), slices.clone()));
        aggregator.flush();
        let problems = aggregator.problems();
        assert_eq!(problems.mismatched.contains(&key), mismatch, "{slices:?}");
        let texts: Vec<String> =
            problems.texts.into_iter().map(|(_, text)| text).filter(|text| text.contains("UDP port")).collect();
        assert_eq!(texts.len(), usize::from(mismatch), "{texts:?}");
        for text in texts {
            assert!(text.contains("the endpoints of own/a have no UDP port 9, only 5514 (named \"syslog\")"), "{text}");
            assert!(text.ends_with("set `port = \"syslog\"`"), "{text}");
        }
    }
}

#[test]
fn the_cause_of_an_empty_set_is_the_present_one() {
    let mut aggregator = aggregator(vec![request(0, &["a"], Locality::Cluster)]);
    let key = ServiceKey::new("own", "a");
    let unready = |number: u8| {
        let endpoints = (0..number)
            .map(|last| SliceEndpoint { readiness: EndpointReadiness::NotReady, ..endpoint(last, "far", "east") });
        found("a", endpoints.collect())
    };
    let six = || {
        let WatchEvent::Slices(key, slices) = simple("a", &[1]) else { unreachable!() };
        let six = Slice { addresses: AddressType::Ip(Family::V6), ..(*slices[0]).clone() };
        WatchEvent::Slices(key, vec![Arc::new(six)])
    };
    let absent = WatchEvent::Absent(key.clone(), "service a does not exist".to_owned());
    for (event, logged, present) in [
        (WatchEvent::Slices(key.clone(), vec![]), 1, "no slices for its services"),
        (absent, 0, "service a does not exist"),
        (WatchEvent::Absent(key.clone(), "service a has no slices".to_owned()), 0, "service a has no slices"),
        (unready(1), 1, "none of 1 endpoints is ready"),
        (unready(2), 0, "none of 2 endpoints is ready"),
        (six(), 1, "only IPv6 addresses"),
        (WatchEvent::Slices(key.clone(), vec![]), 1, "no slices for its services"),
    ] {
        aggregator.handle_event(event);
        let notices = aggregator.flush().1;
        assert_eq!(notices.len(), logged, "{present}: {notices:?}");
        assert!(
            notices
                .iter()
                .all(|notice| matches!(notice, DiscoveryNotice::Empty { cause, .. } if cause.contains(present)))
        );
        let problems = aggregator.problems().texts;
        assert!(matches!(&problems[..], [(_, text)] if text.contains(present)), "{present}: {problems:?}");
    }
    aggregator.handle_event(simple("a", &[1]));
    aggregator.flush();
    assert_eq!(aggregator.problems().texts, []);
}
