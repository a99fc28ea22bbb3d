//! The core: all state and all policy, no I/O.
//!
//! [`Controller::handle`] takes one [`ControllerEvent`] and returns the [`ControllerAction`]s that follow from it. It
//! opens nothing, reads no clock and spawns nothing, so a test can drive it through any history. The event loop turns
//! what happens into events and carries out the actions.
//!
//! What happens to a change:
//!
//! - a new downstream set, for instance without a terminating endpoint: [`ControllerEvent::Downstreams`] → `accept_set`
//!   → routes are read → `replan`;
//! - a health change: [`ControllerEvent::Health`] → `replan`, where `eligible_downstreams` sets the weights and leaves
//!   out what has weight 0 → [`ControllerAction::Apply`] → `Datapath::apply`, in the kernel
//!   `src/datapath/kernel/table.rs`;
//! - a reload: [`ControllerEvent::Config`] → `reload`.

pub mod first_seen;
pub mod mode;
mod reload;
mod self_loop;
mod serving;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;

use self::first_seen::FirstSeen;
pub use self::mode::ModeChoice;
pub use self::reload::PreparedConfig;
use self::reload::PreviousConfig;
use crate::config::{AttachConfig, Config, ListenerConfig};
use crate::health::ListenerCheck;
use crate::health::weights::{HealthMap, effective_weights};
use crate::host::HostFacts;
use crate::host::probe::TcUnsupported;
use crate::model::{Downstream, DownstreamSet, ListenerId, Mode};
use crate::plan::compile::{compile, links};
use crate::plan::{Delivery, LinkRef, ListenerPlan, Plan};

/// How long after a failed plan it is tried again.
pub const RETRY: Duration = Duration::from_secs(1);

/// Something that has happened. Times are durations since the daemon started.
#[derive(Debug, Clone, PartialEq)]
pub enum ControllerEvent {
    /// The host's state has been read, including the routes last asked for.
    Host(HostFacts),
    /// A source has a new set of downstreams for a listener.
    Downstreams {
        /// The listener that it is for.
        listener: ListenerId,
        /// The source.
        origin: DownstreamOrigin,
        /// The whole set.
        set: DownstreamSet,
    },
    /// The last plan is in force on every datapath.
    Applied,
    /// The last plan could not be applied, for this reason.
    ApplyFailed(String),
    /// Something has changed what was applied: for example, another program removed the filter.
    Disturbed(String),
    /// Health checks changed which downstreams are eligible, or their weights.
    Health(HealthMap),
    /// The time asked for with [`ControllerAction::WakeAt`] has come.
    Tick,
    /// Put this configuration in force, if that is possible.
    Config(PreparedConfig),
}

/// A source that finds downstreams while the daemon runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DownstreamOrigin {
    /// EndpointSlices, from discovery.
    Kubernetes,
    /// DNS names, from the resolver.
    Names,
}

/// Something to do.
#[derive(Debug, Clone, PartialEq)]
pub enum ControllerAction {
    /// Read the host's state, with the routes to these addresses, and report [`ControllerEvent::Host`].
    ReadHostFacts(BTreeSet<IpAddr>),
    /// Put this plan in force and report [`ControllerEvent::Applied`] or [`ControllerEvent::ApplyFailed`].
    Apply(Plan),
    /// Report [`ControllerEvent::Tick`] at this time or later.
    WakeAt(Duration),
    /// Log a warning.
    Warn(String),
    /// The last [`ControllerEvent::Config`] is in force. Or it cannot be put in force for this reason, and the previous
    /// configuration is being restored.
    ReloadFinished(Result<(), String>),
}

/// What a listener waits for before it can serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotReady {
    /// No set of downstreams has arrived yet.
    NoDownstreamSet,
    /// Its datapath is not in place, for this reason.
    NotAttached(String),
}

/// All state of the daemon except file descriptors.
#[derive(Debug)]
pub struct Controller {
    listeners: Vec<ListenerState>,
    attach: AttachConfig,
    health_map: HealthMap,
    facts: HostFacts,
    /// The last plan, and whether it is in force.
    plan: Plan,
    applied: Result<(), String>,
    /// The warnings that still hold. Each was logged once.
    warned: BTreeSet<String>,
    /// The configuration to roll back to, until the new one is in force.
    previous: Option<PreviousConfig>,
    first_seen: FirstSeen,
}

#[derive(Debug, Clone)]
struct ListenerState {
    config: ListenerConfig,
    choice: ModeChoice,
    set: Option<DownstreamSet>,
}

impl Controller {
    /// Chooses each listener's mode from what the host supports. Applies nothing: report [`ControllerEvent::Host`]
    /// next.
    ///
    /// `tc_support` says whether the TC program can be used here, and if not, what is missing and the fix.
    ///
    /// # Errors
    /// When a listener demands what the host cannot do: `tc_ebpf` without support for it, or an interface that does not
    /// exist.
    pub fn new(config: Config, tc_support: &Result<(), TcUnsupported>, facts: HostFacts) -> Result<Controller> {
        let mut controller = Controller {
            listeners: Vec::new(),
            attach: AttachConfig::default(),
            health_map: HealthMap::default(),
            facts,
            plan: Plan::default(),
            applied: Err("not applied yet".to_owned()),
            warned: BTreeSet::new(),
            previous: None,
            first_seen: FirstSeen::default(),
        };
        let prepared = controller.prepare(config, tc_support)?;
        controller.adopt(prepared);
        Ok(controller)
    }

    /// Each listener's mode and why it was chosen.
    pub fn modes(&self) -> impl Iterator<Item = (&ListenerConfig, &ModeChoice)> {
        self.listeners.iter().map(|listener| (&listener.config, &listener.choice))
    }

    /// Each listener's downstreams, including those that are not eligible; none before the first set.
    pub fn downstream_sets(&self) -> impl Iterator<Item = (ListenerId, Option<&DownstreamSet>)> {
        self.listeners.iter().map(|listener| (listener.config.id, listener.set.as_ref()))
    }

    /// When this downstream joined the listener, as time since the daemon started.
    #[must_use]
    pub fn first_seen(&self, id: ListenerId, downstream: SocketAddr) -> Duration {
        self.first_seen.at(id, downstream)
    }

    /// The warnings that still hold.
    pub fn active_warnings(&self) -> impl Iterator<Item = &str> {
        self.warned.iter().map(String::as_str)
    }

    /// The addresses whose routes the plan depends on.
    #[must_use]
    pub fn route_addresses(&self) -> BTreeSet<IpAddr> {
        self.listeners
            .iter()
            .filter_map(|listener| listener.set.as_ref())
            .flat_map(|set| &set.downstreams)
            .map(|downstream| downstream.address.ip())
            .collect()
    }

    /// The downstreams to probe, and the settings for each listener.
    #[must_use]
    pub fn watches(&self) -> Vec<ListenerCheck> {
        self.listeners
            .iter()
            .filter_map(|listener| {
                Some(ListenerCheck {
                    listener: listener.config.id,
                    name: listener.config.name.as_str().into(),
                    downstreams: self
                        .without_self_loops(listener, listener.set.as_ref()?)
                        .map(|to| to.address)
                        .collect(),
                    settings: listener.config.health.clone()?,
                })
            })
            .collect()
    }

    /// The interfaces that could carry the TC program but on which no listener wants it.
    #[must_use]
    pub fn unused_links(&self) -> Vec<LinkRef> {
        let wanted: BTreeSet<u32> = self
            .listeners
            .iter()
            .filter(|listener| listener.choice.mode == Mode::TcEbpf)
            .flat_map(|listener| links(&listener.config.interfaces, &self.facts))
            .map(|link| link.index)
            .collect();
        let unused =
            self.facts.links.iter().filter(|link| mode::can_carry_tc_program(link) && !wanted.contains(&link.index));
        unused.map(|link| LinkRef { index: link.index, name: link.name.clone() }).collect()
    }

    /// The interfaces, by index, on which a listener wants the TC program but has no set of downstreams yet.
    #[must_use]
    pub fn links_awaiting_downstreams(&self) -> BTreeSet<u32> {
        let waiting = |listener: &&ListenerState| listener.choice.mode == Mode::TcEbpf && listener.set.is_none();
        let wanted = self.listeners.iter().filter(waiting).map(|listener| &listener.config.interfaces);
        wanted.flat_map(|interfaces| links(interfaces, &self.facts)).map(|link| link.index).collect()
    }

    /// A listener's name.
    #[must_use]
    pub fn listener_name(&self, id: ListenerId) -> Option<&str> {
        self.listeners.iter().find(|listener| listener.config.id == id).map(|listener| listener.config.name.as_str())
    }

    /// The host's state as it was last read.
    #[must_use]
    pub fn facts(&self) -> &HostFacts {
        &self.facts
    }

    /// The last plan.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Each listener's name, and what it still waits for, if anything.
    #[must_use]
    pub fn readiness(&self) -> Vec<(String, Result<(), NotReady>)> {
        self.listeners
            .iter()
            .map(|listener| {
                let state = if listener.set.is_none() {
                    Err(NotReady::NoDownstreamSet)
                } else {
                    let attached = self.applied.clone().and_then(|()| self.missing_interface(listener));
                    attached.map_err(NotReady::NotAttached)
                };
                (listener.config.name.clone(), state)
            })
            .collect()
    }

    fn missing_interface(&self, listener: &ListenerState) -> Result<(), String> {
        if listener.choice.mode == Mode::Userspace && !listener.config.bind.ip().is_multicast() {
            return Ok(());
        }
        mode::interfaces_present(&listener.config.interfaces, &self.facts)
    }

    /// Handles an event and returns the actions to carry out, in order. `now` is the time since the daemon started.
    pub fn handle(&mut self, event: ControllerEvent, now: Duration) -> Vec<ControllerAction> {
        match event {
            ControllerEvent::Host(facts) => {
                self.facts = facts;
                self.replan(false, now)
            }
            ControllerEvent::Downstreams { listener, origin, set } => self.accept_set(listener, origin, &set, now),
            ControllerEvent::Applied => {
                self.applied = Ok(());
                self.finish_reload()
            }
            ControllerEvent::ApplyFailed(reason) => {
                self.applied = Err(reason.clone());
                if self.previous.is_some() {
                    return self.roll_back(reason);
                }
                vec![ControllerAction::Warn(reason), ControllerAction::WakeAt(now + RETRY)]
            }
            ControllerEvent::Config(prepared) => {
                let before: BTreeMap<ListenerId, DownstreamSet> =
                    self.downstream_sets().filter_map(|(id, set)| Some((id, set?.clone()))).collect();
                let actions = self.reconfigure(prepared);
                self.record_first_seen(&before, now);
                actions
            }
            ControllerEvent::Disturbed(reason) => {
                let mut actions = vec![ControllerAction::Warn(reason)];
                actions.extend(self.replan(true, now));
                actions
            }
            // Reading the host's state leads to a new plan, or to the same one again because it is not in force.
            ControllerEvent::Tick if self.applied.is_err() => {
                vec![ControllerAction::ReadHostFacts(self.route_addresses())]
            }
            // A downstream in slow start may have earned a larger weight.
            ControllerEvent::Tick => self.replan(false, now),
            ControllerEvent::Health(map) => {
                self.health_map = map;
                self.replan(false, now)
            }
        }
    }

    /// Records which downstreams a new configuration has added.
    fn record_first_seen(&mut self, before: &BTreeMap<ListenerId, DownstreamSet>, now: Duration) {
        for listener in &self.listeners {
            let id = listener.config.id;
            if let Some(set) = listener.set.as_ref().filter(|set| before.get(&id) != Some(set)) {
                self.first_seen.record(id, before.get(&id), set, now);
            }
        }
    }

    fn accept_set(
        &mut self,
        id: ListenerId,
        origin: DownstreamOrigin,
        set: &DownstreamSet,
        now: Duration,
    ) -> Vec<ControllerAction> {
        if let Some(previous) = &mut self.previous {
            previous.accept_set(id, origin, set);
        }
        let listener = self.listeners.iter_mut().find(|listener| listener.config.id == id);
        let before = listener.as_ref().and_then(|listener| listener.set.clone());
        let taken = listener.is_some_and(|listener| listener.accept_set(id, origin, set));
        if taken {
            self.first_seen.record(id, before.as_ref(), set, now);
        }
        // The plan follows when the routes are known.
        if taken { vec![ControllerAction::ReadHostFacts(self.route_addresses())] } else { Vec::new() }
    }

    /// Compiles the plan again. Returns it for applying if it differs from the last one, or if `force`.
    fn replan(&mut self, force: bool, now: Duration) -> Vec<ControllerAction> {
        let mut next_change: Option<Duration> = None;
        let mut listeners: Vec<Arc<ListenerPlan>> = self
            .listeners
            .iter()
            .filter_map(|listener| {
                let (downstreams, change) = self.eligible_downstreams(listener, listener.set.as_ref()?, now);
                next_change = next_change.into_iter().chain(change).min();
                let before = self.plan.listeners.iter().find(|before| before.id == listener.config.id);
                let mode = listener.choice.mode;
                let new = compile(&listener.config, &downstreams, mode, &self.facts, before.map(Arc::as_ref));
                Some(before.filter(|before| ***before == new).map_or_else(|| Arc::new(new), Arc::clone))
            })
            .collect();
        // Listeners keep their numbers when the file's order changes.
        listeners.sort_by_key(|listener| listener.id);
        let plan = Plan { listeners, attach: self.attach };
        let mut actions: Vec<ControllerAction> =
            self.new_warnings(&plan).into_iter().map(ControllerAction::Warn).collect();
        if force || plan != self.plan || self.applied.is_err() {
            self.plan = plan.clone();
            actions.push(ControllerAction::Apply(plan));
        } else {
            actions.extend(self.finish_reload());
        }
        actions.extend(next_change.map(ControllerAction::WakeAt));
        actions
    }

    /// The downstreams that get a share of the table, with their weights from health checks, and when slow start
    /// changes these next. Downstreams that are unhealthy have weight 0 and are left out.
    fn eligible_downstreams(
        &self,
        listener: &ListenerState,
        set: &DownstreamSet,
        now: Duration,
    ) -> (Vec<Downstream>, Option<Duration>) {
        let mut downstreams: Vec<Downstream> = self.without_self_loops(listener, set).cloned().collect();
        let Some(health) = &listener.config.health else { return (downstreams, None) };
        let id = listener.config.id;
        let effective = effective_weights(id, &downstreams, &self.health_map, health.fail_open, health.slow_start, now);
        for (downstream, &weight) in downstreams.iter_mut().zip(&effective.weights) {
            downstream.weight = weight;
        }
        downstreams.retain(|downstream| downstream.weight > 0);
        (downstreams, effective.next_change)
    }

    /// The downstreams of a set without the listener itself.
    fn without_self_loops<'a>(
        &'a self,
        listener: &'a ListenerState,
        set: &'a DownstreamSet,
    ) -> impl Iterator<Item = &'a Downstream> + use<'a> {
        self_loop::without_self_loops(listener.config.bind, &set.downstreams, &self.facts)
    }

    /// The warnings that did not hold before. Keeps those that hold now.
    fn new_warnings(&mut self, plan: &Plan) -> Vec<String> {
        let holding: BTreeSet<String> = self.warnings(plan).into_iter().collect();
        let new = holding.difference(&self.warned).cloned().collect();
        self.warned = holding;
        new
    }

    fn warnings(&self, plan: &Plan) -> Vec<String> {
        let mut warnings = Vec::new();
        for ListenerState { config, set, .. } in &self.listeners {
            let downstreams = set.as_ref().map_or(&[][..], |set| &set.downstreams);
            warnings.extend(self_loop::warnings(&config.name, config.bind, downstreams, &self.facts));
        }
        let choices: BTreeMap<ListenerId, &ListenerState> =
            self.listeners.iter().map(|listener| (listener.config.id, listener)).collect();
        for listener in &plan.listeners {
            let name = &listener.name;
            if listener.targets.is_empty() {
                warnings.push(format!("listener {name:?} has no downstreams: its datagrams are dropped and counted"));
            }
            if let Some(reason) = &listener.socket_only {
                warnings.push(format!("listener {name:?}: its socket forwards everything, because {reason}"));
            }
            if let Some(Err(missing)) = choices.get(&listener.id).map(|listener| self.missing_interface(listener)) {
                warnings.push(format!("listener {name:?}: {missing}; serving it when it appears"));
            }
            if listener.mode == Mode::Userspace {
                continue;
            }
            let bind = listener.bind.ip();
            let owned = |ip| {
                self.facts.addresses.iter().any(|own| own.address == ip) || bind.is_loopback() || bind.is_multicast()
            };
            if !bind.is_unspecified() && !owned(bind) {
                warnings.push(format!(
                    "listener {name:?}: no interface of this host has {bind}: datagrams that the TC program passes to \
                     the socket are lost"
                ));
            }
            for target in listener.targets.iter().filter(|target| target.delivery == Delivery::Unreachable) {
                warnings.push(format!("listener {name:?}: no route to downstream {}", target.downstream.address));
            }
        }
        warnings
    }
}
