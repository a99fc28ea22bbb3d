//! Out of file descriptors: what needs none continues, what needs one logs it once and retries, and a new
//! configuration is applied whole or not at all.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::{LIMIT, MODES, config, exchange, lab, metrics, start_behind, status, wait_until_counted};
use udp_fanout_lab::{Daemon, DaemonConfig, Lab};

/// Root may raise every limit, and the daemon does. Without that privilege it has to keep the given limit.
const WITHOUT_SYS_RESOURCE: [&str; 2] = ["setpriv", "--bounding-set=-sys_resource"];
const FIX: &str = "raise the limit of open files";

fn open(daemon: &Daemon) -> BTreeSet<u64> {
    let files = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap();
    files.map(|file| file.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect()
}

/// Sets the limit, as `SOFT:HARD`.
fn limit(daemon: &Daemon, files: &str) {
    let pid = daemon.pid().to_string();
    let done = Command::new("prlimit").args(["--pid", &pid, &format!("--nofile={files}")]).status().unwrap();
    assert!(done.success());
}

/// Limits the daemon to `count` further descriptors for the rest of the test.
fn limit_free_descriptors(daemon: &Daemon, count: usize) {
    let open = open(daemon);
    let files = (0..).filter(|number| !open.contains(number)).nth(count).unwrap();
    limit(daemon, &format!("{files}:{files}"));
}

/// A client that has requested the metrics, and waits.
fn client(lab: &Lab) -> TcpStream {
    lab.gateway
        .run(|| {
            let mut stream = TcpStream::connect("127.0.0.1:9090")?;
            stream.set_read_timeout(Some(LIMIT))?;
            stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
            Ok(stream)
        })
        .unwrap()
}

fn is_answered(client: &mut TcpStream) {
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.0 200") || answer.starts_with("HTTP/1.1 200"), "{answer}");
}

/// How often the daemon has failed to accept a connection, from strace's output.
fn failed_accepts(trace: &Path) -> usize {
    fs::read_to_string(trace)
        .unwrap()
        .lines()
        .filter(|line| line.contains("accept4(") && line.contains("EMFILE"))
        .count()
}

#[test]
fn netns_without_descriptors_datagrams_flow_and_all_else_comes_back() {
    let lab = lab();
    let directory = tempfile::tempdir().unwrap();
    for mode in MODES {
        let trace = directory.path().join(mode);
        let tracer = ["strace", "-D", "-f", "--seccomp-bpf", "-e", "trace=accept4", "-o", trace.to_str().unwrap()];
        let mut config = config(&lab, mode);
        let health = "[health]\nenabled = true\nprotocol = \"tcp\"\ninterval_secs = 0.5\ntimeout_secs = 0.4\n";
        config.head += health;
        // The target of the probes. It never accepts; the kernel queues the connections.
        let _targets: Vec<TcpListener> = lab
            .sites
            .iter()
            .map(|site| lab.namespace_of(site).run(|| Ok(TcpListener::bind(site.address)?)).unwrap())
            .collect();
        let mut daemon = start_behind(&lab, &[&tracer[..], &WITHOUT_SYS_RESOURCE].concat(), &config);
        exchange(&lab, 300);
        wait_until_counted(&lab, 300);
        let mut sent = 600;

        let since = Instant::now();
        // Every descriptor below the limit is in use and stays open.
        limit(&daemon, "3:");
        let probes = daemon.wait_for_line("cannot send health probes").unwrap();
        assert!(probes.contains("too many open files") && probes.contains(FIX), "{probes}");
        let mut clients: Vec<TcpStream> = (0..3).map(|_| client(&lab)).collect();
        let page = daemon.wait_for_line("cannot accept connections for metrics").unwrap();
        assert!(page.contains("Too many open files") && page.contains(FIX), "{page}");
        thread::scope(|scope| {
            let socket = daemon.status_socket();
            let asking = scope.spawn({
                let lab = &lab;
                move || status(lab, &socket)
            });
            let refused = daemon.wait_for_line("cannot accept connections to the status socket").unwrap();
            assert!(refused.contains("Too many open files") && refused.contains(FIX), "{refused}");
            exchange(&lab, 300);
            // Every five seconds the daemon checks that the program is attached, which needs a descriptor.
            while since.elapsed() < Duration::from_secs(6) {
                exchange(&lab, 100);
                sent += 100;
            }
            limit(&daemon, "1000:");
            let answer = asking.join().unwrap();
            assert!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
        });
        clients.iter_mut().for_each(is_answered);
        let most = since.elapsed().as_millis() / 100 + since.elapsed().as_millis() / 500 + 4;
        daemon.wait_for_logged("connections for metrics are accepted again").unwrap();
        daemon.wait_for_logged("connections to the status socket are accepted again").unwrap();
        wait_until_counted(&lab, sent);
        let page = metrics(&lab);
        assert_eq!(page.sum("udp_fanout_downstream_health_transitions_total", &[]), 0, "no downstream is unhealthy");
        exchange(&lab, 300);
        wait_until_counted(&lab, sent + 300);
        assert!(!daemon.log().contains("taken off"), "{}", daemon.log());
        // Logged once, however often it was tried; and retried at intervals, not in a busy loop.
        let log = daemon.log().to_owned();
        for what in ["for metrics", "to the status socket"] {
            assert_eq!(log.matches(&format!("cannot accept connections {what}")).count(), 1, "{log}");
        }
        let failed = failed_accepts(&trace);
        assert!(failed as u128 <= most, "{failed} failed accepts, at most {most} expected");
        assert!(daemon.stop().unwrap().0.success());
    }
}

/// A configuration with more of everything that needs descriptors.
fn larger(lab: &Lab, mode: &str) -> DaemonConfig {
    let mut larger = config(lab, mode);
    let mut second = config(lab, "userspace").settings("workers = 2").listeners.remove(0);
    (second.name, second.bind) = ("second".into(), "10.0.0.1:9125".into());
    larger.listeners.push(second);
    larger.metrics = Some("127.0.0.1:9091".parse().unwrap());
    larger
}

/// The open files once no client is served any more.
fn wait_until_open(daemon: &Daemon, count: usize) {
    let deadline = Instant::now() + LIMIT;
    while open(daemon).len() != count {
        assert!(Instant::now() < deadline, "expected {count} open files, found {:?}", open(daemon));
    }
}

#[test]
fn netns_a_new_configuration_for_which_descriptors_are_missing_is_refused_whole() {
    let lab = lab();
    for mode in MODES {
        let small = config(&lab, mode);
        let mut at_rest = 0;
        let mut refusals = 0;
        for free in 0.. {
            let mut daemon = start_behind(&lab, &WITHOUT_SYS_RESOURCE, &small);
            exchange(&lab, 100);
            wait_until_counted(&lab, 100);
            // The scrapes' connections close at any time.
            at_rest = if free == 0 { idle_open_files(&daemon) } else { at_rest };
            wait_until_open(&daemon, at_rest);
            daemon.write_config(&larger(&lab, mode).to_toml()).unwrap();
            limit_free_descriptors(&daemon, free);
            daemon.signal(Signal::SIGHUP).unwrap();
            let outcome = daemon.wait_for_line("reloaded").unwrap();
            let followed = !outcome.contains("configuration not reloaded");
            let log = daemon.log().to_owned();
            exchange(&lab, 100);
            if !followed {
                refusals += 1;
                let reason = log.lines().rev().nth(1).unwrap();
                let words = ["ERROR", "oo many open files", FIX];
                assert!(words.iter().all(|word| reason.contains(word)), "{log}");
                // The old configuration is in force, at the old port, and nothing is left open.
                assert!(!lab.gateway.tool("cat", "/proc/thread-self/net/udp").unwrap().contains(":23A5 "), "{log}");
                wait_until_open(&daemon, at_rest);
                if free > 0 {
                    wait_until_counted(&lab, 200);
                }
            }
            let (ended, _, log) = daemon.stop().unwrap();
            assert!(ended.success(), "{log}");
            assert!(!lab.gateway.tc("filter show dev eth0 ingress").unwrap().contains("udp_fanout"), "{log}");
            if followed {
                break;
            }
        }
        assert!(refusals > 3, "only {refusals}");
    }
}

/// The number of the daemon's open files while it serves no client.
fn idle_open_files(daemon: &Daemon) -> usize {
    let deadline = Instant::now() + LIMIT;
    while has_clients(daemon) {
        assert!(Instant::now() < deadline, "a connection stays open");
    }
    open(daemon).len()
}

/// Whether a connection to the metrics' port is open at the daemon's end.
fn has_clients(daemon: &Daemon) -> bool {
    let table = fs::read_to_string(format!("/proc/{}/net/tcp", daemon.pid())).unwrap();
    let inodes: BTreeSet<String> = open(daemon)
        .iter()
        .filter_map(|number| fs::read_link(format!("/proc/{}/fd/{number}", daemon.pid())).ok())
        .filter_map(|name| Some(name.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    // Local address, state, inode; 0A is listening.
    let lines = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    lines.into_iter().any(|fields| fields[3] != "0A" && inodes.contains(fields[9]))
}
