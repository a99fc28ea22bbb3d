use std::path::Path;

use super::super::{DoctorFinding, Severity};
use super::*;
use crate::config::Config;
use crate::controller::ModeChoice;
use crate::host::HostAddress;
use crate::model::Mode;

/// A host with a wide `eth0` and a narrow `pods`, and a downstream behind the latter.
fn facts() -> HostFacts {
    let link = |index, name: &str, mtu| Link {
        index,
        name: name.into(),
        kind: None,
        up: true,
        ethernet: true,
        l3_device: false,
        l3_ingress: false,
        loopback: false,
        mtu,
        mac: None,
        direct_peer: false,
        running: true,
    };
    let next_hop: IpAddr = "10.1.0.9".parse().unwrap();
    HostFacts {
        links: vec![link(2, "eth0", 1500), link(3, "pods", 1500)],
        addresses: vec![HostAddress { link: 2, address: "10.0.0.1".parse().unwrap() }],
        default_route_links: vec![2],
        routes: [(next_hop, Route::Via { link: 3, next_hop, mtu: 1500 })].into(),
        ..HostFacts::default()
    }
}

fn config(extra: &str) -> Config {
    let text = format!(
        "[[listeners]]\nname = \"a\"\nbind = \"0.0.0.0:1\"\ninterface = \"eth0\"\n{extra}\n\
         downstream = [{{ address = \"10.1.0.9:1\" }}]\n"
    );
    Config::parse(&text, Path::new("c.toml")).unwrap_or_else(|error| panic!("{error}"))
}

fn found(config: &Config, mode: Mode, judge: impl FnOnce(&DoctorListener<'_>, &mut Findings)) -> Vec<DoctorFinding> {
    let first = &config.listeners[0];
    let crate::config::DownstreamSource::Static(downstreams) = &first.source else { panic!("static") };
    let choice = ModeChoice { mode, reason: "configured".into() };
    let listener = DoctorListener { config: first, choice, downstreams: downstreams.clone() };
    let mut findings = Findings::default();
    judge(&listener, &mut findings);
    findings.0
}

fn level(found: &[DoctorFinding]) -> Severity {
    assert_eq!(found.len(), 1, "{found:?}");
    found[0].level
}

#[test]
fn a_healthy_host_is_found_healthy() {
    let facts = facts();
    let all = found(&config(""), Mode::TcEbpf, |listener, findings| {
        judge_routes(listener, &facts, findings);
        judge_neighbours(std::slice::from_ref(listener), &facts, &Resolutions::new(), findings);
        judge_mtu(listener, &facts, findings);
        judge_forwarding(listener, &facts, &|_, _| Some(0), findings);
        judge_source_validation(listener, &facts, &|_, _| Some(1), findings);
    });
    assert_eq!(all.len(), 5);
    assert!(all.iter().all(|finding| finding.level == Severity::Ok), "{all:#?}");
}

#[test]
fn routes_that_lead_nowhere_or_past_the_kernel_program_are_found() {
    let ip: IpAddr = "10.1.0.9".parse().unwrap();
    for (route, mode, expected) in [
        (Route::Unreachable { reason: "no".into() }, Mode::Userspace, Severity::Problem),
        (Route::Encapsulated { link: 3 }, Mode::TcEbpf, Severity::Warning),
        (Route::Encapsulated { link: 3 }, Mode::Userspace, Severity::Ok),
        (Route::Local { loopback: true }, Mode::TcEbpf, Severity::Warning),
        (Route::Local { loopback: false }, Mode::TcEbpf, Severity::Ok),
    ] {
        let facts = HostFacts { routes: [(ip, route.clone())].into(), ..facts() };
        let all = found(&config(""), mode, |listener, findings| judge_routes(listener, &facts, findings));
        assert_eq!(level(&all), expected, "{route:?} {mode}");
    }
}

#[test]
fn a_silent_next_hop_is_found_with_those_behind_it() {
    let hop = (3, "10.1.0.9".parse().unwrap());
    for (resolution, expected) in [
        (NeighbourResolution::Resolved, Severity::Ok),
        (NeighbourResolution::Failed, Severity::Problem),
        (NeighbourResolution::Pending, Severity::Problem),
    ] {
        let neighbours = Resolutions::from([(hop, resolution)]);
        let all = found(&config(""), Mode::TcEbpf, |listener, findings| {
            judge_neighbours(std::slice::from_ref(listener), &facts(), &neighbours, findings);
        });
        assert_eq!(level(&all), expected);
        assert!(
            expected == Severity::Ok || all[0].text.contains("pods") && all[0].text.contains("10.1.0.9:1"),
            "{all:?}"
        );
    }
}

#[test]
fn a_narrow_egress_path_is_found_with_the_payload_that_fits() {
    let mut facts = facts();
    let hop: IpAddr = "10.1.0.9".parse().unwrap();
    facts.routes.insert(hop, Route::Via { link: 3, next_hop: hop, mtu: 1450 });
    for mode in [Mode::TcEbpf, Mode::Userspace] {
        let all = found(&config(""), mode, |listener, findings| judge_mtu(listener, &facts, findings));
        assert_eq!(level(&all), Severity::Warning);
        assert!(all[0].fix.as_ref().unwrap().contains("1422 bytes"), "{all:?}");
    }
}

#[test]
fn strict_source_validation_matters_where_the_way_back_is_another() {
    let mut facts = facts();
    facts.default_route_links = vec![3];
    let judge = |facts: &HostFacts, all: u32, own: u32| {
        let sysctl = move |_: &str, key: &str| Some(if key.starts_with("conf/all/") { all } else { own });
        level(&found(&config(""), Mode::Userspace, |listener, findings| {
            judge_source_validation(listener, facts, &sysctl, findings);
        }))
    };
    assert_eq!(judge(&facts, 1, 0), Severity::Warning);
    assert_eq!(judge(&facts, 0, 1), Severity::Warning);
    assert_eq!(judge(&facts, 0, 0), Severity::Ok);
    assert_eq!(judge(&facts, 1, 2), Severity::Ok, "loose is the larger number");
    facts.default_route_links = vec![];
    assert_eq!(judge(&facts, 1, 1), Severity::Ok, "no route back uses another interface");
}

#[test]
fn forwarding_matters_where_receivers_answer() {
    let judge = |extra: &str, value| {
        level(&found(&config(extra), Mode::TcEbpf, |listener, findings| {
            judge_forwarding(listener, &facts(), &|_, _| Some(value), findings);
        }))
    };
    assert_eq!(judge("", 0), Severity::Ok);
    assert_eq!(judge("protocol = \"dns\"", 1), Severity::Ok);
    assert_eq!(judge("protocol = \"dns\"", 0), Severity::Warning);
}
