//! Reloads under load: no datagram is lost or duplicated, neither on the listeners that change nor on
//! others. A configuration that is wrong or cannot be applied changes nothing.

mod edits;
mod refusals;

use std::net::SocketAddr;
use std::path::Path;

use udp_fanout_lab::scrape::Metrics;
use udp_fanout_lab::{Daemon, DaemonConfig, Lab};

/// Only SIGHUP reloads the file, so that the test causes every reload.
const ON_SIGNAL: &str = "watch_config = false\n";

/// The program under test.
fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_udp-fanout"))
}

fn start(lab: &Lab, config: &DaemonConfig) -> Daemon {
    Daemon::start(&lab.gateway, binary(), config).unwrap()
}

/// Two listeners with all of the lab's receivers: `lab` and `second`, on port 9125 of the same address.
fn two_listeners(lab: &Lab, mode: &str) -> DaemonConfig {
    let mut config = DaemonConfig::for_lab(lab, mode);
    config.head = ON_SIGNAL.to_owned();
    let mut second = config.listeners[0].clone();
    (second.name, second.bind) = ("second".into(), second_listener().to_string());
    config.listeners.push(second);
    config
}

fn second_listener() -> SocketAddr {
    SocketAddr::from(([10, 0, 0, 1], 9125))
}

fn metrics(lab: &Lab) -> Metrics {
    Metrics::scrape(&lab.gateway, "127.0.0.1:9090".parse().unwrap(), "/metrics").unwrap()
}

fn reloads(lab: &Lab, result: &str) -> u64 {
    metrics(lab).sum("udp_fanout_config_reloads_total", &[("result", result)])
}
