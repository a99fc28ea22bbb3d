//! The thread `fo-kube`: a tokio runtime of its own, one task per Service, and the loop that publishes.
//!
//! Nothing asynchronous leaves this file and those below it. `service` follows one Service through every failure,
//! `client` builds its connection to the API server, `link` keeps score of that connection, `lookup` asks the
//! single questions (which version, which zone, why nothing), `failure` sorts what goes wrong by what helps against it,
//! `credentials` says who we are, `backoff` how long to wait.

mod backoff;
mod client;
mod credentials;
mod explain;
mod failure;
mod link;
mod lookup;
mod service;

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
use super::hub::{Finding, Hub, Note, ServiceKey};
use super::status::{ErrorKind, Status};
use super::{Request, Settings, Update};

/// Where updates go.
#[derive(Debug)]
pub(super) struct Outlet {
    sender: mpsc::Sender<Update>,
    waker: Arc<mio::Waker>,
}

impl Outlet {
    pub(super) fn new(sender: mpsc::Sender<Update>, waker: Arc<mio::Waker>) -> Outlet {
        Outlet { sender, waker }
    }

    /// False if nobody receives any more.
    fn send(&self, updates: Vec<Update>) -> bool {
        if updates.is_empty() {
            return true;
        }
        let received = updates.into_iter().all(|update| self.sender.send(update).is_ok());
        if let Err(error) = self.waker.wake() {
            tracing::error!(%error, "cannot wake the event loop: it learns of new endpoints when something else wakes it");
        }
        received
    }
}

/// The way to tell the thread something. Dropping it ends the thread.
#[derive(Debug)]
pub(super) struct Commands(UnboundedSender<Vec<Request>>);

impl Commands {
    pub(super) fn replace(&self, requests: Vec<Request>) -> Result<()> {
        self.0.send(requests).ok().context("the discovery thread has ended: restart the daemon")
    }
}

/// Finds out by single questions why the endpoints of a Service are not to be had.
pub(super) fn explain(settings: &Settings, namespace: &str, service: &str) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start a runtime: {error}"))?;
    let outcome = runtime.block_on(explain::explain(settings, namespace, service));
    runtime.shutdown_background();
    outcome
}

/// Reads the credentials, so that a mistake there is reported at once, and starts the thread.
pub(super) fn start(
    requests: Vec<Request>,
    settings: Settings,
    status: Status,
    outlet: Outlet,
) -> Result<(Commands, JoinHandle<()>)> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime for Kubernetes discovery")?;
    let credentials = Arc::new(Credentials::find(settings.kubeconfig.as_deref()));
    let config = runtime.block_on(credentials.load())?;
    let mut hub = Hub::new(config.default_namespace.trim(), settings.node_name.clone());
    hub.replace(requests);
    let (commands, inbox) = unbounded_channel();
    let (findings, found) = unbounded_channel();
    let crew = Crew {
        tasks: JoinSet::new(),
        watches: HashMap::new(),
        settings,
        credentials,
        status,
        findings,
        zone_asked: false,
    };
    let body = move || {
        runtime.block_on(run(hub, crew, inbox, found, &outlet));
        // A name being resolved or a credential plugin running would otherwise hold up the end.
        runtime.shutdown_background();
    };
    let thread = std::thread::Builder::new()
        .name("fo-kube".to_owned())
        .spawn(body)
        .context("cannot start the thread fo-kube")?;
    Ok((Commands(commands), thread))
}

/// Publishes until the commands' other end is dropped.
async fn run(
    mut hub: Hub,
    mut crew: Crew,
    mut inbox: UnboundedReceiver<Vec<Request>>,
    mut found: UnboundedReceiver<Finding>,
    outlet: &Outlet,
) {
    crew.man(&hub);
    // The first change is published at once, what follows within the window together.
    let mut due = Instant::now();
    let mut dirty = false;
    loop {
        tokio::select! {
            biased;
            command = inbox.recv() => {
                let Some(requests) = command else { return };
                hub.replace(requests);
                crew.man(&hub);
                dirty = true;
            }
            Some(finding) = found.recv() => {
                hub.take(finding);
                dirty = true;
            }
            Some(ended) = crew.tasks.join_next_with_id() => crew.replace_fallen(ended),
            () = tokio::time::sleep_until(due), if dirty => {
                let (updates, notes) = hub.flush();
                let any = !updates.is_empty();
                notes.iter().for_each(log);
                if !outlet.send(updates) {
                    return;
                }
                dirty = false;
                if any {
                    due = Instant::now() + crew.settings.limits.coalesce;
                }
            }
        }
    }
}

/// The tasks: one for each Service, and one while the zone is asked for.
struct Crew {
    tasks: JoinSet<()>,
    watches: HashMap<ServiceKey, AbortHandle>,
    settings: Settings,
    credentials: Arc<Credentials>,
    status: Status,
    findings: UnboundedSender<Finding>,
    zone_asked: bool,
}

impl Crew {
    /// Starts what is wanted and does not run, stops what runs and is not wanted.
    fn man(&mut self, hub: &Hub) {
        let wanted: Vec<&ServiceKey> = hub.wanted().collect();
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
        if !self.zone_asked
            && hub.wants_zone()
            && let Some(node) = self.settings.node_name.clone()
        {
            self.zone_asked = true;
            let (credentials, settings, findings) =
                (self.credentials.clone(), self.settings.clone(), self.findings.clone());
            self.tasks.spawn(lookup::find_zone(node, credentials, settings, findings));
        }
    }

    fn watch(&mut self, key: ServiceKey, delay: Duration) {
        let watch = service::Watch::new(
            key.clone(),
            &self.settings,
            self.credentials.clone(),
            self.status.add(&key),
            self.findings.clone(),
        );
        let task = self.tasks.spawn(async move {
            tokio::time::sleep(delay).await;
            watch.run().await;
        });
        self.watches.insert(key, task);
    }

    /// A watch never ends by itself: if one did, there is a fault in it. What it found stays in force; another takes
    /// over after a while.
    fn replace_fallen(&mut self, ended: Result<(Id, ()), tokio::task::JoinError>) {
        let (id, fault) = match ended {
            Ok((id, ())) => (id, "it ended".to_owned()), // as the search for the zone does
            Err(error) if error.is_cancelled() => return,
            Err(error) => (error.id(), error.to_string()),
        };
        let Some(key) = self.watches.iter().find(|(_, task)| task.id() == id).map(|(key, _)| key.clone()) else {
            return;
        };
        let again = self.settings.limits.backoff_max;
        self.status.add(&key).count_error(ErrorKind::Internal);
        tracing::error!("the watch of the endpoints of {key} failed: {fault}; starting it again in {again:?}");
        self.watch(key, again);
    }
}

fn log(note: &Note) {
    match note {
        Note::Discovered { listener, endpoints } => {
            tracing::info!(listener_id = listener.0, endpoints, "discovered endpoints");
        }
        Note::Changed { listener, endpoints } => {
            tracing::debug!(listener_id = listener.0, endpoints, "discovered endpoints");
        }
        Note::Empty { listener, cause } => {
            tracing::warn!(listener_id = listener.0, endpoints = 0, "discovered endpoints: none usable: {cause}");
        }
        Note::Warning { listener, text } => tracing::warn!(listener_id = listener.0, "{text}"),
    }
}
