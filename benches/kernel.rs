//! Compares the kernel program with the minimum that any program could do: `make bench-kernel`.
//!
//! Every path is set up, measured and removed in turn, for several rounds, so that other programs on the machine
//! affect all paths equally; the result is the median of the ratios within a round. The figures go into `docs/BENCHMARKS.md`, unless
//! `-- --quick`, which is shorter and coarser, or `-- --only WORDS`, for comparisons whose title has these words, is given.
//!
//! `-- --against BINARY`, given any number of times, compares other builds of the daemon with this one; `-- --rounds N` sets
//! the number of rounds. Small differences show only in the ratio to the floor over many rounds.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a bench that cannot go on should stop, and prints"
)]

#[path = "support/mod.rs"]
mod bench;
#[path = "kernel/paths.rs"]
mod paths;
#[path = "kernel/pods.rs"]
mod pods;
#[path = "kernel/program_cost.rs"]
mod program_cost;

use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use bench::report;
use paths::BenchPath;
use pods::Pods;
use serde::Serialize;

/// Payload of each datagram in bytes.
const SIZE: usize = 100;

/// Paths that do the same work. Ratios are relative to the first one.
struct Comparison {
    title: &'static str,
    /// The pods that receive.
    pods: u8,
    /// Datagrams must leave by the device's egress path.
    by_device: bool,
    /// Senders address the pods, not the listener.
    foreign: bool,
    /// Copies of each datagram.
    copies: u64,
    paths: &'static [(&'static str, BenchPath)],
}

const ALONE: &str = "The programs alone (ns for each datagram)";
const OURS: &str = "udp-fanout";

const COMPARISONS: [Comparison; 4] = [
    Comparison {
        title: "Into local pods, three of them",
        pods: 3,
        by_device: false,
        foreign: false,
        copies: 1,
        paths: &[
            ("floor: one pod, known, bpf_redirect_peer", BenchPath::Reference("floor_pod")),
            (OURS, BenchPath::Balance(3)),
            ("the obvious way: bpf_redirect_neigh", BenchPath::Reference("obvious")),
            ("plain kernel forwarding, no balancing", BenchPath::Forwarding),
        ],
    },
    Comparison {
        title: "Out of a device, three receivers",
        pods: 3,
        by_device: true,
        foreign: false,
        copies: 1,
        paths: &[
            ("floor: one receiver, known, bpf_redirect", BenchPath::Reference("floor_device")),
            (OURS, BenchPath::Balance(3)),
            // As many receivers as the floor has, so that devices and receivers cost the same in both.
            ("udp-fanout with one receiver", BenchPath::Balance(1)),
            ("the obvious way: bpf_redirect_neigh", BenchPath::Reference("obvious")),
            ("plain kernel forwarding, no balancing", BenchPath::Forwarding),
        ],
    },
    Comparison {
        title: "Traffic that is not ours, forwarded by the kernel",
        pods: 3,
        by_device: false,
        foreign: true,
        copies: 1,
        paths: &[
            ("no program", BenchPath::Forwarding),
            ("an empty program", BenchPath::Reference("nothing")),
            (OURS, BenchPath::Balance(3)),
        ],
    },
    Comparison {
        title: "A copy to each of eight pods (copies a second)",
        pods: 8,
        by_device: false,
        foreign: false,
        copies: 8,
        paths: &[
            ("iptables TEE", BenchPath::Tee(8)),
            ("nftables dup", BenchPath::Dup(8)),
            (OURS, BenchPath::Replicate(8)),
        ],
    },
];

/// The result of one path.
#[derive(Debug, Serialize)]
struct Line {
    #[serde(rename = "way")]
    path: String,
    /// Median, in datagrams per second.
    rate: f64,
    /// Median of the ratios to the yardstick of the same round, and the least and the greatest.
    ratio: [f64; 3],
    /// Ratio of the best round to the yardstick's best one: other programs can only slow a round down.
    best: f64,
}

#[derive(Debug, Serialize)]
struct Outcome {
    title: &'static str,
    lines: Vec<Line>,
}

struct Options {
    rounds: usize,
    length: Duration,
    only: Option<String>,
    /// Other builds of the daemon.
    against: Vec<PathBuf>,
    /// Write the figures into `docs/BENCHMARKS.md`.
    document: bool,
}

#[derive(Debug, Serialize)]
struct Results {
    /// Nanoseconds for each datagram.
    alone: Vec<(&'static str, f64)>,
    comparisons: Vec<Outcome>,
}

/// The tables between these lines of the document are replaced.
const PLACE: [&str; 2] = ["<!-- kernel: written by `make bench-kernel` -->", "<!-- end of kernel -->"];

fn main() -> Result<()> {
    let options = options();
    let wanted = |title: &str| options.only.as_ref().is_none_or(|only| title.contains(only.as_str()));
    let mut results = Results { alone: Vec::new(), comparisons: Vec::new() };
    if wanted(ALONE) {
        results.alone = program_cost::costs()?;
        println!("{ALONE}");
        for (name, nanoseconds) in &results.alone {
            println!("  {name:<42} {nanoseconds:>12.0}");
        }
        println!();
    }
    for comparison in COMPARISONS.iter().filter(|comparison| wanted(comparison.title)) {
        let outcome = compare(comparison, &options).with_context(|| comparison.title)?;
        show(&outcome);
        results.comparisons.push(outcome);
    }
    if options.document {
        let project = Path::new(env!("CARGO_MANIFEST_DIR"));
        report::splice(&project.join("docs/BENCHMARKS.md"), PLACE, &markdown(&results, options.rounds))?;
        let path = project.join("docs/benchmarks/kernel.json");
        std::fs::create_dir_all(project.join("docs/benchmarks"))?;
        std::fs::write(&path, serde_json::to_string_pretty(&results)? + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The tables of the document.
fn markdown(results: &Results, rounds: usize) -> String {
    let mut text = format!(
        "Medians of {rounds} rounds; in brackets the lowest and the highest ratio within one round.\n\n| {ALONE} | |\n\
         | --- | ---: |\n"
    );
    for (name, nanoseconds) in &results.alone {
        text += &format!("| {name} | {nanoseconds:.0} |\n");
    }
    for outcome in &results.comparisons {
        let ours = outcome.lines.iter().find(|line| line.path == OURS).map_or(1.0, |line| line.ratio[0]);
        text += &format!(
            "\n| {} | datagrams/s | x {} | udp-fanout to this |\n| --- | ---: | ---: | ---: |\n",
            outcome.title, outcome.lines[0].path
        );
        for Line { path, rate, ratio: [median, least, greatest], .. } in &outcome.lines {
            let spread = if (*least, *greatest) == (1.0, 1.0) {
                String::new()
            } else {
                format!(" ({least:.2} to {greatest:.2})")
            };
            text += &format!("| {path} | {rate:.0} | {median:.2}{spread} | {:.2} |\n", ours / median);
        }
    }
    text
}

fn options() -> Options {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let after = |name| words.windows(2).filter(move |pair| pair[0] == name).map(|pair| pair[1].clone());
    let quick = words.iter().any(|word| word == "--quick" || word == "--test");
    let only = after("--only").next();
    let against: Vec<PathBuf> = after("--against").map(PathBuf::from).collect();
    let rounds = after("--rounds").next().map(|rounds| rounds.parse().expect("--rounds takes a number"));
    Options {
        rounds: rounds.unwrap_or(if quick { 3 } else { 9 }),
        length: Duration::from_millis(if quick { 200 } else { 500 }),
        document: !quick && only.is_none() && against.is_empty() && rounds.is_none(),
        only,
        against,
    }
}

/// A comparison's paths, each with its name and the daemon's binary: this build, then the builds to compare.
fn baselines(comparison: &Comparison, options: &Options) -> Vec<(String, BenchPath, PathBuf)> {
    let own = Path::new(env!("CARGO_BIN_EXE_udp-fanout"));
    let mut all = Vec::new();
    for &(name, path) in comparison.paths {
        all.push((name.to_owned(), path, own.to_owned()));
        if name == OURS {
            all.extend(options.against.iter().map(|other| (other.display().to_string(), path, other.clone())));
        }
    }
    all
}

fn compare(comparison: &Comparison, options: &Options) -> Result<Outcome> {
    let testbed = Pods::build(comparison.pods)?;
    if comparison.by_device {
        paths::forbid_shortcuts(&testbed)?;
    }
    let baselines = baselines(comparison, options);
    let mut rounds: Vec<Vec<f64>> = Vec::new();
    // Updated in place on a terminal, otherwise one line per round.
    let terminal = std::io::stdout().is_terminal();
    for round in 0..options.rounds {
        let mut rates = Vec::new();
        let now = format!("{}: round {} of {}", comparison.title, round + 1, options.rounds);
        if !terminal {
            println!("{now}");
        }
        for (name, path, binary) in &baselines {
            if terminal {
                print!("\r\x1b[K{now}, {name}");
                std::io::stdout().flush()?;
            }
            let running = path.start(&testbed, binary).with_context(|| name.clone())?;
            let to = if comparison.foreign { testbed.pods[0].address } else { path.destination(&testbed) };
            rates.push(testbed.measure(to, SIZE, comparison.copies, options.length).with_context(|| name.clone())?);
            drop(running);
        }
        rounds.push(rates);
    }
    if terminal {
        print!("\r\x1b[K");
    }
    let lines = baselines.into_iter().enumerate().map(|(at, (path, ..))| Line {
        path,
        rate: quantiles(rounds.iter().map(|rates| rates[at]))[1],
        ratio: {
            let [least, median, greatest] = quantiles(rounds.iter().map(|rates| rates[at] / rates[0]));
            [median, least, greatest]
        },
        best: quantiles(rounds.iter().map(|rates| rates[at]))[2] / quantiles(rounds.iter().map(|rates| rates[0]))[2],
    });
    Ok(Outcome { title: comparison.title, lines: lines.collect() })
}

/// The least, the median and the greatest.
fn quantiles(values: impl Iterator<Item = f64>) -> [f64; 3] {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    [values[0], values[values.len() / 2], values[values.len() - 1]]
}

fn show(outcome: &Outcome) {
    println!("{}", outcome.title);
    println!("  {:<42} {:>12}  {:>5}  {:>5}  spread", "", "datagrams/s", "ratio", "best");
    for line in &outcome.lines {
        let [median, least, greatest] = line.ratio;
        let best = line.best;
        println!("  {:<42} {:>12.0}  {median:>5.2}  {best:>5.2}  {least:.2} to {greatest:.2}", line.path, line.rate);
    }
    if let Some(ours) = outcome.lines.iter().find(|line| line.path == OURS) {
        for other in outcome.lines.iter().filter(|line| line.path != OURS) {
            println!(
                "  {:<42} {:>12}  {:>5.2}",
                format!("{OURS} to {}", short(&other.path)),
                "",
                ours.ratio[0] / other.ratio[0]
            );
        }
    }
    println!();
}

fn short(path: &str) -> &str {
    path.split([':', ',']).next().unwrap_or(path)
}
