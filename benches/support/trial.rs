//! One load on one contender, and the search for the highest rate without loss.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;

use super::bed::Bed;
use super::contenders::{Running, cpu_seconds};
use super::generator::{Generator, Sent};
use super::sink::{Arrived, Latencies, Look};

/// How often a rate is tried before it counts as too high.
const TRIES: usize = 3;
/// How often a trial that other programs have disturbed is repeated before it counts after all.
const DISTURBANCES: usize = 6;
/// The part of a trial's length for which another program may have had a CPU.
const TOLERANCE: f64 = 0.05;
/// The part of what was sent that may still be on its way when the last of it is sent, if a rate is to count as carried. Else
/// what receive buffers hold would count, which in a short trial is a good part of it all.
const BEHIND: f64 = 0.03;
/// As exactly as `/proc/stat` knows, in seconds.
const TICKS: f64 = 0.012;

/// Trials so far that counted, and how many of them were disturbed all the same.
static COUNTED: AtomicUsize = AtomicUsize::new(0);
static DISTURBED: AtomicUsize = AtomicUsize::new(0);

/// The part of all trials so far that other programs have disturbed, 0 to 1.
pub fn disturbed() -> f64 {
    DISTURBED.load(Ordering::Relaxed) as f64 / COUNTED.load(Ordering::Relaxed).max(1) as f64
}

/// What a trial is about.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// How long the generator sends.
    pub length: Duration,
    /// Copies of each datagram that are to arrive: 1, or the number of receivers under replication.
    pub copies: u32,
}

/// Who takes part.
pub struct Setup<'a> {
    /// The network.
    pub bed: &'a Bed,
    /// Who sends.
    pub generator: Generator,
    /// Who forwards.
    pub contender: Box<dyn Running>,
}

/// What came of it.
#[derive(Debug, Clone)]
pub struct Trial {
    /// What was sent.
    pub sent: Sent,
    /// What has arrived, in the end.
    pub arrived: Arrived,
    /// What had arrived when the generator stopped, per second.
    pub rate: f64,
    /// CPU time in seconds: of the contender if it is a program, else of its CPU.
    pub busy: f64,
    /// Latencies, if the sink inspected.
    pub latencies: Option<Latencies>,
    /// Other programs had the generator's CPU, or the contender's, for more than a little of the time.
    pub disturbed: bool,
}

impl Trial {
    /// Copies that did not arrive.
    pub fn lost(&self, terms: Terms) -> u64 {
        (self.sent.datagrams * u64::from(terms.copies)).saturating_sub(self.arrived.datagrams)
    }

    /// True if nothing was lost and hardly anything was waiting at the end.
    pub fn is_carried(&self, terms: Terms) -> bool {
        let sent = self.sent.rate() * f64::from(terms.copies);
        self.lost(terms) == 0 && self.rate >= sent * (1.0 - BEHIND)
    }

    /// CPU time per copy that arrived, in nanoseconds.
    pub fn cpu(&self) -> f64 {
        self.busy * 1e9 / self.arrived.datagrams.max(1) as f64
    }
}

/// Sends at a rate for a while and waits for what arrives. Where other programs have disturbed that, again, for as long as
/// there is hope.
///
/// # Errors
/// When the generator or the sink fails.
pub fn run(at: &mut Setup<'_>, rate: f64, terms: Terms, inspect: bool) -> Result<Trial> {
    let mut trial = once(at, rate, terms, inspect)?;
    for _ in 1..DISTURBANCES {
        if !trial.disturbed {
            break;
        }
        trial = once(at, rate, terms, inspect)?;
    }
    COUNTED.fetch_add(1, Ordering::Relaxed);
    DISTURBED.fetch_add(usize::from(trial.disturbed), Ordering::Relaxed);
    Ok(trial)
}

/// As [`run`], but once, whatever others do meanwhile: their work is in nobody's CPU time.
///
/// # Errors
/// When the generator or the sink fails.
pub fn once(at: &mut Setup<'_>, rate: f64, terms: Terms, inspect: bool) -> Result<Trial> {
    let Setup { bed, generator, contender } = at;
    let load = generator.load();
    bed.sink.stamps_at(u16::try_from(load.content.stamp_at(load.size))?);
    bed.sink.look(if inspect { Look::Inspect { copies: terms.copies } } else { Look::Count })?;
    bed.sink.reset()?;
    generator.restart();
    let cpu = || contender.cpu_seconds().map_or_else(|| busy_seconds(bed.contender_cpu()), Ok);
    // Packets that the kernel has put off to a thread of its own are nobody else's work.
    let put_off = |cpu| kernel_thread_seconds(&format!("ksoftirqd/{cpu}"));
    let (before, busy_before) = (cpu()?, busy_seconds(bed.contender_cpu())?);
    let put_off_before = [put_off(bed.generator_cpu()), put_off(bed.contender_cpu())];
    let sent = generator.run(rate, terms.length)?;
    let at_end = bed.sink.arrived()?.datagrams;
    let arrived = bed.sink.settle(sent.datagrams * u64::from(terms.copies))?;
    let busy = cpu()? - before;
    let latencies = if inspect { Some(bed.sink.latencies()?) } else { None };
    // Of a forwarder in the kernel it cannot be told apart who was busy.
    let others = busy_seconds(bed.contender_cpu())? - busy_before - busy;
    let there = sent.held_up - (put_off(bed.generator_cpu()) - put_off_before[0]);
    let here = others - (put_off(bed.contender_cpu()) - put_off_before[1]);
    let disturbed = there > sent.seconds * TOLERANCE || here > sent.seconds * TOLERANCE + TICKS;
    Ok(Trial { sent, arrived, rate: at_end as f64 / sent.seconds, busy, latencies, disturbed })
}

/// Searches the highest rate that is carried without loss, in datagrams per second, right to `precision` (such as 0.03).
///
/// A trial that lost something is repeated, because a machine that does other things as well holds anyone up now and
/// then. The result is a rate that was offered and carried, not the one asked for. The search begins at `guess`, such as
/// what was found before, if there is one.
///
/// # Errors
/// When the generator or the sink fails.
pub fn lossless(at: &mut Setup<'_>, terms: Terms, precision: f64, guess: Option<f64>) -> Result<f64> {
    let (mut carried, mut lost_at) = (0.0f64, f64::INFINITY);
    let (mut rate, step) = guess.map_or((16_000.0, 2.0), |guess| (guess * 0.9, 1.15));
    loop {
        match try_rate(at, rate, terms)? {
            Some(offered) => {
                carried = carried.max(offered);
                // The generator does not get any faster: this is as far as can be seen.
                if offered < rate * 0.9 {
                    return Ok(carried);
                }
            }
            None => lost_at = rate,
        }
        rate = if lost_at.is_infinite() { rate * step } else { (carried * lost_at).sqrt().max(lost_at / 4.0) };
        if carried >= lost_at * (1.0 - precision) || lost_at < 500.0 {
            return Ok(carried);
        }
    }
}

/// The rate that was offered and carried without loss, if this one is carried.
fn try_rate(at: &mut Setup<'_>, rate: f64, terms: Terms) -> Result<Option<f64>> {
    for _ in 0..TRIES {
        let trial = run(at, rate, terms, false)?;
        if trial.is_carried(terms) {
            return Ok(Some(trial.sent.rate()));
        }
    }
    Ok(None)
}

/// The CPU time of the kernel's thread of this name, in seconds; 0 if it cannot be seen.
fn kernel_thread_seconds(name: &str) -> f64 {
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

/// The time that a CPU has worked since the start, in seconds: for programs, the kernel and interrupts alike.
///
/// # Errors
/// When `/proc/stat` does not say.
pub fn busy_seconds(cpu: usize) -> Result<f64> {
    let text = fs::read_to_string("/proc/stat")?;
    let name = format!("cpu{cpu} ");
    let line = text.lines().find(|line| line.starts_with(&name)).unwrap_or_default();
    let ticks: Vec<f64> = line.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
    // user, nice, system, then idle and waiting for disks, which are no work, then interrupts of both kinds.
    let busy: f64 = [0, 1, 2, 5, 6].iter().filter_map(|&column| ticks.get(column)).sum();
    Ok(busy / 100.0)
}
