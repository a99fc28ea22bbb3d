//! What a datagram costs at given rates: CPU time only, which says something even where other programs run.
//!
//! Rates without loss and latencies need a machine that does nothing else. CPU time is each one's own, and where more is sent
//! than anyone can carry, its inverse is what one CPU would carry.

use std::time::Duration;

use anyhow::Result;

use super::bed::Bed;
use super::results::Figure;
use super::suite::{self, Section};
use super::trial::{self, Terms};

/// How often a trial is repeated in which nothing was to be measured.
const TRIES: usize = 5;

/// Measures everyone's costs at each of these rates, in datagrams per second, once in each round, and says them as a table.
/// Ratios are within a round, to the contender named `beside`, or to the first.
///
/// # Errors
/// When a contender does not start, or the bench itself cannot go on.
pub fn measure(
    bed: &Bed,
    section: &Section,
    rates: &[f64],
    (rounds, length): (usize, Duration),
    beside: &str,
) -> Result<String> {
    let names: Vec<&str> = section.contenders.iter().map(|contender| contender.name.as_str()).collect();
    let beside = names.iter().position(|name| *name == beside).unwrap_or(0);
    let copies = section.task.copies();
    let terms = Terms { length, copies };
    // For each rate and contender, what each round has found: nanoseconds, and the part that arrived.
    let mut found = vec![vec![Vec::new(); names.len()]; rates.len()];
    for round in 1..=rounds {
        for (number, contender) in section.contenders.iter().enumerate() {
            let mut at = suite::begin(bed, section, contender)?;
            for (&rate, found) in rates.iter().zip(&mut found) {
                let mut trial = trial::once(&mut at, rate, terms, false)?;
                // Kept from sending by other programs, the generator has sent next to nothing.
                for _ in 0..TRIES {
                    if trial.busy > 0.0 {
                        break;
                    }
                    trial = trial::once(&mut at, rate, terms, false)?;
                }
                let sent = (trial.sent.datagrams * u64::from(copies)).max(1);
                found[number].push((trial.cpu(), 100.0 * trial.arrived.datagrams as f64 / sent as f64));
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
