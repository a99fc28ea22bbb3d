//! The comparisons: which forwarders get which work and load, and how they are measured.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;

use super::baselines::bare::{self, Calls};
use super::baselines::{Baseline, ForwardingTask, daemon, netfilter, nginx, programs, uring};
use super::generator::{Content, Load};
use super::results::{CPU, DUPLICATED, HALF, LOSS, LOSSLESS, MODEST, Measure, OVERLOAD, REORDERED, Row, Table};
use super::run::{self, Run, RunParameters, RunSetup};
use super::testbed::Testbed;

/// The rate at which losses are compared, in datagrams per second.
const SAME_FOR_ALL: f64 = 250_000.0;
/// The rate at which latencies are compared.
const MODEST_RATE: f64 = 20_000.0;

/// The row that rows with failing downstreams are compared with.
const WELL: &str = "all well";

/// Prefix of the names of udp-fanout's rows.
pub const OURS: &str = "udp-fanout";

/// The yardstick of userspace mode.
pub const BARE: &str = "bare loop";

/// How thoroughly to measure.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// How often each forwarder is measured.
    pub rounds: usize,
    /// How long the generator sends in one run.
    pub length: Duration,
    /// Relative precision of the lossless rate.
    pub precision: f64,
}

/// One comparison.
pub struct Section {
    /// A short name.
    pub key: String,
    /// The title in reports.
    pub title: String,
    /// The forwarders' task.
    pub task: ForwardingTask,
    /// The generator's load.
    pub load: Load,
    /// The forwarders.
    pub baselines: Vec<Baseline>,
    /// The baseline that ratios are relative to.
    pub beside: &'static str,
    /// Also measure latencies, and the loss at one rate for all.
    pub whole: bool,
}

/// The comparisons of a run.
pub fn sections(quick: bool) -> Vec<Section> {
    let one_of = |downstreams| ForwardingTask { downstreams, replicate: false };
    let mut all = Vec::new();
    let mut balance = |key: &str, title: &str, load, whole| {
        all.push(Section {
            key: key.into(),
            title: title.into(),
            task: one_of(3),
            load,
            baselines: if quick { balancers_in_short() } else { balancers() },
            beside: "nginx, packets",
            whole,
        });
    };
    balance("one-sender", "One sender, 64 bytes, to one of three downstreams in turn", Load::one_sender(64), true);
    if !quick {
        balance("many-senders", "256 senders, 64 bytes, to one of three downstreams", Load::many_senders(64), true);
        balance("size-512", "One sender, 512 bytes, to one of three", Load::one_sender(512), false);
        balance("size-1472", "One sender, 1,472 bytes, to one of three", Load::one_sender(1472), false);
        for downstreams in [1, 10, 100, 1000] {
            all.push(Section {
                key: format!("downstreams-{downstreams}"),
                title: format!("One sender, 64 bytes, to one of {downstreams}"),
                task: one_of(downstreams),
                load: Load::one_sender(64),
                baselines: growing(),
                beside: "nginx, packets",
                whole: false,
            });
        }
    }
    all.push(Section {
        key: "replicate".into(),
        title: "One sender, 64 bytes, a copy to each of three; rates are those of copies".into(),
        task: ForwardingTask { downstreams: 3, replicate: true },
        load: Load::one_sender(64),
        baselines: replicators(),
        beside: "sendto loop",
        whole: true,
    });
    if !quick {
        all.extend([troubled(), special("dns", Content::Dns), special("syslog", Content::Syslog)]);
    }
    all
}

fn ours() -> Vec<Baseline> {
    vec![
        Baseline::kernel("udp-fanout tc_ebpf", |testbed, task| daemon::start(testbed, task, "tc_ebpf", "")),
        Baseline::program("udp-fanout userspace", |testbed, task| daemon::start(testbed, task, "userspace", "")),
    ]
}

fn bare_loop() -> Baseline {
    Baseline::program(BARE, |testbed, task| bare::start(testbed, task, Calls { take: 32, gro: true }))
}

fn nginx_packets() -> Baseline {
    Baseline::program("nginx, packets", |testbed, task| nginx::start(testbed, task, true))
}

fn balancers() -> Vec<Baseline> {
    let single = Calls { take: 64, gro: false };
    let mut all = ours();
    all.extend([
        Baseline::program("udp-fanout preserve_source", |testbed, task| {
            daemon::start(testbed, task, "userspace", "preserve_source = true\n")
        }),
        Baseline::direct("plain forwarding"),
        Baseline::kernel("nftables, stateless", netfilter::nft_stateless),
        Baseline::kernel("nftables, DNAT", netfilter::nft_nat),
        Baseline::kernel("iptables, statistic", netfilter::iptables_statistic),
        bare_loop(),
        Baseline::program("bare loop, io_uring", uring::start),
        Baseline::program("bare loop, one by one", move |testbed, task| bare::start(testbed, task, single)),
        nginx_packets(),
        Baseline::program("nginx, sessions", |testbed, task| nginx::start(testbed, task, false)),
        Baseline::program("socat, to one", programs::socat),
    ]);
    all
}

fn balancers_in_short() -> Vec<Baseline> {
    let left_out = ["bare loop, io_uring", "bare loop, one by one", "iptables, statistic", "nginx, sessions"];
    balancers().into_iter().filter(|baseline| !left_out.contains(&baseline.name.as_str())).collect()
}

fn growing() -> Vec<Baseline> {
    let mut all = ours();
    all.extend([
        bare_loop(),
        Baseline::kernel("nftables, stateless", netfilter::nft_stateless),
        Baseline::kernel("iptables, statistic", netfilter::iptables_statistic),
        nginx_packets(),
    ]);
    all
}

fn replicators() -> Vec<Baseline> {
    let mut all = ours();
    all.extend([
        bare_loop(),
        Baseline::kernel("nftables, dup", netfilter::nft_dup),
        Baseline::kernel("iptables, TEE", netfilter::iptables_tee),
        Baseline::program("sendto loop", bare::copier),
    ]);
    all
}

/// Measures whether failing downstreams affect the others. Only the first three downstreams count.
fn troubled() -> Section {
    // The last host drops packets for addresses that it does not have.
    let silent = [SocketAddr::from(([10, 1, 255, 1], 9)), SocketAddr::from(([10, 1, 255, 2], 9))];
    let refuses = SocketAddr::from(([10, 0, 1, 2], 9));
    let not_there = SocketAddr::from(([10, 0, 1, 77], 9));
    let beside = |name: &str, others: [SocketAddr; 2]| {
        Baseline::program(name, move |testbed, task| daemon::start_beside(testbed, task, others))
    };
    Section {
        key: "trouble".into(),
        title: "One sender, 64 bytes, userspace, a copy to each of five, of whom two may be in trouble; rates are those of \
                the other three's copies"
            .into(),
        task: ForwardingTask { downstreams: 3, replicate: true },
        load: Load::one_sender(64),
        baselines: vec![
            beside(WELL, silent),
            beside("one refuses", [refuses, silent[0]]),
            beside("one is not there", [not_there, silent[0]]),
            beside("one refuses, one is not there", [refuses, not_there]),
        ],
        beside: WELL,
        whole: false,
    }
}

/// A protocol, and a program made for it.
fn special(key: &str, content: Content) -> Section {
    let mut baselines = ours();
    let (beside, title) = match content {
        Content::Dns => {
            baselines.push(Baseline::program("dnsdist", programs::dnsdist));
            ("dnsdist", "One sender, DNS queries of 100 bytes, to one of three downstreams in turn")
        }
        _ => {
            baselines.push(Baseline::program("rsyslog, to one", programs::rsyslog).changes());
            ("rsyslog, to one", "One sender, syslog messages of 200 bytes, to one of three downstreams in turn")
        }
    };
    let size = if content == Content::Dns { 100 } else { 200 };
    let load = Load { content, ..Load::one_sender(size) };
    let task = ForwardingTask { downstreams: 3, replicate: false };
    Section { key: key.into(), title: title.into(), task, load, baselines, beside, whole: true }
}

/// Runs a comparison, round after round.
///
/// # Errors
/// When the benchmark itself fails. A forwarder that does not start is recorded as not run.
pub fn compare(testbed: &Testbed, section: &Section, effort: Effort) -> Result<Table> {
    let mut rows: Vec<Row> = section.baselines.iter().map(|baseline| Row::new(&baseline.name)).collect();
    for round in 1..=effort.rounds {
        for (baseline, row) in section.baselines.iter().zip(&mut rows) {
            if row.not_run.is_some() {
                continue;
            }
            if let Err(error) = measure(testbed, section, baseline, effort, row) {
                row.not_run = Some(format!("{error:#}"));
            }
            eprintln!("{} {round}/{}: {}", section.key, effort.rounds, in_short(row));
        }
    }
    let Section { key, title, beside, .. } = section;
    Ok(Table { key: key.clone(), title: title.clone(), beside: (*beside).into(), rows })
}

fn in_short(row: &Row) -> String {
    match (&row.not_run, row.figures.get(LOSSLESS.key).and_then(|figure| figure.values.last())) {
        (Some(why), _) => format!("{} not run: {why}", row.name),
        (None, rate) => format!("{} {:.0} datagrams/s", row.name, rate.unwrap_or(&0.0)),
    }
}

/// Starts a forwarder and its generator, and warms up: resolves neighbours and touches memory.
///
/// # Errors
/// When the forwarder does not start, or the benchmark itself fails.
pub fn begin<'a>(testbed: &'a Testbed, section: &Section, baseline: &Baseline) -> Result<RunSetup<'a>> {
    testbed.kernel_forwards(baseline.in_kernel)?;
    let task = &section.task;
    let generator = match baseline.direct {
        true => testbed.sender_to(&Testbed::downstreams(task.downstreams), section.load)?,
        false => testbed.sender(section.load)?,
    };
    let mut at = RunSetup { testbed, generator, baseline: (baseline.start)(testbed, task)? };
    run::measure(&mut at, 1000.0, RunParameters { length: Duration::from_millis(50), copies: task.copies() }, false)?;
    Ok(at)
}

/// Measures one forwarder in one round.
fn measure(testbed: &Testbed, section: &Section, baseline: &Baseline, effort: Effort, row: &mut Row) -> Result<()> {
    let mut at = begin(testbed, section, baseline)?;
    let copies = section.task.copies();
    let parameters = RunParameters { length: effort.length, copies };
    let offered = run::find_lossless_rate(
        &mut at,
        parameters,
        effort.precision,
        row.median(LOSSLESS).map(|rate| rate / f64::from(copies)),
    )?;
    row.add(LOSSLESS, offered * f64::from(copies));
    row.add(OVERLOAD, run::measure(&mut at, offered * 2.0, parameters, false)?.rate);
    // The CPU time of kernel work is known only in clock ticks, so the run is longer.
    let half =
        run::measure(&mut at, offered / 2.0, RunParameters { length: effort.length * 2, copies }, baseline.keeps)?;
    row.add(CPU, half.cpu());
    if !section.whole {
        return Ok(());
    }
    let same = run::measure(&mut at, SAME_FOR_ALL / f64::from(copies), parameters, false)?;
    row.add(LOSS, 100.0 * same.lost(parameters) as f64 / (same.sent.datagrams * u64::from(copies)).max(1) as f64);
    if baseline.keeps {
        row.add(REORDERED, 100.0 * half.arrived.reordered as f64 / half.arrived.datagrams.max(1) as f64);
        row.add(DUPLICATED, half.arrived.duplicated as f64);
        add_latencies(row, HALF, &half);
        add_latencies(row, MODEST, &run::measure(&mut at, MODEST_RATE, parameters, true)?);
    }
    Ok(())
}

fn add_latencies(row: &mut Row, measures: [Measure; 3], run: &Run) {
    for (measure, share) in measures.into_iter().zip([0.5, 0.99, 0.999]) {
        if let Some(nanoseconds) = run.latencies.as_ref().and_then(|all| all.quantile(share)) {
            row.add(measure, nanoseconds as f64 / 1e3);
        }
    }
}
