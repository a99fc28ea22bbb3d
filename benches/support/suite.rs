//! The comparisons: who does what with which load, and how that is measured.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;

use super::bed::Bed;
use super::contenders::bare::{self, Calls};
use super::contenders::{Contender, Task, daemon, netfilter, nginx, programs, uring};
use super::generator::{Content, Load};
use super::results::{CPU, DUPLICATED, HALF, LOSS, LOSSLESS, MODEST, Measure, OVERLOAD, REORDERED, Row, Table};
use super::trial::{self, Setup, Terms, Trial};

/// The rate at which losses are compared, in datagrams per second.
const SAME_FOR_ALL: f64 = 250_000.0;
/// The rate at which latencies are compared.
const MODEST_RATE: f64 = 20_000.0;

/// The row that troubled ones are compared with.
const WELL: &str = "all well";

/// What the names of udp-fanout's rows begin with.
pub const OURS: &str = "udp-fanout";

/// The yardstick of userspace mode.
pub const BARE: &str = "bare loop";

/// How long and how often.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Times that each contender has its turn.
    pub rounds: usize,
    /// How long the generator sends in one trial.
    pub length: Duration,
    /// How closely the lossless rate is looked for.
    pub precision: f64,
}

/// One comparison.
pub struct Section {
    /// A short name.
    pub key: String,
    /// What it is about.
    pub title: String,
    /// What is to be done.
    pub task: Task,
    /// What is sent.
    pub load: Load,
    /// Who takes part.
    pub contenders: Vec<Contender>,
    /// The contender that others are set in relation to.
    pub beside: &'static str,
    /// Latencies are looked at, too, and the loss at one rate for all.
    pub whole: bool,
}

/// The comparisons of a run.
pub fn sections(quick: bool) -> Vec<Section> {
    let one_of = |downstreams| Task { downstreams, replicate: false };
    let mut all = Vec::new();
    let mut balance = |key: &str, title: &str, load, whole| {
        all.push(Section {
            key: key.into(),
            title: title.into(),
            task: one_of(3),
            load,
            contenders: if quick { balancers_in_short() } else { balancers() },
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
                contenders: growing(),
                beside: "nginx, packets",
                whole: false,
            });
        }
    }
    all.push(Section {
        key: "replicate".into(),
        title: "One sender, 64 bytes, a copy to each of three; rates are those of copies".into(),
        task: Task { downstreams: 3, replicate: true },
        load: Load::one_sender(64),
        contenders: replicators(),
        beside: "sendto loop",
        whole: true,
    });
    if !quick {
        all.extend([troubled(), special("dns", Content::Dns), special("syslog", Content::Syslog)]);
    }
    all
}

fn ours() -> Vec<Contender> {
    vec![
        Contender::kernel("udp-fanout tc_ebpf", |bed, task| daemon::start(bed, task, "tc_ebpf", "")),
        Contender::program("udp-fanout userspace", |bed, task| daemon::start(bed, task, "userspace", "")),
    ]
}

fn bare_loop() -> Contender {
    Contender::program(BARE, |bed, task| bare::start(bed, task, Calls { take: 32, joined: true }))
}

fn nginx_packets() -> Contender {
    Contender::program("nginx, packets", |bed, task| nginx::start(bed, task, true))
}

fn balancers() -> Vec<Contender> {
    let single = Calls { take: 64, joined: false };
    let mut all = ours();
    all.extend([
        Contender::program("udp-fanout preserve_source", |bed, task| {
            daemon::start(bed, task, "userspace", "preserve_source = true\n")
        }),
        Contender::direct("plain forwarding"),
        Contender::kernel("nftables, stateless", netfilter::nft_stateless),
        Contender::kernel("nftables, DNAT", netfilter::nft_nat),
        Contender::kernel("iptables, statistic", netfilter::iptables_statistic),
        bare_loop(),
        Contender::program("bare loop, io_uring", uring::start),
        Contender::program("bare loop, one by one", move |bed, task| bare::start(bed, task, single)),
        nginx_packets(),
        Contender::program("nginx, sessions", |bed, task| nginx::start(bed, task, false)),
        Contender::program("socat, to one", programs::socat),
    ]);
    all
}

fn balancers_in_short() -> Vec<Contender> {
    let left_out = ["bare loop, io_uring", "bare loop, one by one", "iptables, statistic", "nginx, sessions"];
    balancers().into_iter().filter(|contender| !left_out.contains(&contender.name.as_str())).collect()
}

fn growing() -> Vec<Contender> {
    let mut all = ours();
    all.extend([
        bare_loop(),
        Contender::kernel("nftables, stateless", netfilter::nft_stateless),
        Contender::kernel("iptables, statistic", netfilter::iptables_statistic),
        nginx_packets(),
    ]);
    all
}

fn replicators() -> Vec<Contender> {
    let mut all = ours();
    all.extend([
        bare_loop(),
        Contender::kernel("nftables, dup", netfilter::nft_dup),
        Contender::kernel("iptables, TEE", netfilter::iptables_tee),
        Contender::program("sendto loop", bare::copier),
    ]);
    all
}

/// Whether downstreams that are not well cost the others anything. Those that count are the first three.
fn troubled() -> Section {
    // The last host drops what is for an address that it does not have.
    let silent = [SocketAddr::from(([10, 1, 255, 1], 9)), SocketAddr::from(([10, 1, 255, 2], 9))];
    let refuses = SocketAddr::from(([10, 0, 1, 2], 9));
    let not_there = SocketAddr::from(([10, 0, 1, 77], 9));
    let beside = |name: &str, others: [SocketAddr; 2]| {
        Contender::program(name, move |bed, task| daemon::start_beside(bed, task, others))
    };
    Section {
        key: "trouble".into(),
        title: "One sender, 64 bytes, userspace, a copy to each of five, of whom two may be in trouble; rates are those of \
                the other three's copies"
            .into(),
        task: Task { downstreams: 3, replicate: true },
        load: Load::one_sender(64),
        contenders: vec![
            beside(WELL, silent),
            beside("one refuses", [refuses, silent[0]]),
            beside("one is not there", [not_there, silent[0]]),
            beside("one refuses, one is not there", [refuses, not_there]),
        ],
        beside: WELL,
        whole: false,
    }
}

/// A protocol, and the program that is made for it.
fn special(key: &str, content: Content) -> Section {
    let mut contenders = ours();
    let (beside, title) = match content {
        Content::Dns => {
            contenders.push(Contender::program("dnsdist", programs::dnsdist));
            ("dnsdist", "One sender, DNS queries of 100 bytes, to one of three downstreams in turn")
        }
        _ => {
            contenders.push(Contender::program("rsyslog, to one", programs::rsyslog).changes());
            ("rsyslog, to one", "One sender, syslog messages of 200 bytes, to one of three downstreams in turn")
        }
    };
    let size = if content == Content::Dns { 100 } else { 200 };
    let load = Load { content, ..Load::one_sender(size) };
    let task = Task { downstreams: 3, replicate: false };
    Section { key: key.into(), title: title.into(), task, load, contenders, beside, whole: true }
}

/// Runs a comparison: everybody once, then everybody again.
///
/// # Errors
/// When the bench itself cannot go on. A contender that does not start is noted as not run.
pub fn compare(bed: &Bed, section: &Section, effort: Effort) -> Result<Table> {
    let mut rows: Vec<Row> = section.contenders.iter().map(|contender| Row::new(&contender.name)).collect();
    for round in 1..=effort.rounds {
        for (contender, row) in section.contenders.iter().zip(&mut rows) {
            if row.not_run.is_some() {
                continue;
            }
            if let Err(error) = measure(bed, section, contender, effort, row) {
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

/// Starts a contender, and the generator for it. Neighbours are resolved and memory is touched.
///
/// # Errors
/// When it does not start, or the bench itself cannot go on.
pub fn begin<'a>(bed: &'a Bed, section: &Section, contender: &Contender) -> Result<Setup<'a>> {
    bed.kernel_forwards(contender.in_kernel)?;
    let task = &section.task;
    let generator = match contender.direct {
        true => bed.sender_to(&Bed::downstreams(task.downstreams), section.load)?,
        false => bed.sender(section.load)?,
    };
    let mut at = Setup { bed, generator, contender: (contender.start)(bed, task)? };
    trial::run(&mut at, 1000.0, Terms { length: Duration::from_millis(50), copies: task.copies() }, false)?;
    Ok(at)
}

/// One contender's turn.
fn measure(bed: &Bed, section: &Section, contender: &Contender, effort: Effort, row: &mut Row) -> Result<()> {
    let mut at = begin(bed, section, contender)?;
    let copies = section.task.copies();
    let terms = Terms { length: effort.length, copies };
    let offered =
        trial::lossless(&mut at, terms, effort.precision, row.median(LOSSLESS).map(|rate| rate / f64::from(copies)))?;
    row.add(LOSSLESS, offered * f64::from(copies));
    row.add(OVERLOAD, trial::run(&mut at, offered * 2.0, terms, false)?.rate);
    // CPU time is known in ticks where the kernel does the work: a longer look.
    let half = trial::run(&mut at, offered / 2.0, Terms { length: effort.length * 2, copies }, contender.keeps)?;
    row.add(CPU, half.cpu());
    if !section.whole {
        return Ok(());
    }
    let same = trial::run(&mut at, SAME_FOR_ALL / f64::from(copies), terms, false)?;
    row.add(LOSS, 100.0 * same.lost(terms) as f64 / (same.sent.datagrams * u64::from(copies)).max(1) as f64);
    if contender.keeps {
        row.add(REORDERED, 100.0 * half.arrived.reordered as f64 / half.arrived.datagrams.max(1) as f64);
        row.add(DUPLICATED, half.arrived.duplicated as f64);
        add_latencies(row, HALF, &half);
        add_latencies(row, MODEST, &trial::run(&mut at, MODEST_RATE, terms, true)?);
    }
    Ok(())
}

fn add_latencies(row: &mut Row, measures: [Measure; 3], trial: &Trial) {
    for (measure, share) in measures.into_iter().zip([0.5, 0.99, 0.999]) {
        if let Some(nanoseconds) = trial.latencies.as_ref().and_then(|all| all.quantile(share)) {
            row.add(measure, nanoseconds as f64 / 1e3);
        }
    }
}
