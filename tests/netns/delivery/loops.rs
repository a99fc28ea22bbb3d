//! Two hosts that run the daemon and have each other as receiver, on the listener's own port: a datagram goes back and
//! forth until its TTL expires, and is counted then.

use std::time::{Duration, Instant};

use super::counters::{binary, start};
use udp_fanout_lab::Site;
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Namespace, Place, Sender};

/// How long a datagram's last hop may take. Only a failing test waits that long.
const LIMIT: Duration = Duration::from_secs(20);

/// The sum of both daemons' counters over all modes; what the kernel program passes to the socket is counted once.
#[derive(Debug, Default, PartialEq, Eq)]
struct Sum {
    received: u64,
    forwarded: u64,
    expired: u64,
    dropped: u64,
}

fn sum(daemons: [(&Daemon, &Namespace); 2]) -> Sum {
    let mut sum = Sum::default();
    for (daemon, namespace) in daemons {
        let page = daemon.metrics(namespace).unwrap();
        let of = |what: &str, labels: &[(&str, &str)]| page.sum(&format!("udp_fanout_packets_{what}_total"), labels);
        sum.received += of("received", &[]) - of("passed", &[]);
        sum.forwarded += of("forwarded", &[]);
        sum.expired += of("dropped", &[("reason", "ttl_expired")]);
        sum.dropped += of("dropped", &[]);
    }
    sum
}

/// The second host: a receiver's namespace, whose daemon has the gateway's listener as its receiver.
fn second(lab: &Lab, site: &Site, mode: &str) -> DaemonConfig {
    let mut config = DaemonConfig::for_lab(lab, mode);
    config.listeners[0].bind = site.address.to_string();
    config.listeners[0].interface = (mode != "userspace").then(|| "eth0".to_owned());
    config.listeners[0].downstreams = vec![("back".into(), lab.listener(), 1)];
    config
}

/// Sends datagrams of this size into the loop and waits until all of them have expired.
fn run_loop(mode: &str, ipv6: bool, payload: usize, count: u64) {
    let lab = Lab::builder().receiver(Place::SameInterface).ipv6(ipv6).build().unwrap();
    let site = &lab.sites[0];
    let there = lab.namespace_of(site);
    let first = start(&lab, &DaemonConfig::for_lab(&lab, mode));
    let second = Daemon::start(there, binary(), &second(&lab, site, mode)).unwrap();
    let mut sender = Sender::in_lab(&lab).unwrap().payload(payload);
    let no_receivers = Collectors::start_at([], Expect::OneOfThem).unwrap();
    sender.burst(count, &no_receivers).unwrap();
    // Linux sends with a TTL of 64, and each host decrements it.
    let expected = Sum { received: 64 * count, forwarded: 63 * count, expired: count, dropped: count };
    let deadline = Instant::now() + LIMIT;
    loop {
        let seen = sum([(&first, &lab.gateway), (&second, there)]);
        if seen == expected {
            break;
        }
        assert!(Instant::now() < deadline, "{mode} {payload} bytes: {seen:?}, not {expected:?}");
    }
    for daemon in [first, second] {
        daemon.stop().unwrap();
    }
}

#[test]
fn netns_a_loop_through_two_kernel_programs_ends() {
    for ipv6 in [false, true] {
        run_loop("tc_ebpf", ipv6, 100, 20);
    }
}

#[test]
fn netns_a_loop_of_fragments_through_two_kernel_programs_ends() {
    for ipv6 in [false, true] {
        run_loop("tc_ebpf", ipv6, 4_000, 20);
    }
}
