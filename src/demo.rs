//! `udp-fanout demo`: sends numbered datagrams from one socket through a real daemon to three receivers, and checks
//! every one of them against what the receivers got, the daemon's counters and the kernel's filter.
//!
//! The demo runs in network namespaces that it makes (`udp_fanout_lab`, which the network tests use too) and removes
//! again, also after Ctrl-C. It does not touch the host's network. The daemon is this binary, started a second time.

mod checks;
mod progress;
mod report;

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use nix::unistd::geteuid;
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, INGRESS, Lab, Metrics, Place, Report, Sender};

use self::progress::{announce_if_slow, show_progress};
use crate::model::Mode;
use crate::output::print;

/// This binary, even if its file has been replaced or removed since it was started.
const OWN_BINARY: &str = "/proc/self/exe";
/// Programs of the package iproute2 that the demo runs.
const TOOLS: [&str; 2] = ["ip", "tc"];

/// What to demonstrate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DemoOptions {
    /// The datapath of the demo's only listener.
    pub mode: Mode,
    /// The number of datagrams to send.
    pub count: u64,
}

/// What the receivers, the daemon and the kernel report after the last datagram.
struct DemoResult {
    report: Report,
    /// The time that sending took.
    duration: Duration,
    metrics: Metrics,
    /// The output of `tc filter show` while the daemon ran, and after it had ended.
    filter: String,
    filter_afterwards: String,
    gateway_addresses: Vec<IpAddr>,
    exit_status: String,
}

/// Runs the demo and prints what happens. True if every check passed.
///
/// # Errors
/// Without root, without `ip` and `tc`, or if the network or the daemon cannot be started.
pub fn run(options: DemoOptions) -> Result<bool> {
    check_requirements()?;
    let lab = announce_if_slow("making the network namespaces", || {
        Lab::builder().receivers([Place::OtherInterface; 3]).build()
    })?;
    print(report::picture(&lab, options).as_bytes())?;
    let result = forward(&lab, options)?;
    print(report::table(&result, options.mode).as_bytes())?;
    print(report::evidence(&result).as_bytes())?;
    let checks = checks::check(&result, options);
    print(checks::render(&checks).as_bytes())?;
    Ok(checks.iter().all(|check| check.passed))
}

fn check_requirements() -> Result<()> {
    if !geteuid().is_root() {
        bail!("the demo needs root to make network namespaces: run `sudo udp-fanout demo`");
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let exists = |tool: &&str| std::env::split_paths(&path).any(|directory| directory.join(tool).is_file());
    let missing: Vec<&str> = TOOLS.iter().copied().filter(|tool| !exists(tool)).collect();
    if !missing.is_empty() {
        bail!(
            "the demo cannot find {} in $PATH: install iproute2 (on Debian and Ubuntu: apt-get install iproute2), or add \
             /usr/sbin and /sbin to $PATH",
            missing.join(" and ")
        );
    }
    Ok(())
}

/// Starts the daemon in the lab's gateway, sends everything through it, and collects the results.
fn forward(lab: &Lab, options: DemoOptions) -> Result<DemoResult> {
    let collectors = Collectors::start(lab, Expect::OneOfThem)?;
    let mut config = DaemonConfig::for_lab(lab, options.mode.name());
    if options.mode == Mode::Userspace {
        // Several workers may overtake each other. One worker on one CPU keeps the order, which the demo checks.
        config = config.settings("workers = 1\npin_cpus = true");
    }
    let mut daemon =
        announce_if_slow("starting the daemon", || Daemon::start(&lab.gateway, Path::new(OWN_BINARY), &config))?;
    let mut sender = Sender::in_lab(lab)?;
    let duration = show_progress(collectors.progress(), options.count, || sender.send(options.count, &collectors))?;
    let report = announce_if_slow("waiting for the last datagrams", || collectors.finish(&[&sender]))?;
    let show_filter = || lab.gateway.tc(&format!("filter show dev {INGRESS} ingress"));
    let metrics = daemon.metrics(&lab.gateway)?;
    let filter = show_filter()?;
    if !report.is_perfect() {
        print(format!("{report}\nThe daemon's log:\n{}\n", daemon.log()).as_bytes())?;
    }
    let (status, _, log) = announce_if_slow("stopping the daemon", || daemon.stop())?;
    if !status.success() {
        print(format!("The daemon's log:\n{log}\n").as_bytes())?;
    }
    Ok(DemoResult {
        report,
        duration,
        metrics,
        filter,
        filter_afterwards: show_filter()?,
        gateway_addresses: lab.gateway_addresses()?,
        exit_status: status.to_string(),
    })
}

#[cfg(test)]
mod tests;
