//! Tests of the lab itself, without the daemon: a report that misses a lost, duplicated or reordered
//! datagram would make every other network test worthless.

use std::net::{SocketAddr, UdpSocket};
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Result, bail};
use udp_fanout_lab::daemon::{Daemon, DaemonConfig};
use udp_fanout_lab::traffic::{PATIENCE, Sender, bind};
use udp_fanout_lab::{Collectors, Expect, Lab, Namespace, Place, Report};

/// A fault of the stand-in for the daemon.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// Drops every hundredth.
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

/// Sends `count` datagrams of `payload` bytes through a stand-in and returns the report.
fn run(lab: &Lab, fault: Fault, expect: Expect, payload: usize, count: u64) -> Result<Report> {
    let _stand_in = StandIn::start(lab, fault)?;
    let collectors = Collectors::start(lab, expect)?;
    // Only a lost datagram makes this wait for the full time.
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

/// A stand-in for the daemon that logs a line and then runs `body`.
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
