//! Faults around a running daemon: its log cannot be written, descriptors run out, the clock jumps, the
//! kernel refuses calls or sends more messages than a socket holds, the daemon is killed at the worst moment. Datagrams
//! keep flowing and are counted once.
//!
//! Elsewhere: scrapers and clients that do not read in `http.rs` and `src/control/server/tests.rs`, a thousand reloads
//! in `reload/edits.rs`.

mod clock;
mod descriptors;
mod killed;
mod logs;
mod maps;
mod network;

use std::path::Path;
use std::process::Output;
use std::time::Duration;

use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Metrics, Pins, Place, Sender};

/// The timeout of every wait. Only a failing test waits that long.
const LIMIT: Duration = Duration::from_secs(30);
const MODES: [&str; 2] = ["tc_ebpf", "userspace"];

/// The program under test.
fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_udp-fanout"))
}

fn lab() -> Lab {
    Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap()
}

/// The lab's usual configuration, which only SIGHUP reloads.
fn config(lab: &Lab, mode: &str) -> DaemonConfig {
    let mut config = DaemonConfig::for_lab(lab, mode);
    config.head = "watch_config = false\n".to_owned();
    config
}

/// Starts the daemon behind these words, which become the rest of its line.
fn start_behind(lab: &Lab, before: &[&str], config: &DaemonConfig) -> Daemon {
    Daemon::start_behind(&lab.gateway, before, binary(), config).unwrap()
}

/// Sends `count` datagrams to the listener, all of which must arrive once.
fn exchange(lab: &Lab, count: u64) {
    let collectors = Collectors::start(lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::in_lab(lab).unwrap();
    sender.send(count, &collectors).unwrap();
    let report = collectors.finish(&[&sender]).unwrap();
    assert!(report.is_complete() && report.duplicated == 0, "{report}");
}

fn metrics(lab: &Lab) -> Metrics {
    Metrics::scrape(&lab.gateway, "127.0.0.1:9090".parse().unwrap(), "/metrics").unwrap()
}

/// The counters of the lab's listener: received, forwarded, and the sum of its downstreams.
fn counted(lab: &Lab) -> (u64, u64, u64) {
    let page = metrics(lab);
    let labels = [("listener", "lab")];
    let sum = |what: &str| page.sum(&format!("udp_fanout_{what}_total"), &labels);
    (sum("packets_received"), sum("packets_forwarded"), sum("downstream_packets"))
}

/// Waits until that many datagrams are counted. A worker counts a batch once it has sent it, which may
/// be a moment after it has arrived.
fn wait_until_counted(lab: &Lab, count: u64) {
    let deadline = std::time::Instant::now() + LIMIT;
    loop {
        let seen = counted(lab);
        if seen == (count, count, count) {
            return;
        }
        assert!(seen.0 <= count && seen.1 <= count && seen.2 <= count, "counted {seen:?} of {count} sent");
        assert!(std::time::Instant::now() < deadline, "counted {seen:?} of {count} sent");
    }
}

/// Asks the daemon at this socket for its status.
fn status(lab: &Lab, socket: &Path) -> Output {
    let mut command = lab.gateway.command(binary());
    command.args(["status", "--json", "--interval", "0.1", "--socket"]).arg(socket);
    command.output().unwrap()
}
