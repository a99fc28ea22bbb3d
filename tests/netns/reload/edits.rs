//! Valid edits, while numbered datagrams flow.

use std::collections::BTreeSet;
use std::fs;
use std::net::UdpSocket;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBufForce;

use super::{metrics, reloads, second_listener, start, two_listeners};
use udp_fanout_lab::netns::{End, connect};
use udp_fanout_lab::traffic::{PATIENCE, bind};
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Place, Sender};

/// Successive edits of the first of two listeners. The second must not be affected.
fn edits(lab: &Lab, mode: &str) -> Vec<DaemonConfig> {
    let start = two_listeners(lab, mode);
    let mut all = Vec::new();
    let mut edit = |change: &dyn Fn(&mut DaemonConfig)| {
        let mut config = start.clone();
        change(&mut config);
        all.push(config);
    };
    edit(&|config| config.listeners[0].downstreams[0].2 = 3);
    edit(&|config| config.listeners[0].downstreams.truncate(1));
    edit(&|config| config.listeners[0].downstreams.reverse());
    edit(&|config| config.listeners[0].extra = "policy = \"hash\"".into());
    edit(&|config| config.listeners[0].extra = "protocol = \"gelf\"".into());
    edit(&|config| {
        config.listeners[0].extra = "sources = { allow = [\"10.0.0.0/8\"], deny = [\"10.9.0.0/16\"] }".into()
    });
    edit(&|config| config.listeners[0].extra = "rate_limit = { packets_per_second = 5000000 }".into());
    edit(&|config| config.listeners.swap(0, 1));
    // All of them allow the sender.
    edit(&|config| config.listeners[0].extra = "sources = { allow = \"10.0.0.0/24\", deny = \"10.0.0.77\" }".into());
    edit(&|config| {
        let limit = "rate_limit = { packets_per_second = 10000000, burst = 100000000 }";
        config.listeners[0].extra = format!("sources = {{ allow = [\"10.0.0.2\", \"10.9.0.0/16\"] }}\n{limit}");
    });
    edit(&|config| config.listeners[0].extra = "sources.deny = [\"10.0.0.0/24\"]\nsources.allow = \"10.0.0.2\"".into());
    edit(&|config| config.listeners[0].settings = "workers = 2\nbatch_size = 8".into());
    edit(&|config| config.listeners[0].settings = "recv_buf_size = 1000000".into());
    edit(&|config| {
        let mut third = config.listeners[0].clone();
        (third.name, third.bind) = ("third".into(), "10.0.0.1:9126".into());
        config.listeners.insert(0, third);
    });
    edit(&|config| config.listeners[0].name = "renamed".into());
    edit(&|config| {
        if config.listeners[0].interface.take().is_some() {
            config.listeners[0].extra = "interface = [\"eth0\", \"spare\"]".into();
        }
    });
    edit(&|config| config.head += "[health]\nenabled = true\n");
    // To the other datapath, and back with the next edit.
    let other = if mode == "userspace" { "tc_ebpf" } else { "userspace" };
    edit(&|config| config.listeners[0] = DaemonConfig::for_lab(lab, other).listeners.remove(0));
    edit(&|_| {});
    all
}

fn edits_cost_nothing(mode: &str) {
    let lab = Lab::builder().receivers([Place::Pod, Place::OtherInterface, Place::BehindRouter]).build().unwrap();
    // The kernel drops packets that leave by an interface at the moment when it gets its first `clsact`, so the
    // interface that is added must not lead to a receiver.
    connect(
        End { namespace: &lab.gateway, device: "spare", addresses: "" },
        End { namespace: &lab.sender, device: "spare", addresses: "" },
    )
    .unwrap();
    let mut daemon = start(&lab, &two_listeners(&lab, mode));
    let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
    let mut senders =
        [Sender::in_lab(&lab).unwrap(), Sender::open(&lab.sender, (Lab::SENDER, 0), second_listener()).unwrap()];
    let stop = AtomicBool::new(false);
    let edits = edits(&lab, mode);
    thread::scope(|scope| {
        for sender in &mut senders {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    sender.send(50, &collectors).unwrap();
                }
            });
        }
        // An edit may fail the test: the senders must end for the scope to end.
        let edited = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for (n, config) in edits.iter().enumerate() {
                let before = collectors.progress().now().1;
                daemon.reload(&config.to_toml()).unwrap_or_else(|error| panic!("edit {n}: {error:#}"));
                // Datagrams flow under each configuration.
                assert!(collectors.wait_for(before + 200, PATIENCE), "edit {n}");
            }
        }));
        stop.store(true, Ordering::Relaxed);
        edited.unwrap();
    });
    let [first, second] = &senders;
    let report = collectors.finish(&[first, second]).unwrap();
    assert!(report.is_complete(), "{mode}: {report}");
    assert_eq!(reloads(&lab, "success"), edits.len() as u64);
    // `second` has never changed, so its counters have continued.
    let seen = metrics(&lab).sum("udp_fanout_packets_forwarded_total", &[("listener", "second")]);
    assert_eq!(seen, second.sent(), "{mode}");
    let (status, _, log) = daemon.stop().unwrap();
    assert!(status.success(), "{log}");
}

#[test]
fn netns_who_may_send_changes_with_the_file() {
    let lab = Lab::builder().receiver(Place::OtherInterface).build().unwrap();
    for mode in ["tc_ebpf", "userspace"] {
        let with = |rules: &str| {
            let mut config = two_listeners(&lab, mode);
            config.listeners[0].extra = rules.to_owned();
            config
        };
        let mut daemon = start(&lab, &with("sources.deny = \"10.0.0.2\""));
        for round in 1..=5u64 {
            let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
            let mut denied = Sender::in_lab(&lab).unwrap();
            denied.burst(30, &collectors).unwrap();
            let deadline = Instant::now() + PATIENCE;
            while metrics(&lab).sum("udp_fanout_packets_dropped_total", &[("reason", "source_denied")]) < 30 * round {
                assert!(Instant::now() < deadline, "{mode}: not all are dropped");
            }
            daemon.reload(&with(&format!("sources.allow = [\"10.0.0.2\", \"10.7.{round}.0/24\"]")).to_toml()).unwrap();
            let collected = Collectors::start(&lab, Expect::OneOfThem).unwrap();
            let mut allowed = Sender::in_lab(&lab).unwrap();
            allowed.send(30, &collected).unwrap();
            let report = collected.finish(&[&allowed]).unwrap();
            assert!(report.is_complete(), "{mode}: {report}");
            assert_eq!(collectors.progress().now().1, 0, "{mode}: what was denied has arrived");
            daemon.reload(&with("sources.deny = \"10.0.0.2\"").to_toml()).unwrap();
        }
        daemon.stop().unwrap();
    }
}

#[test]
fn netns_edits_cost_the_kernels_listeners_nothing() {
    edits_cost_nothing("tc_ebpf");
}

#[test]
fn netns_edits_cost_the_sockets_listeners_nothing() {
    edits_cost_nothing("userspace");
}

/// A socket in a receiver's namespace whose buffer holds everything that a test sends.
fn large_buffer_socket(lab: &Lab, site: usize) -> UdpSocket {
    let site = &lab.sites[site];
    let socket = bind(lab.namespace_of(site), site.address).unwrap();
    setsockopt(&socket, RcvBufForce, &(32 << 20)).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

/// From one to all and back: a datagram goes to one receiver or to each, and never twice to the same.
#[test]
fn netns_a_policy_that_becomes_replicate_loses_and_doubles_nothing() {
    let lab = Lab::builder().receivers([Place::Pod, Place::OtherInterface]).build().unwrap();
    for mode in ["tc_ebpf", "userspace"] {
        let mut turns = two_listeners(&lab, mode).settings("recv_buf_size = 33554432");
        turns.listeners.truncate(1);
        // With a receiver that has several turns in the round.
        turns.listeners[0].downstreams[0].2 = 3;
        let mut copies = turns.clone();
        copies.listeners[0].downstreams[0].2 = 1;
        copies.listeners[0].extra = "policy = \"replicate\"".into();
        let mut daemon = start(&lab, &turns);
        let receivers = [large_buffer_socket(&lab, 0), large_buffer_socket(&lab, 1)];
        let sender = bind(&lab.sender, (Lab::SENDER, 0).into()).unwrap();
        let stop = AtomicBool::new(false);
        let sent = thread::scope(|scope| {
            let flow = scope.spawn(|| {
                let mut number = 0u64;
                while !stop.load(Ordering::Relaxed) && number < 20_000 {
                    sender.send_to(&number.to_be_bytes(), lab.listener()).unwrap();
                    number += 1;
                }
                number
            });
            for _ in 0..8 {
                daemon.reload(&copies.to_toml()).unwrap();
                daemon.reload(&turns.to_toml()).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
            flow.join().unwrap()
        });
        let mut seen: [BTreeSet<u64>; 2] = Default::default();
        let guard = Instant::now() + PATIENCE * 10;
        while (seen[0].union(&seen[1]).count() as u64) < sent {
            assert!(Instant::now() < guard, "{mode}: {sent} sent, {} + {} arrived", seen[0].len(), seen[1].len());
            for (receiver, seen) in receivers.iter().zip(&mut seen) {
                let mut number = [0; 8];
                while receiver.recv(&mut number).is_ok() {
                    assert!(seen.insert(u64::from_be_bytes(number)), "{mode}: {number:?} came twice");
                }
            }
        }
        daemon.stop().unwrap();
    }
}

/// The kernel's inode numbers of the sockets on a UDP port.
fn sockets(lab: &Lab, port: u16) -> BTreeSet<String> {
    let table = lab.gateway.tool("cat", "/proc/thread-self/net/udp").unwrap();
    let lines = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let ours = lines.filter(|fields| fields[1].ends_with(&format!(":{port:04X}")));
    ours.map(|fields| fields[9].to_owned()).collect()
}

#[test]
fn netns_no_socket_is_opened_again_without_need() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap();
    let mut config = two_listeners(&lab, "userspace").settings("workers = 3");
    let mut daemon = start(&lab, &config);
    let before = sockets(&lab, lab.listener().port());
    assert_eq!(before.len(), 3);
    config.listeners[0].extra = "policy = \"hash\"".into();
    daemon.reload(&config.to_toml()).unwrap();
    config.listeners[0].downstreams.pop();
    daemon.reload(&config.to_toml()).unwrap();
    config = config.settings("workers = 3\nbatch_size = 9");
    daemon.reload(&config.to_toml()).unwrap();
    config.listeners[0].name = "renamed".into();
    config.listeners.remove(1);
    daemon.reload(&config.to_toml()).unwrap();
    assert_eq!(sockets(&lab, lab.listener().port()), before);
    assert_eq!(sockets(&lab, second_listener().port()).len(), 0, "the socket is closed");
    daemon.stop().unwrap();
}

fn file_descriptors(daemon: &Daemon) -> usize {
    fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count()
}

/// The process's number of threads and of private pages.
fn threads_and_pages(daemon: &Daemon) -> (u64, u64) {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let number = |key: &str| {
        let line = status.lines().find(|line| line.starts_with(key)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    (number("Threads:"), number("RssAnon:") / 4)
}

#[test]
fn netns_a_thousand_reloads_leave_nothing_behind() {
    let lab = Lab::builder().receivers([Place::Pod, Place::OtherInterface]).build().unwrap();
    let small = two_listeners(&lab, "tc_ebpf");
    let mut large = small.clone();
    large.listeners[0].extra = "policy = \"replicate\"".into();
    large.listeners[1] = DaemonConfig::for_lab(&lab, "userspace").listeners.remove(0);
    (large.listeners[1].name, large.listeners[1].bind) = ("third".into(), "10.0.0.1:9126".into());
    large.metrics = Some("127.0.0.1:9091".parse().unwrap());
    large.head += "[health]\nenabled = true\n";
    let mut daemon = start(&lab, &small);
    let mut turn = |times: u32| {
        for _ in 0..times {
            daemon.reload(&large.to_toml()).unwrap();
            daemon.reload(&small.to_toml()).unwrap();
        }
        (file_descriptors(&daemon), threads_and_pages(&daemon))
    };
    let (descriptors, (threads, pages)) = turn(50);
    let (descriptors_after, (threads_after, pages_after)) = turn(450);
    assert_eq!((descriptors_after, threads_after), (descriptors, threads));
    // The allocator may keep some pages; a leak in each of 900 reloads would show.
    assert!(pages_after < pages + 900, "{pages} pages, then {pages_after}");
    assert_eq!(reloads(&lab, "success"), 1_000);
    daemon.stop().unwrap();
}

#[test]
fn netns_a_file_that_changes_is_read_again() {
    let lab = Lab::builder().receivers([Place::Pod, Place::OtherInterface]).build().unwrap();
    let mut config = two_listeners(&lab, "userspace");
    // The default.
    config.head.clear();
    let mut daemon = start(&lab, &config);
    config.listeners[0].downstreams.pop();
    daemon.write_config(&config.to_toml()).unwrap();
    daemon.wait_for_line("updated userspace downstream set listener_id=0 endpoints=1").unwrap();
    daemon.wait_for_line("configuration reloaded").unwrap();

    // Symbolic links, of which one is replaced, as in a mounted ConfigMap.
    let directory = daemon.config_path().parent().unwrap().to_owned();
    let version = |name: &str, config: &DaemonConfig| {
        fs::create_dir(directory.join(name)).unwrap();
        fs::write(directory.join(name).join("config.toml"), config.to_toml()).unwrap();
        symlink(name, directory.join("..data_tmp")).unwrap();
        fs::rename(directory.join("..data_tmp"), directory.join("..data")).unwrap();
    };
    config.listeners.pop();
    version("..1", &config);
    symlink("..data/config.toml", directory.join("link")).unwrap();
    fs::rename(directory.join("link"), daemon.config_path()).unwrap();
    daemon.wait_for_line("configuration reloaded").unwrap();
    for n in 2..5u32 {
        config.listeners[0].downstreams[0].2 = n;
        version(&format!("..{n}"), &config);
        fs::remove_dir_all(directory.join(format!("..{}", n - 1))).unwrap();
        daemon.wait_for_line("configuration reloaded").unwrap();
    }
    // A rewrite without a change has no effect, nor has any change with `watch_config = false`.
    daemon.write_config(&config.to_toml()).unwrap();
    config.head = super::ON_SIGNAL.to_owned();
    daemon.write_config(&config.to_toml()).unwrap();
    daemon.wait_for_line("configuration reloaded").unwrap();
    config.listeners[0].downstreams[0].2 = 9;
    daemon.write_config(&config.to_toml()).unwrap();
    config.listeners[0].downstreams[0].2 = 7;
    daemon.reload(&config.to_toml()).unwrap();
    assert_eq!((reloads(&lab, "success"), reloads(&lab, "error")), (7, 0));
    daemon.stop().unwrap();
}

#[test]
fn netns_metrics_move_without_a_refused_scrape() {
    let lab = Lab::builder().receiver(Place::OtherInterface).build().unwrap();
    let config = two_listeners(&lab, "userspace");
    let mut daemon = start(&lab, &config);
    let get = |address: &str, path: &str| {
        udp_fanout_lab::scrape::get(&lab.gateway, address.parse().unwrap(), path).map(|page| page.status)
    };
    let moved = config.to_toml().replace("path = \"/metrics\"", "path = \"/m\"");
    daemon.reload(&moved).unwrap();
    assert_eq!(get("127.0.0.1:9090", "/m").unwrap(), 200);
    assert_eq!(get("127.0.0.1:9090", "/metrics").unwrap(), 404);
    daemon.reload(&moved.replace("9090", "9099")).unwrap();
    assert_eq!(get("127.0.0.1:9099", "/m").unwrap(), 200);
    assert!(get("127.0.0.1:9090", "/m").is_err());
    daemon.reload(&moved.replace("enabled = true", "enabled = false")).unwrap();
    assert!(get("127.0.0.1:9099", "/m").is_err());
    daemon.reload(&moved).unwrap();
    assert_eq!(get("127.0.0.1:9090", "/healthz").unwrap(), 200);
    daemon.stop().unwrap();
}
