//! Compiles one listener's part of the plan from its configuration, its downstreams and the host's facts. Pure.
//!
//! Unhealthy downstreams have been left out before (`eligible_downstreams` in the controller), and so have terminating
//! endpoints (`discovery/slices.rs`): they get no slot.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::sync::Arc;

use super::{Delivery, LinkRef, ListenerPlan, MacPair, PlanTarget, maglev, round_robin};
use crate::config::{Interfaces, ListenerConfig};
use crate::host::{HostFacts, Link, Route};
use crate::model::{Downstream, MAX_COPIES, Mode, Policy};
use crate::net::is_link_scoped_multicast;

/// What both datapaths must do for one listener.
///
/// `facts.routes` must hold the route of every downstream; a downstream without one counts as unreachable.
/// `before` is the listener's part of the previous plan, if there is one: its table is reused if nothing in it changes,
/// because a long table is expensive to fill.
#[must_use]
pub fn compile(
    listener: &ListenerConfig,
    downstreams: &[Downstream],
    mode: Mode,
    facts: &HostFacts,
    before: Option<&ListenerPlan>,
) -> ListenerPlan {
    let routes: Vec<Option<&Route>> =
        downstreams.iter().map(|downstream| facts.routes.get(&downstream.address.ip())).collect();
    let target = |(downstream, route): (&Downstream, &Option<&Route>)| PlanTarget {
        downstream: downstream.clone(),
        delivery: delivery(*route, facts),
    };
    let targets = downstreams.iter().zip(&routes).map(target).collect();
    let kernel = mode == Mode::TcEbpf;
    let links = links(&listener.interfaces, facts);
    let joins = if listener.bind.ip().is_multicast() { links.clone() } else { Vec::new() };
    ListenerPlan {
        id: listener.id,
        name: listener.name.as_str().into(),
        mode,
        bind: on_link(listener.bind, &joins),
        match_addresses: if kernel { match_addresses(listener.bind.ip(), facts) } else { Vec::new() },
        l3_ingress: if kernel { l3_ingress(&links, facts) } else { Vec::new() },
        links: if kernel { links } else { Vec::new() },
        joins,
        policy: listener.policy,
        sources: Arc::clone(&listener.sources),
        meter: listener.rate_limit.map(|limit| limit.meter(listener.bind.ip())),
        socket_only: if kernel { socket_only(listener.policy, downstreams, &routes) } else { None },
        targets,
        table: fill_table(listener.policy, downstreams, before),
        settings: listener.settings.clone(),
    }
}

/// Adds the link to a link-scoped multicast address.
fn on_link(bind: SocketAddr, joins: &[LinkRef]) -> SocketAddr {
    match (bind, joins.first()) {
        (SocketAddr::V6(v6), Some(link)) if is_link_scoped_multicast(bind.ip()) => {
            SocketAddrV6::new(*v6.ip(), v6.port(), 0, link.index).into()
        }
        _ => bind,
    }
}

fn fill_table(policy: Policy, downstreams: &[Downstream], before: Option<&ListenerPlan>) -> Arc<[u32]> {
    let place = |downstream: &Downstream| (downstream.address, downstream.weight);
    if let Some(before) = before.filter(|before| before.policy == policy)
        && before.targets.iter().map(|target| place(&target.downstream)).eq(downstreams.iter().map(place))
    {
        return Arc::clone(&before.table);
    }
    match policy {
        Policy::RoundRobin | Policy::GelfMessage => {
            round_robin::interleave(&downstreams.iter().map(|downstream| downstream.weight).collect::<Vec<u32>>())
                .into()
        }
        // Each downstream once: weights do not matter for copies.
        Policy::Replicate => (0..).zip(downstreams).map(|(index, _)| index).collect(),
        Policy::Hash(_) => {
            let weighted: Vec<_> = downstreams.iter().map(|to| (to.address, to.weight)).collect();
            maglev::table(&weighted, before.map_or(0, |before| before.table.len())).into()
        }
    }
}

fn delivery(route: Option<&Route>, facts: &HostFacts) -> Delivery {
    match route {
        Some(Route::Local { .. }) => Delivery::Local,
        Some(&Route::Via { link, mtu, .. }) if facts.link(link).is_some_and(|link| link.l3_device) => {
            Delivery::L3Device { link, mtu }
        }
        Some(&Route::Via { link, next_hop, mtu }) => {
            let own = facts.link(link).and_then(|link| link.mac);
            let neighbour = facts.neighbour(link, next_hop);
            let macs = neighbour.zip(own).map(|(neighbour, own)| MacPair { neighbour, own });
            let into_pod = macs.is_some() && facts.can_redirect_to_peer(link);
            Delivery::Neighbour { link, next_hop, mtu, macs, into_pod }
        }
        // The TC program cannot encapsulate; `socket_only` sends such datagrams through the socket.
        Some(Route::Encapsulated { .. } | Route::Unreachable { .. }) | None => Delivery::Unreachable,
    }
}

/// The addresses at which the TC program sees this listener's datagrams. A wildcard expands to all host addresses of
/// its family except loopback addresses, because datagrams to those never arrive through an interface.
fn match_addresses(bind: IpAddr, facts: &HostFacts) -> Vec<IpAddr> {
    if !bind.is_unspecified() {
        return vec![bind];
    }
    let ours: BTreeSet<IpAddr> = facts
        .addresses
        .iter()
        .map(|address| address.address)
        .filter(|address| address.is_ipv4() == bind.is_ipv4() && !address.is_loopback())
        .collect();
    ours.into_iter().collect()
}

/// The interfaces that the listener wants and that exist at the moment.
#[must_use]
pub fn links(interfaces: &Interfaces, facts: &HostFacts) -> Vec<LinkRef> {
    let found: Vec<&Link> = match interfaces {
        Interfaces::Auto => facts.default_route_links.iter().filter_map(|&index| facts.link(index)).collect(),
        Interfaces::Named(names) => names.iter().filter_map(|name| facts.link_named(name)).collect(),
    };
    let mut links: Vec<LinkRef> =
        found.into_iter().map(|link| LinkRef { index: link.index, name: link.name.clone() }).collect();
    links.sort();
    links.dedup();
    links
}

fn l3_ingress(links: &[LinkRef], facts: &HostFacts) -> Vec<u32> {
    let indices = links.iter().map(|link| link.index);
    indices.filter(|&index| facts.link(index).is_some_and(|link| link.l3_ingress)).collect()
}

/// Why the socket must forward everything, if it must.
///
/// - A downstream is reachable for the host's stack but not for the TC program: a packet from outside cannot be sent to
///   a loopback address (a martian), nor can the program encapsulate. If the program passed only that downstream's
///   datagrams to the socket, the socket's own round robin would send them to the wrong receiver. So the socket
///   forwards all.
/// - More copies than the program can make: a Service may have any number of endpoints.
fn socket_only(policy: Policy, downstreams: &[Downstream], routes: &[Option<&Route>]) -> Option<String> {
    let count = downstreams.len();
    if policy == Policy::Replicate && count > MAX_COPIES {
        return Some(format!("{count} downstreams want a copy, and the TC program makes at most {MAX_COPIES}"));
    }
    downstreams.iter().zip(routes).find_map(|(downstream, route)| {
        let obstacle = match (*route)? {
            Route::Local { loopback: true } => "is on the loopback interface",
            Route::Encapsulated { .. } => "is behind a route that encapsulates",
            Route::Local { loopback: false } | Route::Via { .. } | Route::Unreachable { .. } => return None,
        };
        Some(format!("downstream {} {obstacle}", downstream.address))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DownstreamSource, ListenerProtocol, RequestedMode, UserspaceSettings};
    use crate::host::{HostAddress, Neighbour};
    use crate::model::ListenerId;

    fn facts() -> HostFacts {
        let link = |index, name: &str| Link {
            index,
            name: name.into(),
            up: true,
            ethernet: index != 1,
            mac: (index != 1).then_some([2, 0, 0, 0, 0, index as u8]),
            loopback: index == 1,
            mtu: 1500,
            ..Link::default()
        };
        let address = |link, address: &str| HostAddress { link, address: address.parse().unwrap() };
        HostFacts {
            links: vec![link(1, "lo"), link(2, "eth0"), link(3, "eth1")],
            addresses: vec![
                address(1, "127.0.0.1"),
                address(2, "192.0.2.1"),
                address(2, "2001:db8::1"),
                address(3, "198.51.100.1"),
                address(3, "192.0.2.1"),
            ],
            default_route_links: vec![2],
            routes: [
                ("192.0.2.9", Route::Via { link: 2, next_hop: "192.0.2.9".parse().unwrap(), mtu: 1500 }),
                ("203.0.113.9", Route::Via { link: 3, next_hop: "198.51.100.254".parse().unwrap(), mtu: 1400 }),
                ("192.0.2.1", Route::Local { loopback: false }),
                ("127.0.0.1", Route::Local { loopback: true }),
                ("10.0.0.1", Route::Unreachable { reason: "Network is unreachable".into() }),
            ]
            .into_iter()
            .map(|(ip, route)| (ip.parse().unwrap(), route))
            .collect(),
            ..HostFacts::default()
        }
    }

    fn listener(bind: &str, interfaces: Interfaces) -> ListenerConfig {
        ListenerConfig {
            id: ListenerId(0),
            name: "syslog".into(),
            bind: bind.parse().unwrap(),
            interfaces,
            mode: RequestedMode::TcEbpf,
            protocol: ListenerProtocol::Raw,
            policy: Policy::RoundRobin,
            sources: Arc::default(),
            rate_limit: None,
            source: DownstreamSource::Static(Vec::new()),
            health: None,
            settings: UserspaceSettings::default(),
        }
    }

    fn set(addresses: &[&str]) -> Vec<Downstream> {
        addresses
            .iter()
            .map(|address| Downstream {
                name: (*address).into(),
                address: address.parse().unwrap(),
                weight: 1,
                sample: Downstream::ALL,
            })
            .collect()
    }

    #[test]
    fn a_wildcard_matches_the_hosts_addresses_of_its_family_once_each() {
        let plan = compile(&listener("0.0.0.0:514", Interfaces::Auto), &set(&[]), Mode::TcEbpf, &facts(), None);
        let expected: Vec<IpAddr> = vec!["192.0.2.1".parse().unwrap(), "198.51.100.1".parse().unwrap()];
        assert_eq!(plan.match_addresses, expected);
        assert_eq!(plan.links, [LinkRef { index: 2, name: "eth0".into() }]);
        let plan = compile(&listener("[::]:514", Interfaces::Auto), &set(&[]), Mode::TcEbpf, &facts(), None);
        assert_eq!(plan.match_addresses, ["2001:db8::1".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn a_table_is_what_it_would_be_had_there_been_none_before() {
        let mut listener = listener("192.0.2.1:514", Interfaces::Auto);
        for policy in [Policy::RoundRobin, Policy::Hash(crate::model::HashOn::Flow), Policy::Replicate] {
            listener.policy = policy;
            let mut before = None;
            let first = set(&["192.0.2.9:1", "192.0.2.9:2", "10.0.0.1:1"]);
            let mut heavier = first.clone();
            heavier[1].weight = 3;
            let mut turned = heavier.clone();
            turned.swap(0, 2);
            for set in [&first, &first, &heavier, &turned, &set(&["192.0.2.9:1"])] {
                let anew = compile(&listener, set, Mode::TcEbpf, &facts(), None);
                let after = compile(&listener, set, Mode::TcEbpf, &facts(), before.as_ref());
                assert_eq!(after, anew);
                before = Some(after);
            }
        }
    }

    #[test]
    fn the_program_is_told_which_of_its_links_have_no_frames() {
        let mut facts = facts();
        (facts.links[2].ethernet, facts.links[2].l3_ingress) = (false, true);
        let listener = listener("192.0.2.1:514", Interfaces::Named(vec!["eth0".into(), "eth1".into()]));
        let l3_ingress = |mode| compile(&listener, &set(&[]), mode, &facts, None).l3_ingress;
        assert_eq!((l3_ingress(Mode::TcEbpf), l3_ingress(Mode::Userspace)), (vec![3], vec![]));
    }

    #[test]
    fn interfaces_that_are_missing_are_left_out() {
        let named = Interfaces::Named(vec!["eth1".into(), "eth9".into()]);
        let plan = compile(&listener("192.0.2.1:514", named), &set(&[]), Mode::TcEbpf, &facts(), None);
        assert_eq!(plan.links, [LinkRef { index: 3, name: "eth1".into() }]);
        assert_eq!(plan.match_addresses, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn a_group_is_joined_in_both_modes_and_knows_its_link() {
        let named = |names: &[&str]| Interfaces::Named(names.iter().map(ToString::to_string).collect());
        let compiled = |bind: &str, names: &[&str], mode| {
            let plan = compile(&listener(bind, named(names)), &set(&[]), mode, &facts(), None);
            let joined = |links: &[LinkRef]| links.iter().map(|link| link.name.clone()).collect::<Vec<_>>();
            (plan.bind.to_string(), joined(&plan.joins), joined(&plan.links), plan.match_addresses)
        };
        let (bind, joins, links, addresses) = compiled("239.1.1.1:9000", &["eth0", "eth1", "eth9"], Mode::TcEbpf);
        assert_eq!((bind.as_str(), joins.len(), links.len()), ("239.1.1.1:9000", 2, 2));
        assert_eq!(addresses, ["239.1.1.1".parse::<IpAddr>().unwrap()]);
        let (bind, joins, links, _) = compiled("[ff02::7]:9000", &["eth1"], Mode::Userspace);
        assert_eq!((bind.as_str(), joins, links.len()), ("[ff02::7%3]:9000", vec!["eth1".to_owned()], 0));
        assert_eq!(compiled("[ff05::7]:9000", &["eth1"], Mode::Userspace).0, "[ff05::7]:9000");
        assert_eq!(compiled("192.0.2.1:9000", &["eth1"], Mode::Userspace).1.len(), 0);
    }

    #[test]
    fn each_route_becomes_its_delivery() {
        let set = set(&["192.0.2.9:1", "203.0.113.9:1", "192.0.2.1:1", "10.0.0.1:1", "10.0.0.2:1"]);
        let plan = compile(&listener("192.0.2.1:514", Interfaces::Auto), &set, Mode::TcEbpf, &facts(), None);
        let deliveries: Vec<Delivery> = plan.targets.iter().map(|target| target.delivery).collect();
        let neighbour = |link, next_hop: &str, mtu| Delivery::Neighbour {
            link,
            next_hop: next_hop.parse().unwrap(),
            mtu,
            macs: None,
            into_pod: false,
        };
        assert_eq!(
            deliveries,
            [
                neighbour(2, "192.0.2.9", 1500),
                neighbour(3, "198.51.100.254", 1400),
                Delivery::Local,
                Delivery::Unreachable,
                Delivery::Unreachable
            ]
        );
        assert_eq!(*plan.table, [0, 1, 2, 3, 4]);
        assert_eq!(plan.socket_only, None);
    }

    /// The delivery to a downstream at 192.0.2.9, behind eth0, after `change` was made to the facts.
    fn delivery_after(change: impl FnOnce(&mut HostFacts)) -> Delivery {
        let mut facts = facts();
        change(&mut facts);
        let listener = listener("192.0.2.1:514", Interfaces::Auto);
        compile(&listener, &set(&["192.0.2.9:1"]), Mode::TcEbpf, &facts, None).targets[0].delivery
    }

    fn resolve(facts: &mut HostFacts) {
        let address = "192.0.2.9".parse().unwrap();
        facts.neighbours = vec![Neighbour { link: 2, address, mac: [9; 6] }];
    }

    #[test]
    fn a_pod_is_entered_directly_where_nobody_guards_its_door_and_it_is_known() {
        let into_pod = |delivery| matches!(delivery, Delivery::Neighbour { into_pod: true, .. });
        let opened = |facts: &mut HostFacts| facts.links[1].direct_peer = true;
        assert!(into_pod(delivery_after(|facts| {
            opened(facts);
            resolve(facts);
        })));
        assert!(!into_pod(delivery_after(resolve)));
        assert!(!into_pod(delivery_after(opened)));
        assert!(!into_pod(delivery_after(|facts| {
            opened(facts);
            resolve(facts);
            facts.egress_hooks.insert(2, "somebody".into());
        })));
    }

    #[test]
    fn what_is_known_of_a_neighbour_goes_into_the_plan() {
        let known = delivery_after(resolve);
        let expected = Some(MacPair { neighbour: [9; 6], own: [2, 0, 0, 0, 0, 2] });
        assert!(matches!(known, Delivery::Neighbour { macs, .. } if macs == expected), "{known:?}");
        assert_eq!(known.without_neighbour(), delivery_after(|_| ()));
    }

    #[test]
    fn on_a_link_that_carries_bare_packets_there_are_no_neighbours() {
        let bare = delivery_after(|facts| facts.links[1].l3_device = true);
        assert_eq!(bare, Delivery::L3Device { link: 2, mtu: 1500 });
    }

    #[test]
    fn more_copies_than_the_program_makes_are_left_to_the_socket() {
        let addresses: Vec<String> = (1..=65).map(|port| format!("192.0.2.9:{port}")).collect();
        let all: Vec<&str> = addresses.iter().map(String::as_str).collect();
        let mut listener = listener("192.0.2.1:514", Interfaces::Auto);
        let reason = |listener: &ListenerConfig, count: usize| {
            compile(listener, &set(&all[..count]), Mode::TcEbpf, &facts(), None).socket_only
        };
        assert_eq!(reason(&listener, 65), None);
        listener.policy = Policy::Replicate;
        assert_eq!(reason(&listener, 64), None);
        let expected = "65 downstreams want a copy, and the TC program makes at most 64";
        assert_eq!(reason(&listener, 65).as_deref(), Some(expected));
    }

    #[test]
    fn one_loopback_downstream_leaves_all_to_the_socket() {
        let set = set(&["192.0.2.9:1", "127.0.0.1:1"]);
        let listener = listener("192.0.2.1:514", Interfaces::Auto);
        let plan = compile(&listener, &set, Mode::TcEbpf, &facts(), None);
        assert_eq!(plan.socket_only.as_deref(), Some("downstream 127.0.0.1:1 is on the loopback interface"));
        let plan = compile(&listener, &set, Mode::Userspace, &facts(), None);
        assert_eq!((plan.socket_only, plan.links.len(), plan.match_addresses.len()), (None, 0, 0));
    }
}
