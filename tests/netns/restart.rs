//! Restarts of the daemon under traffic: with `on_exit = "keep"` no datagram is lost or duplicated, counters continue,
//! and an orphaned program is taken over, stops after a limit, and can be removed.

mod detach;
mod flow;
mod obstacles;
mod orphaned;
mod untrusted;
mod upgrade;

use std::path::Path;
use std::process::{Command, Output};

use nix::sys::signal::Signal;
use udp_fanout_lab::INGRESS;
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Pins, Place, Sender};

/// The program under test.
fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_udp-fanout"))
}

fn lab() -> Lab {
    Lab::builder().receivers([Place::OtherInterface, Place::Pod, Place::Pod]).build().unwrap()
}

fn start(lab: &Lab, config: &DaemonConfig) -> Daemon {
    Daemon::start(&lab.gateway, binary(), config).unwrap()
}

/// Ends the daemon and returns its log.
fn end(mut daemon: Daemon, signal: Signal) -> String {
    daemon.signal(signal).unwrap();
    daemon.wait().unwrap();
    daemon.log().to_owned()
}

/// Sends `count` datagrams to the listener, all of which must arrive once.
fn exchange(lab: &Lab, count: u64) {
    let collectors = Collectors::start(lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::in_lab(lab).unwrap();
    sender.send(count, &collectors).unwrap();
    let report = collectors.finish(&[&sender]).unwrap();
    assert!(report.is_perfect(), "{report}");
}

/// The daemon's filter on the lab's ingress, as `tc` shows it.
fn filter(lab: &Lab) -> Option<String> {
    let shown = lab.gateway.tc(&format!("filter show dev {INGRESS} ingress")).unwrap();
    shown.lines().find(|line| line.contains("udp_fanout")).map(str::to_owned)
}

/// The kernel datapath's counters of the lab's listener: received, forwarded, and the sum of its downstreams.
fn counted(lab: &Lab, daemon: &Daemon) -> (u64, u64, u64) {
    let page = daemon.metrics(&lab.gateway).unwrap();
    let labels = [("listener", "lab"), ("mode", "tc_ebpf")];
    let sum = |what: &str| page.sum(&format!("udp_fanout_packets_{what}_total"), &labels);
    let downstreams = page.sum("udp_fanout_downstream_packets_total", &[("listener", "lab")]);
    (sum("received"), sum("forwarded"), downstreams)
}

fn run(lab: &Lab, arguments: &[&str], pins: &Pins) -> Output {
    let mut command: Command = lab.gateway.command(binary());
    command.args(arguments).arg("--pin-path").arg(pins.path()).output().unwrap()
}
