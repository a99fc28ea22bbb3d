//! Where downstreams come from while the daemon runs: the thread that follows EndpointSlices, and the names that are looked
//! up again and again.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use anyhow::Result;
use mio::Waker;

use super::Daemon;
use crate::config::{Config, ListenerConfig};
use crate::controller::{Event, Origin};
use crate::discovery::{self, Discovery, Update};
use crate::model::{Downstream, DownstreamSet, ListenerId};
use crate::names::lookup::{self, Answer, Lookups};
use crate::names::state::Names;

/// Everything that finds downstreams out.
#[derive(Debug)]
pub(super) struct Sources {
    /// Only while a listener follows a Service.
    pub(super) discovery: Option<(Discovery, Receiver<Update>)>,
    /// The operator has been told that discovery has failed for good.
    pub(super) lost: bool,
    /// Where to find the API server, if the operator has said so.
    kubeconfig: Option<PathBuf>,
    names: Names,
    lookups: Lookups,
    /// Of the last set. One count for all sources: a listener may change from one to another, and a source may begin anew.
    generation: u64,
}

impl Sources {
    /// Starts what the configuration needs. Sets that come before the loop turns wait.
    ///
    /// # Errors
    /// When there are no credentials for the API server, or the node's name is needed and not known.
    pub(super) fn start(config: &Config, kubeconfig: Option<PathBuf>, waker: &Arc<Waker>) -> Result<Sources> {
        let mut sources = Sources {
            discovery: None,
            lost: false,
            kubeconfig,
            names: Names::default(),
            lookups: Lookups::new(Arc::clone(waker), lookup::system),
            generation: 0,
        };
        sources.discovery = sources.start_discovery(config, waker)?;
        sources.follow_names(config, Duration::ZERO);
        Ok(sources)
    }

    /// Starts following the Services that listeners want, if any does.
    ///
    /// # Errors
    /// As for [`start`](Self::start).
    pub(super) fn start_discovery(
        &self,
        config: &Config,
        waker: &Arc<Waker>,
    ) -> Result<Option<(Discovery, Receiver<Update>)>> {
        let requests = requests(config);
        if requests.is_empty() {
            return Ok(None);
        }
        let (sender, updates) = mpsc::channel();
        Ok(Some((Discovery::start(requests, self.settings(config), sender, Arc::clone(waker))?, updates)))
    }

    /// True if discovery can follow the configuration as it runs.
    ///
    /// # Errors
    /// When what the configuration asks for is impossible.
    pub(super) fn can_follow(&self, config: &Config) -> Result<bool> {
        // One that has failed must begin anew.
        if !self.discovery.as_ref().is_some_and(|(discovery, _)| discovery.is_running()) {
            return Ok(false);
        }
        discovery::validate(&requests(config), &self.settings(config))?;
        Ok(true)
    }

    /// Has the running discovery follow the configuration.
    ///
    /// # Errors
    /// When it has failed in the meantime.
    pub(super) fn follow_services(&self, config: &Config) -> Result<()> {
        match &self.discovery {
            Some((discovery, _)) => discovery.update_requests(requests(config)),
            None => Ok(()),
        }
    }

    /// Looks up the names in the configuration from now on, and no others.
    pub(super) fn follow_names(&mut self, config: &Config, now: Duration) {
        self.names.replace(config.listeners.iter().filter_map(ListenerConfig::names_request).collect(), now);
    }

    /// When names are to be looked up.
    pub(super) fn next_deadline(&self) -> Option<Duration> {
        self.names.next_deadline()
    }

    /// Says once that nothing new will come any more; what is known stays in force.
    pub(super) fn tend(&mut self) {
        if !self.lost && self.discovery.as_ref().is_some_and(|(discovery, _)| !discovery.is_running()) {
            self.lost = true;
            tracing::error!(
                "the thread that follows EndpointSlices has failed: the last known endpoints stay in use, and changes \
                 are no longer seen; restart the daemon, or have it reload its configuration once that has changed"
            );
        }
    }

    fn settings(&self, config: &Config) -> discovery::Settings {
        let path = std::path::absolute(&config.path).unwrap_or_else(|_| config.path.clone());
        let kubeconfig = self.kubeconfig.clone();
        discovery::Settings { kubeconfig, config: Some(path), ..discovery::Settings::from_env() }
    }

    fn next_set(&mut self, downstreams: Vec<Downstream>) -> DownstreamSet {
        self.generation += 1;
        DownstreamSet { generation: self.generation, downstreams }
    }

    /// What has been found out since the last call, for each listener only the last of it: each set replaces the one
    /// before.
    fn take(&mut self, now: Duration) -> VecDeque<Event> {
        while let Some(Answer { host, addresses }) = self.lookups.answer() {
            self.names.answered(&host, addresses, now);
        }
        for host in self.names.due(now) {
            self.lookups.ask(host);
        }
        let updates = self.discovery.iter().flat_map(|(_, updates)| updates.try_iter());
        let found: BTreeMap<ListenerId, Vec<Downstream>> =
            updates.map(|update| (update.listener, update.set.downstreams)).collect();
        let found = found.into_iter().map(|(listener, set)| (listener, Origin::Kubernetes, set));
        let named = self.names.take_updates().into_iter().map(|(listener, set)| (listener, Origin::Names, set));
        let all: Vec<_> = found.chain(named).collect();
        let event =
            |(listener, origin, downstreams)| Event::Downstreams { listener, origin, set: self.next_set(downstreams) };
        all.into_iter().map(event).collect()
    }
}

impl Daemon {
    /// Takes in what is new of downstreams, and looks up the names that are due.
    pub(super) fn take_downstreams(&mut self) {
        let events = self.sources.take(self.started.elapsed());
        if events.is_empty() {
            return;
        }
        self.handle_all(events);
        self.watch_health();
    }
}

/// What the listeners whose downstreams come from Kubernetes want to know.
fn requests(config: &Config) -> Vec<discovery::Request> {
    config.listeners.iter().filter_map(ListenerConfig::discovery_request).collect()
}
