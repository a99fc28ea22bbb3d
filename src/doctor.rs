//! `udp-fanout doctor`: looks at this host for what silently breaks forwarding, and says what to do about it.
//!
//! ```text
//! configuration ─► kernel     privileges, kernel, the program itself, pings, buffers
//!                ─► links      interfaces, and who is on them before us
//!                ─► cluster    the API server: may we list, may we watch, what is there
//!                ─► names      names of downstreams, and what the resolver says
//!                ─► daemon     the running daemon's own word
//!                ─► ways       routes, neighbours, MTU, source validation, forwarding ─► show
//! ```
//!
//! It changes nothing: what it loads, it lets go of; what it sends is an ARP or neighbour request, as forwarding would.
//! Each part gathers facts and hands them to pure functions that judge; each finding is one line.

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

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The configuration file.
    pub config: PathBuf,
    /// Senders whose datagrams must be let in.
    pub senders: Vec<IpAddr>,
    /// Where to find the API server of Kubernetes, if named.
    pub kubeconfig: Option<PathBuf>,
    /// JSON instead of lines.
    pub json: bool,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Works, but not for all datagrams, or not as well as it could.
    Warning,
    /// Datagrams are lost, or the daemon does not start.
    Problem,
}

impl Level {
    /// The name in the output.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Warning => "warning",
            Level::Problem => "problem",
        }
    }
}

/// One thing found out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// What was looked at, in a word.
    pub check: &'static str,
    /// What was found.
    pub text: String,
    /// What to do about it; none if all is well.
    pub fix: Option<String>,
}

/// All that was found, in the order of looking.
#[derive(Debug, Default)]
pub struct Findings(Vec<Finding>);

impl Findings {
    fn ok(&mut self, check: &'static str, text: impl Into<String>) {
        self.0.push(Finding { level: Level::Ok, check, text: text.into(), fix: None });
    }

    fn warning(&mut self, check: &'static str, text: impl Into<String>, fix: impl Into<String>) {
        self.0.push(Finding { level: Level::Warning, check, text: text.into(), fix: Some(fix.into()) });
    }

    fn problem(&mut self, check: &'static str, text: impl Into<String>, fix: impl Into<String>) {
        self.0.push(Finding { level: Level::Problem, check, text: text.into(), fix: Some(fix.into()) });
    }

    /// Says that all is well, unless something has been found in this check since `before`.
    fn ok_unless_found(&mut self, before: usize, check: &'static str, text: impl Into<String>) {
        if !self.0[before..].iter().any(|finding| finding.check == check) {
            self.ok(check, text);
        }
    }

    fn count(&self, level: Level) -> usize {
        self.0.iter().filter(|finding| finding.level == level).count()
    }
}

/// A listener as it would run on this host.
#[derive(Debug)]
struct Subject<'a> {
    config: &'a ListenerConfig,
    choice: ModeChoice,
    downstreams: Vec<Downstream>,
}

impl Subject<'_> {
    fn kernel(&self) -> bool {
        self.choice.mode == Mode::TcEbpf
    }
}

/// Looks, and prints what it finds. True if there is no problem.
///
/// # Errors
/// When the host cannot be looked at at all, or standard output refuses.
pub fn run(options: &Options) -> Result<bool> {
    let mut findings = Findings::default();
    match Config::load(&options.config) {
        Ok(config) => examine(&config, options, &mut findings)?,
        Err(error) => {
            let fix = "the daemon does not start with this file; correct it";
            match error.downcast_ref::<Problems>() {
                Some(problems) => problems.to_string().lines().for_each(|line| findings.problem("config", line, fix)),
                None => findings.problem("config", format!("{error:#}"), fix),
            }
        }
    }
    let text = if options.json { show::json(&findings)? } else { show::text(&findings) };
    output::print(text.as_bytes())?;
    Ok(findings.count(Level::Problem) == 0)
}

fn examine(config: &Config, options: &Options, findings: &mut Findings) -> Result<()> {
    let before = findings.0.len();
    for warning in &config.warnings {
        let (key, what) = warning.split_once(": ").unwrap_or(("", warning));
        findings.warning("config", format!("{}: {key}", config.path.display()), what);
    }
    findings.ok_unless_found(before, "config", format!("{} is right", config.path.display()));

    let mut host = HostNetwork::open()?;
    let facts = host.facts(&BTreeSet::new())?;
    let tc_support = kernel::look(config, findings)?;
    let choices = links::choose(config, &tc_support, &facts, findings);
    let report = daemon::ask(config, findings);
    links::look(config, &choices, &facts, report.is_some(), findings);
    let mut discovered = cluster::look(config, options.kubeconfig.as_deref(), report.as_ref(), findings);
    discovered.append(&mut names::look(config, findings));
    let subjects = subjects(config, choices, discovered);
    paths::look(&mut host, &subjects, &options.senders, findings)
}

/// Puts together what is known of each listener that could run.
fn subjects(
    config: &Config,
    mut choices: BTreeMap<ListenerId, ModeChoice>,
    mut discovered: BTreeMap<ListenerId, Vec<Downstream>>,
) -> Vec<Subject<'_>> {
    let mut subjects = Vec::new();
    for listener in &config.listeners {
        let downstreams = match &listener.source {
            DownstreamSource::Static(downstreams) => downstreams.clone(),
            DownstreamSource::Kubernetes(_) | DownstreamSource::Names(_) => {
                discovered.remove(&listener.id).unwrap_or_default()
            }
        };
        if let Some(choice) = choices.remove(&listener.id) {
            subjects.push(Subject { config: listener, choice, downstreams });
        }
    }
    subjects
}

/// The interfaces on which a listener's datagrams arrive: those of the kernel program, or in userspace mode those that
/// have the addresses it is bound to.
fn arrives_on<'a>(subject: &Subject<'_>, facts: &'a HostFacts) -> Vec<&'a Link> {
    let bind = subject.config.bind.ip();
    let ours = |own: &&HostAddress| {
        if bind.is_unspecified() { own.address.is_ipv4() == bind.is_ipv4() } else { own.address == bind }
    };
    let indices: BTreeSet<u32> = match &subject.config.interfaces {
        _ if !subject.kernel() => facts.addresses.iter().filter(ours).map(|own| own.link).collect(),
        Interfaces::Auto => facts.default_route_links.iter().copied().collect(),
        Interfaces::Named(names) => {
            names.iter().filter_map(|name| facts.link_named(name)).map(|link| link.index).collect()
        }
    };
    indices.into_iter().filter_map(|index| facts.link(index)).filter(|link| !link.loopback).collect()
}
