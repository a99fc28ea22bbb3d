//! The API server: whether it can be asked, whether we may, and what it says.
//!
//! The daemon's own discovery does the asking, so that what works here works there. Where it fails, single questions find
//! out why.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::Findings;
use crate::config::{Config, DownstreamSource, ListenerConfig};
use crate::control::report::StatusReport;
use crate::discovery::{self, Discovery, DiscoverySettings, DiscoveryUpdate, ServiceStatus};
use crate::model::{Downstream, ListenerId};

/// How long the API server may take to answer.
const PATIENCE: Duration = Duration::from_secs(15);
/// How often it is looked whether it has.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Asks for what the listeners follow. Returns the downstreams found; where the API server says nothing, those that the
/// running daemon has.
pub(super) fn look(
    config: &Config,
    kubeconfig: Option<&Path>,
    report: Option<&StatusReport>,
    findings: &mut Findings,
) -> BTreeMap<ListenerId, Vec<Downstream>> {
    let requests: Vec<discovery::DiscoveryRequest> =
        config.listeners.iter().filter_map(ListenerConfig::discovery_request).collect();
    if requests.is_empty() {
        return BTreeMap::new();
    }
    let path = std::path::absolute(&config.path).unwrap_or_else(|_| config.path.clone());
    let kubeconfig = kubeconfig.map(Path::to_owned);
    let settings = DiscoverySettings { kubeconfig, config: Some(path), ..DiscoverySettings::from_env() };
    let mut found = match follow(requests, settings, findings) {
        Ok(found) => found,
        Err(error) => {
            findings.problem("kubernetes", format!("{error:#}"), "the daemon does not start like this");
            BTreeMap::new()
        }
    };
    for listener in
        config.listeners.iter().filter(|listener| matches!(listener.source, DownstreamSource::Kubernetes(_)))
    {
        let of_daemon = || report?.listeners.iter().find(|reported| reported.name == listener.name);
        if found.get(&listener.id).is_none_or(Vec::is_empty)
            && let Some(reported) = of_daemon()
        {
            found.insert(listener.id, reported.downstreams.iter().map(|to| downstream(&to.name, to.address)).collect());
        }
    }
    found
}

fn downstream(name: &str, address: SocketAddr) -> Downstream {
    Downstream { name: name.into(), address, weight: 1, sample: Downstream::ALL }
}

/// Runs the discovery until every Service has been listed and is being watched, or has failed.
fn follow(
    requests: Vec<discovery::DiscoveryRequest>,
    settings: DiscoverySettings,
    findings: &mut Findings,
) -> Result<BTreeMap<ListenerId, Vec<Downstream>>> {
    let listeners: BTreeSet<ListenerId> = requests.iter().map(|request| request.listener).collect();
    let (sender, updates) = mpsc::channel();
    // Nothing polls: what wakes the event loop is of no use here.
    let poll = mio::Poll::new().context("cannot create an event queue (epoll)")?;
    let waker = Arc::new(mio::Waker::new(poll.registry(), mio::Token(0)).context("cannot create a waker")?);
    let discovery = Discovery::start(requests, settings.clone(), sender, waker)?;
    let (found, services) = gather(&discovery, &updates, &listeners);
    discovery.shutdown();
    let before = findings.0.len();
    for service in &services {
        let name = format!("{}/{}", service.namespace, service.service);
        match discovery::diagnose(&settings, &service.namespace, &service.service) {
            Err(reason) => {
                let (what, fix) = split(&reason);
                findings.problem("kubernetes", what, fix);
            }
            Ok(()) if !service.synced => findings.problem(
                "kubernetes",
                format!("the endpoints of {name} were not to be had within {PATIENCE:?}: {}", errors(service)),
                "look at the API server, and at what is between it and this host",
            ),
            Ok(()) => {}
        }
    }
    let endpoints: usize = found.values().map(Vec::len).sum();
    let text = format!("the API server lists and watches all {} Services: {endpoints} endpoints", services.len());
    findings.ok_unless_found(before, "kubernetes", text);
    Ok(found)
}

fn gather(
    discovery: &Discovery,
    updates: &Receiver<DiscoveryUpdate>,
    listeners: &BTreeSet<ListenerId>,
) -> (BTreeMap<ListenerId, Vec<Downstream>>, Vec<ServiceStatus>) {
    let deadline = Instant::now() + PATIENCE;
    let mut found = BTreeMap::new();
    loop {
        if let Ok(DiscoveryUpdate { listener, set }) = updates.recv_timeout(LOOK_AGAIN) {
            found.insert(listener, set.downstreams);
        }
        let services = discovery.status().services();
        let failed = |service: &ServiceStatus| service.errors.iter().any(|(_, n)| *n > 0);
        let settled = !services.is_empty() && services.iter().all(|service| service.synced || failed(service));
        let complete = services.iter().any(failed) || listeners.iter().all(|listener| found.contains_key(listener));
        if (settled && complete) || Instant::now() > deadline {
            return (found, services);
        }
    }
}

fn errors(service: &ServiceStatus) -> String {
    let errors: Vec<String> =
        service.errors.iter().filter(|(_, n)| *n > 0).map(|(kind, n)| format!("{n} of kind {kind}")).collect();
    if errors.is_empty() { "no answer".to_owned() } else { errors.join(", ") }
}

/// What is wrong, and the fix.
fn split(reason: &str) -> (&str, &str) {
    reason.split_once("; ").unwrap_or((reason, "look at the API server, and at what is between it and this host"))
}
