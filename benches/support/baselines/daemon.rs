//! udp-fanout itself.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::Result;

use crate::bench::baselines::{ForwardingTask, RunningBaseline};
use crate::bench::cpu::cpu_seconds;
use crate::bench::testbed::{IN, LISTENER, Testbed};
use udp_fanout_lab::daemon::{Daemon, DaemonConfig, ListenerSpec};

struct Serving(Daemon);

impl RunningBaseline for Serving {
    fn cpu_seconds(&self) -> Option<f64> {
        cpu_seconds(&format!("/proc/{}/task", self.0.pid()), None)
    }
}

/// Starts the daemon in a mode, with one worker on the baseline's CPU. `settings` are further lines of the listener's settings.
///
/// # Errors
/// When the daemon does not become ready.
pub fn start(testbed: &Testbed, task: &ForwardingTask, mode: &str, settings: &str) -> Result<Box<dyn RunningBaseline>> {
    run(testbed, &config(task, mode, settings))
}

/// As [`start`] in user space, with two more downstreams.
///
/// # Errors
/// When the daemon does not become ready.
pub fn start_beside(
    testbed: &Testbed,
    task: &ForwardingTask,
    others: [SocketAddr; 2],
) -> Result<Box<dyn RunningBaseline>> {
    let mut config = config(task, "userspace", "");
    let others = others.into_iter().enumerate().map(|(n, address)| (format!("other{n}"), address, 1));
    config.listeners[0].downstreams.extend(others);
    run(testbed, &config)
}

fn run(testbed: &Testbed, config: &DaemonConfig) -> Result<Box<dyn RunningBaseline>> {
    let cpu = testbed.forwarder_cpu().to_string();
    let binary = Path::new(env!("CARGO_BIN_EXE_udp-fanout"));
    let daemon = Daemon::start_behind(&testbed.gateway, &["taskset", "-c", &cpu], binary, config)?;
    Ok(Box::new(Serving(daemon)))
}

/// The daemon's configuration for a task.
pub fn config(task: &ForwardingTask, mode: &str, settings: &str) -> DaemonConfig {
    let mut extra = String::new();
    if task.replicate {
        let _ = writeln!(extra, "policy = \"replicate\"");
    }
    let downstreams = Testbed::downstreams(task.downstreams).into_iter().enumerate();
    let listener = ListenerSpec {
        name: "bench".into(),
        bind: LISTENER.to_string(),
        interface: (mode != "userspace").then(|| IN.to_owned()),
        mode: mode.to_owned(),
        downstreams: downstreams.map(|(n, address)| (format!("d{n}"), address, 1)).collect(),
        samples: Vec::new(),
        extra,
        settings: format!("workers = 1\nrecv_buf_size = 4194304\n{settings}"),
    };
    DaemonConfig { listeners: vec![listener], metrics: Some(([127, 0, 0, 1], 9090).into()), head: String::new() }
}
