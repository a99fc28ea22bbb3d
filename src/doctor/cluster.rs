//! The API server: whether it is reachable, whether we may list and watch EndpointSlices, and what it contains.
//!
//! The checks run the daemon's own discovery, so what works here works there. If it fails, single requests find the reason.

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

/// How long the API server may take to reply.
const CLUSTER_TIMEOUT: Duration = Duration::from_secs(15);
/// How long to wait for an update before checking the status again.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Runs discovery for the listeners with Services. Returns the downstreams found; if the API server returns none, those of the
/// running daemon.
pub(super) fn check(
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
    let mut found = match discover(requests, settings, &config.listeners, findings) {
        Ok(found) => found,
        Err(error) => {
            findings.problem("kubernetes", format!("{error:#}"), "correct this; the daemon does not start otherwise");
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

/// Runs discovery until every Service is listed and watched, or has failed.
fn discover(
    requests: Vec<discovery::DiscoveryRequest>,
    settings: DiscoverySettings,
    configured: &[ListenerConfig],
    findings: &mut Findings,
) -> Result<BTreeMap<ListenerId, Vec<Downstream>>> {
    let listeners: BTreeSet<ListenerId> = requests.iter().map(|request| request.listener).collect();
    let (sender, updates) = mpsc::channel();
    // Discovery needs a waker for the event loop. Nothing polls this one.
    let poll = mio::Poll::new().context("cannot create an event queue (epoll)")?;
    let waker = Arc::new(mio::Waker::new(poll.registry(), mio::Token(0)).context("cannot create a waker")?);
    let discovery = Discovery::start(requests, settings.clone(), sender, waker)?;
    let (found, services) = gather(&discovery, &updates, &listeners);
    let problems = discovery.status().problems();
    discovery.shutdown();
    let before = findings.0.len();
    // `diagnose` names the cause where there are no slices.
    for (id, text) in problems.iter().filter(|(_, text)| !text.contains("EndpointSlice not found")) {
        let listener = configured.iter().find(|listener| listener.id == *id).map_or("", |listener| &listener.name);
        let (what, fix) = split(text);
        findings.warning("kubernetes", format!("listener {listener:?}: {what}"), fix);
    }
    for service in &services {
        let name = format!("{}/{}", service.namespace, service.service);
        match discovery::diagnose(&settings, &service.namespace, &service.service) {
            Err(reason) => {
                let (what, fix) = split(&reason);
                findings.problem("kubernetes", what, fix);
            }
            Ok(()) if !service.synced => findings.problem(
                "kubernetes",
                format!(
                    "the API server returned no endpoints of {name} within {CLUSTER_TIMEOUT:?}: {}",
                    errors(service)
                ),
                "check the API server, and the network between it and this host",
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
    let deadline = Instant::now() + CLUSTER_TIMEOUT;
    let mut found = BTreeMap::new();
    loop {
        if let Ok(DiscoveryUpdate { listener, set }) = updates.recv_timeout(POLL_INTERVAL) {
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
    if errors.is_empty() { "no reply".to_owned() } else { errors.join(", ") }
}

/// Splits a reason into the fault and its fix.
fn split(reason: &str) -> (&str, &str) {
    reason.split_once("; ").unwrap_or((reason, "check the API server, and the network between it and this host"))
}
