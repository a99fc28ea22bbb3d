//! Admission: allowed senders and rate limits, for datagrams from outside, those that the kernel program passes to the
//! socket, and those of the host itself, in both modes.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::{MODES, start, stop};
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Place, Sender};

/// How long the daemon may take to count what it has dropped. Only a failing test waits that long.
const LIMIT: Duration = Duration::from_secs(10);
/// The wait for datagrams that must not arrive.
const EXPECT_NOTHING: Duration = Duration::from_millis(1);

/// Another address of the sender's host.
fn second_address(lab: &Lab, ipv6: bool) -> IpAddr {
    let (address, bits) = if ipv6 { ("fd00::3", 64) } else { ("10.0.0.3", 24) };
    lab.sender.ip(&format!("address add {address}/{bits} dev eth0")).unwrap();
    address.parse().unwrap()
}

/// The listener's drops for this reason, by mode, once it has received `received` datagrams in all. Those that the
/// kernel program passes to the socket are counted once.
fn dropped(lab: &Lab, daemon: &Daemon, reason: &str, received: u64) -> (u64, u64) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let page = daemon.metrics(&lab.gateway).unwrap();
        let sum = |name: &str, labels: &[(&str, &str)]| page.sum(&format!("udp_fanout_packets_{name}_total"), labels);
        let seen = sum("received", &[]) - sum("passed", &[]);
        if seen == received {
            assert_eq!(sum("dropped", &[]), sum("dropped", &[("reason", reason)]), "for other reasons too");
            let of = |mode| sum("dropped", &[("mode", mode), ("reason", reason)]);
            return (of("tc_ebpf"), of("userspace"));
        }
        assert!(Instant::now() < deadline && seen < received, "{seen} of {received} datagrams are counted");
    }
}

#[test]
fn netns_only_those_who_may_send_are_forwarded_for() {
    for (mode, ipv6) in MODES.iter().flat_map(|mode| [(mode, false), (mode, true)]) {
        let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).ipv6(ipv6).build().unwrap();
        let second = second_address(&lab, ipv6);
        let (network, wrong) = if ipv6 { ("fd00::/16", "fd00::3/128") } else { ("10.0.0.0/8", "10.0.0.3") };
        let rules = format!("sources = {{ allow = \"{network}\", deny = [\"{wrong}\"] }}");
        let daemon = start(&lab, &DaemonConfig::for_lab(&lab, mode).extra(&rules));
        let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
        let mut denied = Sender::open(&lab.sender, (second, 0), lab.listener()).unwrap();
        denied.burst(100, &collectors).unwrap();
        let mut allowed = Sender::in_lab(&lab).unwrap().window(250);
        allowed.send(200, &collectors).unwrap();
        // Also fragmented datagrams, which only the socket sees whole.
        let mut long = Sender::open(&lab.sender, (second, 0), lab.listener()).unwrap().payload(4_000);
        long.burst(10, &collectors).unwrap();
        // Also from the gateway itself, which only the socket sees.
        let mut host = Sender::open(&lab.gateway, (lab.listener().ip(), 0), lab.listener()).unwrap().window(150);
        host.send(20, &collectors).unwrap();
        let (kernel, user) = dropped(&lab, &daemon, "source_denied", 330);
        assert_eq!(kernel + user, 110, "{mode}");
        assert_eq!(kernel >= 100, *mode == "tc_ebpf");
        let report = collectors.finish(&[&allowed, &host]).unwrap();
        assert_eq!((report.lost, report.duplicated, report.unexpected), (0, 0, 0), "{mode}: {report}");
        assert_eq!(report.receivers.iter().map(|receiver| receiver.received).sum::<u64>(), 220);
        stop(daemon);
    }
}

#[test]
fn netns_the_host_itself_may_be_denied() {
    let lab = Lab::builder().receivers([Place::OtherInterface]).build().unwrap();
    for mode in MODES {
        let daemon = start(&lab, &DaemonConfig::for_lab(&lab, mode).extra("sources.deny = \"10.0.0.1\""));
        let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
        let mut host = Sender::open(&lab.gateway, (Lab::GATEWAY, 0), lab.listener()).unwrap();
        host.burst(50, &collectors).unwrap();
        assert_eq!(dropped(&lab, &daemon, "source_denied", 50), (0, 50));
        stop(daemon);
    }
}

/// Sends a burst. Returns how many of its datagrams were forwarded, and how long that took.
fn flood(lab: &Lab, daemon: &Daemon, from: SocketAddr, before: u64) -> (u64, Duration) {
    let collectors = Collectors::start(lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::open(&lab.sender, from, lab.listener()).unwrap().patience(EXPECT_NOTHING);
    let begun = Instant::now();
    sender.burst(200, &collectors).unwrap();
    dropped(lab, daemon, "rate_limited", before + 200);
    let took = begun.elapsed();
    let report = collectors.finish(&[&sender]).unwrap();
    assert_eq!((report.duplicated, report.unexpected), (0, 0), "{report}");
    (report.counts().iter().sum(), took)
}

#[test]
fn netns_each_sender_gets_its_rate_and_no_more() {
    for (mode, ipv6) in MODES.iter().flat_map(|mode| [(mode, false), (mode, true)]) {
        let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).ipv6(ipv6).build().unwrap();
        let second = second_address(&lab, ipv6);
        let limit = "rate_limit = { packets_per_second = 5, burst = 30, ipv4_prefix = 32, ipv6_prefix = 128 }";
        let daemon = start(&lab, &DaemonConfig::for_lab(&lab, mode).extra(limit));
        let mut before = 0;
        for from in [lab.sender_address(), second] {
            let (passed, took) = flood(&lab, &daemon, (from, 0).into(), before);
            before += 200;
            let most = 30 + 5 * (took.as_secs() + 1);
            assert!((30..=most).contains(&passed), "{mode}: {passed} of 200 in {took:?}");
        }
        stop(daemon);
    }
}

#[test]
fn netns_senders_of_one_network_share_their_rate() {
    let lab = Lab::builder().receivers([Place::OtherInterface]).build().unwrap();
    let second = second_address(&lab, false);
    for mode in MODES {
        let limit = "rate_limit = { packets_per_second = 1, burst = 30, ipv4_prefix = 24 }";
        let daemon = start(&lab, &DaemonConfig::for_lab(&lab, mode).extra(limit));
        let begun = Instant::now();
        let (first, _) = flood(&lab, &daemon, (Lab::SENDER, 0).into(), 0);
        let (second, _) = flood(&lab, &daemon, (second, 0).into(), 200);
        let most = 31 + begun.elapsed().as_secs();
        assert!((30..=most).contains(&(first + second)), "{mode}: {first} and {second}");
        stop(daemon);
    }
}

/// A datagram that the kernel program passes takes a token there and another one at the socket: neither lets through
/// more than the other.
#[test]
fn netns_what_goes_through_the_socket_has_no_rate_of_its_own() {
    let lab = Lab::builder().receivers([Place::GatewayHost]).build().unwrap();
    let mut config =
        DaemonConfig::for_lab(&lab, "tc_ebpf").extra("rate_limit = { packets_per_second = 1, burst = 40 }");
    // With a receiver on the loopback interface, everything needs the socket.
    config.listeners[0].downstreams.push(("nobody".into(), "127.0.0.1:9".parse().unwrap(), 1));
    let daemon = start(&lab, &config);
    let mut sender = Sender::in_lab(&lab).unwrap();
    let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
    let begun = Instant::now();
    sender.burst(200, &collectors).unwrap();
    let deadline = begun + LIMIT;
    let page = loop {
        let page = daemon.metrics(&lab.gateway).unwrap();
        let of = |what: &str, mode| page.sum(&format!("udp_fanout_packets_{what}_total"), &[("mode", mode)]);
        if of("received", "tc_ebpf") == 200 && of("received", "userspace") == of("passed", "tc_ebpf") {
            break page;
        }
        assert!(Instant::now() < deadline, "the counters are not complete");
    };
    let most = 41 + begun.elapsed().as_secs();
    let limited = |mode| page.sum("udp_fanout_packets_dropped_total", &[("mode", mode), ("reason", "rate_limited")]);
    let passed = 200 - limited("tc_ebpf");
    assert!((40..=most).contains(&passed), "{passed} passed");
    assert_eq!(limited("userspace"), 0);
    stop(daemon);
}
