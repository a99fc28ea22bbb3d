//! Where downstreams come from at run time: the discovery thread, which follows EndpointSlices, and DNS names, which are
//! looked up again and again.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use anyhow::Result;
use mio::Waker;

use super::Daemon;
use crate::config::{Config, ListenerConfig};
use crate::controller::{ControllerEvent, DownstreamOrigin};
use crate::discovery::{self, Discovery, DiscoveryUpdate};
use crate::model::{Downstream, DownstreamSet, ListenerId};
use crate::names::cache::NameCache;
use crate::names::lookup::{self, LookupPool, LookupResult};

/// Discovery and name look-ups.
#[derive(Debug)]
pub(super) struct DownstreamSources {
    /// Runs only while a listener follows a Service.
    pub(super) discovery: Option<(Discovery, Receiver<DiscoveryUpdate>)>,
    /// Discovery has failed for good, and an error was logged.
    pub(super) discovery_failed: bool,
    /// The kubeconfig file that the command line names.
    kubeconfig: Option<PathBuf>,
    names: NameCache,
    lookups: LookupPool,
    /// The last set's generation, counted over all sources: a listener may change its source, and a source may restart.
    generation: u64,
}

impl DownstreamSources {
    /// Starts what the configuration needs. Sets that arrive before the event loop runs are kept for it.
    ///
    /// # Errors
    /// When there are no credentials for the API server, or the node's name is needed and unknown.
    pub(super) fn start(config: &Config, kubeconfig: Option<PathBuf>, waker: &Arc<Waker>) -> Result<DownstreamSources> {
        let mut sources = DownstreamSources {
            discovery: None,
            discovery_failed: false,
            kubeconfig,
            names: NameCache::default(),
            lookups: LookupPool::new(Arc::clone(waker), lookup::resolve_with_system),
            generation: 0,
        };
        sources.discovery = sources.start_discovery(config, waker)?;
        sources.update_names(config, Duration::ZERO);
        Ok(sources)
    }

    /// Starts discovery if a listener follows a Service.
    ///
    /// # Errors
    /// As for [`start`](Self::start).
    pub(super) fn start_discovery(
        &self,
        config: &Config,
        waker: &Arc<Waker>,
    ) -> Result<Option<(Discovery, Receiver<DiscoveryUpdate>)>> {
        let requests = requests(config);
        if requests.is_empty() {
            return Ok(None);
        }
        let (sender, updates) = mpsc::channel();
        Ok(Some((Discovery::start(requests, self.settings(config), sender, Arc::clone(waker))?, updates)))
    }

    /// True if the running discovery can follow this configuration.
    ///
    /// # Errors
    /// When discovery cannot do what the configuration asks for.
    pub(super) fn can_update_discovery(&self, config: &Config) -> Result<bool> {
        // A failed one must be started again.
        if !self.discovery.as_ref().is_some_and(|(discovery, _)| discovery.is_running()) {
            return Ok(false);
        }
        discovery::validate(&requests(config), &self.settings(config))?;
        Ok(true)
    }

    /// Passes the configuration to the running discovery.
    ///
    /// # Errors
    /// When discovery has failed meanwhile.
    pub(super) fn update_discovery(&self, config: &Config) -> Result<()> {
        match &self.discovery {
            Some((discovery, _)) => discovery.update_requests(requests(config)),
            None => Ok(()),
        }
    }

    /// Looks up this configuration's names from now on.
    pub(super) fn update_names(&mut self, config: &Config, now: Duration) {
        self.names.replace_requests(config.listeners.iter().filter_map(ListenerConfig::names_request).collect(), now);
    }

    /// When the next name is to be looked up.
    pub(super) fn next_deadline(&self) -> Option<Duration> {
        self.names.next_deadline()
    }

    /// Logs once that discovery has failed. The last known downstreams stay in use.
    pub(super) fn check_discovery(&mut self) {
        if !self.discovery_failed && self.discovery.as_ref().is_some_and(|(discovery, _)| !discovery.is_running()) {
            self.discovery_failed = true;
            tracing::error!(
                "the thread that follows EndpointSlices has failed: the last known endpoints stay in use and changes are \
                 not seen; restart the daemon, or change its configuration and reload it"
            );
        }
    }

    fn settings(&self, config: &Config) -> discovery::DiscoverySettings {
        let path = std::path::absolute(&config.path).unwrap_or_else(|_| config.path.clone());
        let kubeconfig = self.kubeconfig.clone();
        discovery::DiscoverySettings { kubeconfig, config: Some(path), ..discovery::DiscoverySettings::from_env() }
    }

    fn next_set(&mut self, downstreams: Vec<Downstream>) -> DownstreamSet {
        self.generation += 1;
        DownstreamSet { generation: self.generation, downstreams }
    }

    /// The sets found since the last call; of each listener only the latest, which replaces those before.
    fn take_updates(&mut self, now: Duration) -> VecDeque<ControllerEvent> {
        while let Some(LookupResult { host, addresses }) = self.lookups.next_result() {
            self.names.handle_lookup_result(&host, addresses, now);
        }
        for host in self.names.due(now) {
            self.lookups.submit(host);
        }
        let updates = self.discovery.iter().flat_map(|(_, updates)| updates.try_iter());
        let found: BTreeMap<ListenerId, Vec<Downstream>> =
            updates.map(|update| (update.listener, update.set.downstreams)).collect();
        let found = found.into_iter().map(|(listener, set)| (listener, DownstreamOrigin::Kubernetes, set));
        let named =
            self.names.take_updates().into_iter().map(|(listener, set)| (listener, DownstreamOrigin::Names, set));
        let all: Vec<_> = found.chain(named).collect();
        let event = |(listener, origin, downstreams)| ControllerEvent::Downstreams {
            listener,
            origin,
            set: self.next_set(downstreams),
        };
        all.into_iter().map(event).collect()
    }
}

impl Daemon {
    /// Passes new sets of downstreams to the controller, and starts the look-ups that are due.
    pub(super) fn take_downstream_updates(&mut self) {
        let events = self.sources.take_updates(self.started.elapsed());
        if events.is_empty() {
            return;
        }
        self.handle_all(events);
        self.update_health_targets();
    }
}

/// What the listeners that follow Services ask of discovery.
fn requests(config: &Config) -> Vec<discovery::DiscoveryRequest> {
    config.listeners.iter().filter_map(ListenerConfig::discovery_request).collect()
}
