//! Receivers where network plugins put them: behind a bridge on the host, and on another host behind a VXLAN.

use super::counters::{PacketCounts, check_counters, start};
use udp_fanout_lab::netns::{End, connect};
use udp_fanout_lab::{Collectors, DaemonConfig, Expect, Lab, Namespace, Place, Sender};

/// Sends `count` datagrams of this size to receivers at these addresses through the daemon and checks the shares.
fn exchange(lab: &Lab, receivers: &[(String, &Namespace)], payload: usize, segments: u16, count: u64) {
    let places = receivers.iter().map(|(address, inside)| (address.as_str(), *inside, address.parse().unwrap()));
    let collectors = Collectors::start_at(places, Expect::OneOfThem).unwrap();
    let mut sender = Sender::in_lab(lab).unwrap().payload(payload).segments(segments);
    sender.send(count, &collectors).unwrap();
    let report = collectors.finish(&[&sender]).unwrap();
    assert!(report.is_complete(), "{payload} bytes: {report}");
    assert_eq!(report.counts(), vec![count / receivers.len() as u64; receivers.len()], "{payload} bytes: {report}");
}

fn config(lab: &Lab, receivers: &[(String, &Namespace)]) -> DaemonConfig {
    let mut config = DaemonConfig::for_lab(lab, "tc_ebpf");
    config.listeners[0].downstreams =
        receivers.iter().map(|(address, _)| (address.clone(), address.parse().unwrap(), 1)).collect();
    config
}

#[test]
fn netns_pods_behind_a_bridge_on_the_host() {
    for ip_forward in [false, true] {
        let lab = Lab::builder().ip_forward(ip_forward).build().unwrap();
        lab.gateway
            .ip_batch("link add cni0 type bridge stp_state 0\naddress add 10.88.0.1/16 dev cni0\nlink set cni0 up\n")
            .unwrap();
        let pods: Vec<Namespace> = (2..5)
            .map(|n| {
                let pod = Namespace::create("bridged").unwrap();
                let device = format!("veth{n}");
                connect(
                    End { namespace: &lab.gateway, device: &device, addresses: "" },
                    End { namespace: &pod, device: "eth0", addresses: &format!("10.88.0.{n}/16") },
                )
                .unwrap();
                lab.gateway.ip(&format!("link set {device} master cni0")).unwrap();
                pod.ip("route add default via 10.88.0.1").unwrap();
                pod
            })
            .collect();
        udp_fanout_lab::topology::wait_for_bridge(&lab.gateway).unwrap();
        let receivers: Vec<_> = (2..5).zip(&pods).map(|(n, pod)| (format!("10.88.0.{n}:5514"), pod)).collect();
        let daemon = start(&lab, &config(&lab, &receivers));
        exchange(&lab, &receivers, 100, 1, 900);
        exchange(&lab, &receivers, 400, 10, 900);
        check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(1_800)), PacketCounts::NOTHING);
    }
}

#[test]
fn netns_pods_on_other_hosts_behind_a_vxlan() {
    for ip_forward in [false, true] {
        let lab = Lab::builder().receivers([Place::OtherInterface; 2]).ip_forward(ip_forward).build().unwrap();
        let mut receivers = Vec::new();
        for (n, site) in lab.sites.iter().enumerate() {
            let other = lab.namespace_of(site);
            let (near, far) = (format!("10.0.{}.1", n + 10), format!("10.0.{}.2", n + 10));
            for (namespace, local, remote, device, host) in
                [(&lab.gateway, &near, &far, format!("out{}", n + 1), 1), (other, &far, &near, "eth0".into(), 2)]
            {
                let vxlan = format!("vxlan{n}");
                namespace
                    .ip_batch(&format!(
                        "link add {vxlan} type vxlan id {n} local {local} remote {remote} dstport 4789 dev {device}\n\
                         address add 10.42.{n}.{host}/24 dev {vxlan}\n\
                         link set {vxlan} up\n"
                    ))
                    .unwrap();
            }
            // The sender's network is behind the link, not behind the VXLAN through which its datagrams come.
            other.sysctl("net.ipv4.conf.all.rp_filter", "2").unwrap();
            receivers.push((format!("10.42.{n}.2:5514"), other));
        }
        let daemon = start(&lab, &config(&lab, &receivers));
        exchange(&lab, &receivers, 100, 1, 800);
        exchange(&lab, &receivers, 400, 10, 800);
        // The longest that a VXLAN over a link with an MTU of 1,500 carries, and the shortest that is fragmented.
        exchange(&lab, &receivers, 1_422, 1, 200);
        exchange(&lab, &receivers, 1_423, 1, 200);
        let kernel = PacketCounts { received: 2_000, forwarded: 1_800, dropped: 0, passed: 200 };
        check_counters(&daemon, &lab.gateway, Some(kernel), PacketCounts::forwarded(200));
    }
}
