use super::*;

fn request(service: &str, port: PortRef) -> DiscoveryRequest {
    DiscoveryRequest {
        listener: ListenerId(0),
        services: vec![ServiceRef { namespace: Some("logging".to_owned()), service: service.to_owned(), port }],
        family: Family::V4,
        locality: Locality::Cluster,
        terminating: Terminating::Fallback,
    }
}

fn settings() -> DiscoverySettings {
    DiscoverySettings { kubeconfig: None, config: None, node_name: None, limits: DiscoveryTimeouts::default() }
}

fn refused(requests: &[DiscoveryRequest]) -> String {
    format!("{:#}", validate(requests, &settings()).unwrap_err())
}

#[test]
fn impossible_requests_are_refused_by_name() {
    let good = request("vector-aggregators", PortRef::Number(5514));
    assert!(validate(std::slice::from_ref(&good), &settings()).is_ok());
    for name in ["", "Upper", "a.b", "a,b=c", "-a", "a-", &"x".repeat(64)] {
        assert!(refused(&[request(name, PortRef::Number(1))]).contains("is not a Kubernetes name"), "{name}");
    }
    assert!(refused(&[request("a", PortRef::Number(0))]).contains("port 0"));
    assert!(refused(&[good.clone(), good.clone()]).contains("two discovery requests"));
    assert!(refused(&[DiscoveryRequest { services: vec![], ..good.clone() }]).contains("names no service"));
    let strict = [DiscoveryRequest { locality: Locality::Node, ..good.clone() }];
    assert!(refused(&strict).contains("NODE_NAME"));
    let known = DiscoverySettings { node_name: Some("here".to_owned()), ..settings() };
    assert!(validate(&strict, &known).is_ok());
    let mut long = settings();
    long.limits.watch_timeout = Duration::from_secs(300);
    assert!(validate(&[good], &long).is_err());
}

#[test]
fn configuration_spells_them_like_the_guide() {
    assert_eq!(serde_json::from_str::<PortRef>("5514").unwrap(), PortRef::Number(5514));
    assert_eq!(serde_json::from_str::<PortRef>("\"syslog\"").unwrap(), PortRef::Name("syslog".to_owned()));
    for locality in [Locality::Cluster, Locality::PreferNode, Locality::Node, Locality::PreferZone] {
        let spelled = format!("{:?}", locality.name());
        assert_eq!(serde_json::from_str::<Locality>(&spelled).unwrap(), locality);
    }
    assert_eq!(serde_json::from_str::<Terminating>("\"until_gone\"").unwrap(), Terminating::UntilGone);
}
