//! The daemon's work besides forwarding: tables, reloads, scrapes, start, and its cost when idle.

use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use udp_fanout::testing::config::Config;
use udp_fanout::testing::datapath::Datapath;
use udp_fanout::testing::datapath::kernel::KernelDatapath;
use udp_fanout::testing::host::{HostFacts, Link, Route};
use udp_fanout::testing::model::{Downstream, Mode};
use udp_fanout::testing::plan::Plan;
use udp_fanout::testing::plan::compile::compile;

use super::baselines::{ForwardingTask, daemon};
use super::cpu::cpu_seconds;
use super::results::{Figure, Goal};
use super::sink::Look;
use super::testbed::{LISTENER, Testbed};
use udp_fanout_lab::Daemon;
use udp_fanout_lab::scrape;

const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9090);
/// Number of listeners in the reload benchmark.
const LISTENERS: u32 = 100;

/// Measures everything, each this many times.
///
/// # Errors
/// When a measurement fails.
pub fn measure(testbed: &Testbed, rounds: usize) -> Result<Vec<Goal>> {
    let mut goals = Vec::new();
    eprintln!("control: tables");
    goals.extend(tables("round_robin", 10_000, [Some(20.0), Some(2.0)], rounds)?);
    goals.extend(tables("hash", 1000, [None; 2], rounds)?);
    for (mode, below) in [("tc_ebpf", Some(150.0)), ("userspace", Some(150.0))] {
        eprintln!("control: start, {mode}");
        goals.push(goal(
            format!("start to first datagram forwarded, {mode}"),
            "ms",
            below,
            &starts(testbed, mode, rounds)?,
        ));
    }
    eprintln!("control: a daemon with 1,000 downstreams");
    goals.extend(at_rest(testbed, rounds)?);
    eprintln!("control: reloads");
    goals.push(reloads(testbed, rounds)?);
    Ok(goals)
}

fn goal(title: impl Into<String>, unit: &'static str, below: Option<f64>, values: &[f64]) -> Goal {
    Goal { title: title.into(), unit, figure: Figure::of(values), below }
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// The time to write a table of this many downstreams to the kernel's maps, then the time for a change of one of them.
fn tables(policy: &str, many: u32, below: [Option<f64>; 2], rounds: usize) -> Result<[Goal; 2]> {
    let text = format!(
        "[limits]\nmax_downstreams = 262144\n[[listeners]]\nname = \"large\"\nbind = \"{LISTENER}\"\n\
         interface = \"eth0\"\nmode = \"tc_ebpf\"\npolicy = \"{policy}\"\ndownstream = [{{ address = \"10.1.0.1:1\" }}]\n"
    );
    let config = Config::parse(&text, Path::new("bench.toml"))?;
    let listener = config.listeners.first().context("no listener")?;
    let address = |number: u32| IpAddr::V4(Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 1, 0, 0)) + number));
    let mut facts = HostFacts {
        links: vec![Link { index: 2, name: "eth0".into(), up: true, ethernet: true, mtu: 1500, ..Link::default() }],
        ..HostFacts::default()
    };
    let via = Route::Via { link: 2, next_hop: address(1), mtu: 1500 };
    facts.routes = (1..=many + 1).map(|number| (address(number), via.clone())).collect();
    let downstreams = |last: u32| -> Vec<Downstream> {
        (1..many)
            .chain([last])
            .map(|number| Downstream {
                name: format!("d{number}").as_str().into(),
                address: SocketAddr::new(address(number), 5514),
                weight: 1,
                sample: Downstream::ALL,
            })
            .collect()
    };
    let (mut whole, mut one) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let mut datapath = KernelDatapath::new(&config.limits)?;
        let mut before = None;
        for (downstreams, times) in [(downstreams(many), &mut whole), (downstreams(many + 1), &mut one)] {
            let start = Instant::now();
            let mut compiled = compile(listener, &downstreams, Mode::TcEbpf, &facts, before.as_deref());
            // No interface to attach to.
            compiled.links.clear();
            let mut plan = Plan::from(vec![compiled]);
            datapath.apply(&plan)?;
            times.push(milliseconds(start));
            before = plan.listeners.pop();
        }
    }
    let title = |what: String| format!("{what}, {policy}, compiled and published");
    Ok([
        goal(title(format!("table of {many} downstreams")), "ms", below[0], &whole),
        goal(title(format!("one of {many} downstreams changed")), "ms", below[1], &one),
    ])
}

fn starts(testbed: &Testbed, mode: &str, rounds: usize) -> Result<Vec<f64>> {
    testbed.kernel_forwards(mode == "tc_ebpf")?;
    let config = daemon::config(&ForwardingTask { downstreams: 3, replicate: false }, mode, "").to_toml();
    let sender = testbed.generator.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(LISTENER)?;
        Ok(socket)
    })?;
    (0..rounds)
        .map(|_| {
            testbed.sink.look(Look::Count)?;
            testbed.sink.reset()?;
            let start = Instant::now();
            let daemon = Daemon::spawn(&testbed.gateway, Path::new(env!("CARGO_BIN_EXE_udp-fanout")), &config)?;
            while testbed.sink.arrived()?.datagrams == 0 {
                if start.elapsed() > Duration::from_secs(10) {
                    bail!("nothing has been forwarded ten seconds after the start in mode {mode}");
                }
                // Refused until the daemon listens.
                let _ = sender.send(b"is anybody there?");
                std::thread::sleep(Duration::from_micros(200));
            }
            let took = milliseconds(start);
            daemon.stop()?;
            Ok(took)
        })
        .collect()
}

/// A scrape, memory and idle time with a thousand downstreams.
fn at_rest(testbed: &Testbed, rounds: usize) -> Result<Vec<Goal>> {
    testbed.kernel_forwards(true)?;
    let config = daemon::config(&ForwardingTask { downstreams: 1000, replicate: false }, "tc_ebpf", "");
    let daemon = Daemon::start(&testbed.gateway, Path::new(env!("CARGO_BIN_EXE_udp-fanout")), &config)?;
    let scrapes = testbed.gateway.run(|| {
        (0..rounds * 10)
            .map(|_| {
                let start = Instant::now();
                let page = scrape::fetch(METRICS, "/metrics")?;
                ensure!(page.status == 200, "a scrape was answered with {}", page.status);
                Ok(milliseconds(start))
            })
            .collect::<Result<Vec<f64>>>()
    })?;
    let memory = resident(daemon.pid().as_raw())?;
    let tasks = format!("/proc/{}/task", daemon.pid());
    let idle: Vec<f64> = (0..rounds)
        .map(|_| {
            let (before, start) = (cpu_seconds(&tasks, None).unwrap_or(0.0), Instant::now());
            std::thread::sleep(Duration::from_secs(2));
            100.0 * (cpu_seconds(&tasks, None).unwrap_or(0.0) - before) / start.elapsed().as_secs_f64()
        })
        .collect();
    daemon.stop()?;
    Ok(vec![
        goal("scrape with 1,000 downstreams", "ms", Some(10.0), &scrapes),
        goal("resident memory with 1,000 downstreams", "MiB", Some(20.0), &[memory]),
        goal("idle, with 1,000 downstreams, of one CPU", "%", Some(0.1), &idle),
    ])
}

/// Resident memory in MiB.
fn resident(pid: i32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kilobytes: f64 = line.split_whitespace().next().context("no number")?.parse()?;
    Ok(kilobytes / 1024.0)
}

/// The time from SIGHUP until the configuration is active: a hundred listeners, each with new weights.
fn reloads(testbed: &Testbed, rounds: usize) -> Result<Goal> {
    let text = |weight: usize| {
        let mut text = String::new();
        for number in 0..LISTENERS {
            let port = 6000 + number;
            let _ = write!(
                text,
                "[[listeners]]\nname = \"l{number}\"\nbind = \"10.0.0.1:{port}\"\ninterface = \"in\"\nmode = \"tc_ebpf\"\n\
                 settings = {{ workers = 1 }}\n[[listeners.downstream]]\naddress = \"10.1.0.1:5514\"\nweight = {weight}\n\
                 [[listeners.downstream]]\naddress = \"10.1.0.2:5514\"\n"
            );
        }
        text
    };
    let mut daemon = Daemon::spawn(&testbed.gateway, Path::new(env!("CARGO_BIN_EXE_udp-fanout")), &text(1))?;
    daemon.wait_until_ready(&testbed.gateway, LISTENERS as usize)?;
    let times = (0..rounds)
        .map(|round| {
            let start = Instant::now();
            daemon.reload(&text(2 + round % 2))?;
            Ok(milliseconds(start))
        })
        .collect::<Result<Vec<f64>>>()?;
    daemon.stop()?;
    Ok(goal("reload that changes each of 100 listeners", "ms", None, &times))
}
