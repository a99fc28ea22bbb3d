//! The command `udp-fanout doctor`: looks for what silently breaks forwarding on this host, and says how to fix it.
//!
//! ```text
//! configuration ─► kernel     privileges, kernel, the program itself, ICMP sockets, socket buffers
//!               ─► links      interfaces, programs that precede ours (foreign programs), bind addresses
//!               ─► daemon     the report of the running daemon
//!               ─► cluster    the API server: may we list, may we watch, what exists
//!               ─► names      DNS names of downstreams
//!               ─► paths      routes, neighbours, MTU, source validation, forwarding ─► show
//! ```
//!
//! It changes nothing: it unloads the programs that it loads, and sends only ARP or neighbour requests, as forwarding would.
//! Each module collects facts and passes them to pure functions that judge (`judge_…`). Each finding is one line.

mod cluster;
mod daemon;
mod kernel;
mod links;
mod names;
mod paths;
mod show;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;

use crate::config::{Config, DownstreamSource, Interfaces, ListenerConfig, Problems};
use crate::controller::ModeChoice;
use crate::host::{HostAddress, HostFacts, HostNetwork, Link};
use crate::model::{Downstream, ListenerId, Mode};
use crate::output;

/// What to check, and how to print it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DoctorOptions {
    /// The configuration file.
    pub config: PathBuf,
    /// Senders whose datagrams the host must accept.
    pub senders: Vec<IpAddr>,
    /// The kubeconfig of the API server, if the command line names one.
    pub kubeconfig: Option<PathBuf>,
    /// JSON instead of lines.
    pub json: bool,
}

/// Severity of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// No fault.
    Ok,
    /// Works, but not for all datagrams, or slower than it could.
    Warning,
    /// Datagrams are lost, or the daemon does not start.
    Problem,
}

impl Severity {
    /// As printed.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Severity::Ok => "ok",
            Severity::Warning => "warning",
            Severity::Problem => "problem",
        }
    }
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DoctorFinding {
    /// The key `level` in JSON.
    pub level: Severity,
    /// The name of the check, one word.
    pub check: &'static str,
    /// What was found, and where.
    pub text: String,
    /// What to type or change. None if there is no fault.
    pub fix: Option<String>,
}

/// All findings, in the order of the checks.
#[derive(Debug, Default)]
pub struct Findings(Vec<DoctorFinding>);

impl Findings {
    fn ok(&mut self, check: &'static str, text: impl Into<String>) {
        self.0.push(DoctorFinding { level: Severity::Ok, check, text: text.into(), fix: None });
    }

    fn warning(&mut self, check: &'static str, text: impl Into<String>, fix: impl Into<String>) {
        self.0.push(DoctorFinding { level: Severity::Warning, check, text: text.into(), fix: Some(fix.into()) });
    }

    fn problem(&mut self, check: &'static str, text: impl Into<String>, fix: impl Into<String>) {
        self.0.push(DoctorFinding { level: Severity::Problem, check, text: text.into(), fix: Some(fix.into()) });
    }

    /// Adds an `ok` unless this check has added findings since there were `before`.
    fn ok_unless_found(&mut self, before: usize, check: &'static str, text: impl Into<String>) {
        if !self.0[before..].iter().any(|finding| finding.check == check) {
            self.ok(check, text);
        }
    }

    fn count(&self, level: Severity) -> usize {
        self.0.iter().filter(|finding| finding.level == level).count()
    }
}

/// A listener as it would run on this host.
#[derive(Debug)]
struct DoctorListener<'a> {
    config: &'a ListenerConfig,
    choice: ModeChoice,
    downstreams: Vec<Downstream>,
}

impl DoctorListener<'_> {
    fn uses_kernel(&self) -> bool {
        self.choice.mode == Mode::TcEbpf
    }
}

/// Runs all checks and prints the findings. True if there is no problem.
///
/// # Errors
/// When the host's facts cannot be collected, or standard output cannot be written.
pub fn run(options: &DoctorOptions) -> Result<bool> {
    let mut findings = Findings::default();
    match Config::load(&options.config) {
        Ok(config) => check_host(&config, options, &mut findings)?,
        Err(error) => {
            let fix = "correct the file; the daemon does not start with it";
            match error.downcast_ref::<Problems>() {
                Some(problems) => problems.to_string().lines().for_each(|line| findings.problem("config", line, fix)),
                None => findings.problem("config", format!("{error:#}"), fix),
            }
        }
    }
    let text = if options.json { show::json(&findings)? } else { show::text(&findings) };
    output::print(text.as_bytes())?;
    Ok(findings.count(Severity::Problem) == 0)
}

fn check_host(config: &Config, options: &DoctorOptions, findings: &mut Findings) -> Result<()> {
    let before = findings.0.len();
    for warning in &config.warnings {
        let (key, what) = warning.split_once(": ").unwrap_or(("", warning));
        findings.warning("config", format!("{}: {key}", config.path.display()), what);
    }
    findings.ok_unless_found(before, "config", format!("{} is valid", config.path.display()));

    let mut host = HostNetwork::open()?;
    let facts = host.facts(&BTreeSet::new())?;
    let tc_support = kernel::check(config, findings)?;
    let choices = links::choose_modes(config, &tc_support, &facts, findings);
    let report = daemon::check(config, findings);
    links::check(config, &choices, &facts, report.is_some(), findings);
    let mut discovered = cluster::check(config, options.kubeconfig.as_deref(), report.as_ref(), findings);
    discovered.append(&mut names::check(config, findings));
    let listeners = checked_listeners(config, choices, discovered);
    paths::check(&mut host, &listeners, &options.senders, findings)
}

/// Combines what is known about each listener that can run.
fn checked_listeners(
    config: &Config,
    mut choices: BTreeMap<ListenerId, ModeChoice>,
    mut discovered: BTreeMap<ListenerId, Vec<Downstream>>,
) -> Vec<DoctorListener<'_>> {
    let mut checked = Vec::new();
    for listener in &config.listeners {
        let downstreams = match &listener.source {
            DownstreamSource::Static(downstreams) => downstreams.clone(),
            DownstreamSource::Kubernetes(_) | DownstreamSource::Names(_) => {
                discovered.remove(&listener.id).unwrap_or_default()
            }
        };
        if let Some(choice) = choices.remove(&listener.id) {
            checked.push(DoctorListener { config: listener, choice, downstreams });
        }
    }
    checked
}

/// The interfaces on which a listener's datagrams arrive: those that the kernel program is attached to, or in userspace mode
/// those with the addresses that the listener is bound to.
fn ingress_links<'a>(listener: &DoctorListener<'_>, facts: &'a HostFacts) -> Vec<&'a Link> {
    let bind = listener.config.bind.ip();
    let ours = |own: &&HostAddress| {
        if bind.is_unspecified() { own.address.is_ipv4() == bind.is_ipv4() } else { own.address == bind }
    };
    let indices: BTreeSet<u32> = match &listener.config.interfaces {
        _ if !listener.uses_kernel() => facts.addresses.iter().filter(ours).map(|own| own.link).collect(),
        Interfaces::Auto => facts.default_route_links.iter().copied().collect(),
        Interfaces::Named(names) => {
            names.iter().filter_map(|name| facts.link_named(name)).map(|link| link.index).collect()
        }
    };
    indices.into_iter().filter_map(|index| facts.link(index)).filter(|link| !link.loopback).collect()
}
