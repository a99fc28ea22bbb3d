//! Downstreams from Kubernetes: follows the EndpointSlices of the listeners' Services and publishes whole sets.
//!
//! ```text
//! API server ══► watch/service_watch ──► aggregator ──► DiscoveryUpdate ──► channel + waker ──► event loop
//!                one task per Service    pure: merges, counts generations
//! ```
//!
//! All asynchronous code runs on one thread, `fo-kube`, in `watch` and the files below it. [`slices`] turns
//! slices into a list of downstreams and [`aggregator`] decides what is published when, both without I/O. Sets are
//! snapshots: a [`DiscoveryUpdate`] replaces the listener's last one. Only a reply of the API server changes a set; during an
//! outage the last good one stays in force.
//!
//! | event | first function | ends in |
//! | --- | --- | --- |
//! | endpoint added | `ServiceWatch::apply_event` | `Aggregator::flush`, then the event loop's `downstream_sources` |
//! | endpoint terminating | the same; `EndpointReadiness::from_conditions` | `slices::choose_endpoints` leaves it out |
//! | API server away | `ServiceWatch::recover_from` | one log line; the sets stay |

pub mod aggregator;
pub mod messages;
pub mod rbac;
pub mod service_key;
pub mod slices;
pub mod status;
mod watch;
pub mod wire;

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

pub use self::status::{DiscoveryStatus, ErrorKind, ServiceStatus};
use crate::model::{DownstreamSet, ListenerId};
use crate::net::Family;

/// Which endpoints a listener uses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiscoveryRequest {
    /// The listener that gets the downstreams.
    pub listener: ListenerId,
    /// At least one; their endpoints are merged.
    pub services: Vec<ServiceRef>,
    /// The listener's own address family; endpoints of the other one are left out.
    pub family: Family,
    /// Preference by node or zone.
    pub locality: Locality,
    /// Use of endpoints that are shutting down.
    pub terminating: Terminating,
}

/// A Service, and the port to send to on each of its endpoints.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct ServiceRef {
    /// The namespace; none means the pod's own, or that of the kubeconfig's context.
    pub namespace: Option<String>,
    /// The name of the Service.
    pub service: String,
    /// The port on the endpoints, not the Service's.
    pub port: PortRef,
}

/// A port of an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PortRef {
    /// This number on every endpoint, from 1; the Service's own ports do not matter.
    Number(u16),
    /// The number that each slice gives for the Service port of this name; the empty name stands for the unnamed port.
    Name(String),
}

impl fmt::Display for PortRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PortRef::Number(number) => number.fmt(f),
            PortRef::Name(name) => write!(f, "{name:?}"),
        }
    }
}

/// Which endpoints are preferred, by node or zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Locality {
    /// No preference.
    #[default]
    Cluster,
    /// The endpoints on this node; if it has none, all.
    PreferNode,
    /// Only endpoints on this node.
    Node,
    /// The endpoints in this node's zone; if it has none, all.
    PreferZone,
}

impl Locality {
    /// The name in configuration files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Locality::Cluster => "cluster",
            Locality::PreferNode => "prefer_node",
            Locality::Node => "node",
            Locality::PreferZone => "prefer_zone",
        }
    }
}

/// Use of endpoints that are shutting down and still serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Terminating {
    /// Never used.
    Never,
    /// Used only when no endpoint is ready.
    #[default]
    Fallback,
    /// Used like ready ones until the API server removes them.
    UntilGone,
}

/// Credentials, node and timeouts of discovery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiscoverySettings {
    /// The kubeconfig given by the operator. If there is none: the pod's service account, else the file that `KUBECONFIG`
    /// names, else `~/.kube/config`.
    pub kubeconfig: Option<PathBuf>,
    /// The configuration file, for the commands that log lines suggest.
    pub config: Option<PathBuf>,
    /// The name of this node in EndpointSlices.
    pub node_name: Option<String>,
    /// Timeouts.
    pub limits: DiscoveryTimeouts,
}

impl DiscoverySettings {
    /// The node's name from the environment variable `NODE_NAME`; defaults for the rest.
    #[must_use]
    pub fn from_env() -> DiscoverySettings {
        DiscoverySettings {
            kubeconfig: None,
            config: None,
            node_name: std::env::var("NODE_NAME").ok().filter(|name| !name.is_empty()),
            limits: DiscoveryTimeouts::default(),
        }
    }
}

/// Timeouts and intervals of discovery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiscoveryTimeouts {
    /// The most time to accept a connection (at most 2 s), to begin a reply, and between two parts of one.
    pub request_timeout: Duration,
    /// A watch without an event or bookmark for this long counts as dead. Servers send a bookmark about every minute; with
    /// one that sends none, each such renewal costs one request.
    pub stall_timeout: Duration,
    /// The requested length of a watch, in whole seconds, below 295 s (a limit of the kube crate). Up to a fifth is subtracted
    /// at random, so that nodes started together do not renew together.
    pub watch_timeout: Duration,
    /// After two watches in a row that were shorter than this, the next one waits for the backoff.
    pub short_watch: Duration,
    /// The upper bound of the first wait after a failure; each further failure doubles it.
    pub backoff_min: Duration,
    /// The longest wait after a failure; after one that is not the server's overload or error, it is 1 s or 5 s
    /// (`watch/backoff`).
    pub backoff_max: Duration,
    /// The least time between two updates; changes in between are published together.
    pub coalesce: Duration,
}

impl Default for DiscoveryTimeouts {
    fn default() -> DiscoveryTimeouts {
        DiscoveryTimeouts {
            request_timeout: Duration::from_secs(30),
            stall_timeout: Duration::from_secs(150),
            watch_timeout: Duration::from_secs(290),
            short_watch: Duration::from_secs(1),
            backoff_min: Duration::from_millis(200),
            backoff_max: Duration::from_secs(30),
            coalesce: Duration::from_millis(3),
        }
    }
}

/// A listener's new downstreams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiscoveryUpdate {
    /// The listener.
    pub listener: ListenerId,
    /// All its downstreams, sorted by address. Generations increase over all updates of one [`Discovery`].
    pub set: DownstreamSet,
}

/// The handle of the thread `fo-kube`. Dropping it ends the thread.
#[derive(Debug)]
pub struct Discovery {
    /// Dropped to end the thread.
    commands: Option<watch::CommandSender>,
    status: DiscoveryStatus,
    settings: DiscoverySettings,
    thread: Option<JoinHandle<()>>,
}

impl Discovery {
    /// Reads the credentials, starts the thread and returns without waiting for the API server; [`Discovery::status`] and the
    /// log show whether it can be reached. Fails without credentials, so call it only if a listener needs it. Wakes `waker`
    /// after each update sent.
    ///
    /// # Errors
    /// If a request is invalid ([`validate`]), if credentials are missing or unreadable, or if the thread cannot be started.
    pub fn start(
        requests: Vec<DiscoveryRequest>,
        settings: DiscoverySettings,
        sender: mpsc::Sender<DiscoveryUpdate>,
        waker: Arc<mio::Waker>,
    ) -> Result<Discovery> {
        validate(&requests, &settings)?;
        let status = DiscoveryStatus::new();
        let update_sender = watch::UpdateSender::new(sender, waker);
        let (commands, thread) = watch::start(requests, settings.clone(), status.clone(), update_sender)?;
        Ok(Discovery { commands: Some(commands), status, settings, thread: Some(thread) })
    }

    /// Replaces all requests. Watches that are still needed continue, a listener with an unchanged request gets no update, and
    /// generations continue.
    ///
    /// # Errors
    /// If a request is invalid ([`validate`]), or if the thread has ended. The old requests then stay in force.
    pub fn update_requests(&self, requests: Vec<DiscoveryRequest>) -> Result<()> {
        validate(&requests, &self.settings)?;
        let commands = self.commands.as_ref().context("the discovery thread (fo-kube) has been shut down")?;
        commands.replace(requests)
    }

    /// The state of each Service's watch. The handle may be kept and read from any thread.
    #[must_use]
    pub fn status(&self) -> DiscoveryStatus {
        self.status.clone()
    }

    /// False if the thread has failed: there will be no more updates, and the last sets stay in use.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Ends the thread and waits for it. Takes milliseconds, since pending requests are aborted.
    pub fn shutdown(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the discovery thread (fo-kube) had panicked; endpoints were no longer updated");
        }
    }
}

impl Drop for Discovery {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Tries once to list and watch the endpoints of a Service, for `udp-fanout doctor`. Blocks until the API server replies.
///
/// # Errors
/// The cause and the fix, in one line.
pub fn diagnose(settings: &DiscoverySettings, namespace: &str, service: &str) -> Result<(), String> {
    watch::diagnose(settings, namespace, service)
}

/// Checks requests and settings without a cluster.
///
/// # Errors
/// If a listener appears twice or has no Service, a name is not a valid Kubernetes name, a port is 0, `locality = "node"` is
/// set and the node's name is unknown, or a timeout is out of range.
pub fn validate(requests: &[DiscoveryRequest], settings: &DiscoverySettings) -> Result<()> {
    let mut seen = BTreeSet::new();
    for request in requests {
        let id = request.listener;
        ensure!(seen.insert(id), "listener {id} has two discovery requests");
        ensure!(!request.services.is_empty(), "listener {id}: `kubernetes` names no service");
        for service in &request.services {
            check_service(service).with_context(|| format!("listener {id}"))?;
        }
        if request.locality == Locality::Node && settings.node_name.is_none() {
            bail!(
                "listener {id}: locality = \"node\" needs the node's name: set the environment variable NODE_NAME, in a \
                 DaemonSet by the downward API (fieldPath: spec.nodeName)"
            );
        }
    }
    let seconds = settings.limits.watch_timeout.as_secs();
    ensure!((1..295).contains(&seconds), "watch_timeout is {seconds} s: must be from 1 to 294 s");
    Ok(())
}

fn check_service(service: &ServiceRef) -> Result<()> {
    check_name("service", &service.service)?;
    if let Some(namespace) = &service.namespace {
        check_name("namespace", namespace)?;
    }
    ensure!(
        service.port != PortRef::Number(0),
        "service {:?}: port 0 is not a valid destination; give a port from 1 to 65535",
        service.service
    );
    Ok(())
}

/// Services and namespaces are DNS labels (RFC 1123); anything else could also change the label selector's meaning.
fn check_name(what: &str, name: &str) -> Result<()> {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() || name.len() > 63 || !name.chars().all(fits) || name.starts_with('-') || name.ends_with('-') {
        bail!("{what} {name:?} is not a Kubernetes name: use 1 to 63 of a-z, 0-9 and '-', with no '-' at either end");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
