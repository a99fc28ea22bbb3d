//! One list of cases, each run on every delivery path: by the kernel program as a filter, as a TCX program and as on an
//! old kernel, and by sockets alone. Every receiver gets the same on each.

use std::net::SocketAddr;
use std::path::Path;

use super::stop;
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Place, Sender, old_kernel};

/// A listener of its own in each daemon.
struct Case {
    name: &'static str,
    keys: &'static str,
    weights: [u32; 3],
    /// Bytes of each datagram.
    payload: usize,
    /// Datagrams in one super-packet of the sender.
    segments: u16,
    /// The number of sending sockets, each with its own port.
    senders: u16,
    /// The number of datagrams from each.
    count: u64,
}

const ROUND: Case =
    Case { name: "round", keys: "", weights: [1; 3], payload: 100, segments: 1, senders: 1, count: 300 };
const HASH: Case = Case { name: "hash", senders: 24, count: 6, ..ROUND };
const REPLICATE: &str = "policy = \"replicate\"";

fn cases() -> Vec<Case> {
    vec![
        ROUND,
        Case { name: "weights", weights: [1, 2, 3], ..ROUND },
        Case { name: "shortest", payload: 20, ..ROUND },
        // The longest that fits the egress MTU (IPv6, then IPv4), one byte more, and many fragments.
        Case { name: "fits-v6", payload: 1_452, ..ROUND },
        Case { name: "fits-v4", payload: 1_472, ..ROUND },
        Case { name: "too-long", payload: 1_473, count: 60, ..ROUND },
        Case { name: "fragments", payload: 8_000, count: 60, ..ROUND },
        Case { name: "many-fragments", payload: 40_000, count: 30, ..ROUND },
        // As many segments as one round robin has turns.
        Case { name: "joined", payload: 200, segments: 20, count: 1_200, ..ROUND },
        Case { keys: "policy = \"hash\"", name: "hash-source-ip", ..HASH },
        Case { keys: "policy = \"hash\"\nhash_on = \"source\"", name: "hash-source", ..HASH },
        Case { keys: "policy = \"hash\"\nhash_on = \"flow\"", name: "hash-flow", ..HASH },
        Case { keys: "policy = \"hash\"\nhash_on = \"source\"", name: "hash-weights", weights: [6, 1, 2], ..HASH },
        Case { keys: "protocol = \"netflow\"", name: "netflow", ..HASH },
        Case { keys: REPLICATE, name: "replicate", ..ROUND },
        Case { keys: REPLICATE, name: "replicate-fragments", payload: 4_000, count: 60, ..ROUND },
        Case { keys: REPLICATE, name: "replicate-joined", payload: 200, segments: 10, ..ROUND },
        Case { keys: "sources = { allow = \"NEAR\" }", name: "allowed", ..ROUND },
        Case { keys: "rate_limit = { packets_per_second = 5000000 }", name: "limited", ..ROUND },
    ]
}

/// Mode, the first lines of the configuration, and whether the daemon detects an old kernel.
const MODES: [(&str, &str, bool); 4] = [
    ("tc_ebpf", "attach = \"clsact\"", false),
    ("tc_ebpf", "attach = \"auto\"", false),
    ("tc_ebpf", "", true),
    ("userspace", "", false),
];

fn port(number: usize) -> u16 {
    6_000 + u16::try_from(number).unwrap()
}

fn config(lab: &Lab, mode: &str, head: &str) -> DaemonConfig {
    let mut config = DaemonConfig::for_lab(lab, mode).settings("workers = 1");
    config.head = head.to_owned();
    let base = config.listeners.remove(0);
    for (number, case) in cases().iter().enumerate() {
        let mut listener = base.clone();
        listener.name = case.name.to_owned();
        listener.bind = SocketAddr::new(lab.listener().ip(), port(number)).to_string();
        let near = if lab.listener().is_ipv4() { "10.0.0.0/8" } else { "fd00::/16" };
        listener.extra = case.keys.replace("NEAR", near);
        for (downstream, weight) in listener.downstreams.iter_mut().zip(case.weights) {
            downstream.2 = weight;
        }
        config.listeners.push(listener);
    }
    config
}

/// What each receiver got from each sender. All datagrams must arrive once.
fn run(lab: &Lab, number: usize, case: &Case) -> Vec<Vec<u64>> {
    let expect = if case.keys == REPLICATE { Expect::EachOfThem } else { Expect::OneOfThem };
    let collectors = Collectors::start(lab, expect).unwrap();
    let target = SocketAddr::new(lab.listener().ip(), port(number));
    let open = |sender: u16| {
        let source = SocketAddr::new(lab.sender_address(), 30_000 + sender);
        Sender::open(&lab.sender, source, target).unwrap().payload(case.payload).segments(case.segments)
    };
    let mut senders: Vec<Sender> = (0..case.senders).map(open).collect();
    for sender in &mut senders {
        sender.send(case.count, &collectors).unwrap();
    }
    let report = collectors.finish(&senders.iter().collect::<Vec<_>>()).unwrap();
    assert!(report.is_complete(), "{}: {report}", case.name);
    senders.iter().map(|sender| report.counts_of(sender.run_id())).collect()
}

/// Checks that the counters of all datapaths agree with what has arrived. Workers count batches a
/// moment after they have arrived, so this waits.
fn check_counters(lab: &Lab, daemon: &Daemon, case: &Case, got: &[Vec<u64>]) {
    let deadline = std::time::Instant::now() + udp_fanout_lab::traffic::PATIENCE;
    let sent = u64::from(case.senders) * case.count;
    loop {
        let page = daemon.metrics(&lab.gateway).unwrap();
        let sum = |name: &str| page.sum(name, &[("listener", case.name)]);
        let forwarded = sum("udp_fanout_packets_forwarded_total");
        if forwarded < sent && std::time::Instant::now() < deadline {
            continue;
        }
        let counted = (forwarded, sum("udp_fanout_packets_dropped_total"), sum("udp_fanout_copies_dropped_total"));
        assert_eq!(counted, (sent, 0, 0), "{}", case.name);
        for (receiver, site) in lab.sites.iter().enumerate() {
            let endpoint = site.address.to_string();
            let handed =
                page.sum("udp_fanout_downstream_packets_total", &[("listener", case.name), ("endpoint", &endpoint)]);
            assert_eq!(handed, got.iter().map(|counts| counts[receiver]).sum::<u64>(), "{} {endpoint}", case.name);
        }
        return;
    }
}

fn check_parity(ipv6: bool) {
    let places = [Place::OtherInterface, Place::Pod, Place::BehindRouter];
    let lab = Lab::builder().receivers(places).ipv6(ipv6).build().unwrap();
    let mut first: Option<Vec<Vec<Vec<u64>>>> = None;
    for (mode, head, old) in MODES {
        let binary = Path::new(env!("CARGO_BIN_EXE_udp-fanout"));
        let words = old_kernel();
        let before: &[&str] = if old { &words } else { &[] };
        let daemon = Daemon::start_behind(&lab.gateway, before, binary, &config(&lab, mode, head)).unwrap();
        let mut outcomes = Vec::new();
        for (number, case) in cases().iter().enumerate() {
            let got = run(&lab, number, case);
            check_counters(&lab, &daemon, case, &got);
            outcomes.push(got);
        }
        stop(daemon);
        let expected = first.get_or_insert_with(|| outcomes.clone());
        for ((case, got), expected) in cases().iter().zip(&outcomes).zip(expected) {
            assert_eq!(got, expected, "{}: {mode} {head} {before:?} differs from the first mode", case.name);
        }
    }
}

#[test]
fn netns_everyone_gets_the_same_on_every_path() {
    check_parity(false);
}

#[test]
fn netns_everyone_gets_the_same_over_ipv6_on_every_path() {
    check_parity(true);
}
