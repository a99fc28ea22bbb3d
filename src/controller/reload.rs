//! Replaces one configuration by the next: what is kept, and how to roll back if the new one cannot be put in force.
//! Pure.
//!
//! ```text
//! prepare ─► event Config ─► adopt ─► action Apply ─┬─► event Applied ─────► action ReloadFinished(Ok)
//!  (pure)    old kept as `previous`                 └─► event ApplyFailed ─► roll_back ─► action ReloadFinished(Err)
//! ```

use anyhow::Result;

use super::mode::{self, ModeChoice};
use super::{Controller, ControllerAction, DownstreamOrigin, ListenerState};
use crate::config::{AttachConfig, Config, DownstreamSource, ListenerConfig};
use crate::host::probe::TcUnsupported;
use crate::model::{DownstreamSet, ListenerId, Mode};

/// A configuration, checked against the host, with each listener's mode.
#[derive(Debug, Clone, PartialEq)]
pub struct PreparedConfig {
    listeners: Vec<(ListenerConfig, ModeChoice)>,
    attach: AttachConfig,
}

impl PreparedConfig {
    /// True if a listener wants the TC program.
    #[must_use]
    pub fn wants_kernel(&self) -> bool {
        self.listeners.iter().any(|(_, choice)| choice.mode == Mode::TcEbpf)
    }
}

/// The configuration that is in force while a new one is being applied.
#[derive(Debug)]
pub(super) struct PreviousConfig {
    listeners: Vec<ListenerState>,
    attach: AttachConfig,
}

impl PreviousConfig {
    pub(super) fn accept_set(&mut self, id: ListenerId, origin: DownstreamOrigin, set: &DownstreamSet) {
        for listener in &mut self.listeners {
            listener.accept_set(id, origin, set);
        }
    }
}

impl ListenerState {
    /// A listener of a new configuration. `before` is the same listener in the old one, if it was there.
    fn new(config: ListenerConfig, choice: ModeChoice, before: Option<&ListenerState>) -> ListenerState {
        let known = before.and_then(|before| before.set.as_ref());
        let set = match &config.source {
            DownstreamSource::Static(downstreams) => match known {
                Some(set) if set.downstreams == *downstreams => Some(set.clone()),
                known => {
                    let generation = known.map_or(0, |set| set.generation) + 1;
                    Some(DownstreamSet { generation, downstreams: downstreams.clone() })
                }
            },
            DownstreamSource::Kubernetes(_) | DownstreamSource::Names(_) => {
                before.and_then(|before| before.carried_over_set(&config))
            }
        };
        ListenerState { config, choice, set }
    }

    /// The current downstreams, for use under `config` until its own source has found some. Without them, datagrams
    /// would be dropped in the meantime.
    fn carried_over_set(&self, config: &ListenerConfig) -> Option<DownstreamSet> {
        let set = self.set.as_ref().filter(|_| self.config.bind.is_ipv4() == config.bind.is_ipv4())?;
        let same = self.config.source == config.source;
        // Any set of the new source must replace this one.
        let generation = if same { set.generation } else { 0 };
        Some(DownstreamSet { generation, downstreams: set.downstreams.clone() })
    }

    /// Accepts a set if it is for this listener and newer than the current one. True if it was accepted.
    pub(super) fn accept_set(&mut self, id: ListenerId, origin: DownstreamOrigin, set: &DownstreamSet) -> bool {
        // A source that is no longer configured may still report what it had found.
        let wanted = match self.config.source {
            DownstreamSource::Static(_) => false,
            DownstreamSource::Names(_) => origin == DownstreamOrigin::Names,
            DownstreamSource::Kubernetes(_) => origin == DownstreamOrigin::Kubernetes,
        };
        let newer = self.set.as_ref().is_none_or(|old| old.generation < set.generation);
        let taken = self.config.id == id && wanted && newer;
        if taken {
            self.set = Some(set.clone());
        }
        taken
    }
}

impl Controller {
    /// Chooses each listener's mode under a configuration. Changes nothing: report
    /// [`ControllerEvent::Config`](super::ControllerEvent::Config) with the result.
    ///
    /// `tc_support` says whether the TC program can be used here, and if not, what is missing and the fix.
    ///
    /// # Errors
    /// When a listener demands what the host cannot do, as for [`Controller::new`].
    pub fn prepare(&self, config: Config, tc_support: &Result<(), TcUnsupported>) -> Result<PreparedConfig> {
        let attach = config.attach;
        let choose = |listener: ListenerConfig| {
            let choice = mode::choose(&listener, tc_support, &self.facts);
            // An unchanged listener keeps its mode while its interface is missing for the moment.
            let choice = match (choice, self.current_choice(&listener)) {
                (Ok(choice), _) if choice.mode == Mode::TcEbpf => choice,
                (_, Some(choice)) if choice.mode == Mode::TcEbpf => choice.clone(),
                (choice, _) => choice?,
            };
            Ok((listener, choice))
        };
        let listeners = config.listeners.into_iter().map(choose).collect::<Result<_>>()?;
        Ok(PreparedConfig { listeners, attach })
    }

    /// The listener's current mode, if none of what the choice depends on changes with the new configuration.
    fn current_choice(&self, new: &ListenerConfig) -> Option<&ModeChoice> {
        let same = |old: &&ListenerState| {
            let old = &old.config;
            old.id == new.id && old.mode == new.mode && old.interfaces == new.interfaces && old.bind == new.bind
        };
        self.listeners.iter().find(same).map(|listener| &listener.choice)
    }

    /// Makes the configuration the current one. Its listeners keep the sets of downstreams that they had.
    pub(super) fn adopt(&mut self, prepared: PreparedConfig) {
        let before = std::mem::take(&mut self.listeners);
        let listener = |(config, choice): (ListenerConfig, ModeChoice)| {
            // The number may have passed to a different listener.
            let same = |before: &&ListenerState| {
                let before = &before.config;
                before.id == config.id && (before.name == config.name || before.bind == config.bind)
            };
            let before = before.iter().find(same);
            ListenerState::new(config, choice, before)
        };
        self.listeners = prepared.listeners.into_iter().map(listener).collect();
        self.attach = prepared.attach;
    }

    pub(super) fn reconfigure(&mut self, prepared: PreparedConfig) -> Vec<ControllerAction> {
        let previous = PreviousConfig { listeners: self.listeners.clone(), attach: self.attach };
        // If two reloads follow each other quickly, roll back to the configuration that is in force.
        self.previous.get_or_insert(previous);
        self.adopt(prepared);
        // The plan follows when the routes are known.
        vec![ControllerAction::ReadHostFacts(self.route_addresses())]
    }

    /// The plan is in force: so is the configuration, if a reload was in progress.
    pub(super) fn finish_reload(&mut self) -> Vec<ControllerAction> {
        self.previous.take().map(|_| ControllerAction::ReloadFinished(Ok(()))).into_iter().collect()
    }

    /// Restores the previous configuration because the new one cannot be put in force.
    pub(super) fn roll_back(&mut self, reason: String) -> Vec<ControllerAction> {
        let Some(previous) = self.previous.take() else { return Vec::new() };
        self.listeners = previous.listeners;
        self.attach = previous.attach;
        vec![ControllerAction::ReloadFinished(Err(reason)), ControllerAction::ReadHostFacts(self.route_addresses())]
    }
}
