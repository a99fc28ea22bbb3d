//! Downstreams from Kubernetes: what the EndpointSlices of a listener's Services say, as whole sets.
//!
//! ```text
//! API server ══► watch/service_watch (one task per Service) ──► aggregator (pure) ──► DiscoveryUpdate ──► channel + waker ──► event loop
//!                  kube's watcher, back-off, outages        merges, counts generations
//! ```
//!
//! One thread, `fo-kube`, runs everything asynchronous; it lives in `watch` and the files below it. [`slices`] turns
//! slices into a list of downstreams and [`aggregator`] decides what is published when, both without I/O. Sets are
//! snapshots: an [`DiscoveryUpdate`] replaces what the listener had. Only an answer of the API server changes a set; whatever
//! goes wrong on the way to the server leaves the last good one in force.

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

/// What a listener wants to know: the endpoints of which Services, and which of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiscoveryRequest {
    /// Whose downstreams they will be.
    pub listener: ListenerId,
    /// At least one; their endpoints are merged.
    pub services: Vec<ServiceRef>,
    /// The listener's own address family; endpoints of the other one are left out.
    pub family: Family,
    /// Which endpoints are preferred by where they run.
    pub locality: Locality,
    /// What becomes of endpoints that are shutting down.
    pub terminating: Terminating,
}

/// A Service, and the port to send to on each of its endpoints.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct ServiceRef {
    /// Its namespace; none means the pod's own, or that of the kubeconfig's context.
    pub namespace: Option<String>,
    /// Its name.
    pub service: String,
    /// The port on the endpoints, not the Service's.
    pub port: PortRef,
}

/// A port of an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PortRef {
    /// This number on every endpoint, whatever ports the Service has; from 1.
    Number(u16),
    /// The number that each slice gives the Service port of this name; the empty name is a port without one.
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

/// Which endpoints are preferred by where they run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Locality {
    /// All alike.
    #[default]
    Cluster,
    /// Those on this node; while it has none, all.
    PreferNode,
    /// Only those on this node.
    Node,
    /// Those in this node's zone; while it has none, all.
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

/// What becomes of endpoints that are shutting down and still serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
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

/// Where the API server is, who we are, and how patient to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiscoverySettings {
    /// A kubeconfig file given by the operator; it wins over everything else. Without it: the pod's service account
    /// if there is one, else what `KUBECONFIG` names, else `~/.kube/config`.
    pub kubeconfig: Option<PathBuf>,
    /// The configuration file, to be named in messages.
    pub config: Option<PathBuf>,
    /// The name of the node this runs on, as EndpointSlices spell it.
    pub node_name: Option<String>,
    /// Time limits.
    pub limits: DiscoveryTimeouts,
}

impl DiscoverySettings {
    /// DiscoverySettings of this process: `NODE_NAME` from the environment, everything else by default.
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

/// How long things may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiscoveryTimeouts {
    /// How long a server may take to accept a connection, to begin its answer, or to go on with one.
    pub request_timeout: Duration,
    /// How long a watch may be silent, bookmarks included, before it is taken for dead. Servers send a bookmark
    /// about every minute; one that sends none has its watch renewed this often, which costs it one request.
    pub stall_timeout: Duration,
    /// After how long the server is asked to end a watch, in whole seconds; up to a fifth is taken off at random, so
    /// that nodes started together do not come back together. Less than 295 s, as the kube crate demands.
    pub watch_timeout: Duration,
    /// A watch that ends sooner than this twice in a row is renewed only after a back-off.
    pub short_watch: Duration,
    /// The longest first wait after a failure. It doubles with each further one.
    pub backoff_min: Duration,
    /// The longest wait.
    pub backoff_max: Duration,
    /// After a set has been published, changes are gathered this long before the next.
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

/// A listener's downstreams have changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiscoveryUpdate {
    /// Whose.
    pub listener: ListenerId,
    /// All of them, in order of address. The generation is higher than in any earlier update of this [`Discovery`].
    pub set: DownstreamSet,
}

/// The running discovery. Dropping it ends the thread.
#[derive(Debug)]
pub struct Discovery {
    /// Dropped to end the thread.
    commands: Option<watch::CommandSender>,
    status: DiscoveryStatus,
    settings: DiscoverySettings,
    thread: Option<JoinHandle<()>>,
}

impl Discovery {
    /// Reads the credentials, starts the thread and returns at once (not to be called where no listener needs it, since
    /// it fails where there are no credentials): whether the API server can be reached shows in
    /// [`Discovery::status`] and in the log. After each update sent, `waker` is woken.
    ///
    /// # Errors
    /// When a request is impossible ([`validate`]), when there are no credentials or they cannot be read, or when the
    /// thread cannot be started.
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

    /// Replaces all requests. Watches that are still wanted go on undisturbed; a listener whose request is unchanged
    /// gets no update from this; generations go on counting.
    ///
    /// # Errors
    /// When a request is impossible ([`validate`]), which leaves everything as it was; when the thread has ended.
    pub fn update_requests(&self, requests: Vec<DiscoveryRequest>) -> Result<()> {
        validate(&requests, &self.settings)?;
        let commands = self.commands.as_ref().context("the discovery thread has been shut down")?;
        commands.replace(requests)
    }

    /// How each Service's watch is doing; may be called from any thread, and kept.
    #[must_use]
    pub fn status(&self) -> DiscoveryStatus {
        self.status.clone()
    }

    /// False if the thread has failed: what it found last stays, and nothing new will come.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Ends the thread and waits for it, which takes milliseconds: requests under way are abandoned.
    pub fn shutdown(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the discovery thread had failed; endpoints were no longer being updated");
        }
    }
}

impl Drop for Discovery {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Lists the endpoints of a Service and begins to watch them, once, waiting for the answers.
///
/// # Errors
/// What stands in the way and the fix, in one line.
pub fn diagnose(settings: &DiscoverySettings, namespace: &str, service: &str) -> Result<(), String> {
    watch::diagnose(settings, namespace, service)
}

/// Checks what can be checked without a cluster.
///
/// # Errors
/// When a listener appears twice or has no service, when a name is not a valid Kubernetes name, when a port is 0,
/// when `locality = "node"` is asked for without knowing the node's name, or when a limit is out of range.
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
    ensure!(service.port != PortRef::Number(0), "service {:?}: port 0 cannot be sent to", service.service);
    Ok(())
}

/// Services and namespaces are DNS labels (RFC 1123); anything else could also change the label selector's meaning.
fn check_name(what: &str, name: &str) -> Result<()> {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() || name.len() > 63 || !name.chars().all(fits) || name.starts_with('-') || name.ends_with('-') {
        bail!("{what} {name:?} is not a Kubernetes name: 1 to 63 of a-z, 0-9 and '-', not at either end");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
