//! VLAN devices as ingress and egress interfaces. Not every kernel has them (8021q), so `make test` skips these tests
//! and says so; `make test-kernels` runs them. `foreign` tests frames in VLANs without a device.

use std::net::{IpAddr, SocketAddr};

use super::counters::{PacketCounts, check_counters, check_downstream_counters, start};
use udp_fanout_lab::INGRESS;
use udp_fanout_lab::{Collectors, DaemonConfig, Expect, Lab, Namespace, Place, Sender};

/// Adds a VLAN device with these addresses to a device.
fn add_vlan(namespace: &Namespace, device: &str, id: u16, addresses: &[String]) {
    let mut lines = format!("link add link {device} name {device}.{id} type vlan id {id}\n");
    for address in addresses {
        lines += &format!("address add {address} dev {device}.{id}\n");
    }
    namespace.ip_batch(&format!("{lines}link set {device}.{id} up\n")).unwrap();
}

struct Vlans {
    lab: Lab,
    listener: SocketAddr,
    sender: IpAddr,
    receivers: [SocketAddr; 2],
}

/// The sender reaches the listener in VLAN 5; of the receivers, the second is behind VLAN 7.
fn vlans(ipv6: bool) -> Vlans {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::OtherInterface]).ipv6(ipv6).build().unwrap();
    for (namespace, device, id, host) in [
        (&lab.gateway, INGRESS, 5, 1),
        (&lab.sender, "eth0", 5, 2),
        (&lab.gateway, "out2", 7, 1),
        (lab.namespace_of(&lab.sites[1]), "eth0", 7, 2),
    ] {
        if ipv6 {
            for scope in ["all", "default"] {
                namespace.sysctl(&format!("net.ipv6.conf.{scope}.accept_dad"), "0").unwrap();
            }
        }
        let addresses = [format!("10.{id}.0.{host}/24"), format!("fd00:{id}::{host}/64")];
        add_vlan(namespace, device, id, &addresses[..if ipv6 { 2 } else { 1 }]);
    }
    // The route back to the sender is the forward path, as source validation requires.
    let inside = lab.namespace_of(&lab.sites[1]);
    inside.ip("route add 10.5.0.0/24 via 10.7.0.1").unwrap();
    if ipv6 {
        inside.ip("-6 route add fd00:5::/64 via fd00:7::1").unwrap();
    }
    let [listener, sender, receiver] = match ipv6 {
        true => ["[fd00:5::1]:5514", "[fd00:5::2]:0", "[fd00:7::2]:5514"],
        false => ["10.5.0.1:5514", "10.5.0.2:0", "10.7.0.2:5514"],
    }
    .map(|address| address.parse::<SocketAddr>().unwrap());
    let receivers = [lab.sites[0].address, receiver];
    Vlans { lab, listener, sender: sender.ip(), receivers }
}

/// The other network's receiver needs the route back as well.
fn add_return_route(lab: &Lab, ipv6: bool) {
    let inside = lab.namespace_of(&lab.sites[0]);
    inside.ip("route replace 10.5.0.0/24 via 10.0.10.1").unwrap();
    if ipv6 {
        inside.ip("-6 route replace fd00:5::/64 via fd00:0:0:a::1").unwrap();
    }
}

#[test]
#[ignore = "needs VLAN devices (8021q), which the kernels of make test-kernels have"]
fn netns_datagrams_in_a_vlan_are_taken_where_they_are_untagged_and_go_out_into_another() {
    for (ipv6, mode) in [(false, "tc_ebpf"), (false, "userspace"), (true, "tc_ebpf")] {
        let Vlans { lab, listener, sender, receivers } = vlans(ipv6);
        add_return_route(&lab, ipv6);
        let mut config = DaemonConfig::for_lab(&lab, mode);
        config.listeners[0].bind = listener.to_string();
        // Also on the parent device, which sees the same datagrams tagged and must pass them.
        config.listeners[0].interface = None;
        if mode == "tc_ebpf" {
            config.listeners[0].extra = format!("interface = [\"{INGRESS}\", \"{INGRESS}.5\"]");
        }
        for (downstream, address) in config.listeners[0].downstreams.iter_mut().zip(receivers) {
            downstream.1 = address;
        }
        let daemon = start(&lab, &config);
        let places = lab.sites.iter().zip(receivers);
        let places = places.map(|(site, address)| (site.name.as_str(), lab.namespace_of(site), address));
        let collectors = Collectors::start_at(places, Expect::OneOfThem).unwrap();
        let mut small = Sender::open(&lab.sender, (sender, 0), listener).unwrap();
        small.send(1_000, &collectors).unwrap();
        // The longest that fit into one packet, and longer ones.
        let mut full = Sender::open(&lab.sender, (sender, 0), listener).unwrap().payload(1_452);
        full.send(100, &collectors).unwrap();
        let mut long = Sender::open(&lab.sender, (sender, 0), listener).unwrap().payload(4_000);
        long.send(100, &collectors).unwrap();
        let report = collectors.finish(&[&small, &full, &long]).unwrap();
        assert!(report.is_complete(), "{mode} ipv6={ipv6}: {report}");
        assert_eq!(report.counts(), [600; 2], "{mode} ipv6={ipv6}");
        let kernel = (mode == "tc_ebpf").then_some(PacketCounts::forwarded(1_200));
        let user = if kernel.is_some() { PacketCounts::NOTHING } else { PacketCounts::forwarded(1_200) };
        check_counters(&daemon, &lab.gateway, kernel, user);
        check_downstream_counters(&daemon, &lab.gateway, &report);
        daemon.stop().unwrap();
    }
}
