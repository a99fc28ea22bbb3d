//! How fast datagrams are forwarded, beside what else could forward them: `make bench`, or, as root,
//! `cargo bench --bench fanout`.
//!
//! Each contender gets the same load in the same network, one after the other, several times round. Without arguments
//! everything is measured, `docs/benchmarks/` is written and the tables of `docs/BENCHMARKS.md` are replaced, unless other
//! programs have disturbed too many of the trials. With
//! `--quick`, which takes less than three minutes, or with words, which choose sections whose names begin so, the report
//! goes to `target/benchmarks/` or to `--out DIRECTORY`. `--rounds N` says how often, `--only 'NAME;NAME'` who takes part.
//!
//! `--costs RATE,RATE` measures nothing but the CPU time of each datagram at these rates, which needs no idle machine, and
//! only says it.

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
use bench::bed::Bed;
use bench::results::{Machine, Results};
use bench::suite::{self, Effort};
use bench::{control, costs, report, trial};

/// What the command line asks for.
#[derive(Default)]
struct Options {
    sections: Vec<String>,
    /// Names of contenders; none for all.
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

    /// Everything is measured thoroughly, so that the project's documents may say so.
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
        eprintln!("Other programs are running (load average {:.2}): figures will be too low.", machine.load_before);
    }
    let (effort, bed) = (options.effort(), Bed::build()?);
    let mut tables = Vec::new();
    // Whoever names sections gets them all, however short each is to be.
    let short = options.quick && options.sections.is_empty();
    for mut section in suite::sections(short).into_iter().filter(|section| options.wants(&section.key)) {
        section.contenders.retain(|contender| options.only.is_empty() || options.only.contains(&contender.name));
        if !options.costs.is_empty() {
            println!(
                "{}",
                costs::measure(&bed, &section, &options.costs, (effort.rounds, effort.length), suite::BARE)?
            );
            continue;
        }
        tables.push(suite::compare(&bed, &section, effort)?);
    }
    if !options.costs.is_empty() {
        return Ok(());
    }
    let control = if options.wants("control") { control::measure(&bed, effort.rounds.max(3))? } else { Vec::new() };
    let results = Results { machine, rounds: effort.rounds, disturbed: trial::disturbed(), tables, control };
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
        println!("docs/ is as it was: this machine does too much else. Run it again when it is idle.");
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
            // Given by cargo.
            "--bench" => {}
            "--quick" => options.quick = true,
            // Names have commas in them.
            "--only" => options.only = value()?.split(';').map(|name| name.trim().to_owned()).collect(),
            "--costs" => options.costs = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?,
            "--rounds" => options.rounds = Some(value()?.parse()?),
            "--out" => options.out = Some(value()?.into()),
            _ => options.sections.push(word),
        }
    }
    Ok(options)
}
