//! Host facts, read from real network namespaces and compared with their configuration.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use caps::{CapSet, Capability};
use mio::{Events, Interest, Poll, Token};
use nix::errno::Errno;
use udp_fanout::testing::config::{MapLimits, TcxOrder};
use udp_fanout::testing::datapath::kernel::KernelDatapath;
use udp_fanout::testing::datapath::kernel::attach::{AttachMode, Attachment};
use udp_fanout::testing::host::programs;
use udp_fanout::testing::host::{
    HostFacts, HostFeatures, HostMonitor, HostNetwork, Link, Neighbour, NextHopTracking, Route, TcUnsupported,
    tc_ebpf_support,
};
use udp_fanout::testing::plan::LinkRef;
use udp_fanout_lab::{in_new_netns, ip};

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// All facts, with the routes to these addresses.
fn facts(addresses: &[&str]) -> HostFacts {
    let addresses: BTreeSet<_> = addresses.iter().map(|text| address(text)).collect();
    HostNetwork::open().unwrap().facts(&addresses).unwrap()
}

fn route(to: &str) -> Route {
    facts(&[to]).routes.remove(&address(to)).unwrap()
}

fn link(name: &str) -> Link {
    facts(&[]).link_named(name).unwrap_or_else(|| panic!("no interface {name}")).clone()
}

fn via(name: &str, next_hop: &str, mtu: u32) -> Route {
    Route::Via { link: link(name).index, next_hop: address(next_hop), mtu }
}

fn refused(route: &Route) -> &str {
    match route {
        Route::Unreachable { reason } => reason,
        other => panic!("not unreachable: {other:?}"),
    }
}

/// A veth pair, `eth0` and `eth1`, both up; `eth0` has 10.0.0.1/24 and fd00::1/64, usable at once.
fn cable() {
    ip("link add eth0 type veth peer name eth1");
    ip("addr add 10.0.0.1/24 dev eth0");
    ip("addr add fd00::1/64 dev eth0 nodad");
    ip("link set eth0 up");
    ip("link set eth1 up");
    until(|| ip("-6 route show table local").contains("local fd00::1 "));
}

/// Waits for something that the kernel does asynchronously. Checks again whenever the host has changed.
fn until(holds: impl Fn() -> bool) {
    let mut monitor = HostMonitor::open().unwrap();
    let mut poll = Poll::new().unwrap();
    let mut events = Events::with_capacity(1);
    poll.registry().register(&mut monitor, Token(0), Interest::READABLE).unwrap();
    while !holds() {
        poll.poll(&mut events, Some(Duration::from_secs(30))).unwrap();
        assert!(!events.is_empty(), "nothing has changed for half a minute");
        monitor.drain().unwrap();
    }
}

#[test]
fn netns_links_are_listed_with_kind_state_and_mtu() {
    in_new_netns(|| {
        ip("link add eth0 type veth peer name eth1");
        ip("link set eth0 up mtu 1400");
        assert!(facts(&[]).links.is_sorted_by_key(|link| link.index));
        let (lo, eth0, eth1) = (link("lo"), link("eth0"), link("eth1"));
        assert!(lo.loopback && lo.up && !lo.ethernet && lo.kind.is_none() && lo.mtu == 65536, "{lo:?}");
        assert!(eth0.up && eth0.ethernet && !eth0.loopback && eth0.mtu == 1400, "{eth0:?}");
        assert_eq!(eth0.kind.as_deref(), Some("veth"));
        assert!(!eth1.up && eth1.ethernet && eth1.mtu == 1500, "{eth1:?}");
    });
}

/// In a test of its own, because not every kernel has these kinds.
#[test]
fn netns_links_of_other_kinds() {
    in_new_netns(|| {
        without_ipv6();
        // Its own address; otherwise, it would take that of its first port.
        ip("link add br0 address 02:00:00:00:00:03 type bridge");
        ip("tuntap add mode tun name tun0");
        let (bridge, tun) = (link("br0"), link("tun0"));
        assert!(bridge.ethernet && bridge.kind.as_deref() == Some("bridge"), "{bridge:?}");
        assert!(!bridge.l3_device && bridge.mac == Some([2, 0, 0, 0, 0, 3]), "{bridge:?}");
        assert!(!tun.ethernet && tun.kind.as_deref() == Some("tun"), "{tun:?}");
        assert!(tun.l3_device && tun.l3_ingress && tun.mac.is_none() && !bridge.l3_ingress, "{tun:?}");

        // All down: a bridge's carrier, which is a fact, follows that of its ports.
        ip("link add eth0 type veth peer name eth1");
        ip("link set eth1 master br0");
        let monitor = &mut caught_up();
        ip("link set eth1 type bridge_slave priority 7");
        assert!(!monitor.drain().unwrap(), "a bridge reports its ports, which changes no fact");
    });
}

#[test]
fn netns_addresses_are_the_usable_ones() {
    in_new_netns(|| {
        cable();
        ip("addr add 10.0.7.1 peer 10.0.7.2 dev eth1");
        ip("addr add fd00::99/64 dev eth1 nodad");
        let (lo, a, b) = (link("lo").index, link("eth0").index, link("eth1").index);
        let seen: BTreeSet<_> = facts(&[])
            .addresses
            .into_iter()
            .map(|own| (own.link, own.address))
            // The kernel creates link-local addresses asynchronously.
            .filter(|(_, ip)| !matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local()))
            .collect();
        let expected =
            [(lo, "127.0.0.1"), (lo, "::1"), (a, "10.0.0.1"), (a, "fd00::1"), (b, "10.0.7.1"), (b, "fd00::99")];
        assert_eq!(seen, expected.map(|(link, ip)| (link, address(ip))).into());
    });
}

#[test]
fn netns_an_ipv6_address_that_is_still_being_checked_is_left_out() {
    in_new_netns(|| {
        // Without a carrier (the other end is down), the check does not begin, and the address stays tentative.
        ip("link add eth0 type veth peer name eth1");
        ip("link set eth0 up");
        ip("addr add fd00::1/64 dev eth0");
        assert!(ip("-6 addr show dev eth0 tentative").contains("fd00::1"));
        assert!(!facts(&[]).addresses.iter().any(|own| own.address == address("fd00::1")));
    });
}

#[test]
fn netns_a_host_without_routes_reaches_nothing() {
    in_new_netns(|| {
        let seen = facts(&["192.0.2.1", "2001:db8::1"]);
        assert!(seen.default_route_links.is_empty());
        for route in seen.routes.values() {
            assert_eq!(refused(route), "Network is unreachable (os error 101)");
        }
    });
}

#[test]
fn netns_on_link_and_through_gateways() {
    in_new_netns(|| {
        cable();
        ip("route add 10.1.0.0/16 via 10.0.0.254");
        ip("route add 10.2.0.0/24 via inet6 fe80::1 dev eth0");
        ip("-6 route add fd01::/32 via fd00::fe");
        ip("-6 route add fd02::/32 via fe80::7 dev eth0");
        assert_eq!(route("10.0.0.77"), via("eth0", "10.0.0.77", 1500));
        assert_eq!(route("10.1.2.3"), via("eth0", "10.0.0.254", 1500));
        assert_eq!(route("10.2.0.9"), via("eth0", "fe80::1", 1500));
        assert_eq!(route("fd00::77"), via("eth0", "fd00::77", 1500));
        assert_eq!(route("fd01::1"), via("eth0", "fd00::fe", 1500));
        assert_eq!(route("fd02::1"), via("eth0", "fe80::7", 1500));
    });
}

#[test]
fn netns_a_routes_mtu_overrides_the_links() {
    in_new_netns(|| {
        cable();
        ip("link set eth0 mtu 1450");
        ip("route add 10.1.0.0/16 via 10.0.0.254 mtu 1380");
        ip("route add 10.2.0.0/16 via 10.0.0.254 mtu lock 1370");
        ip("-6 route add fd01::/32 via fd00::fe mtu 1300");
        assert_eq!(route("10.0.0.77"), via("eth0", "10.0.0.77", 1450));
        assert_eq!(route("10.1.0.1"), via("eth0", "10.0.0.254", 1380));
        assert_eq!(route("10.2.0.1"), via("eth0", "10.0.0.254", 1370));
        assert_eq!(route("fd01::1"), via("eth0", "fd00::fe", 1300));
    });
}

#[test]
fn netns_local_addresses() {
    in_new_netns(|| {
        cable();
        ip("route add local 10.77.0.0/16 dev lo");
        for own in ["10.0.0.1", "10.77.1.2", "fd00::1"] {
            assert_eq!(route(own), Route::Local { loopback: false }, "{own}");
        }
        for own in ["127.0.0.1", "127.8.9.10", "::1"] {
            assert_eq!(route(own), Route::Local { loopback: true }, "{own}");
        }
    });
}

#[test]
fn netns_rejecting_routes_have_a_reason() {
    in_new_netns(|| {
        cable();
        for (v4, v6, kind) in [("1", "1", "unreachable"), ("2", "2", "blackhole"), ("3", "3", "prohibit")] {
            ip(&format!("route add {kind} 10.{v4}.0.0/16"));
            ip(&format!("-6 route add {kind} fd0{v6}::/32"));
        }
        for (to, words) in [
            ("10.1.0.1", "No route to host"),
            ("10.2.0.1", "blackhole"),
            ("10.3.0.1", "prohibit"),
            ("fd01::1", "No route to host"),
            ("fd02::1", "blackhole"),
            ("fd03::1", "prohibit"),
            ("10.0.0.255", "broadcast"),
            ("fe80::1", "link-local"),
            ("192.0.2.1", "Network is unreachable"),
        ] {
            let route = route(to);
            assert!(refused(&route).contains(words), "{to}: {route:?}");
        }
    });
}

#[test]
fn netns_a_multicast_group_is_reached_directly() {
    in_new_netns(|| {
        cable();
        ip("route add 239.0.0.0/8 dev eth0");
        assert_eq!(route("239.1.2.3"), via("eth0", "239.1.2.3", 1500));
    });
}

#[test]
fn netns_an_encapsulating_route_is_recognised() {
    in_new_netns(|| {
        cable();
        ip("route add 10.3.0.0/16 encap ip id 1 dst 10.0.0.9 via 10.0.0.254 dev eth0");
        // Linux 5.10 omits the encapsulation from the reply to a route request.
        if ip("route get 10.3.0.1").contains("encap") {
            assert_eq!(route("10.3.0.1"), Route::Encapsulated { link: link("eth0").index });
        }
    });
}

#[test]
fn netns_next_hop_objects_are_resolved() {
    in_new_netns(|| {
        cable();
        ip("nexthop add id 7 via 10.0.0.254 dev eth0");
        ip("route add 10.3.0.0/16 nhid 7");
        ip("route add default nhid 7");
        assert_eq!(route("10.3.0.1"), via("eth0", "10.0.0.254", 1500));
        assert_eq!(facts(&[]).default_route_links, [link("eth0").index]);
    });
}

#[test]
fn netns_routing_rules_and_other_tables_count() {
    in_new_netns(|| {
        cable();
        ip("route add 192.0.2.0/24 via 10.0.0.253 table 5000");
        assert!(matches!(route("192.0.2.1"), Route::Unreachable { .. }));
        ip("rule add to 192.0.2.0/24 lookup 5000");
        assert_eq!(route("192.0.2.1"), via("eth0", "10.0.0.253", 1500));
    });
}

#[test]
fn netns_of_equal_paths_one_is_taken() {
    in_new_netns(|| {
        cable();
        ip("addr add 10.5.0.1/24 dev eth1");
        ip("route add 192.0.2.0/24 nexthop via 10.0.0.254 nexthop via 10.5.0.254");
        let paths = [via("eth0", "10.0.0.254", 1500), via("eth1", "10.5.0.254", 1500)];
        assert!(paths.contains(&route("192.0.2.1")));
    });
}

#[test]
fn netns_default_routes_best_first_and_each_link_once() {
    in_new_netns(|| {
        cable();
        ip("link add eth2 type veth peer name eth3");
        for name in ["eth2", "eth3"] {
            ip(&format!("link set {name} up"));
        }
        ip("addr add 10.5.0.1/24 dev eth2");
        ip("addr add 10.6.0.1/24 dev eth3");
        ip("route add default via 10.0.0.254 metric 200");
        ip("route add default via 10.5.0.254 metric 100");
        ip("route add default via 10.6.0.254 table 77");
        ip("-6 route add default via fd00::fe metric 50");
        assert_eq!(facts(&[]).default_route_links, [link("eth0").index, link("eth2").index]);
        ip("-6 route del default");
        assert_eq!(facts(&[]).default_route_links, [link("eth2").index, link("eth0").index]);
        ip("route add default metric 50 nexthop via 10.6.0.254 nexthop via 10.0.0.254");
        assert_eq!(facts(&[]).default_route_links, ["eth3", "eth0", "eth2"].map(|name| link(name).index));
    });
}

#[test]
fn netns_ten_thousand_addresses_are_looked_up() {
    in_new_netns(|| {
        cable();
        ip("route add default via 10.0.0.254");
        ip("route add unreachable 10.200.0.0/16");
        ip("-6 route add default via fd00::fe");
        let mut addresses = BTreeSet::new();
        for n in 0..10_000_u32 {
            let [_, _, high, low] = n.to_be_bytes();
            addresses.insert(match n % 4 {
                0 => IpAddr::from([10, 200, high, low]),
                1 => IpAddr::from([0xfd01, 0, 0, 0, 0, 0, 0, u16::from_be_bytes([high, low])]),
                _ => IpAddr::from([172, 16, high, low]),
            });
        }
        let mut host = HostNetwork::open().unwrap();
        let start = std::time::Instant::now();
        let routes = host.facts(&addresses).unwrap().routes;
        println!("{} routes in {:?}", routes.len(), start.elapsed());

        assert!(routes.keys().eq(&addresses));
        let v4 = via("eth0", "10.0.0.254", 1500);
        let v6 = via("eth0", "fd00::fe", 1500);
        for (address, route) in &routes {
            match address {
                IpAddr::V4(ip) if ip.octets()[0] == 10 => assert!(refused(route).contains("No route to host")),
                IpAddr::V4(_) => assert_eq!(*route, v4, "{address}"),
                IpAddr::V6(_) => assert_eq!(*route, v6, "{address}"),
            }
        }
    });
}

#[test]
fn netns_a_dump_longer_than_one_datagram_is_complete() {
    in_new_netns(|| {
        cable();
        let addresses: String =
            (0..2000).map(|n| format!("addr add 10.9.{}.{}/32 dev eth0\n", n / 250, n % 250)).collect();
        let batch = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(batch.path(), addresses).unwrap();
        ip(&format!("-batch {}", batch.path().display()));
        let seen = facts(&[]).addresses;
        let count = seen.iter().filter(|own| own.address.to_string().starts_with("10.9.")).count();
        assert_eq!(count, 2000);
    });
}

/// A monitor that has read all messages so far and knows each link, so that late messages about carriers are no
/// changes.
fn caught_up() -> HostMonitor {
    let mut monitor = HostMonitor::open().unwrap();
    for link in facts(&[]).links {
        ip(&format!("link set {} alias known", link.name));
    }
    assert!(monitor.drain().unwrap());
    monitor
}

/// Requires that the command is noticed, and that no change remains after it.
fn noticed(monitor: &mut HostMonitor, command: &str) {
    ip(command);
    assert!(monitor.drain().unwrap(), "not noticed: ip {command}");
    assert!(!monitor.drain().unwrap());
}

/// Disables IPv6 on new interfaces. Otherwise, their link-local addresses appear asynchronously and count as changes.
fn without_ipv6() {
    std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
}

#[test]
fn netns_the_monitor_notices_each_kind_of_change() {
    in_new_netns(|| {
        without_ipv6();
        let monitor = &mut caught_up();
        for command in [
            "link add eth0 type veth peer name eth1",
            "link set eth0 up",
            "link set eth1 up",
            "link set eth0 mtu 1400",
            "addr add 10.0.0.1/24 dev eth0",
            "addr add 10.0.0.2/24 dev eth0",
            "addr del 10.0.0.2/24 dev eth0",
            "route add 10.1.0.0/16 via 10.0.0.254",
            "route change 10.1.0.0/16 via 10.0.0.253",
            "route del 10.1.0.0/16",
            "rule add to 192.0.2.0/24 lookup 77",
            "nexthop add id 7 via 10.0.0.254 dev eth0",
            "link set eth0 down",
            "link del eth0",
            "link add eth0 type veth peer name eth1",
            "link set eth0 name eth2",
            "addr add fd00::1/128 dev lo",
            "-6 route add unreachable fd01::/32",
        ] {
            noticed(monitor, command);
        }
    });
}

#[test]
fn netns_the_monitor_notices_changes_of_next_hops() {
    in_new_netns(|| {
        without_ipv6();
        ip("link add eth0 type veth peer name eth1");
        ip("addr add 10.0.0.1/24 dev eth0");
        ip("link set eth0 up");
        ip("link set eth1 up");
        let mut host = HostNetwork::open().unwrap();
        host.track_next_hops(NextHopTracking::ResolvePods);
        let addresses = BTreeSet::from([address("10.0.0.7")]);
        let mut monitor = caught_up();
        monitor.track_next_hops().unwrap();
        let watch = |host: &mut HostNetwork, monitor: &mut HostMonitor| {
            let facts = host.facts(&addresses).unwrap();
            monitor.watch(&facts);
            assert!(!monitor.drain().unwrap());
            facts
        };
        assert_eq!(watch(&mut host, &mut monitor).neighbours, []);
        for (command, mac) in [
            ("neigh add 10.0.0.7 lladdr 02:00:00:00:00:07 dev eth0", Some(7)),
            ("neigh change 10.0.0.7 lladdr 02:00:00:00:00:08 dev eth0", Some(8)),
            ("neigh del 10.0.0.7 dev eth0", None),
        ] {
            noticed(&mut monitor, command);
            let facts = watch(&mut host, &mut monitor);
            let known = mac.map(|last| Neighbour {
                link: link("eth0").index,
                address: address("10.0.0.7"),
                mac: [2, 0, 0, 0, 0, last],
            });
            assert_eq!(facts.neighbours, Vec::from_iter(known), "{command}");
        }
        // These are not next hops.
        ip("neigh add 10.0.0.9 lladdr 02:00:00:00:00:09 dev eth0");
        ip("neigh add 10.0.0.7 lladdr 02:00:00:00:00:09 dev eth1");
        assert!(!monitor.drain().unwrap());
        // A configured neighbour is not resolved; a request would make the kernel forget that it is permanent.
        ip("neigh add 10.0.0.7 lladdr 02:00:00:00:00:07 dev eth0 nud permanent");
        let facts = watch_again(&mut host, &mut monitor, &addresses);
        host.track_next_hops(NextHopTracking::ResolveAll);
        assert!(!host.maintain(&facts).unwrap());
        assert!(ip("neigh show 10.0.0.7 dev eth0").contains("PERMANENT"));
    });
}

/// Collects the facts and drains the messages that led to them.
fn watch_again(host: &mut HostNetwork, monitor: &mut HostMonitor, addresses: &BTreeSet<IpAddr>) -> HostFacts {
    let facts = host.facts(addresses).unwrap();
    monitor.watch(&facts);
    monitor.drain().unwrap();
    facts
}

#[test]
fn netns_the_kernel_is_made_to_resolve_neighbours_without_traffic() {
    in_new_netns(|| {
        cable();
        let mut host = HostNetwork::open().unwrap();
        host.track_next_hops(NextHopTracking::ResolveAll);
        let addresses = BTreeSet::from([address("10.0.0.7"), address("fd00::7")]);
        host.facts(&addresses).unwrap();
        // Nobody replies, but the kernel has sent requests.
        for sought in ["10.0.0.7", "fd00::7"] {
            assert!(ip(&format!("neigh show {sought} dev eth0")).contains(sought), "{sought}");
        }
        host.track_next_hops(NextHopTracking::ResolvePods);
        host.facts(&BTreeSet::from([address("10.0.0.8")])).unwrap();
        assert_eq!(ip("neigh show 10.0.0.8 dev eth0"), "");
    });
}

#[test]
fn netns_a_link_that_is_deleted_and_created_again_is_noticed() {
    in_new_netns(|| {
        without_ipv6();
        let make = "link add eth0 index 50 address 02:00:00:00:00:01 type veth peer name eth1 index 51";
        ip(make);
        let monitor = &mut caught_up();
        let before = link("eth0");
        ip("link del eth0");
        ip(make);
        assert_eq!(link("eth0"), before);
        assert!(monitor.drain().unwrap());
    });
}

#[test]
fn netns_the_monitor_ignores_changes_that_are_no_facts() {
    in_new_netns(|| {
        ip("addr add 10.0.0.1/24 dev lo");
        let monitor = &mut caught_up();
        // The first message about an address always counts as a change.
        noticed(monitor, "addr change 10.0.0.1/24 dev lo valid_lft 3000 preferred_lft 2000");
        for n in 0..50 {
            ip(&format!("link set lo alias number{n}"));
            ip(&format!("addr change 10.0.0.1/24 dev lo valid_lft {} preferred_lft 1000", 4000 + n));
        }
        ip("link set lo txqueuelen 77");
        assert!(!monitor.drain().unwrap());
    });
}

#[test]
fn netns_an_overrun_counts_as_a_change() {
    in_new_netns(|| {
        let monitor = &mut caught_up();
        socket2::SockRef::from(&*monitor).set_recv_buffer_size(1).unwrap();
        // Messages that would not count as changes if none were lost.
        for n in 0..50 {
            ip(&format!("link set lo alias number{n}"));
        }
        assert!(monitor.drain().unwrap());
        assert!(!monitor.drain().unwrap());
        // Then it works as before: the first message is a change again, the second is not.
        noticed(monitor, "link set lo alias fresh");
        ip("link set lo alias stale");
        assert!(!monitor.drain().unwrap());
    });
}

#[test]
fn netns_the_monitor_wakes_a_mio_loop() {
    in_new_netns(|| {
        without_ipv6();
        let mut monitor = caught_up();
        let mut poll = Poll::new().unwrap();
        let mut events = Events::with_capacity(4);
        poll.registry().register(&mut monitor, Token(7), Interest::READABLE).unwrap();
        for command in ["link add eth0 type veth peer name eth1", "link del eth0"] {
            ip(command);
            poll.poll(&mut events, Some(Duration::from_secs(30))).unwrap();
            assert!(events.iter().any(|event| event.token() == Token(7) && event.is_readable()), "{command}");
            assert!(monitor.drain().unwrap());
        }
        poll.registry().deregister(&mut monitor).unwrap();
    });
}

/// Runs `work` on a thread without these capabilities, in the caller's network namespace.
fn without<T: Send>(capabilities: &[Capability], work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            for &capability in capabilities {
                caps::drop(None, CapSet::Effective, capability).expect("cannot drop a capability");
            }
            work()
        });
        worker.join().unwrap_or_else(|cause| std::panic::resume_unwind(cause))
    })
}

fn features_without(capabilities: &[Capability]) -> HostFeatures {
    without(capabilities, || HostFeatures::probe().unwrap())
}

/// All of this thread's capabilities except those that the documentation tells users to grant.
fn needless(features: &HostFeatures) -> Vec<Capability> {
    let needed = [Capability::CAP_BPF, Capability::CAP_PERFMON, Capability::CAP_NET_ADMIN];
    features.effective_caps.iter().copied().filter(|capability| !needed.contains(capability)).collect()
}

#[test]
fn netns_the_probe_reports_what_capabilities_allow() {
    in_new_netns(|| {
        use Capability::{CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON, CAP_SYS_ADMIN};
        let full = features_without(&[]);
        assert_eq!(full.load, Ok(()), "this test probes for TC programs: run it as root");
        assert_eq!(full.redirect_neigh, Some(true));
        assert_eq!(tc_ebpf_support(&full), Ok(()));

        // CAP_SYS_ADMIN replaces the other two, and they replace it.
        for spare in [vec![CAP_SYS_ADMIN], vec![CAP_BPF, CAP_PERFMON]] {
            assert_eq!(tc_ebpf_support(&features_without(&spare)), Ok(()), "without {spare:?}");
        }
        assert_eq!(tc_ebpf_support(&features_without(&needless(&full))), Ok(()));

        for (lost, named) in [
            (vec![CAP_BPF, CAP_SYS_ADMIN], "CAP_BPF is missing"),
            (vec![CAP_NET_ADMIN, CAP_SYS_ADMIN], "CAP_NET_ADMIN is missing"),
        ] {
            let poor = features_without(&lost);
            assert_eq!(poor.load, Err(Errno::EPERM), "{lost:?}");
            let obstacle = tc_ebpf_support(&poor).unwrap_err();
            assert!(matches!(&obstacle, TcUnsupported::Privilege(what) if what.starts_with(named)), "{obstacle:?}");
        }
    });
}

/// Loads the real program and attaches it to both ends of the cable, on a thread without these capabilities.
fn load_and_attach_without(capabilities: &[Capability]) -> anyhow::Result<()> {
    // A different end each time: a command that another test starts may hold the claim for a moment.
    let [eth0, eth1] = ["eth0", "eth1"].map(|name| LinkRef { index: link(name).index, name: name.into() });
    without(capabilities, || {
        let datapath = KernelDatapath::new(&MapLimits {
            max_listeners: 4,
            max_downstreams: 64,
            max_sources: 64,
            max_senders: 1_024,
        })?;
        let attachment = Attachment::replacing(&[], datapath.program(), &eth0, AttachMode::Clsact)?;
        assert!(attachment.in_place());
        attachment.detach()?;
        if programs::has_tcx() {
            let attachment = Attachment::replacing(&[], datapath.program(), &eth1, AttachMode::Tcx(TcxOrder::First))?;
            assert!(attachment.in_place() && attachment.preceding_programs()?.is_empty());
            attachment.detach()?;
        }
        Ok(())
    })
}

#[test]
fn netns_the_program_needs_the_documented_capabilities_and_no_others() {
    in_new_netns(|| {
        cable();
        let needless = needless(&features_without(&[]));
        load_and_attach_without(&needless).expect("the documented capabilities are not enough");
        for needed in [Capability::CAP_BPF, Capability::CAP_PERFMON, Capability::CAP_NET_ADMIN] {
            let lost = [needless.as_slice(), &[needed]].concat();
            assert!(load_and_attach_without(&lost).is_err(), "{needed} is not needed after all");
        }
    });
}
