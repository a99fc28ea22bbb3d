//! A run, which is one load on one forwarder, and the search for the highest rate without loss.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Result;

use super::baselines::RunningBaseline;
use super::cpu::{busy_seconds, kernel_thread_seconds};
use super::generator::{Generator, Sent};
use super::sink::{Arrived, Latencies, Look};
use super::testbed::Testbed;

/// How often a rate is tried before it counts as too high.
const TRIES: usize = 3;
/// How often a run is repeated that other programs have disturbed, before it counts anyway.
const DISTURBANCES: usize = 6;
/// The share of a run's length for which another program may have one of the CPUs.
const TOLERANCE: f64 = 0.05;
/// The share of the datagrams that may still be in flight when the last one is sent. Beyond that, a rate does not count as
/// carried: in a short run, receive buffers hold a large part of all datagrams.
const BEHIND: f64 = 0.03;
/// The resolution of `/proc/stat`, in seconds, and a little more.
const TICKS: f64 = 0.012;

/// The number of runs that counted, and how many of them were disturbed.
static COUNTED: AtomicUsize = AtomicUsize::new(0);
static DISTURBED: AtomicUsize = AtomicUsize::new(0);

/// The share of all runs so far that other programs have disturbed, 0 to 1.
pub fn disturbed_share() -> f64 {
    DISTURBED.load(Ordering::Relaxed) as f64 / COUNTED.load(Ordering::Relaxed).max(1) as f64
}

/// The parameters of a run.
#[derive(Debug, Clone, Copy)]
pub struct RunParameters {
    /// How long the generator sends.
    pub length: Duration,
    /// Expected copies of each datagram: 1, or the number of receivers under replication.
    pub copies: u32,
}

/// The participants of a run.
pub struct RunSetup<'a> {
    pub testbed: &'a Testbed,
    pub generator: Generator,
    /// The forwarder, started.
    pub baseline: Box<dyn RunningBaseline>,
}

/// The results of a run.
#[derive(Debug, Clone)]
pub struct Run {
    pub sent: Sent,
    /// Received in total.
    pub arrived: Arrived,
    /// Received by the time when the generator stopped, in datagrams per second.
    pub rate: f64,
    /// CPU time in seconds: of the forwarder if it is a program, else of its CPU.
    pub busy: f64,
    /// Latencies, if the sink inspected.
    pub latencies: Option<Latencies>,
    /// Other programs had the generator's CPU or the forwarder's for more than [`TOLERANCE`].
    pub disturbed: bool,
}

impl Run {
    /// Copies that did not arrive.
    pub fn lost(&self, parameters: RunParameters) -> u64 {
        (self.sent.datagrams * u64::from(parameters.copies)).saturating_sub(self.arrived.datagrams)
    }

    /// True if nothing was lost and at most [`BEHIND`] was in flight at the end.
    pub fn is_carried(&self, parameters: RunParameters) -> bool {
        let sent = self.sent.rate() * f64::from(parameters.copies);
        self.lost(parameters) == 0 && self.rate >= sent * (1.0 - BEHIND)
    }

    /// CPU time per copy that arrived, in nanoseconds.
    pub fn cpu(&self) -> f64 {
        self.busy * 1e9 / self.arrived.datagrams.max(1) as f64
    }
}

/// Sends at a rate for a while and counts what arrives. Repeats a run that other programs have disturbed, up to
/// [`DISTURBANCES`] times.
///
/// # Errors
/// When the generator or the sink fails.
pub fn measure(at: &mut RunSetup<'_>, rate: f64, parameters: RunParameters, inspect: bool) -> Result<Run> {
    let mut run = measure_once(at, rate, parameters, inspect)?;
    for _ in 1..DISTURBANCES {
        if !run.disturbed {
            break;
        }
        run = measure_once(at, rate, parameters, inspect)?;
    }
    COUNTED.fetch_add(1, Ordering::Relaxed);
    DISTURBED.fetch_add(usize::from(run.disturbed), Ordering::Relaxed);
    Ok(run)
}

/// As [`measure`], but only once, even if other programs disturb it. Their work is not part of any CPU time.
///
/// # Errors
/// When the generator or the sink fails.
pub fn measure_once(at: &mut RunSetup<'_>, rate: f64, parameters: RunParameters, inspect: bool) -> Result<Run> {
    let RunSetup { testbed, generator, baseline } = at;
    let load = generator.load();
    testbed.sink.stamps_at(u16::try_from(load.content.stamp_at(load.size))?);
    testbed.sink.look(if inspect { Look::Inspect { copies: parameters.copies } } else { Look::Count })?;
    testbed.sink.reset()?;
    generator.restart();
    let cpu = || baseline.cpu_seconds().map_or_else(|| busy_seconds(testbed.forwarder_cpu()), Ok);
    // Packets that the kernel defers to ksoftirqd are not the work of other programs.
    let put_off = |cpu| kernel_thread_seconds(&format!("ksoftirqd/{cpu}"));
    let (before, busy_before) = (cpu()?, busy_seconds(testbed.forwarder_cpu())?);
    let put_off_before = [put_off(testbed.generator_cpu()), put_off(testbed.forwarder_cpu())];
    let sent = generator.run(rate, parameters.length)?;
    let at_end = testbed.sink.arrived()?.datagrams;
    let arrived = testbed.sink.settle(sent.datagrams * u64::from(parameters.copies))?;
    let busy = cpu()? - before;
    let latencies = if inspect { Some(testbed.sink.latencies()?) } else { None };
    // For a forwarder in the kernel, its own work and that of others cannot be told apart.
    let others = busy_seconds(testbed.forwarder_cpu())? - busy_before - busy;
    let there = sent.held_up - (put_off(testbed.generator_cpu()) - put_off_before[0]);
    let here = others - (put_off(testbed.forwarder_cpu()) - put_off_before[1]);
    let disturbed = there > sent.seconds * TOLERANCE || here > sent.seconds * TOLERANCE + TICKS;
    Ok(Run { sent, arrived, rate: at_end as f64 / sent.seconds, busy, latencies, disturbed })
}

/// Searches for the highest rate that is carried without loss, in datagrams per second, to within `precision` (such as 0.03).
///
/// A run with losses is repeated, because other programs may have caused them. The result is a rate that was really offered and
/// carried. The search begins at `guess`, such as an earlier result, if there is one.
///
/// # Errors
/// When the generator or the sink fails.
pub fn find_lossless_rate(
    at: &mut RunSetup<'_>,
    parameters: RunParameters,
    precision: f64,
    guess: Option<f64>,
) -> Result<f64> {
    let (mut carried, mut lost_at) = (0.0f64, f64::INFINITY);
    let (mut rate, step) = guess.map_or((16_000.0, 2.0), |guess| (guess * 0.9, 1.15));
    loop {
        match try_rate(at, rate, parameters)? {
            Some(offered) => {
                carried = carried.max(offered);
                // The generator is at its limit, so no higher rate can be measured.
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
fn try_rate(at: &mut RunSetup<'_>, rate: f64, parameters: RunParameters) -> Result<Option<f64>> {
    for _ in 0..TRIES {
        let run = measure(at, rate, parameters, false)?;
        if run.is_carried(parameters) {
            return Ok(Some(run.sent.rate()));
        }
    }
    Ok(None)
}
