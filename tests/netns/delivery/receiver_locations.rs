//! Receivers in every location, in every mode.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use super::counters::{PacketCounts, check_counters, check_downstream_counters, filters, start};
use udp_fanout_lab::INGRESS;
use udp_fanout_lab::{Collectors, DaemonConfig, Expect, Lab, LabBuilder, Place, Report, Sender};

/// Datagrams of each run: a multiple of every table's length in this file.
const COUNT: u64 = 1_500;

/// The datapath that forwarded, as the counters must show it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ForwardedBy {
    Kernel,
    Socket,
}

/// Runs the daemon in this mode and sends [`COUNT`] datagrams through it. Checks that each arrived once, the shares,
/// the source, the counters, and that nothing is left behind.
fn deliver(lab: &Lab, mode: &str, by: ForwardedBy) {
    let mut daemon = start(lab, &DaemonConfig::for_lab(lab, mode));
    if by == ForwardedBy::Kernel {
        // The wording and the order of fields that the documentation quotes.
        for said in [
            "updated tc_ebpf downstream set listener_id=0 endpoints=",
            "attached TC eBPF program to ingress interface=\"eth0\"",
        ] {
            daemon.wait_for_logged(&format!("INFO {said}")).unwrap();
        }
    }
    let collectors = Collectors::start(lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::in_lab(lab).unwrap();
    sender.send(COUNT, &collectors).unwrap();
    let report = collectors.finish(&[&sender]).unwrap();
    // Several workers may overtake each other; one CPU in the kernel cannot.
    assert!(if by == ForwardedBy::Kernel { report.is_perfect() } else { report.is_complete() }, "{mode}: {report}");
    assert_eq!(report.counts(), vec![COUNT / lab.sites.len() as u64; lab.sites.len()], "{mode}: {report}");
    match by {
        ForwardedBy::Kernel => {
            assert_eq!(sources(&report), BTreeSet::from([sender.address().unwrap()]), "{mode}: {report}");
            check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(COUNT)), PacketCounts::NOTHING);
        }
        ForwardedBy::Socket => {
            let gateway: BTreeSet<IpAddr> = lab.gateway_addresses().unwrap().into_iter().collect();
            let seen: BTreeSet<IpAddr> = sources(&report).iter().map(SocketAddr::ip).collect();
            assert!(seen.is_subset(&gateway), "{mode}: {report}");
            check_counters(&daemon, &lab.gateway, None, PacketCounts::forwarded(COUNT));
        }
    }
    check_downstream_counters(&daemon, &lab.gateway, &report);
    let (status, _, log) = daemon.stop().unwrap();
    assert!(status.success(), "{mode}: {status}\n{log}");
    assert!(filters(&lab.gateway, INGRESS).is_empty());
}

fn sources(report: &Report) -> BTreeSet<SocketAddr> {
    report.receivers.iter().flat_map(|receiver| receiver.sources.iter().copied()).collect()
}

/// Each mode, on a gateway that does not forward by itself and on one that does.
fn deliver_in_every_mode(builder: &LabBuilder) {
    for (ip_forward, rp_filter) in [(false, 1), (true, 1)] {
        let lab = builder.clone().ip_forward(ip_forward).rp_filter(rp_filter).build().unwrap();
        deliver(&lab, "tc_ebpf", ForwardedBy::Kernel);
        deliver(&lab, "userspace", ForwardedBy::Socket);
        deliver(&lab, "auto", ForwardedBy::Kernel);
    }
}

fn three(place: Place) -> LabBuilder {
    Lab::builder().receivers([place; 3])
}

#[test]
fn netns_receivers_behind_other_interfaces() {
    deliver_in_every_mode(&three(Place::OtherInterface));
}

#[test]
fn netns_receivers_on_the_senders_interface() {
    deliver_in_every_mode(&three(Place::SameInterface));
}

#[test]
fn netns_receivers_behind_routers() {
    deliver_in_every_mode(&three(Place::BehindRouter));
}

#[test]
fn netns_receivers_in_local_pods() {
    deliver_in_every_mode(&three(Place::Pod));
}

#[test]
fn netns_receivers_on_the_host_itself() {
    deliver_in_every_mode(&three(Place::GatewayHost));
}

#[test]
fn netns_receivers_in_all_places_at_once() {
    deliver_in_every_mode(&Lab::builder().receivers(Place::ALL));
}

#[test]
fn netns_receivers_on_ports_other_than_the_listeners() {
    deliver_in_every_mode(&Lab::builder().receivers(Place::ALL).port(9_000));
}

#[test]
fn netns_receivers_in_all_places_over_ipv6() {
    deliver_in_every_mode(&Lab::builder().receivers(Place::ALL).ipv6(true));
    deliver_in_every_mode(&Lab::builder().receivers(Place::ALL).ipv6(true).port(9_000));
}
