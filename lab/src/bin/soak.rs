//! `make soak`: runs both datapaths for a given time under repeated changes, and checks that no datagram was lost or duplicated and that
//! the daemon's memory, files and maps have not grown.
//!
//! One daemon with a listener in each mode runs in separate network namespaces (the crate `lab`). Each round removes and
//! returns receivers, changes weights and policy, takes down an unused interface, and makes a receiver that still accepts
//! datagrams fail its health checks. None of these changes may lose a datagram. Needs root.
//!
//! Exit code: 0 if every check passed, 1 otherwise.

use std::collections::BTreeSet;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Place, Sender};

/// Port on which receivers answer health checks.
const HEALTH_PORT: u16 = 9999;
/// The first lines of every configuration. The daemon reloads it only on SIGHUP.
const HEAD: &str = "watch_config = false\n[health]\nenabled = true\nprotocol = \"tcp\"\nport = 9999\n\
                    interval_secs = 0.5\ntimeout_secs = 0.4\n";
/// Each sender sends this many datagrams, waits until they have arrived, and pauses. With this closed loop, the daemon has lost every
/// missing one.
const BATCH: u64 = 20;
const REST: Duration = Duration::from_millis(5);
/// How long a sender waits for its datagrams to arrive.
const PATIENCE: Duration = Duration::from_secs(10);
/// Timeout of every other wait.
const LIMIT: Duration = Duration::from_secs(20);
/// Rounds before the first measurement of resources: later rounds make no first-time allocations.
const WARM_UP: u64 = 2;
/// Allowed growth of resident memory after that, in KiB: allocator slack. A leak in each round exceeds it eventually.
const SLACK_KIB: u64 = 16 * 1024;

/// Forwards in both modes for minutes, under changes, and checks that nothing is lost and nothing grows.
#[derive(Parser)]
struct Arguments {
    /// Duration in minutes.
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// Path of the daemon's binary.
    #[arg(long, default_value = "target/release/udp-fanout")]
    daemon: PathBuf,
}

/// Resources that the daemon holds.
#[derive(Debug, Clone, Copy)]
struct Resources {
    fds: usize,
    maps: usize,
    rss_kib: u64,
}

/// The network, the daemon and its traffic.
struct Soak<'a> {
    lab: &'a Lab,
    daemon: Daemon,
    collectors: &'a Collectors,
    /// Health check listener of each receiver; none while its health checks must fail.
    answering: &'a Mutex<Vec<Option<TcpListener>>>,
}

fn main() -> ExitCode {
    match soak(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("soak: FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn soak(arguments: &Arguments) -> Result<()> {
    let duration = Duration::try_from_secs_f64(arguments.minutes * 60.0).context("--minutes")?;
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::BehindRouter, Place::Pod]).build()?;
    let answering = Mutex::new((0..lab.sites.len()).map(|site| answer(&lab, site).map(Some)).collect::<Result<_>>()?);
    let collectors = Collectors::start(&lab, Expect::OneOfThem)?;
    let config = everything(&lab);
    let daemon = Daemon::start(&lab.gateway, &arguments.daemon, &config)?;
    let mut senders = Vec::new();
    for listener in &config.listeners {
        let sender = Sender::open(&lab.sender, (Lab::SENDER, 0), listener.bind.parse::<SocketAddr>()?)?;
        senders.push(sender.patience(PATIENCE));
    }
    let mut soak = Soak { lab: &lab, daemon, collectors: &collectors, answering: &answering };
    let stop = AtomicBool::new(false);
    let held = thread::scope(|scope| {
        scope.spawn(|| accept(&answering, &stop));
        let sending: Vec<_> =
            senders.iter_mut().map(|sender| scope.spawn(|| send(sender, &collectors, &stop))).collect();
        let held = soak.run(duration);
        stop.store(true, Ordering::SeqCst);
        let sent: Result<()> =
            sending.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| bail!("a sender panicked")));
        held.and(sent)
    });
    let mut daemon = soak.daemon;
    let log = daemon.log().to_owned();
    let report = collectors.finish(&senders.iter().collect::<Vec<_>>())?;
    eprintln!("{report}");
    let end = || format!("the daemon's log ends:\n{}\n", last_lines(&log));
    held.with_context(end)?;
    ensure!(report.is_complete(), "datagrams were lost, duplicated or damaged; {}", end());
    let (status, ..) = daemon.stop()?;
    ensure!(status.success(), "the daemon ended with {status}");
    eprintln!("soak: ok");
    Ok(())
}

fn last_lines(log: &str) -> String {
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}

/// A configuration with a listener in each mode and all receivers.
fn everything(lab: &Lab) -> DaemonConfig {
    let mut config = DaemonConfig::for_lab(lab, "tc_ebpf");
    let mut sockets = DaemonConfig::for_lab(lab, "userspace").listeners.remove(0);
    (sockets.name, sockets.bind) = ("sockets".into(), SocketAddr::new(Lab::GATEWAY, 9126).to_string());
    config.listeners.push(sockets);
    HEAD.clone_into(&mut config.head);
    config
}

fn answer(lab: &Lab, site: usize) -> Result<TcpListener> {
    let listener = lab.namespace_of(&lab.sites[site]).run(|| Ok(TcpListener::bind(("0.0.0.0", HEALTH_PORT))?))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Accepts the health checks' connections, so that the queues do not fill up.
fn accept(answering: &Mutex<Vec<Option<TcpListener>>>, stop: &AtomicBool) {
    while !stop.load(Ordering::SeqCst) {
        if let Ok(answering) = answering.lock() {
            answering.iter().flatten().for_each(|listener| while listener.accept().is_ok() {});
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn send(sender: &mut Sender, collectors: &Collectors, stop: &AtomicBool) -> Result<()> {
    while !stop.load(Ordering::SeqCst) {
        let took = sender.send(BATCH, collectors)?;
        ensure!(took < PATIENCE, "a datagram is lost: nothing has arrived for {PATIENCE:?} while one was due");
        thread::sleep(REST);
    }
    Ok(())
}

impl Soak<'_> {
    fn run(&mut self, duration: Duration) -> Result<()> {
        let start = Instant::now();
        let mut baseline = None;
        let mut round = 0;
        while start.elapsed() < duration || round <= WARM_UP {
            self.round().with_context(|| format!("round {}", round + 1))?;
            round += 1;
            let now = self.resources()?;
            if round == WARM_UP {
                baseline = Some(now);
            }
            let (sent, arrived) = self.collectors.progress().now();
            let Resources { fds, maps, rss_kib } = now;
            eprintln!(
                "{:5.0} s  round {round}: sent {sent}, arrived {arrived}; {fds} files, {maps} maps, {rss_kib} KiB",
                start.elapsed().as_secs_f64()
            );
            if let Some(then) = baseline {
                let grown = now.fds > then.fds || now.maps > then.maps || now.rss_kib > then.rss_kib + SLACK_KIB;
                ensure!(!grown, "the daemon holds more than after round {WARM_UP}: {now:?}, then {then:?}");
            }
        }
        Ok(())
    }

    fn round(&mut self) -> Result<()> {
        let all = everything(self.lab);
        self.reload(&changed(&all, |config| config.listeners.iter_mut().for_each(|one| one.downstreams[0].2 = 3)))?;
        self.reload(&changed(&all, |config| {
            config.listeners.iter_mut().for_each(|one| one.extra = "policy = \"hash\"".into())
        }))?;
        self.reload(&changed(&all, |config| config.listeners.swap(0, 1)))?;
        self.reload(&changed(&all, |config| config.listeners.iter_mut().for_each(|one| one.downstreams.truncate(2))))?;
        // The interface to the first receiver, which is not configured at the moment.
        self.reload(&changed(&all, |config| {
            config.listeners.iter_mut().for_each(|one| drop(one.downstreams.remove(0)))
        }))?;
        for state in ["down", "up"] {
            self.lab.gateway.ip(&format!("link set out1 {state}"))?;
            self.traffic()?;
        }
        self.reload(&all)?;
        self.wait_for_unhealthy(0)?;
        for site in 0..self.lab.sites.len() {
            self.answers(site, None)?;
            self.wait_for_unhealthy(all.listeners.len())?;
            self.traffic()?;
            self.answers(site, Some(answer(self.lab, site)?))?;
            self.wait_for_unhealthy(0)?;
        }
        self.traffic()
    }

    fn answers(&self, site: usize, listener: Option<TcpListener>) -> Result<()> {
        let Ok(mut answering) = self.answering.lock() else { bail!("a thread panicked") };
        answering[site] = listener;
        Ok(())
    }

    fn reload(&mut self, config: &DaemonConfig) -> Result<()> {
        self.daemon.reload(&config.to_toml())?;
        self.traffic()
    }

    /// Waits until datagrams sent from now on have arrived, and therefore all earlier ones.
    fn traffic(&self) -> Result<()> {
        let arrived = self.collectors.progress().now().1;
        ensure!(self.collectors.wait_for(arrived + 10 * BATCH, LIMIT), "datagrams have stopped arriving");
        Ok(())
    }

    /// Waits until `count` downstreams are unhealthy, summed over the listeners.
    fn wait_for_unhealthy(&self, count: usize) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let metrics = self.daemon.metrics(&self.lab.gateway)?;
            let unhealthy = metrics.select("udp_fanout_downstream_health", &[]).filter(|one| one.value < 0.5).count();
            if unhealthy == count {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "timed out: {unhealthy} downstreams are unhealthy instead of {count}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Resources that the daemon holds between probes: the minimum of several samples.
    fn resources(&self) -> Result<Resources> {
        let process = PathBuf::from(format!("/proc/{}", self.daemon.pid()));
        let mut least = Resources { fds: usize::MAX, maps: usize::MAX, rss_kib: u64::MAX };
        for _ in 0..20 {
            let (mut fds, mut maps) = (0, BTreeSet::new());
            for entry in fs::read_dir(process.join("fdinfo"))? {
                fds += 1;
                // It may have been closed in the meantime.
                let info = fs::read_to_string(entry?.path()).unwrap_or_default();
                maps.extend(info.lines().find_map(|line| line.strip_prefix("map_id:")).map(|id| id.trim().to_owned()));
            }
            let status = fs::read_to_string(process.join("status"))?;
            let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
            let rss_kib = rss.context("/proc has no VmRSS for the daemon")?.trim().parse()?;
            least.fds = least.fds.min(fds);
            least.maps = least.maps.min(maps.len());
            least.rss_kib = least.rss_kib.min(rss_kib);
            thread::sleep(Duration::from_millis(25));
        }
        Ok(least)
    }
}

fn changed(config: &DaemonConfig, change: impl FnOnce(&mut DaemonConfig)) -> DaemonConfig {
    let mut config = config.clone();
    change(&mut config);
    config
}
