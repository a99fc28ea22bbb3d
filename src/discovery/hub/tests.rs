use std::net::IpAddr;

use super::super::slices::{AddressType, Endpoint, Readiness};
use super::super::{Family, PortRef, Terminating};
use super::*;

fn request(listener: u32, services: &[&str], locality: Locality) -> Request {
    let service = |name: &&str| ServiceRef { namespace: None, service: (*name).to_owned(), port: PortRef::Number(9) };
    Request {
        listener: ListenerId(listener),
        services: services.iter().map(service).collect(),
        family: Family::V4,
        locality,
        terminating: Terminating::Fallback,
    }
}

fn hub(requests: Vec<Request>) -> Hub {
    let mut hub = Hub::new("own", Some("here".to_owned()));
    hub.replace(requests);
    hub
}

fn endpoint(last: u8, node: &str, zone: &str) -> Endpoint {
    Endpoint {
        address: IpAddr::from([10, 0, 0, last]),
        readiness: Readiness::Ready,
        node: Some(node.into()),
        zone: Some(zone.into()),
        pod: None,
    }
}

fn found(service: &str, endpoints: Vec<Endpoint>) -> Finding {
    let slice = Slice { addresses: AddressType::Ip(Family::V4), ports: vec![], endpoints, unreadable: 0 };
    Finding::Slices(ServiceKey::new("own", service), vec![Arc::new(slice)])
}

fn simple(service: &str, last: &[u8]) -> Finding {
    found(service, last.iter().map(|&last| endpoint(last, "far", "east")).collect())
}

/// Listener, generation, last bytes of the addresses.
fn updates(hub: &mut Hub) -> Vec<(u32, u64, Vec<u8>)> {
    let last = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets()[3],
        IpAddr::V6(_) => 0,
    };
    hub.flush()
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
    let mut hub = hub(vec![
        request(0, &["a"], Locality::Cluster),
        request(1, &["a", "b"], Locality::Cluster),
        request(2, &["b"], Locality::Cluster),
    ]);
    assert_eq!(hub.wanted().map(ToString::to_string).collect::<Vec<_>>(), ["own/a", "own/b"]);
    assert_eq!(updates(&mut hub), []);
    hub.take(simple("a", &[1]));
    assert_eq!(updates(&mut hub), [(0, 1, vec![1])], "listener 1 waits for b");
    hub.take(simple("b", &[2]));
    assert_eq!(updates(&mut hub), [(1, 2, vec![1, 2]), (2, 3, vec![2])]);
    hub.take(simple("b", &[2]));
    assert_eq!(updates(&mut hub), [], "nothing has changed");
    hub.take(simple("b", &[3]));
    hub.take(simple("b", &[4]));
    assert_eq!(updates(&mut hub), [(1, 4, vec![1, 4]), (2, 5, vec![4])], "one update for two changes");
}

#[test]
fn an_empty_list_empties_and_a_failure_does_not() {
    let mut hub = hub(vec![request(0, &["a"], Locality::Cluster)]);
    let key = ServiceKey::new("own", "a");
    hub.take(Finding::Failed(key.clone()));
    assert_eq!(updates(&mut hub), [], "a failure is not a set");
    hub.take(Finding::Slices(key.clone(), vec![]));
    let (sets, notes) = hub.flush();
    assert!(sets[0].set.downstreams.is_empty());
    assert!(
        matches!(&notes[..], [Note::Empty { cause, .. }] if cause.contains("EndpointSlice not found")),
        "{notes:?}"
    );
    hub.take(simple("a", &[1]));
    assert_eq!(updates(&mut hub), [(0, 2, vec![1])]);
    hub.take(Finding::Failed(key.clone()));
    assert_eq!(updates(&mut hub), []);
    hub.take(Finding::Slices(key, vec![]));
    assert_eq!(updates(&mut hub), [(0, 3, vec![])]);
}

#[test]
fn a_service_that_cannot_be_listed_does_not_withhold_the_others() {
    let mut hub = hub(vec![request(0, &["a", "b"], Locality::Cluster)]);
    hub.take(simple("a", &[1]));
    assert_eq!(updates(&mut hub), []);
    hub.take(Finding::Failed(ServiceKey::new("own", "b")));
    assert_eq!(updates(&mut hub), [(0, 1, vec![1])]);
    hub.take(simple("b", &[2]));
    assert_eq!(updates(&mut hub), [(0, 2, vec![1, 2])]);
}

#[test]
fn a_listener_that_prefers_its_zone_waits_until_the_zone_is_asked_for() {
    let mut hub = hub(vec![request(0, &["a"], Locality::PreferZone), request(1, &["a"], Locality::Cluster)]);
    assert!(hub.wants_zone());
    let both = || found("a", vec![endpoint(1, "next", "west"), endpoint(2, "far", "east")]);
    hub.take(both());
    assert_eq!(updates(&mut hub), [(1, 1, vec![1, 2])]);
    hub.take(Finding::Zone(Some("west".into())));
    assert!(!hub.wants_zone());
    assert_eq!(updates(&mut hub), [(0, 2, vec![1])]);
    hub.take(Finding::Zone(Some("east".into())));
    assert_eq!(updates(&mut hub), [(0, 3, vec![2])]);
}

#[test]
fn without_the_node_object_an_endpoint_here_tells_the_zone() {
    let mut hub = hub(vec![request(0, &["a"], Locality::PreferZone), request(1, &["b"], Locality::Cluster)]);
    hub.take(found("a", vec![endpoint(1, "next", "west"), endpoint(2, "far", "east")]));
    hub.take(Finding::Zone(None));
    assert_eq!(updates(&mut hub), [(0, 1, vec![1, 2])]);
    // Learnt from another listener's service.
    hub.take(found("b", vec![endpoint(9, "here", "east")]));
    assert_eq!(updates(&mut hub), [(0, 2, vec![2]), (1, 3, vec![9])]);
}

#[test]
fn replacing_requests_keeps_what_is_the_same() {
    let mut hub = hub(vec![request(0, &["a"], Locality::Cluster), request(1, &["b"], Locality::Cluster)]);
    hub.take(simple("a", &[1]));
    hub.take(simple("b", &[2]));
    assert_eq!(updates(&mut hub).len(), 2);
    hub.replace(vec![request(0, &["a"], Locality::Cluster), request(1, &["a", "c"], Locality::Cluster)]);
    assert_eq!(hub.wanted().map(|key| key.service.to_string()).collect::<Vec<_>>(), ["a", "c"]);
    assert_eq!(updates(&mut hub), [], "listener 0 is as it was, listener 1 waits for c");
    hub.take(simple("b", &[7]));
    assert_eq!(updates(&mut hub), [], "b is forgotten");
    hub.take(simple("c", &[3]));
    assert_eq!(updates(&mut hub), [(1, 3, vec![1, 3])], "generations go on");
}

#[test]
fn what_is_wrong_is_said_once() {
    let mut hub = hub(vec![request(0, &["a"], Locality::Cluster)]);
    let odd = |last: &[u8]| {
        let Finding::Slices(key, mut slices) = simple("a", last) else { unreachable!() };
        let addresses = AddressType::Other("FQDN".to_owned());
        slices.push(Arc::new(Slice { addresses, ports: vec![], endpoints: vec![], unreadable: 0 }));
        Finding::Slices(key, slices)
    };
    hub.take(odd(&[1]));
    let (_, notes) = hub.flush();
    assert!(
        matches!(&notes[..], [Note::Warning { text, .. }, Note::Discovered { endpoints: 1, .. }] if text.contains("FQDN"))
    );
    hub.take(odd(&[1, 2]));
    assert_eq!(hub.flush().1, [Note::Changed { listener: ListenerId(0), endpoints: 2 }]);
    hub.take(simple("a", &[1]));
    hub.flush();
    hub.take(odd(&[1]));
    assert_eq!(hub.flush().1.len(), 1, "said again after it had gone");
}

#[test]
fn a_node_that_is_not_known_is_said_once_and_prefers_nothing() {
    let mut hub = Hub::new("own", None);
    hub.replace(vec![request(0, &["a"], Locality::PreferNode), request(1, &["a"], Locality::PreferZone)]);
    assert!(!hub.wants_zone());
    hub.take(simple("a", &[1, 2]));
    let (sets, notes) = hub.flush();
    assert!(sets.iter().all(|update| update.set.downstreams.len() == 2) && sets.len() == 2);
    let warnings = notes.iter().filter(|note| matches!(note, Note::Warning { text, .. } if text.contains("NODE_NAME")));
    assert_eq!(warnings.count(), 2);
}
