//! `make demo`: real datagrams from one socket through the real daemon to three receivers, and the proof that it works.
//!
//! Everything happens in network namespaces of the demo's own (the crate `lab`, which the network tests use too);
//! the host's network is not touched, and nothing is left behind, not after Ctrl-C either. Needs root.
//!
//! Exit code: 0 if every check is ok, 1 otherwise.

#![allow(clippy::print_stdout, reason = "printing is what a demonstration is for")]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Parser, ValueEnum};
use udp_fanout_lab::INGRESS;
use udp_fanout_lab::traffic::Progress;
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Metrics, Place, Report, Sender};

/// Shows udp-fanout at work, in network namespaces of its own.
#[derive(Parser)]
struct Arguments {
    /// How the daemon forwards.
    #[arg(long, value_enum, default_value = "tc_ebpf")]
    mode: Mode,
    /// How many datagrams to send.
    #[arg(long, default_value_t = 30_000, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    count: u64,
    /// The daemon's binary.
    #[arg(long, default_value = "target/release/udp-fanout")]
    daemon: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Mode {
    /// In the kernel, by the TC program.
    TcEbpf,
    /// Through sockets.
    Userspace,
}

/// What the daemon and the kernel say once everything has been sent.
struct Evidence {
    report: Report,
    took: Duration,
    metrics: Metrics,
    /// `tc filter show` while the daemon ran, and after it had ended.
    filter: String,
    filter_afterwards: String,
    gateway: Vec<IpAddr>,
    exit: String,
}

/// A statement that has been put to the test.
struct Check {
    holds: bool,
    what: String,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match demonstrate(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            println!("\nFAILED: not everything is as it should be.");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demonstrate(arguments: &Arguments) -> Result<bool> {
    if !arguments.daemon.is_file() {
        bail!("no daemon at {}: run `make build` first, or name it with --daemon", arguments.daemon.display());
    }
    let lab = Lab::builder().receivers([Place::OtherInterface; 3]).build()?;
    print!("{}", picture(&lab, arguments));
    let evidence = gather(&lab, arguments)?;
    print!("{}", table(&evidence, arguments.mode));
    let filter = if evidence.filter.is_empty() { "(no filter)" } else { evidence.filter.trim() };
    println!("\n$ tc filter show dev {INGRESS} ingress\n{filter}\n\n$ curl http://127.0.0.1:9090/metrics");
    for sample in counters(&evidence.metrics) {
        println!("{sample}");
    }
    println!();
    let checks = check(&evidence, arguments);
    for check in &checks {
        println!("{} {}", if check.holds { "  ok    " } else { "  FAILED" }, check.what);
    }
    Ok(checks.iter().all(|check| check.holds))
}

/// Runs the daemon, sends everything through it, and notes what came of it.
fn gather(lab: &Lab, arguments: &Arguments) -> Result<Evidence> {
    let collectors = Collectors::start(lab, Expect::OneOfThem)?;
    let mut config = DaemonConfig::for_lab(lab, arguments.mode.name());
    if arguments.mode == Mode::Userspace {
        // Several workers take turns and may overtake each other; one, on one CPU, lets order be checked too.
        config = config.settings("workers = 1\npin_cpus = true");
    }
    let mut daemon = Daemon::start(&lab.gateway, &arguments.daemon, &config)?;
    let mut sender = Sender::in_lab(lab)?;
    let took = show_progress(collectors.progress(), arguments.count, || sender.send(arguments.count, &collectors))?;
    let report = collectors.finish(&[&sender])?;
    let show_filter = || lab.gateway.tc(&format!("filter show dev {INGRESS} ingress"));
    let metrics = daemon.metrics(&lab.gateway)?;
    let filter = show_filter()?;
    if !report.is_perfect() {
        println!("{report}\nThe daemon's log:\n{}", daemon.log());
    }
    let (status, _, log) = daemon.stop()?;
    if !status.success() {
        println!("The daemon's log:\n{log}");
    }
    Ok(Evidence {
        report,
        took,
        metrics,
        filter,
        filter_afterwards: show_filter()?,
        gateway: lab.gateway_addresses()?,
        exit: status.to_string(),
    })
}

/// Runs `work` and meanwhile says how far it has got: in place on a terminal, else a line now and then.
fn show_progress<T>(progress: &Arc<Progress>, count: u64, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let (done, wait) = mpsc::channel::<()>();
    let progress = Arc::clone(progress);
    let terminal = io::stdout().is_terminal();
    let every = Duration::from_millis(if terminal { 50 } else { 2_000 });
    let shower = thread::spawn(move || {
        loop {
            let finished = wait.recv_timeout(every) != Err(RecvTimeoutError::Timeout);
            let (sent, arrived) = progress.now();
            let line = format!("{} of {} sent, {} arrived", group(sent), group(count), group(arrived));
            if terminal {
                print!("\r\x1b[K{line}");
                let _ = io::stdout().flush();
            } else {
                println!("{line}");
            }
            if finished {
                break;
            }
        }
    });
    let outcome = work();
    drop(done);
    let _ = shower.join();
    println!("{}", if terminal { "\n" } else { "" });
    outcome
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Mode::TcEbpf => "tc_ebpf",
            Mode::Userspace => "userspace",
        }
    }
}

/// Who is who, before anything is sent.
fn picture(lab: &Lab, arguments: &Arguments) -> String {
    let mut text = format!(
        "udp-fanout in {} mode: {} datagrams from one socket, in network namespaces of their own\n\n",
        arguments.mode.name(),
        group(arguments.count)
    );
    let start = format!("  sender {} ──► gateway {} ─┬", Lab::SENDER, lab.listener());
    let indent = " ".repeat(start.chars().count() - 1);
    for (position, site) in lab.sites.iter().enumerate() {
        let lead = match position {
            0 => start.clone(),
            _ if position + 1 == lab.sites.len() => format!("{indent}└"),
            _ => format!("{indent}├"),
        };
        let _ = writeln!(text, "{lead}─► {} {}", site.name, site.address);
    }
    text.push('\n');
    text
}

/// The table of what the receivers got, and the rate.
fn table(evidence: &Evidence, mode: Mode) -> String {
    let report = &evidence.report;
    let header = ["", "datagrams", "lost", "duplicated", "reordered", "source seen"].map(String::from);
    let mut rows = vec![header];
    for receiver in &report.receivers {
        // Which receiver a lost datagram was meant for, nobody can tell: losses are the round's, not a receiver's.
        let counts = [group(receiver.received), "-".into(), group(receiver.duplicated), group(receiver.reordered)];
        let sources = ips(receiver.sources.iter().map(std::net::SocketAddr::ip));
        let [received, lost, duplicated, reordered] = counts;
        rows.push([receiver.name.clone(), received, lost, duplicated, reordered, sources]);
    }
    let arrived = report.counts().iter().sum();
    let totals = [arrived, report.lost, report.duplicated, report.reordered].map(group);
    let [received, lost, duplicated, reordered] = totals;
    rows.push(["all".into(), received, lost, duplicated, reordered, String::new()]);
    let mut text = align(&rows);
    let _ = writeln!(
        text,
        "\nThe source is {}.",
        match mode {
            Mode::TcEbpf => "the sender's own address: the kernel program keeps it",
            Mode::Userspace => "the gateway's address: the daemon's sockets send anew",
        }
    );
    let rate = report.sent as f64 / evidence.took.as_secs_f64();
    let _ = writeln!(
        text,
        "{} datagrams in {:.2} s: {} a second, waiting for the receivers after every few dozen.",
        group(report.sent),
        evidence.took.as_secs_f64(),
        group(rate as u64)
    );
    text
}

/// Lays out rows in columns: the first and last to the left, numbers to the right.
fn align<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = width(column);
            let _ = match column {
                0 => write!(line, "  {cell:<width$}"),
                _ if column == N - 1 => write!(line, "   {cell}"),
                _ => write!(line, "   {cell:>width$}"),
            };
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// The samples worth showing: those of traffic, zeros left out.
fn counters(metrics: &Metrics) -> impl Iterator<Item = &udp_fanout_lab::scrape::Sample> {
    let traffic = ["udp_fanout_packets_", "udp_fanout_bytes_", "udp_fanout_downstream_"];
    let shown = move |name: &str| traffic.iter().any(|prefix| name.starts_with(prefix));
    metrics.samples.iter().filter(move |sample| sample.value != 0.0 && shown(&sample.name))
}

/// Every statement the demo makes.
fn check(evidence: &Evidence, arguments: &Arguments) -> Vec<Check> {
    let report = &evidence.report;
    let counts = report.counts();
    let uneven = counts.iter().max().unwrap_or(&0) - counts.iter().min().unwrap_or(&0);
    let mut checks = Vec::new();
    let mut check = |holds: bool, what: String| checks.push(Check { holds, what });
    check(report.sent == arguments.count, format!("{} datagrams were sent", group(arguments.count)));
    check(report.lost == 0 && report.duplicated == 0, "each arrived exactly once".into());
    check(report.reordered == 0, "each receiver got its share in the order of sending".into());
    check(report.unexpected == 0, "nothing else arrived, and nothing damaged".into());
    check(uneven <= 1, "the receivers got equal shares".into());
    check(
        sources_fit(evidence, arguments.mode),
        match arguments.mode {
            Mode::TcEbpf => "every receiver saw the sender's own address".into(),
            Mode::Userspace => "every receiver saw an address of the gateway".into(),
        },
    );
    checks.extend(check_counters(evidence, arguments.mode));
    let mut check = |holds: bool, what: &str| checks.push(Check { holds, what: what.into() });
    match arguments.mode {
        Mode::TcEbpf => {
            let shown = evidence.filter.contains("pref 49152 bpf") && evidence.filter.contains("udp_fanout");
            check(shown, "the kernel shows the filter udp_fanout at pref 49152");
        }
        Mode::Userspace => check(evidence.filter.is_empty(), "the kernel shows no filter"),
    }
    check(evidence.exit == "exit status: 0", "the daemon ended with exit code 0 when asked to");
    check(evidence.filter_afterwards.is_empty(), "no filter is left after it");
    checks
}

fn sources_fit(evidence: &Evidence, mode: Mode) -> bool {
    let fits = |ip: IpAddr| match mode {
        Mode::TcEbpf => ip == Lab::SENDER,
        Mode::Userspace => evidence.gateway.contains(&ip),
    };
    evidence.report.receivers.iter().all(|receiver| receiver.sources.iter().all(|source| fits(source.ip())))
}

/// The daemon's own figures, against what the receivers got.
fn check_counters(evidence: &Evidence, mode: Mode) -> Vec<Check> {
    let Evidence { report, metrics, .. } = evidence;
    let labels = [("listener", "lab"), ("mode", mode.name())];
    let sum = |name: &str| metrics.sum(&format!("udp_fanout_{name}_total"), &labels);
    let arrived: u64 = report.counts().iter().sum();
    let bytes: u64 = report.receivers.iter().map(|receiver| receiver.bytes).sum();
    let packets = sum("packets_received") == report.sent && sum("packets_forwarded") == arrived;
    let each = report.receivers.iter().all(|receiver| {
        let endpoint = receiver.address.map(|address| address.to_string()).unwrap_or_default();
        let labels = [("listener", "lab"), ("endpoint", endpoint.as_str())];
        metrics.sum("udp_fanout_downstream_packets_total", &labels) == receiver.received
    });
    [
        (packets, "the daemon counted what was sent as received and what arrived as forwarded"),
        (sum("bytes_received") == bytes && sum("bytes_forwarded") == bytes, "and the same bytes"),
        (metrics.sum("udp_fanout_packets_dropped_total", &[]) == 0, "it counted no drops"),
        (each, "its count for each receiver is the receiver's own"),
    ]
    .map(|(holds, what)| Check { holds, what: what.into() })
    .into()
}

fn ips(addresses: impl Iterator<Item = IpAddr>) -> String {
    let distinct: BTreeSet<_> = addresses.map(|ip| ip.to_string()).collect();
    distinct.into_iter().collect::<Vec<_>>().join(", ")
}

/// A number with its thousands set apart.
fn group(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
