//! Policies and admission through the real daemon, the same cases in both modes: who gets what, and the cost of
//! failures. `parity` runs one list of cases on every delivery path.

mod admission;
mod choices;
mod parity;
mod replicate;

use std::path::Path;

use udp_fanout_lab::{Daemon, DaemonConfig, Lab};

const MODES: [&str; 2] = ["tc_ebpf", "userspace"];

fn start(lab: &Lab, config: &DaemonConfig) -> Daemon {
    Daemon::start(&lab.gateway, Path::new(env!("CARGO_BIN_EXE_udp-fanout")), config).unwrap()
}

/// Terminates the daemon. A killed one would leave its filter, which would go on forwarding.
fn stop(daemon: Daemon) {
    let (status, _, log) = daemon.stop().unwrap();
    assert!(status.success(), "{log}");
}

/// Datagrams that the mode's own datapath has forwarded. In `tc_ebpf` mode, the socket must have forwarded none.
fn forwarded(lab: &Lab, daemon: &Daemon, mode: &str) -> u64 {
    let metrics = daemon.metrics(&lab.gateway).unwrap();
    assert_eq!(metrics.sum("udp_fanout_packets_passed_total", &[]), 0);
    assert_eq!(metrics.sum("udp_fanout_packets_dropped_total", &[]), 0);
    metrics.sum("udp_fanout_packets_forwarded_total", &[("mode", mode)])
}
