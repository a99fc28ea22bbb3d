//! CPUs: which ones to use, pinning threads to them, and the time that threads and CPUs have worked.

use std::collections::BTreeMap;
use std::fs;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// The first two CPUs that this process may use.
///
/// # Errors
/// When there is only one CPU.
pub fn two_cpus() -> Result<[usize; 2]> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let mut cpus = (0..nix::sched::CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false));
    match (cpus.next(), cpus.next()) {
        (Some(first), Some(second)) => Ok([first, second]),
        _ => anyhow::bail!("benchmarks need two CPUs: one for the generator, one for the forwarder"),
    }
}

/// Keeps the calling thread on one CPU.
///
/// # Errors
/// When the affinity cannot be set.
pub fn pin_thread(cpu: usize) -> Result<()> {
    let mut only = CpuSet::new();
    only.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &only).context("cannot pin a thread to a CPU")
}

/// The CPU time of the threads listed in a `/proc/PID/task` directory, or of one of them.
pub fn cpu_seconds(tasks: &str, only: Option<Pid>) -> Option<f64> {
    let mut nanoseconds = 0;
    for task in fs::read_dir(tasks).ok()?.flatten() {
        if only.is_some_and(|only| task.file_name().to_string_lossy() != only.to_string()) {
            continue;
        }
        // A thread may have ended in the meantime.
        let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        nanoseconds += text.split_whitespace().next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
    }
    Some(nanoseconds as f64 / 1e9)
}

/// The CPU time of the kernel thread with this name, in seconds; 0 if it cannot be read.
pub fn kernel_thread_seconds(name: &str) -> f64 {
    static TASKS: Mutex<BTreeMap<String, Option<String>>> = Mutex::new(BTreeMap::new());
    let mut tasks = TASKS.lock().unwrap_or_else(PoisonError::into_inner);
    let tasks = tasks.entry(name.to_owned()).or_insert_with(|| {
        let is_it = |entry: &fs::DirEntry| {
            fs::read_to_string(entry.path().join("comm")).is_ok_and(|comm| comm.trim_end() == name)
        };
        let entry = fs::read_dir("/proc").ok()?.flatten().find(is_it)?;
        Some(entry.path().join("task").display().to_string())
    });
    tasks.as_ref().and_then(|tasks| cpu_seconds(tasks, None)).unwrap_or(0.0)
}

/// The time that a CPU has been busy since boot, in seconds: with programs, the kernel and interrupts.
///
/// # Errors
/// When `/proc/stat` cannot be read.
pub fn busy_seconds(cpu: usize) -> Result<f64> {
    let text = fs::read_to_string("/proc/stat")?;
    let name = format!("cpu{cpu} ");
    let line = text.lines().find(|line| line.starts_with(&name)).unwrap_or_default();
    let ticks: Vec<f64> = line.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
    // user, nice, system, (idle, iowait: not busy), irq, softirq.
    let busy: f64 = [0, 1, 2, 5, 6].iter().filter_map(|&column| ticks.get(column)).sum();
    Ok(busy / 100.0)
}
