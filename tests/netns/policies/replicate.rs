//! One copy for every downstream, wherever it is.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::{MODES, forwarded, start, stop};
use udp_fanout_lab::Site;
use udp_fanout_lab::traffic::{PATIENCE, bind};
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Place, Report, Sender};

const REPLICATE: &str = "policy = \"replicate\"";

fn config(lab: &Lab, mode: &str) -> DaemonConfig {
    DaemonConfig::for_lab(lab, mode).extra(REPLICATE)
}

/// Collectors at these sites, each of which must get everything.
fn collect(lab: &Lab, sites: &[Site]) -> Collectors {
    let places = sites.iter().map(|site| (site.name.as_str(), lab.namespace_of(site), site.address));
    Collectors::start_at(places, Expect::EachOfThem).unwrap()
}

/// Makes sender and gateway forget every neighbour.
fn forget_neighbours(lab: &Lab) {
    for namespace in [&lab.sender, &lab.gateway] {
        namespace.ip("neigh flush all").unwrap();
    }
}

fn send(lab: &Lab, collectors: Collectors, count: u64) -> Report {
    let mut sender = Sender::in_lab(lab).unwrap();
    sender.send(count, &collectors).unwrap();
    let report = collectors.finish(&[&sender]).unwrap();
    assert_eq!(report.sent, count);
    report
}

fn copies_dropped(lab: &Lab, daemon: &Daemon, labels: &[(&str, &str)]) -> u64 {
    daemon.metrics(&lab.gateway).unwrap().sum("udp_fanout_copies_dropped_total", labels)
}

#[test]
fn netns_everyone_everywhere_gets_each_datagram_once() {
    for ip_forward in [false, true] {
        let lab = Lab::builder().receivers(Place::ALL).ip_forward(ip_forward).build().unwrap();
        for mode in MODES {
            let daemon = start(&lab, &config(&lab, mode));
            let report = send(&lab, collect(&lab, &lab.sites), 2_000);
            assert!(report.is_complete(), "{mode}, ip_forward={ip_forward}: {report}");
            assert_eq!(report.counts(), [2_000; 5]);
            if mode == "tc_ebpf" {
                for receiver in &report.receivers {
                    assert!(receiver.sources.iter().all(|source| source.ip() == Lab::SENDER), "{report}");
                }
            }
            assert_eq!(forwarded(&lab, &daemon, mode), 2_000);
            assert_eq!(copies_dropped(&lab, &daemon, &[]), 0);
            let metrics = daemon.metrics(&lab.gateway).unwrap();
            assert_eq!(metrics.sum("udp_fanout_downstream_packets_total", &[]), 10_000);
            stop(daemon);
        }
    }
}

#[test]
fn netns_order_is_kept_for_everyone() {
    for ip_forward in [false, true] {
        let lab = Lab::builder().receivers(Place::ALL).ip_forward(ip_forward).build().unwrap();
        for mode in MODES {
            let daemon = start(&lab, &config(&lab, mode));
            // Neighbours are resolved meanwhile, so one datagram may overtake another.
            assert!(send(&lab, collect(&lab, &lab.sites), 50).is_complete());
            let report = send(&lab, collect(&lab, &lab.sites), 2_000);
            assert!(report.is_perfect(), "{mode}, ip_forward={ip_forward}: {report}");
            stop(daemon);
        }
    }
}

#[test]
fn netns_nothing_is_lost_while_neighbours_are_looked_for() {
    for ip_forward in [false, true] {
        let lab = Lab::builder().receivers(Place::ALL).ip_forward(ip_forward).build().unwrap();
        for mode in MODES {
            let daemon = start(&lab, &config(&lab, mode));
            for count in [1, 1, 2, 5, 30, 200] {
                forget_neighbours(&lab);
                let report = send(&lab, collect(&lab, &lab.sites), count);
                assert!(report.is_complete(), "{mode}, ip_forward={ip_forward}, {count} datagrams: {report}");
            }
            stop(daemon);
        }
    }
}

#[test]
fn netns_from_one_receiver_to_eight() {
    let places = [&Place::ALL[..], &Place::ALL[..3]].concat();
    let lab = Lab::builder().receivers(places).build().unwrap();
    for mode in MODES {
        for count in 1..=8 {
            let mut config = config(&lab, mode);
            config.listeners[0].downstreams.truncate(count);
            let daemon = start(&lab, &config);
            forget_neighbours(&lab);
            let report = send(&lab, collect(&lab, &lab.sites[..count]), 500);
            assert!(report.is_complete(), "{mode}, {count} receivers: {report}");
            assert_eq!(forwarded(&lab, &daemon, mode), 500);
            stop(daemon);
        }
    }
}

#[test]
fn netns_every_size_that_fits_and_many_in_one_piece() {
    let lab = Lab::builder().receivers(Place::ALL).build().unwrap();
    for mode in MODES {
        let daemon = start(&lab, &config(&lab, mode));
        for payload in [20, 1_000, 1_472] {
            let collectors = collect(&lab, &lab.sites);
            let mut sender = Sender::in_lab(&lab).unwrap().payload(payload);
            sender.send(300, &collectors).unwrap();
            let report = collectors.finish(&[&sender]).unwrap();
            assert!(report.is_complete(), "{mode}, {payload} bytes: {report}");
        }
        let collectors = collect(&lab, &lab.sites);
        let mut sender = Sender::in_lab(&lab).unwrap().payload(200).segments(10).window(40);
        sender.send(500, &collectors).unwrap();
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_complete(), "{mode}, super-packets of ten: {report}");
        stop(daemon);
    }
}

/// Adds a downstream at an address that no host has.
fn with_unreachable(mut config: DaemonConfig, address: &str) -> DaemonConfig {
    let unreachable: SocketAddr = address.parse().unwrap();
    config.listeners[0].downstreams.insert(1, ("nobody".into(), unreachable, 1));
    config
}

#[test]
fn netns_a_receiver_without_a_route_costs_exactly_its_own_copies() {
    for ip_forward in [false, true] {
        let lab = Lab::builder().receivers(Place::ALL).ip_forward(ip_forward).build().unwrap();
        for (mode, reason) in [("tc_ebpf", "no_route"), ("userspace", "unreachable")] {
            let daemon = start(&lab, &with_unreachable(config(&lab, mode), "203.0.113.1:514"));
            let report = send(&lab, collect(&lab, &lab.sites), 1_000);
            assert!(report.is_complete(), "{mode}, ip_forward={ip_forward}: {report}");
            assert_eq!(forwarded(&lab, &daemon, mode), 1_000);
            assert_eq!(copies_dropped(&lab, &daemon, &[("mode", mode), ("reason", reason)]), 1_000);
            assert_eq!(copies_dropped(&lab, &daemon, &[]), 1_000);
            stop(daemon);
        }
    }
}

#[test]
fn netns_a_receiver_that_does_not_answer_costs_no_other_receiver_anything() {
    for ip_forward in [false, true] {
        let lab = Lab::builder().receivers(Place::ALL).ip_forward(ip_forward).build().unwrap();
        for mode in MODES {
            // On the first receiver's network, where no host has this address.
            let daemon = start(&lab, &with_unreachable(config(&lab, mode), "10.0.10.77:514"));
            for count in [1, 50, 500] {
                forget_neighbours(&lab);
                let report = send(&lab, collect(&lab, &lab.sites), count);
                assert!(report.is_complete(), "{mode}, ip_forward={ip_forward}, {count} datagrams: {report}");
            }
            assert_eq!(forwarded(&lab, &daemon, mode), 551);
            stop(daemon);
        }
    }
}

#[test]
fn netns_a_sample_is_of_the_size_asked_for() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod, Place::BehindRouter]).build().unwrap();
    for mode in MODES {
        let mut config = config(&lab, mode);
        config.listeners[0].samples = vec![(lab.sites[1].name.clone(), 0.1)];
        let daemon = start(&lab, &config);
        let sampler = bind(lab.namespace_of(&lab.sites[1]), lab.sites[1].address).unwrap();
        sampler.set_nonblocking(true).unwrap();
        let mut sampled = 0u64;
        let mut drain = || {
            while sampler.recv(&mut [0; 200]).is_ok() {
                sampled += 1;
            }
            sampled
        };
        let full = [&lab.sites[0], &lab.sites[2]].map(|site| (&*site.name, lab.namespace_of(site), site.address));
        let collectors = Collectors::start_at(full, Expect::EachOfThem).unwrap();
        let mut sender = Sender::in_lab(&lab).unwrap();
        for _ in 0..50 {
            sender.send(100, &collectors).unwrap();
            drain();
        }
        let report = collectors.finish(&[&sender]).unwrap();
        assert!(report.is_complete(), "{mode}: {report}");
        let endpoint = lab.sites[1].address.to_string();
        let counted = daemon.metrics(&lab.gateway).unwrap();
        let counted = counted.sum("udp_fanout_downstream_packets_total", &[("endpoint", &endpoint)]);
        let start = Instant::now();
        while drain() < counted {
            assert!(start.elapsed() < PATIENCE + Duration::from_secs(10), "{mode}: {} of {counted} came", drain());
        }
        assert_eq!(drain(), counted, "{mode}");
        // 500 expected; the standard deviation is 21.2, and one in half a million runs is more than five of them away.
        assert!((394..=606).contains(&counted), "{mode}: {counted} of 5000");
        assert_eq!((forwarded(&lab, &daemon, mode), copies_dropped(&lab, &daemon, &[])), (5_000, 0));
        stop(daemon);
    }
}
