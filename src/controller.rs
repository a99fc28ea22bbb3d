//! The core: all state and all policy, no I/O.
//!
//! [`Controller::handle`] takes one [`Event`] and answers with the [`Action`]s that follow from it. It opens nothing,
//! reads no clock and spawns nothing, so that a test can drive it through any history. The event loop turns what
//! happens into events and carries the actions out.

pub mod ages;
mod itself;
pub mod mode;
mod reload;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Result;

use self::ages::Ages;
pub use self::mode::ModeChoice;
pub use self::reload::Prepared;
use self::reload::Previous;
use crate::config::{AttachConfig, Config, ListenerConfig};
use crate::health::ListenerCheck;
use crate::health::weights::{HealthMap, effective_weights};
use crate::host::HostFacts;
use crate::host::probe::TcUnsupported;
use crate::model::{Downstream, DownstreamSet, ListenerId, Mode};
use crate::plan::compile::{compile, links};
use crate::plan::{Delivery, LinkRef, ListenerPlan, Plan};

/// How long after a plan could not be applied it is tried again.
pub const RETRY: Duration = Duration::from_secs(1);

/// Something that has happened. Times are durations since the daemon started.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The host has been looked at, including the routes last asked for.
    Host(HostFacts),
    /// A source has a new set of downstreams for a listener.
    Downstreams {
        /// Whose.
        listener: ListenerId,
        /// Who says so.
        origin: Origin,
        /// All of them.
        set: DownstreamSet,
    },
    /// The last plan is in force on every datapath.
    Applied,
    /// The last plan could not be applied, for this reason.
    ApplyFailed(String),
    /// Something has disturbed what was applied, such as a filter taken off by someone else.
    Disturbed(String),
    /// Health checks have found something that changes which downstreams take part.
    Health(HealthMap),
    /// The time asked for with [`Action::WakeAt`] has come.
    Tick,
    /// Follow this configuration from now on, if it can be put in force.
    Config(Prepared),
}

/// Who finds out about downstreams while the daemon runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Discovery, from EndpointSlices.
    Kubernetes,
    /// The resolver, from names.
    Names,
}

/// Something to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Look at the host again, with the routes to these addresses, and report [`Event::Host`].
    LookAtHost(BTreeSet<IpAddr>),
    /// Put this plan in force and report [`Event::Applied`] or [`Event::ApplyFailed`].
    Apply(Plan),
    /// Report [`Event::Tick`] at this time or later.
    WakeAt(Duration),
    /// Tell the operator.
    Warn(String),
    /// The last [`Event::Config`] is in force; or it cannot be put in force for this reason, and what was before is being
    /// restored.
    Settled(Result<(), String>),
}

/// What a listener waits for before it takes part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotReady {
    /// No set of downstreams has come yet.
    NoDownstreamSet,
    /// Its datapath is not in place, for this reason.
    NotAttached(String),
}

/// All state of the daemon that is not a file descriptor.
#[derive(Debug)]
pub struct Controller {
    listeners: Vec<Listener>,
    attach: AttachConfig,
    health_map: HealthMap,
    facts: HostFacts,
    /// The plan last handed out, and whether it is in force.
    plan: Plan,
    applied: Result<(), String>,
    /// What the operator has been warned about and still holds, so that it is said once.
    warned: BTreeSet<String>,
    /// What to go back to, until the configuration is in force.
    previous: Option<Previous>,
    ages: Ages,
}

#[derive(Debug, Clone)]
struct Listener {
    config: ListenerConfig,
    choice: ModeChoice,
    set: Option<DownstreamSet>,
}

impl Controller {
    /// Decides each listener's mode from what the host allows. Nothing is applied yet: report [`Event::Host`] next.
    ///
    /// `tc_support` says whether the TC program can be used here, and if not, what is missing and the fix.
    ///
    /// # Errors
    /// When a listener demands what the host cannot do: `tc_ebpf` without support for it, or an interface that does
    /// not exist.
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
            ages: Ages::default(),
        };
        let prepared = controller.prepare(config, tc_support)?;
        controller.adopt(prepared);
        Ok(controller)
    }

    /// Each listener's mode and why it was chosen.
    pub fn modes(&self) -> impl Iterator<Item = (&ListenerConfig, &ModeChoice)> {
        self.listeners.iter().map(|listener| (&listener.config, &listener.choice))
    }

    /// Each listener's downstreams, those that are left out of the round included; none before the first set has come.
    pub fn sets(&self) -> impl Iterator<Item = (ListenerId, Option<&DownstreamSet>)> {
        self.listeners.iter().map(|listener| (listener.config.id, listener.set.as_ref()))
    }

    /// Since when this has been one of the listener's downstreams.
    #[must_use]
    pub fn since(&self, id: ListenerId, downstream: SocketAddr) -> Duration {
        self.ages.since(id, downstream)
    }

    /// What the operator has been warned about and still holds.
    pub fn standing_warnings(&self) -> impl Iterator<Item = &str> {
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

    /// Whose downstreams are to be checked, and how.
    #[must_use]
    pub fn watches(&self) -> Vec<ListenerCheck> {
        self.listeners
            .iter()
            .filter_map(|listener| {
                Some(ListenerCheck {
                    listener: listener.config.id,
                    name: listener.config.name.as_str().into(),
                    downstreams: self.others(listener, listener.set.as_ref()?).map(|to| to.address).collect(),
                    settings: listener.config.health.clone()?,
                })
            })
            .collect()
    }

    /// The interfaces that could carry the TC program, and on which no listener wants it.
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
            self.facts.links.iter().filter(|link| mode::carries_program(link) && !wanted.contains(&link.index));
        unused.map(|link| LinkRef { index: link.index, name: link.name.clone() }).collect()
    }

    /// The interfaces, by index, on which a listener wants the TC program and still waits for its first set of downstreams.
    #[must_use]
    pub fn links_in_waiting(&self) -> BTreeSet<u32> {
        let waiting = |listener: &&Listener| listener.choice.mode == Mode::TcEbpf && listener.set.is_none();
        let wanted = self.listeners.iter().filter(waiting).map(|listener| &listener.config.interfaces);
        wanted.flat_map(|interfaces| links(interfaces, &self.facts)).map(|link| link.index).collect()
    }

    /// A listener's name.
    #[must_use]
    pub fn listener_name(&self, id: ListenerId) -> Option<&str> {
        self.listeners.iter().find(|listener| listener.config.id == id).map(|listener| listener.config.name.as_str())
    }

    /// The host as it was last looked at.
    #[must_use]
    pub fn facts(&self) -> &HostFacts {
        &self.facts
    }

    /// The plan last handed out.
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

    fn missing_interface(&self, listener: &Listener) -> Result<(), String> {
        if listener.choice.mode == Mode::Userspace && !listener.config.bind.ip().is_multicast() {
            return Ok(());
        }
        mode::interfaces_present(&listener.config.interfaces, &self.facts)
    }

    /// Takes an event in and says what is to be done, in order. `now` is the time since the daemon started.
    pub fn handle(&mut self, event: Event, now: Duration) -> Vec<Action> {
        match event {
            Event::Host(facts) => {
                self.facts = facts;
                self.replan(false, now)
            }
            Event::Downstreams { listener, origin, set } => self.take_set(listener, origin, &set, now),
            Event::Applied => {
                self.applied = Ok(());
                self.settle()
            }
            Event::ApplyFailed(reason) => {
                self.applied = Err(reason.clone());
                if self.previous.is_some() {
                    return self.go_back(reason);
                }
                vec![Action::Warn(reason), Action::WakeAt(now + RETRY)]
            }
            Event::Config(prepared) => {
                let before: BTreeMap<ListenerId, DownstreamSet> =
                    self.sets().filter_map(|(id, set)| Some((id, set?.clone()))).collect();
                let actions = self.reconfigure(prepared);
                self.note_ages(&before, now);
                actions
            }
            Event::Disturbed(reason) => {
                let mut actions = vec![Action::Warn(reason)];
                actions.extend(self.replan(true, now));
                actions
            }
            // Looking at the host leads to a new plan, or to the same one again since it is not in force.
            Event::Tick if self.applied.is_err() => vec![Action::LookAtHost(self.route_addresses())],
            // A downstream that has recovered may have earned a larger share.
            Event::Tick => self.replan(false, now),
            Event::Health(map) => {
                self.health_map = map;
                self.replan(false, now)
            }
        }
    }

    /// Takes note of what has become of the listeners' sets under a new configuration.
    fn note_ages(&mut self, before: &BTreeMap<ListenerId, DownstreamSet>, now: Duration) {
        for listener in &self.listeners {
            let id = listener.config.id;
            if let Some(set) = listener.set.as_ref().filter(|set| before.get(&id) != Some(set)) {
                self.ages.note(id, before.get(&id), set, now);
            }
        }
    }

    fn take_set(&mut self, id: ListenerId, origin: Origin, set: &DownstreamSet, now: Duration) -> Vec<Action> {
        if let Some(previous) = &mut self.previous {
            previous.take_set(id, origin, set);
        }
        let listener = self.listeners.iter_mut().find(|listener| listener.config.id == id);
        let before = listener.as_ref().and_then(|listener| listener.set.clone());
        let taken = listener.is_some_and(|listener| listener.take_set(id, origin, set));
        if taken {
            self.ages.note(id, before.as_ref(), set, now);
        }
        // The plan follows when the routes are known.
        if taken { vec![Action::LookAtHost(self.route_addresses())] } else { Vec::new() }
    }

    /// Compiles the plan anew and hands it out if it differs from the last, or if `force`.
    fn replan(&mut self, force: bool, now: Duration) -> Vec<Action> {
        let mut next_change: Option<Duration> = None;
        let mut listeners: Vec<ListenerPlan> = self
            .listeners
            .iter()
            .filter_map(|listener| {
                let (set, change) = self.taking_part(listener, listener.set.as_ref()?, now);
                next_change = next_change.into_iter().chain(change).min();
                let before = self.plan.listeners.iter().find(|before| before.id == listener.config.id);
                Some(compile(&listener.config, &set, listener.choice.mode, &self.facts, before))
            })
            .collect();
        // In the file they may be in another order, since they keep their numbers when it changes.
        listeners.sort_by_key(|listener| listener.id);
        let plan = Plan { listeners, attach: self.attach };
        let mut actions: Vec<Action> = self.new_warnings(&plan).into_iter().map(Action::Warn).collect();
        if force || plan != self.plan || self.applied.is_err() {
            self.plan = plan.clone();
            actions.push(Action::Apply(plan));
        } else {
            actions.extend(self.settle());
        }
        actions.extend(next_change.map(Action::WakeAt));
        actions
    }

    /// The downstreams that take part at the moment, with their shares, and when that will change by itself.
    fn taking_part(
        &self,
        listener: &Listener,
        set: &DownstreamSet,
        now: Duration,
    ) -> (DownstreamSet, Option<Duration>) {
        let generation = set.generation;
        let mut downstreams: Vec<Downstream> = self.others(listener, set).cloned().collect();
        let Some(health) = &listener.config.health else { return (DownstreamSet { generation, downstreams }, None) };
        let id = listener.config.id;
        let effective = effective_weights(id, &downstreams, &self.health_map, health.fail_open, health.slow_start, now);
        for (downstream, &weight) in downstreams.iter_mut().zip(&effective.weights) {
            downstream.weight = weight;
        }
        downstreams.retain(|downstream| downstream.weight > 0);
        (DownstreamSet { generation, downstreams }, effective.next_change)
    }

    /// The downstreams of a set but for the listener itself.
    fn others<'a>(
        &'a self,
        listener: &'a Listener,
        set: &'a DownstreamSet,
    ) -> impl Iterator<Item = &'a Downstream> + use<'a> {
        itself::others(listener.config.bind, &set.downstreams, &self.facts)
    }

    /// What is wrong now and was not the last time.
    fn new_warnings(&mut self, plan: &Plan) -> Vec<String> {
        let holding: BTreeSet<String> = self.warnings(plan).into_iter().collect();
        let new = holding.difference(&self.warned).cloned().collect();
        self.warned = holding;
        new
    }

    fn warnings(&self, plan: &Plan) -> Vec<String> {
        let mut warnings = Vec::new();
        for Listener { config, set, .. } in &self.listeners {
            let downstreams = set.as_ref().map_or(&[][..], |set| &set.downstreams);
            warnings.extend(itself::warnings(&config.name, config.bind, downstreams, &self.facts));
        }
        let choices: BTreeMap<ListenerId, &Listener> =
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
                    "listener {name:?}: no interface of this host has {bind}: what the TC program leaves to the socket \
                     does not reach it"
                ));
            }
            for target in listener.targets.iter().filter(|target| target.delivery == Delivery::Unreachable) {
                warnings.push(format!("listener {name:?}: no route to downstream {}", target.downstream.address));
            }
        }
        warnings
    }
}
