//! From one configuration to the next: what of the old one stays, and the way back if the new one cannot be put in force.
//! Pure.
//!
//! ```text
//! prepare ─► Event::Config ─► adopt ─► Action::Apply ─┬─► Event::Applied ─────► Action::Settled(Ok)
//!  (pure)      old kept as `previous`                 └─► Event::ApplyFailed ─► go_back ─► Action::Settled(Err)
//! ```

use anyhow::Result;

use super::mode::{self, ModeChoice};
use super::{Action, Controller, Listener, Origin};
use crate::config::{AttachConfig, Config, DownstreamSource, ListenerConfig};
use crate::host::probe::TcUnsupported;
use crate::model::{DownstreamSet, ListenerId, Mode};

/// A configuration for which all has been decided that can be decided beforehand.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepared {
    listeners: Vec<(ListenerConfig, ModeChoice)>,
    attach: AttachConfig,
}

impl Prepared {
    /// True if a listener wants the TC program.
    #[must_use]
    pub fn wants_kernel(&self) -> bool {
        self.listeners.iter().any(|(_, choice)| choice.mode == Mode::TcEbpf)
    }

    /// Each listener's mode and why it was chosen.
    pub fn modes(&self) -> impl Iterator<Item = (&ListenerConfig, &ModeChoice)> {
        self.listeners.iter().map(|(listener, choice)| (listener, choice))
    }
}

/// What was in force before a configuration that isn't in force yet.
#[derive(Debug)]
pub(super) struct Previous {
    listeners: Vec<Listener>,
    attach: AttachConfig,
}

impl Previous {
    pub(super) fn take_set(&mut self, id: ListenerId, origin: Origin, set: &DownstreamSet) {
        for listener in &mut self.listeners {
            listener.take_set(id, origin, set);
        }
    }
}

impl Listener {
    /// A listener of a new configuration, and the same one in the old, if it was there.
    fn new(config: ListenerConfig, choice: ModeChoice, before: Option<&Listener>) -> Listener {
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
                before.and_then(|before| before.set_to_go_on_with(&config))
            }
        };
        Listener { config, choice, set }
    }

    /// The downstreams that the listener has as `config` says until those are known that `config` names: none would mean
    /// that its datagrams are dropped for as long as it takes.
    fn set_to_go_on_with(&self, config: &ListenerConfig) -> Option<DownstreamSet> {
        let set = self.set.as_ref().filter(|_| self.config.bind.is_ipv4() == config.bind.is_ipv4())?;
        let same = self.config.source == config.source;
        // Whatever the new source says is newer.
        let generation = if same { set.generation } else { 0 };
        Some(DownstreamSet { generation, downstreams: set.downstreams.clone() })
    }

    /// Takes a set if it is this listener's and newer than the one it has. True if it was.
    pub(super) fn take_set(&mut self, id: ListenerId, origin: Origin, set: &DownstreamSet) -> bool {
        // What a source had found before it was given up may arrive late.
        let wanted = match self.config.source {
            DownstreamSource::Static(_) => false,
            DownstreamSource::Names(_) => origin == Origin::Names,
            DownstreamSource::Kubernetes(_) => origin == Origin::Kubernetes,
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
    /// Decides each listener's mode under a configuration. Changes nothing: report [`Event::Config`](super::Event::Config)
    /// with what this returns.
    ///
    /// `tc_support` says whether the TC program can be used here, and if not, what is missing and the fix.
    ///
    /// # Errors
    /// When a listener demands what the host cannot do, as for [`Controller::new`].
    pub fn prepare(&self, config: Config, tc_support: &Result<(), TcUnsupported>) -> Result<Prepared> {
        let attach = config.attach;
        let choose = |listener: ListenerConfig| {
            let choice = mode::choose(&listener, tc_support, &self.facts);
            // An interface that is away at the moment, as happens, is no reason to refuse or move a listener of which
            // nothing has changed.
            let choice = match (choice, self.choice_so_far(&listener)) {
                (Ok(choice), _) if choice.mode == Mode::TcEbpf => choice,
                (_, Some(choice)) if choice.mode == Mode::TcEbpf => choice.clone(),
                (choice, _) => choice?,
            };
            Ok((listener, choice))
        };
        let listeners = config.listeners.into_iter().map(choose).collect::<Result<_>>()?;
        Ok(Prepared { listeners, attach })
    }

    /// The mode of the listener as it is, if under the new configuration it must be chosen by the same considerations.
    fn choice_so_far(&self, new: &ListenerConfig) -> Option<&ModeChoice> {
        let same = |old: &&Listener| {
            let old = &old.config;
            old.id == new.id && old.mode == new.mode && old.interfaces == new.interfaces && old.bind == new.bind
        };
        self.listeners.iter().find(same).map(|listener| &listener.choice)
    }

    /// Makes the configuration that of the controller. What its listeners knew, they know under the new one.
    pub(super) fn adopt(&mut self, prepared: Prepared) {
        let before = std::mem::take(&mut self.listeners);
        let listener = |(config, choice): (ListenerConfig, ModeChoice)| {
            // A number may have passed on to a listener that has nothing to do with the one before.
            let same = |before: &&Listener| {
                let before = &before.config;
                before.id == config.id && (before.name == config.name || before.bind == config.bind)
            };
            let before = before.iter().find(same);
            Listener::new(config, choice, before)
        };
        self.listeners = prepared.listeners.into_iter().map(listener).collect();
        self.attach = prepared.attach;
    }

    pub(super) fn reconfigure(&mut self, prepared: Prepared) -> Vec<Action> {
        let previous = Previous { listeners: self.listeners.clone(), attach: self.attach };
        // The one in force, of two that follow each other quickly.
        self.previous.get_or_insert(previous);
        self.adopt(prepared);
        // The plan follows when the routes are known.
        vec![Action::LookAtHost(self.route_addresses())]
    }

    /// The plan is in force, and with it the configuration, if that was still open.
    pub(super) fn settle(&mut self) -> Vec<Action> {
        self.previous.take().map(|_| Action::Settled(Ok(()))).into_iter().collect()
    }

    /// Gives a configuration up that cannot be put in force.
    pub(super) fn go_back(&mut self, reason: String) -> Vec<Action> {
        let Some(previous) = self.previous.take() else { return Vec::new() };
        self.listeners = previous.listeners;
        self.attach = previous.attach;
        vec![Action::Settled(Err(reason)), Action::LookAtHost(self.route_addresses())]
    }
}
