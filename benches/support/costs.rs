//! The CPU time of a datagram at given rates, which can be measured even while other programs run.
//!
//! Lossless rates and latencies need an idle machine. CPU time is counted per process, and its inverse, at a rate above every
//! forwarder's limit, is the rate that one CPU could forward.

use std::time::Duration;

use anyhow::Result;

use super::results::Figure;
use super::run::{self, RunParameters};
use super::suite::{self, Section};
use super::testbed::Testbed;

/// How often a run without a usable result is repeated.
const TRIES: usize = 5;

/// Measures the cost of every baseline at each of these rates, in datagrams per second, once in each round, and returns a table.
/// Ratios are within a round, to the baseline named `beside`, or to the first.
///
/// # Errors
/// When a baseline does not start, or the benchmark itself fails.
pub fn measure(
    testbed: &Testbed,
    section: &Section,
    rates: &[f64],
    (rounds, length): (usize, Duration),
    beside: &str,
) -> Result<String> {
    let names: Vec<&str> = section.baselines.iter().map(|baseline| baseline.name.as_str()).collect();
    let beside = names.iter().position(|name| *name == beside).unwrap_or(0);
    let copies = section.task.copies();
    let parameters = RunParameters { length, copies };
    // For each rate and baseline, the results of each round: nanoseconds, and the share that arrived.
    let mut found = vec![vec![Vec::new(); names.len()]; rates.len()];
    for round in 1..=rounds {
        for (number, baseline) in section.baselines.iter().enumerate() {
            let mut at = suite::begin(testbed, section, baseline)?;
            for (&rate, found) in rates.iter().zip(&mut found) {
                let mut run = run::measure_once(&mut at, rate, parameters, false)?;
                // Other programs had the CPU, so the generator sent almost nothing.
                for _ in 0..TRIES {
                    if run.busy > 0.0 {
                        break;
                    }
                    run = run::measure_once(&mut at, rate, parameters, false)?;
                }
                let sent = (run.sent.datagrams * u64::from(copies)).max(1);
                found[number].push((run.cpu(), 100.0 * run.arrived.datagrams as f64 / sent as f64));
            }
        }
        eprintln!("{} {round}/{rounds}", section.key);
    }
    let mut text = format!("\n### {}\n\nMedians of {rounds}; ratios to {}.\n", section.title, names[beside]);
    for (rate, found) in rates.iter().zip(&found) {
        text += &format!("\n| {rate:.0} datagrams/s | CPU ns each | x | arrived, % |\n| --- | ---: | ---: | ---: |\n");
        for (name, values) in names.iter().zip(found) {
            let ratios: Vec<f64> = values.iter().zip(&found[beside]).map(|(own, other)| own.0 / other.0).collect();
            let [own, ratio] =
                [values.iter().map(|value| value.0).collect(), ratios].map(|all: Vec<f64>| Figure::of(&all));
            let arrived = Figure::of(&values.iter().map(|value| value.1).collect::<Vec<_>>());
            text += &format!(
                "| {name} | {:.0} ({:.0} to {:.0}) | {:.2} ({:.2} to {:.2}) | {:.1} |\n",
                own.median, own.low, own.high, ratio.median, ratio.low, ratio.high, arrived.median
            );
        }
    }
    Ok(text)
}
