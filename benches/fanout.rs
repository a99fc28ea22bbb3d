//! How fast datagrams are forwarded, beside what else could forward them: `cargo bench --bench fanout`, as root.
//!
//! Each contender gets the same load in the same network, one after the other, several times round. Arguments name the
//! contenders that take part, by the beginnings of their names; `--rounds N`, `--size BYTES`, `--downstreams N`, `--many`
//! choose the rest.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a bench that cannot go on should stop, and prints"
)]

#[path = "support/mod.rs"]
mod bench;
#[path = "../tests/support/mod.rs"]
mod support;

use std::time::Duration;

use anyhow::{Context, Result};
use bench::bed::Bed;
use bench::contenders::bare::{self, Calls};
use bench::contenders::{Contender, Task, daemon, nginx};
use bench::generator::Load;
use bench::trial::{self, Setup, Terms};

/// What the command line asks for.
struct Options {
    names: Vec<String>,
    rounds: usize,
    size: usize,
    downstreams: u32,
    many: bool,
}

fn main() -> Result<()> {
    let options = options()?;
    let bed = Bed::build()?;
    let mut contenders = contenders();
    contenders.retain(|contender| {
        options.names.is_empty() || options.names.iter().any(|name| contender.name.starts_with(name.as_str()))
    });
    let task = Task { downstreams: options.downstreams, replicate: false };
    let load = if options.many { Load::many_senders(options.size) } else { Load::one_sender(options.size) };
    println!("{load:?}, {task:?}");
    println!(
        "{:<16} {:>11} {:>11} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "", "lossless/s", "overload/s", "ns each", "ns, half", "p50 us", "p99 us", "p99.9 us"
    );
    for _ in 0..options.rounds {
        for contender in &contenders {
            measure(&bed, contender, &task, load).with_context(|| contender.name.clone())?;
        }
    }
    Ok(())
}

/// The lossless rate; what is carried at twice that; latency at half of it.
fn measure(bed: &Bed, contender: &Contender, task: &Task, load: Load) -> Result<()> {
    let terms = Terms { length: Duration::from_millis(300), copies: 1 };
    let mut at = Setup { bed, generator: bed.sender(load)?, contender: (contender.start)(bed, task)? };
    // Neighbours are resolved and memory is touched.
    trial::run(&mut at, 1000.0, Terms { length: Duration::from_millis(50), copies: 1 }, false)?;
    let best = trial::lossless(&mut at, terms, 0.04)?;
    let over = trial::run(&mut at, best * 2.0, terms, false)?;
    let half = trial::run(&mut at, best / 2.0, terms, true)?;
    let latency = |share| half.latencies.as_ref().and_then(|all| all.quantile(share)).unwrap_or(0) as f64 / 1e3;
    println!(
        "{:<16} {best:>11.0} {:>11.0} {:>9.0} {:>9.0} {:>9.1} {:>9.1} {:>9.1}",
        contender.name,
        over.rate,
        over.cpu(),
        half.cpu(),
        latency(0.5),
        latency(0.99),
        latency(0.999)
    );
    Ok(())
}

fn contenders() -> Vec<Contender> {
    let joined = Calls { take: 32, joined: true };
    let single = Calls { take: 64, joined: false };
    vec![
        Contender::program("bare", move |bed, task| bare::start(bed, task, joined)),
        Contender::program("bare single", move |bed, task| bare::start(bed, task, single)),
        Contender::program("udp-fanout", |bed, task| daemon::start(bed, task, "userspace", "")),
        Contender::program("nginx packet", |bed, task| nginx::start(bed, task, true)),
        Contender::program("nginx session", |bed, task| nginx::start(bed, task, false)),
    ]
}

fn options() -> Result<Options> {
    let mut options = Options { names: Vec::new(), rounds: 3, size: 100, downstreams: 3, many: false };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            // Given by cargo.
            "--bench" => {}
            "--rounds" => options.rounds = value()?.parse()?,
            "--size" => options.size = value()?.parse()?,
            "--downstreams" => options.downstreams = value()?.parse()?,
            "--many" => options.many = true,
            _ => options.names.push(word),
        }
    }
    Ok(options)
}
