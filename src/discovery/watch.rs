//! The thread `fo-kube`: a tokio runtime of its own, one task per Service, and the loop that publishes.
//!
//! Asynchronous code exists only in this file and those below it. `service_watch` follows one Service through every failure,
//! `client` builds its connection to the API server, `connection_state` counts what happens on it, `queries` makes single
//! requests (API version, zone, why there are no slices), `failure` maps errors to recoveries, `credentials` finds the kubeconfig
//! or service account, `backoff` computes waits, `diagnose` serves `udp-fanout doctor`.

mod backoff;
mod client;
mod connection_state;
mod credentials;
mod diagnose;
mod failure;
mod queries;
mod service_watch;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::{AbortHandle, Id, JoinSet};
use tokio::time::Instant;

use self::credentials::Credentials;
use super::aggregator::{Aggregator, DiscoveryNotice, WatchEvent};
use super::service_key::ServiceKey;
use super::status::{DiscoveryStatus, ErrorKind};
use super::{DiscoveryRequest, DiscoverySettings, DiscoveryUpdate};

/// Sends updates to the event loop and wakes it.
#[derive(Debug)]
pub(super) struct UpdateSender {
    sender: mpsc::Sender<DiscoveryUpdate>,
    waker: Arc<mio::Waker>,
}

impl UpdateSender {
    pub(super) fn new(sender: mpsc::Sender<DiscoveryUpdate>, waker: Arc<mio::Waker>) -> UpdateSender {
        UpdateSender { sender, waker }
    }

    /// False if the receiver is gone.
    fn send(&self, updates: Vec<DiscoveryUpdate>) -> bool {
        if updates.is_empty() {
            return true;
        }
        let received = updates.into_iter().all(|update| self.sender.send(update).is_ok());
        if let Err(error) = self.waker.wake() {
            tracing::error!(%error, "cannot wake the event loop: it applies new endpoints only when another event wakes it");
        }
        received
    }
}

/// Sends commands to the thread. Dropping it ends the thread.
#[derive(Debug)]
pub(super) struct CommandSender(UnboundedSender<Vec<DiscoveryRequest>>);

impl CommandSender {
    pub(super) fn replace(&self, requests: Vec<DiscoveryRequest>) -> Result<()> {
        self.0.send(requests).ok().context("the discovery thread has ended: restart the daemon")
    }
}

/// Finds out why the endpoints of a Service cannot be listed or watched.
pub(super) fn diagnose(settings: &DiscoverySettings, namespace: &str, service: &str) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start a runtime: {error}"))?;
    let outcome = runtime.block_on(diagnose::diagnose(settings, namespace, service));
    runtime.shutdown_background();
    outcome
}

/// Reads the credentials first, so that an error there is reported at once, then starts the thread.
pub(super) fn start(
    requests: Vec<DiscoveryRequest>,
    settings: DiscoverySettings,
    status: DiscoveryStatus,
    updates_out: UpdateSender,
) -> Result<(CommandSender, JoinHandle<()>)> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime for Kubernetes discovery")?;
    let credentials = Arc::new(Credentials::find(settings.kubeconfig.as_deref()));
    let config = runtime.block_on(credentials.load())?;
    let mut aggregator = Aggregator::new(config.default_namespace.trim(), settings.node_name.clone());
    aggregator.replace_requests(requests);
    let (commands, inbox) = unbounded_channel();
    let (events, watch_events) = unbounded_channel();
    let tasks = TaskSet {
        tasks: JoinSet::new(),
        watches: HashMap::new(),
        settings,
        credentials,
        status,
        events,
        zone_requested: false,
    };
    let body = move || {
        runtime.block_on(run(aggregator, tasks, inbox, watch_events, &updates_out));
        // Otherwise the end would wait for a name lookup or a credential plugin.
        runtime.shutdown_background();
    };
    let thread = std::thread::Builder::new()
        .name("fo-kube".to_owned())
        .spawn(body)
        .context("cannot start the thread fo-kube")?;
    Ok((CommandSender(commands), thread))
}

/// The thread's loop: publishes until the [`CommandSender`] is dropped.
async fn run(
    mut aggregator: Aggregator,
    mut tasks: TaskSet,
    mut inbox: UnboundedReceiver<Vec<DiscoveryRequest>>,
    mut watch_events: UnboundedReceiver<WatchEvent>,
    updates_out: &UpdateSender,
) {
    tasks.reconcile(&aggregator);
    // The first change is published at once; those within the `coalesce` window after it, together.
    let mut due = Instant::now();
    let mut dirty = false;
    loop {
        tokio::select! {
            biased;
            command = inbox.recv() => {
                let Some(requests) = command else { return };
                aggregator.replace_requests(requests);
                tasks.reconcile(&aggregator);
                dirty = true;
            }
            Some(event) = watch_events.recv() => {
                aggregator.handle_event(event);
                dirty = true;
            }
            Some(ended) = tasks.tasks.join_next_with_id() => tasks.restart_failed_task(ended),
            () = tokio::time::sleep_until(due), if dirty => {
                let (updates, notices) = aggregator.flush();
                let any = !updates.is_empty();
                tasks.status.set_problems(aggregator.problems());
                notices.iter().for_each(log);
                if !updates_out.send(updates) {
                    return;
                }
                dirty = false;
                if any {
                    due = Instant::now() + tasks.settings.limits.coalesce;
                }
            }
        }
    }
}

/// The running tasks: one per Service, and one while the zone is being queried.
struct TaskSet {
    tasks: JoinSet<()>,
    watches: HashMap<ServiceKey, AbortHandle>,
    settings: DiscoverySettings,
    credentials: Arc<Credentials>,
    status: DiscoveryStatus,
    events: UnboundedSender<WatchEvent>,
    zone_requested: bool,
}

impl TaskSet {
    /// Starts the missing watches and stops those that no listener needs.
    fn reconcile(&mut self, aggregator: &Aggregator) {
        let wanted: Vec<&ServiceKey> = aggregator.wanted_services().collect();
        let status = &self.status;
        self.watches.retain(|key, task| {
            let keep = wanted.contains(&key);
            if !keep {
                task.abort();
                status.remove(key);
            }
            keep
        });
        for key in wanted {
            if !self.watches.contains_key(key) {
                self.watch(key.clone(), Duration::ZERO);
            }
        }
        if !self.zone_requested
            && aggregator.needs_zone()
            && let Some(node) = self.settings.node_name.clone()
        {
            self.zone_requested = true;
            let (credentials, settings, events) =
                (self.credentials.clone(), self.settings.clone(), self.events.clone());
            self.tasks.spawn(queries::find_zone(node, credentials, settings, events));
        }
    }

    fn watch(&mut self, key: ServiceKey, delay: Duration) {
        let watch = service_watch::ServiceWatch::new(
            key.clone(),
            &self.settings,
            self.credentials.clone(),
            self.status.add(&key),
            self.events.clone(),
        );
        let task = self.tasks.spawn(async move {
            tokio::time::sleep(delay).await;
            watch.run().await;
        });
        self.watches.insert(key, task);
    }

    /// Restarts a watch that has ended, which only a bug can cause. The last known endpoints stay in use meanwhile.
    fn restart_failed_task(&mut self, ended: Result<(Id, ()), tokio::task::JoinError>) {
        let (id, fault) = match ended {
            Ok((id, ())) => (id, "it ended".to_owned()), // the zone query ends too; it is not in `watches`
            Err(error) if error.is_cancelled() => return,
            Err(error) => (error.id(), error.to_string()),
        };
        let Some(key) = self.watches.iter().find(|(_, task)| task.id() == id).map(|(key, _)| key.clone()) else {
            return;
        };
        let again = self.settings.limits.backoff_max;
        self.status.add(&key).count_error(ErrorKind::Internal);
        tracing::error!(
            "internal error: the watch of the endpoints of {key} stopped: {fault}; the last known endpoints stay in use; \
             restarting it in {again:?}"
        );
        self.watch(key, again);
    }
}

fn log(notice: &DiscoveryNotice) {
    match notice {
        DiscoveryNotice::Discovered { listener, endpoints } => {
            tracing::info!(listener_id = listener.0, endpoints, "discovered endpoints");
        }
        DiscoveryNotice::Changed { listener, endpoints } => {
            tracing::debug!(listener_id = listener.0, endpoints, "discovered endpoints");
        }
        DiscoveryNotice::Empty { listener, cause } => {
            tracing::warn!(listener_id = listener.0, endpoints = 0, "discovered endpoints: none usable: {cause}");
        }
        DiscoveryNotice::Warning { listener, text } => tracing::warn!(listener_id = listener.0, "{text}"),
    }
}
