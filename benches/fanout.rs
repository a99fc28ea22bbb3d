//! The speed of udp-fanout and other forwarders: `make bench`, or, as root,
//! `cargo bench --bench fanout`.
//!
//! Each forwarder gets the same load in the same network, one after the other, for several rounds. Without arguments,
//! everything is measured, `docs/benchmarks/` is written and the tables of `docs/BENCHMARKS.md` are replaced, unless other
//! programs disturbed too many runs. With `--quick` (less than three minutes), or with words that select the sections
//! whose names begin with them, the report goes to `target/benchmarks/` or to `--out DIRECTORY`. `--rounds N` sets the number
//! of rounds, `--only 'NAME;NAME'` selects forwarders.
//!
//! `--costs RATE,RATE` only prints the CPU time of each datagram at these rates, which needs no idle machine.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a bench that cannot go on should stop, and prints"
)]

#[path = "support/mod.rs"]
mod bench;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use bench::results::{Machine, Results};
use bench::suite::{self, Effort};
use bench::testbed::Testbed;
use bench::{control, costs, report, run};

/// The command line.
#[derive(Default)]
struct Options {
    sections: Vec<String>,
    /// Names of baselines; none for all.
    only: Vec<String>,
    rounds: Option<usize>,
    quick: bool,
    costs: Vec<f64>,
    out: Option<PathBuf>,
}

impl Options {
    fn wants(&self, section: &str) -> bool {
        self.sections.is_empty() || self.sections.iter().any(|name| section.starts_with(name.as_str()))
    }

    /// True for a complete run, whose figures go into the documents.
    fn full(&self) -> bool {
        self.sections.is_empty() && self.only.is_empty() && !self.quick && self.out.is_none()
    }

    fn effort(&self) -> Effort {
        if self.quick {
            return Effort { rounds: self.rounds.unwrap_or(1), length: Duration::from_millis(150), precision: 0.08 };
        }
        Effort { rounds: self.rounds.unwrap_or(5), length: Duration::from_millis(300), precision: 0.04 }
    }
}

fn main() -> Result<()> {
    let options = options()?;
    let machine = Machine::here();
    if machine.load_before > 0.5 {
        eprintln!("Other programs are running (load average {:.2}): the figures will be too low.", machine.load_before);
    }
    let (effort, testbed) = (options.effort(), Testbed::build()?);
    let mut tables = Vec::new();
    // Sections that are named are measured even with --quick.
    let short = options.quick && options.sections.is_empty();
    for mut section in suite::sections(short).into_iter().filter(|section| options.wants(&section.key)) {
        section.baselines.retain(|baseline| options.only.is_empty() || options.only.contains(&baseline.name));
        if !options.costs.is_empty() {
            println!(
                "{}",
                costs::measure(&testbed, &section, &options.costs, (effort.rounds, effort.length), suite::BARE)?
            );
            continue;
        }
        tables.push(suite::compare(&testbed, &section, effort)?);
    }
    if !options.costs.is_empty() {
        return Ok(());
    }
    let control = if options.wants("control") { control::measure(&testbed, effort.rounds.max(3))? } else { Vec::new() };
    let results = Results { machine, rounds: effort.rounds, disturbed: run::disturbed_share(), tables, control };
    let publish = options.full() && results.to_be_trusted();
    println!("\n{}", report::tables(&results, "."));
    let project = Path::new(env!("CARGO_MANIFEST_DIR"));
    let directory = match &options.out {
        Some(directory) => directory.clone(),
        None if publish => project.join("docs/benchmarks"),
        None => Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("benchmarks"),
    };
    report::write(&results, &directory)?;
    println!("Written: {}", directory.display());
    if options.full() && !publish {
        println!(
            "docs/ is unchanged: other programs disturbed too many runs. Run the benchmark again on an idle machine."
        );
    }
    if publish {
        report::insert(&results, &project.join("docs/BENCHMARKS.md"), "benchmarks")?;
        println!("Written: docs/BENCHMARKS.md");
    }
    Ok(())
}

fn options() -> Result<Options> {
    let mut options = Options::default();
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            // Cargo passes this argument.
            "--bench" => {}
            "--quick" => options.quick = true,
            // Names contain commas.
            "--only" => options.only = value()?.split(';').map(|name| name.trim().to_owned()).collect(),
            "--costs" => options.costs = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?,
            "--rounds" => options.rounds = Some(value()?.parse()?),
            "--out" => options.out = Some(value()?.into()),
            _ => options.sections.push(word),
        }
    }
    Ok(options)
}
