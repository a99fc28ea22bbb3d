//! The laboratory itself is proved here, without the daemon: a reckoning that misses a lost, doubled or overtaken
//! datagram would make every other network test worthless.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Result, bail};
use proptest::prelude::*;
use udp_fanout_lab::daemon::{Daemon, DaemonConfig};
use udp_fanout_lab::report::{RunTally, Tally};
use udp_fanout_lab::traffic::{PATIENCE, Sender, bind, decode, encode};
use udp_fanout_lab::{Collectors, Expect, Lab, Metrics, Namespace, Place, Report, scrape};

const RUN: u64 = 7;

fn source() -> SocketAddr {
    "10.0.0.2:4000".parse().unwrap()
}

fn tally(name: &str, sequence_numbers: &[u64]) -> Tally {
    let mut tally = Tally::new(name, "10.0.1.2:5514".parse().unwrap());
    for &number in sequence_numbers {
        tally.note(RUN, number, source(), 100);
    }
    tally
}

fn report(sent: u64, receivers: &[&[u64]], expect: Expect) -> Report {
    let tallies: Vec<_> = receivers.iter().map(|numbers| tally("r", numbers)).collect();
    Report::new(&BTreeMap::from([(RUN, sent)]), &tallies, expect)
}

fn summary(report: &Report) -> (u64, u64, u64, u64) {
    (report.lost, report.duplicated, report.reordered, report.unexpected)
}

#[test]
fn report_of_a_perfect_round() {
    let report = report(6, &[&[0, 3], &[1, 4], &[2, 5]], Expect::OneOfThem);
    assert!(report.is_perfect());
    assert_eq!(report.counts(), [2, 2, 2]);
    assert_eq!(report.receivers[0].bytes, 200);
    assert_eq!(report.receivers[0].sources.iter().copied().collect::<Vec<_>>(), [source()]);
}

#[test]
fn report_finds_what_is_lost() {
    let report = report(6, &[&[0, 3], &[4], &[2]], Expect::OneOfThem);
    assert_eq!(summary(&report), (2, 0, 0, 0));
    assert_eq!(report.missing, [1, 5]);
    assert!(!report.is_complete());
}

#[test]
fn report_finds_copies_at_one_receiver_and_at_two() {
    let same = report(3, &[&[0, 0, 1], &[2]], Expect::OneOfThem);
    assert_eq!(summary(&same), (0, 1, 0, 0));
    assert_eq!(same.receivers[0].duplicated, 1);
    let other = report(3, &[&[0, 1], &[1, 2]], Expect::OneOfThem);
    assert_eq!(summary(&other), (0, 1, 0, 0));
    assert_eq!(other.receivers[0].duplicated, 0);
}

#[test]
fn report_finds_what_was_overtaken() {
    // 3 and 4 come after 5; a repeat of 1 is a copy, not disorder.
    let report = report(6, &[&[0, 1, 5, 3, 4, 1, 2]], Expect::OneOfThem);
    assert_eq!(summary(&report), (0, 1, 3, 0));
    assert!(!report.is_perfect());
}

#[test]
fn report_expects_a_copy_at_each_receiver_when_told() {
    assert!(report(2, &[&[0, 1], &[0, 1]], Expect::EachOfThem).is_perfect());
    let uneven = report(2, &[&[0, 1, 1], &[1]], Expect::EachOfThem);
    assert_eq!(summary(&uneven), (1, 1, 0, 0));
}

#[test]
fn report_does_not_take_foreign_datagrams_for_ours() {
    let mut stranger = tally("r", &[0, 1, 2]);
    stranger.note(RUN + 1, 0, source(), 100);
    stranger.note_unexpected(source(), || "damaged".into());
    let report = Report::new(&BTreeMap::from([(RUN, 2)]), &[stranger], Expect::OneOfThem);
    assert_eq!(summary(&report), (0, 0, 0, 3), "one of another run, one damaged, one never sent");
}

proptest! {
    /// Whatever happens on the way, the report's sums are those of a straightforward count.
    #[test]
    fn report_agrees_with_a_plain_count(fates in prop::collection::vec((0..3usize, 0..4usize), 0..200), seed: u64) {
        let mut arrivals = [Vec::new(), Vec::new(), Vec::new()];
        for (number, (receiver, copies)) in fates.iter().enumerate() {
            arrivals[*receiver].extend(std::iter::repeat_n(number as u64, *copies));
        }
        for numbers in &mut arrivals {
            // Any order will do as long as it is the same on every run of this case.
            numbers.sort_by_key(|number| (number ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        }
        let [a, b, c] = &arrivals;
        let report = report(fates.len() as u64, &[a, b, c], Expect::OneOfThem);
        prop_assert_eq!(report.lost, fates.iter().filter(|(_, copies)| *copies == 0).count() as u64);
        prop_assert_eq!(report.duplicated, fates.iter().map(|(_, copies)| copies.saturating_sub(1) as u64).sum::<u64>());
        let overtaken = |numbers: &Vec<u64>| {
            let first = |i: &usize| !numbers[..*i].contains(&numbers[*i]);
            let late = |i: &usize| numbers[..*i].iter().any(|before| *before > numbers[*i]);
            (0..numbers.len()).filter(first).filter(late).count() as u64
        };
        prop_assert_eq!(report.reordered, arrivals.iter().map(overtaken).sum::<u64>());
    }

    /// A datagram reads as what was written, and as nothing once a byte is gone, added or changed.
    #[test]
    fn datagrams_are_recognised_and_damage_is_seen(run: u64, number in 0..1u64 << 28, size in 20..2000usize, at: usize) {
        let mut datagram = Vec::new();
        encode(&mut datagram, run, number, size);
        prop_assert_eq!(datagram.len(), size);
        prop_assert_eq!(decode(&datagram), Ok((run, number)));
        prop_assert!(decode(&datagram[..size - 1]).is_err());
        let at = at % size;
        datagram[at] ^= 1;
        prop_assert_ne!(decode(&datagram), Ok((run, number)));
        datagram[at] ^= 1;
        datagram.push(0);
        prop_assert!(decode(&datagram).is_err());
    }
}

#[test]
fn tally_counts_only_first_arrivals_as_reordered() {
    let mut run = RunTally::default();
    for number in [1, 1, 0, 0] {
        run.note(number);
    }
    assert_eq!((run.received, run.duplicated, run.reordered), (4, 2, 1));
}

#[test]
fn metrics_pages_are_read() {
    let page = "# HELP a_total words\n# TYPE a_total counter\n\
        a_total{listener=\"x\",mode=\"tc_ebpf\"} 3\na_total{listener=\"y, \\\"z\\\"}\",mode=\"userspace\"} 4\n\nb 1.5\n";
    let metrics = Metrics::parse(page).unwrap();
    assert_eq!(metrics.samples.len(), 3);
    assert_eq!(metrics.sum("a_total", &[]), 7);
    assert_eq!(metrics.sum("a_total", &[("listener", "y, \"z\"}")]), 4);
    assert_eq!(metrics.sum("a_total", &[("listener", "x"), ("mode", "userspace")]), 0);
    assert!(metrics.has("b", &[]));
    assert!(Metrics::parse("a_total{listener=\"x} 3").is_err());
    assert_eq!(scrape::parse_answer("HTTP/1.1 503 Busy\r\nA: b\r\n\r\nno\r\n\r\nyet").unwrap().status, 503);
    assert!(scrape::parse_answer("SSH-2.0-OpenSSH_9.2\r\n\r\n").is_err());
}

/// What a stand-in for the daemon does with the datagrams it takes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// Forgets every hundredth.
    Loses,
    /// Sends every hundredth twice.
    Doubles,
    /// Holds every hundredth back until the next one to the same receiver has gone.
    Swaps,
    /// Sends all to all.
    Copies,
    /// Cuts every hundredth short.
    Cuts,
}

/// A round-robin forwarder in the lab's gateway.
struct StandIn {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl StandIn {
    fn start(lab: &Lab, fault: Fault) -> Result<Self> {
        let socket = bind(&lab.gateway, lab.listener())?;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        let targets: Vec<_> = lab.sites.iter().map(|site| site.address).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut buffer = vec![0; 65_536];
            let mut held = None;
            let mut count = 0_usize;
            while !stopped.load(Ordering::Relaxed) {
                let Ok((length, _)) = socket.recv_from(&mut buffer) else { continue };
                forward(&socket, &targets, count, &buffer[..length], fault, &mut held);
                count += 1;
            }
        });
        Ok(StandIn { stop, thread: Some(thread) })
    }
}

fn forward(
    socket: &UdpSocket,
    targets: &[SocketAddr],
    count: usize,
    datagram: &[u8],
    fault: Fault,
    held: &mut Option<(usize, Vec<u8>)>,
) {
    let target = targets[count % targets.len()];
    let odd = count % 100 == 50;
    let send = |data: &[u8], to: SocketAddr| assert_eq!(socket.send_to(data, to).unwrap(), data.len());
    match fault {
        Fault::Loses if odd => {}
        Fault::Swaps if odd => *held = Some((count, datagram.to_vec())),
        Fault::Cuts if odd => send(&datagram[..datagram.len() - 1], target),
        Fault::Copies => targets.iter().for_each(|to| send(datagram, *to)),
        _ => {
            send(datagram, target);
            if fault == Fault::Doubles && odd {
                send(datagram, target);
            }
            let due = held.take_if(|(since, _)| *since + targets.len() == count);
            if let Some((_, late)) = due {
                send(&late, target);
            }
        }
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let outcome = thread.join();
            assert!(outcome.is_ok() || thread::panicking(), "the stand-in panicked");
        }
    }
}

/// Sends `count` datagrams of `payload` bytes through a stand-in and reckons up.
fn run(lab: &Lab, fault: Fault, expect: Expect, payload: usize, count: u64) -> Result<Report> {
    let _stand_in = StandIn::start(lab, fault)?;
    let collectors = Collectors::start(lab, expect)?;
    // Only what a fault has taken away is ever waited for in vain.
    let patience = if fault == Fault::None { PATIENCE } else { Duration::from_millis(300) };
    let mut sender = Sender::in_lab(lab)?.payload(payload).patience(patience);
    sender.send(count, &collectors)?;
    collectors.finish(&[&sender])
}

#[test]
fn netns_every_place_is_reached_with_and_without_forwarding() {
    for (forward, rp_filter) in [(false, 1), (true, 0)] {
        let builder = Lab::builder().receivers(Place::ALL).ip_forward(forward).rp_filter(rp_filter);
        let lab = builder.build().unwrap();
        let report = run(&lab, Fault::None, Expect::OneOfThem, 100, 5_000).unwrap();
        assert!(report.is_perfect(), "{report}");
        assert_eq!(report.sent, 5_000);
        assert_eq!(report.counts(), [1_000; 5]);
        let gateway = lab.gateway_addresses().unwrap();
        for receiver in &report.receivers {
            assert!(receiver.sources.iter().all(|source| gateway.contains(&source.ip())), "{report}");
        }
    }
}

#[test]
fn netns_datagrams_of_every_size_pass_whole() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap();
    for payload in [20, 1_472, 1_473, 9_000, 65_507] {
        let report = run(&lab, Fault::None, Expect::OneOfThem, payload, 300).unwrap();
        assert!(report.is_perfect(), "{payload} bytes: {report}");
    }
}

#[test]
fn netns_loss_doubling_disorder_and_damage_are_seen() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap();
    let of = |fault| {
        let report = run(&lab, fault, Expect::OneOfThem, 64, 1_000).unwrap();
        (report.lost, report.duplicated, report.reordered, report.unexpected)
    };
    assert_eq!(of(Fault::None), (0, 0, 0, 0));
    assert_eq!(of(Fault::Loses), (10, 0, 0, 0));
    assert_eq!(of(Fault::Doubles), (0, 10, 0, 0));
    assert_eq!(of(Fault::Swaps), (0, 0, 10, 0));
    assert_eq!(of(Fault::Cuts), (10, 0, 0, 10));
}

#[test]
fn netns_copies_for_everyone_are_expected_when_told() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod, Place::SameInterface]).build().unwrap();
    let report = run(&lab, Fault::Copies, Expect::EachOfThem, 64, 2_000).unwrap();
    assert!(report.is_perfect(), "{report}");
    assert_eq!(report.counts(), [2_000; 3]);
}

#[test]
fn netns_many_datagrams_in_one_piece_are_many_datagrams() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap();
    let _stand_in = StandIn::start(&lab, Fault::None).unwrap();
    let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::in_lab(&lab).unwrap().payload(200).segments(30).window(60);
    sender.send(1_000, &collectors).unwrap();
    let report = collectors.finish(&[&sender]).unwrap();
    assert!(report.is_perfect(), "{report}");
    assert_eq!(report.sent, 1_000);
}

#[test]
fn netns_several_senders_are_told_apart() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap();
    let _stand_in = StandIn::start(&lab, Fault::None).unwrap();
    let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
    let pod = lab.namespace_of(&lab.sites[1]);
    let mut senders = [
        Sender::in_lab(&lab).unwrap(),
        Sender::open(pod, (lab.sites[1].address.ip(), 0), lab.listener()).unwrap(),
        Sender::open(&lab.gateway, (Lab::GATEWAY, 0), lab.listener()).unwrap(),
    ];
    thread::scope(|scope| {
        for sender in &mut senders {
            let collectors = &collectors;
            // Three windows share one socket's buffer.
            scope.spawn(|| sender.send(1_000, collectors).unwrap());
        }
    });
    let report = collectors.finish(&senders.each_ref()).unwrap();
    assert!(report.is_complete(), "{report}");
    assert_eq!(report.sent, 3_000);
}

#[test]
fn netns_the_gateway_forwards_by_itself_only_when_told() {
    for forward in [false, true] {
        let lab = Lab::builder().receiver(Place::Pod).ip_forward(forward).build().unwrap();
        let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
        let mut sender = Sender::open(&lab.sender, (Lab::SENDER, 0), lab.sites[0].address).unwrap();
        sender.burst(1, &collectors).unwrap();
        let patience = if forward { PATIENCE } else { Duration::from_millis(300) };
        assert_eq!(collectors.wait_for(1, patience), forward);
        let report = collectors.finish(&[&sender]).unwrap();
        assert_eq!(report.lost, u64::from(!forward));
        let sources: Vec<_> = report.receivers[0].sources.iter().map(SocketAddr::ip).collect();
        assert_eq!(sources, if forward { vec![Lab::SENDER] } else { vec![] });
    }
}

#[test]
fn netns_namespaces_go_also_when_a_test_panics() {
    let mut name = String::new();
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let namespace = Namespace::create("doomed").unwrap();
        namespace.name().clone_into(&mut name);
        assert!(!Namespace::is_gone(&name));
        let refused: Result<()> = namespace.run(|| bail!("refused"));
        assert!(format!("{:#}", refused.unwrap_err()).contains(&name));
        namespace.run(|| -> Result<()> { panic!("on purpose, inside") })
    }));
    assert!(outcome.is_err());
    assert!(Namespace::is_gone(&name));
}

#[test]
fn netns_commands_run_inside_and_leave_no_trace_outside() {
    let namespace = Namespace::create("alone").unwrap();
    let links = namespace.ip("-oneline link show").unwrap();
    assert_eq!(links.lines().filter(|line| line.contains(": lo:")).count(), 1);
    assert!(!links.contains(": eth0"), "another namespace's interfaces: {links}");
    let error = namespace.ip("link set eth9 up").unwrap_err();
    assert!(format!("{error:#}").contains("eth9"), "{error:#}");
    assert!(namespace.sysctl("net.ipv4.no_such_setting", "1").is_err());
    assert_eq!(namespace.tool("cat", "/proc/sys/net/ipv4/ip_forward").unwrap().trim(), "0");
    assert_eq!(namespace.link("lo").unwrap().index, 1);
}

/// A program that logs a line and then does as told, in place of the daemon.
fn script(body: &str) -> (tempfile::TempDir, std::path::PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let (text, path) = (directory.path().join("text"), directory.path().join("stand-in"));
    std::fs::write(&text, format!("#!/bin/sh\n{body}\n")).unwrap();
    // A file that this process has written cannot be run while a program that another thread is starting still holds
    // a copy of the descriptor; one that another process has written can.
    let installed = std::process::Command::new("install").arg("--mode=755").args([&text, &path]).status().unwrap();
    assert!(installed.success());
    (directory, path)
}

#[test]
fn netns_a_daemon_is_waited_for_and_stopped() {
    let lab = Lab::builder().receiver(Place::Pod).build().unwrap();
    let mut config = DaemonConfig::for_lab(&lab, "userspace");
    config.metrics = None;
    let (_directory, path) = script("cat \"$3\" >&2; echo 'updated the downstream set' >&2; exec sleep 600");
    let daemon = Daemon::start(&lab.gateway, &path, &config).unwrap();
    let (status, _, log) = daemon.stop().unwrap();
    assert_eq!(status.signal(), Some(libc::SIGTERM));
    assert!(log.contains("address = \"10.244.0.10:5514\""), "{log}");
}

#[test]
fn netns_a_daemon_that_ends_early_fails_with_its_log() {
    let lab = Lab::builder().receiver(Place::Pod).build().unwrap();
    let (_directory, path) = script("echo 'error: no such interface' >&2; exit 1");
    let error = Daemon::start(&lab.gateway, &path, &DaemonConfig::for_lab(&lab, "auto")).unwrap_err();
    assert!(format!("{error:#}").contains("no such interface"), "{error:#}");
}

#[test]
fn netns_a_dropped_daemon_is_gone() {
    let lab = Lab::builder().receiver(Place::Pod).build().unwrap();
    let (_directory, path) = script("echo 'downstream set' >&2; exec sleep 600");
    let mut config = DaemonConfig::for_lab(&lab, "auto");
    config.metrics = None;
    let daemon = Daemon::start(&lab.gateway, &path, &config).unwrap();
    let handle = udp_fanout_lab::cleanup::pidfd(daemon.pid()).unwrap();
    drop(daemon);
    assert!(udp_fanout_lab::cleanup::wait_readable(&handle, Duration::ZERO));
}
