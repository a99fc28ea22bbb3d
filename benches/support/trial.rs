//! One load on one contender, and the search for the highest rate without loss.

use std::time::Duration;

use anyhow::Result;

use super::bed::Bed;
use super::contenders::Running;
use super::generator::{Generator, Sent};
use super::sink::{Arrived, Latencies, Look};

/// How often a rate is tried before it counts as too high.
const TRIES: usize = 3;
/// How often a trial that other programs have disturbed is repeated before it counts after all.
const DISTURBANCES: usize = 12;
/// The part of a trial's length for which another program may have had a CPU.
const TOLERANCE: f64 = 0.05;
/// As exactly as `/proc/stat` knows, in seconds.
const TICKS: f64 = 0.012;

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
    Ok(trial)
}

fn once(at: &mut Setup<'_>, rate: f64, terms: Terms, inspect: bool) -> Result<Trial> {
    let Setup { bed, generator, contender } = at;
    let load = generator.load();
    bed.sink.stamps_at(u16::try_from(load.content.stamp_at(load.size))?);
    bed.sink.look(if inspect { Look::Inspect { copies: terms.copies } } else { Look::Count })?;
    bed.sink.reset()?;
    generator.restart();
    let cpu = || contender.cpu_seconds().map_or_else(|| busy_seconds(bed.contender_cpu()), Ok);
    let (before, busy_before) = (cpu()?, busy_seconds(bed.contender_cpu())?);
    let sent = generator.run(rate, terms.length)?;
    let at_end = bed.sink.arrived()?.datagrams;
    let arrived = bed.sink.settle(sent.datagrams * u64::from(terms.copies))?;
    let busy = cpu()? - before;
    let latencies = if inspect { Some(bed.sink.latencies()?) } else { None };
    // Of a forwarder in the kernel it cannot be told apart who was busy.
    let others = busy_seconds(bed.contender_cpu())? - busy_before - busy;
    let disturbed = sent.held_up > sent.seconds * TOLERANCE || others > sent.seconds * TOLERANCE + TICKS;
    Ok(Trial { sent, arrived, rate: at_end as f64 / sent.seconds, busy, latencies, disturbed })
}

/// Searches the highest rate without loss, in datagrams per second, right to `precision` (such as 0.03).
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
        if trial.lost(terms) == 0 {
            return Ok(Some(trial.sent.rate()));
        }
    }
    Ok(None)
}

/// The time that a CPU has worked since the start, in seconds: for programs, the kernel and interrupts alike.
///
/// # Errors
/// When `/proc/stat` does not say.
pub fn busy_seconds(cpu: usize) -> Result<f64> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let name = format!("cpu{cpu} ");
    let line = text.lines().find(|line| line.starts_with(&name)).unwrap_or_default();
    let ticks: Vec<f64> = line.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
    // user, nice, system, then idle and waiting for disks, which are no work, then interrupts of both kinds.
    let busy: f64 = [0, 1, 2, 5, 6].iter().filter_map(|&column| ticks.get(column)).sum();
    Ok(busy / 100.0)
}
