//! Who is compared: each one way of getting datagrams from the listener to the downstreams.

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

use super::bed::{Bed, PORT};
use udp_fanout_lab::cleanup;

/// What a contender is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Task {
    /// How many downstreams there are.
    pub downstreams: u32,
    /// Each gets a copy, rather than one of them in turn.
    pub replicate: bool,
}

impl Task {
    /// Copies of each datagram that are to arrive.
    pub fn copies(&self) -> u32 {
        if self.replicate { self.downstreams } else { 1 }
    }
}

/// A contender at work, until it is dropped.
pub trait Running {
    /// The CPU time it has taken so far, in seconds, including what the kernel did in its name; none if it is the kernel.
    fn cpu_seconds(&self) -> Option<f64>;
}

/// How a contender is started.
pub type Start = Box<dyn Fn(&Bed, &Task) -> Result<Box<dyn Running>>>;

/// One of those compared.
pub struct Contender {
    /// How reports name it.
    pub name: String,
    /// The kernel does the forwarding, on the contender's CPU.
    pub in_kernel: bool,
    /// Senders send to the downstreams themselves: the yardstick, without any balancing.
    pub direct: bool,
    /// What it forwards arrives byte by byte as it was sent.
    pub keeps: bool,
    /// Starts it.
    pub start: Start,
}

impl Contender {
    /// A program that forwards.
    pub fn program(name: &str, start: impl Fn(&Bed, &Task) -> Result<Box<dyn Running>> + 'static) -> Contender {
        Contender { name: name.into(), in_kernel: false, direct: false, keeps: true, start: Box::new(start) }
    }

    /// Something in the kernel that forwards.
    pub fn kernel(name: &str, start: impl Fn(&Bed, &Task) -> Result<Box<dyn Running>> + 'static) -> Contender {
        Contender { in_kernel: true, ..Contender::program(name, start) }
    }

    /// The kernel's own forwarding, for senders that name the downstreams themselves.
    pub fn direct(name: &str) -> Contender {
        Contender { direct: true, ..Contender::kernel(name, netfilter::nothing) }
    }

    /// As this one, which changes what it forwards: number and time cannot be read after it.
    pub fn changes(self) -> Contender {
        Contender { keeps: false, ..self }
    }
}

/// Keeps the calling thread on one CPU.
///
/// # Errors
/// When the kernel refuses.
pub fn stay_on(cpu: usize) -> Result<()> {
    let mut only = CpuSet::new();
    only.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &only).context("cannot stay on one CPU")
}

/// A process on the contender's CPU. It is asked to end when dropped, and waited for.
pub struct Process {
    child: Child,
    /// What it reads goes with it.
    _directory: Option<tempfile::TempDir>,
}

impl Running for Process {
    fn cpu_seconds(&self) -> Option<f64> {
        cpu_seconds(&format!("/proc/{}/task", self.child.id()), None)
    }
}

/// The CPU time of the threads listed in a `/proc/PID/task` directory, or of one of them.
pub fn cpu_seconds(tasks: &str, only: Option<Pid>) -> Option<f64> {
    let mut nanoseconds = 0;
    for task in fs::read_dir(tasks).ok()?.flatten() {
        if only.is_some_and(|only| task.file_name().to_string_lossy() != only.to_string()) {
            continue;
        }
        // A thread that ends meanwhile has had its time.
        let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        nanoseconds += text.split_whitespace().next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
    }
    Some(nanoseconds as f64 / 1e9)
}

impl Process {
    /// Starts it. A directory that it reads from is removed after its end.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(bed: &Bed, command: &mut Command, directory: Option<tempfile::TempDir>) -> Result<Process> {
        let mut only = CpuSet::new();
        only.set(bed.contender_cpu())?;
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
    /// When it ends instead, or takes too long.
    pub fn listens(&mut self) -> Result<()> {
        let table = format!("/proc/{}/net/udp", self.child.id());
        let port = format!(":{PORT:04X} ");
        let start = Instant::now();
        while !fs::read_to_string(&table).is_ok_and(|text| text.contains(&port)) {
            self.alive()?;
            anyhow::ensure!(start.elapsed() < Duration::from_secs(10), "it does not listen after ten seconds");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Fails if it has ended.
    ///
    /// # Errors
    /// Says how it ended.
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
        cleanup::registry().forget_child(pid);
        let _ = self.child.wait();
    }
}
