//! The forwarders that are compared, udp-fanout among them. Each gets datagrams from the listener to the downstreams.

pub mod bare;
pub mod daemon;
pub mod netfilter;
pub mod nginx;
pub mod programs;
pub mod uring;

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::cpu::cpu_seconds;
use super::testbed::{PORT, Testbed};
use udp_fanout_lab::cleanup;

/// The work of a forwarder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForwardingTask {
    /// Number of downstreams.
    pub downstreams: u32,
    /// Each downstream gets a copy. Otherwise, one of them does, in turn.
    pub replicate: bool,
}

impl ForwardingTask {
    /// Expected copies of each datagram.
    pub fn copies(&self) -> u32 {
        if self.replicate { self.downstreams } else { 1 }
    }
}

/// A started forwarder. Dropping it stops it.
pub trait RunningBaseline {
    /// CPU time so far, in seconds, including system time. None for forwarders in the kernel.
    fn cpu_seconds(&self) -> Option<f64>;
}

/// Starts a forwarder.
pub type Start = Box<dyn Fn(&Testbed, &ForwardingTask) -> Result<Box<dyn RunningBaseline>>>;

/// A forwarder that is compared.
pub struct Baseline {
    /// The name in reports.
    pub name: String,
    /// The kernel forwards, on the forwarder's CPU.
    pub in_kernel: bool,
    /// Senders address the downstreams themselves, without any balancing.
    pub direct: bool,
    /// The forwarder does not change payloads.
    pub keeps: bool,
    pub start: Start,
}

impl Baseline {
    /// A forwarder that is a program.
    pub fn program(
        name: &str,
        start: impl Fn(&Testbed, &ForwardingTask) -> Result<Box<dyn RunningBaseline>> + 'static,
    ) -> Baseline {
        Baseline { name: name.into(), in_kernel: false, direct: false, keeps: true, start: Box::new(start) }
    }

    /// A forwarder in the kernel.
    pub fn kernel(
        name: &str,
        start: impl Fn(&Testbed, &ForwardingTask) -> Result<Box<dyn RunningBaseline>> + 'static,
    ) -> Baseline {
        Baseline { in_kernel: true, ..Baseline::program(name, start) }
    }

    /// The kernel's own forwarding, for senders that address the downstreams.
    pub fn direct(name: &str) -> Baseline {
        Baseline { direct: true, ..Baseline::kernel(name, netfilter::nothing) }
    }

    /// The same, but it changes payloads, so number and time cannot be read from them.
    pub fn changes(self) -> Baseline {
        Baseline { keeps: false, ..self }
    }
}

/// A process on the forwarder's CPU. Dropping it sends SIGTERM and waits for its end.
pub struct Process {
    child: Child,
    /// A directory that is removed after the process has ended.
    _directory: Option<tempfile::TempDir>,
}

impl RunningBaseline for Process {
    fn cpu_seconds(&self) -> Option<f64> {
        cpu_seconds(&format!("/proc/{}/task", self.child.id()), None)
    }
}

impl Process {
    /// Starts the process. `directory`, which it may read from, is removed after its end.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn start(testbed: &Testbed, command: &mut Command, directory: Option<tempfile::TempDir>) -> Result<Process> {
        let mut only = CpuSet::new();
        only.set(testbed.forwarder_cpu())?;
        let pin = move || Ok(sched_setaffinity(Pid::from_raw(0), &only)?);
        // SAFETY: between fork and exec only a system call is made; nothing allocates or takes a lock.
        unsafe { command.pre_exec(pin) };
        let mut registry = cleanup::registry();
        let child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        registry.add_child(Pid::from_raw(child.id().cast_signed()));
        Ok(Process { child, _directory: directory })
    }

    /// Waits until a socket in its namespace is bound to the listener's port.
    ///
    /// # Errors
    /// When the process ends, or takes too long.
    pub fn listens(&mut self) -> Result<()> {
        let table = format!("/proc/{}/net/udp", self.child.id());
        let port = format!(":{PORT:04X} ");
        let start = Instant::now();
        while !fs::read_to_string(&table).is_ok_and(|text| text.contains(&port)) {
            self.alive()?;
            anyhow::ensure!(start.elapsed() < Duration::from_secs(10), "it has not bound its port after ten seconds");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Fails if the process has ended.
    ///
    /// # Errors
    /// With the exit status of the process.
    pub fn alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            anyhow::bail!("it ended: {status}");
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        let _ = kill(pid, Signal::SIGTERM);
        cleanup::registry().unregister_child(pid);
        let _ = self.child.wait();
    }
}
