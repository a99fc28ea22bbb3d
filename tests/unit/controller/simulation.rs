//! The simulated environment of the controller: a host, sources of downstreams, datapaths that sometimes fail, and an
//! operator who edits the configuration. It computes independently what the controller must do.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use udp_fanout::testing::config::{Config, DownstreamSource, ListenerConfig, ListenerIdAllocator};
use udp_fanout::testing::controller::{Controller, ControllerAction, ControllerEvent, DownstreamOrigin, RETRY};
use udp_fanout::testing::health::weights::{HealthMap, HealthMark};
use udp_fanout::testing::host::{HostAddress, HostFacts, Link, Route};
use udp_fanout::testing::model::{Downstream, DownstreamSet, ListenerId, Mode};
use udp_fanout::testing::plan::{Delivery, ListenerPlan, Plan};

/// The initial configuration of scripted tests.
const REFERENCE: &str = r#"
[[listeners]]
name = "static"
bind = "0.0.0.0:5000"
interface = "eth0"
mode = "tc_ebpf"
downstream = [{ address = "10.0.0.1:1" }, { address = "10.0.0.2:1", weight = 3 }]

[[listeners]]
name = "discovered"
bind = "192.0.2.1:5001"
interface = ["eth0", "eth1"]
mode = "tc_ebpf"
kubernetes = { namespace = "logs", service = "receivers", port = 1 }

[[listeners]]
name = "sockets"
bind = "0.0.0.0:5002"
mode = "userspace"
kubernetes = { namespace = "logs", service = "others", port = 1 }
"#;

/// Many different configurations.
const CONFIGURATIONS: u64 = 300;

pub fn address(n: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, n], 1))
}

/// The configurations of random histories.
pub fn configurations() -> &'static [Config] {
    static ALL: OnceLock<Vec<Config>> = OnceLock::new();
    ALL.get_or_init(|| (0..CONFIGURATIONS).map(|seed| random_config(&mut SmallRng::seed_from_u64(seed))).collect())
}

/// One to five listeners out of five, each with its address most of the time, in any order.
fn random_config(rng: &mut SmallRng) -> Config {
    let mut ports: Vec<usize> = (0..5).collect();
    if rng.random_bool(0.2) {
        ports.rotate_left(1);
    }
    let mut listeners: Vec<String> = Vec::new();
    for (index, port) in ports.into_iter().enumerate() {
        let last_chance = index == 4 && listeners.is_empty();
        if !last_chance && rng.random_bool(0.4) {
            continue;
        }
        let name = if rng.random_bool(0.05) { "renamed".to_owned() + &index.to_string() } else { format!("l{index}") };
        let mode = ["tc_ebpf", "userspace", "auto"][rng.random_range(0..3)];
        let policy = ["round_robin", "replicate"][rng.random_range(0..2)];
        // Rare, since its tables take much longer to compute than everything else here.
        let policy = if rng.random_bool(0.02) { "hash" } else { policy };
        let interface = ["\"eth0\"", "[\"eth0\", \"eth1\"]", "\"auto\""][rng.random_range(0..3)];
        let mut text = format!(
            "[[listeners]]\nname = \"{name}\"\nbind = \"0.0.0.0:{}\"\nmode = \"{mode}\"\npolicy = \"{policy}\"\ninterface = {interface}\n",
            5_000 + port
        );
        if rng.random_bool(0.5) {
            let service = ["one", "two"][rng.random_range(0..2)];
            let _ = writeln!(text, "kubernetes = {{ namespace = \"logs\", service = \"{service}\", port = 1 }}");
        } else {
            for n in (1..=8).filter(|&n| n == index + 1 || rng.random_bool(0.3)) {
                let _ = writeln!(text, "[[listeners.downstream]]\naddress = \"10.0.0.{n}:1\"");
            }
        }
        listeners.insert(rng.random_range(0..=listeners.len()), text);
    }
    let fail_open = if rng.random_bool(0.5) { "[health]\nenabled = true\n" } else { "" };
    // Few enough that IDs are reused.
    let text = format!("{fail_open}[limits]\nmax_listeners = 7\n{}", listeners.concat());
    Config::parse(&text, Path::new("random.toml")).unwrap()
}

/// The state of a history, independent of the controller.
pub struct Simulation {
    rng: SmallRng,
    now: Duration,
    generation: u64,
    pub facts: HostFacts,
    believed: State,
    /// The state to restore if the pending configuration is refused.
    fallback: Option<State>,
    numbers: ListenerIdAllocator,
    /// The last plan, and whether it was applied.
    handed_out: Option<Plan>,
    in_force: bool,
    wake_at: Option<Duration>,
    /// The host could not be read and must be read again.
    look_again: bool,
    /// Whether the next plan can be applied; random if `None`.
    script: Vec<bool>,
}

/// The controller's settings.
#[derive(Clone)]
struct State {
    config: Config,
    sets: BTreeMap<ListenerId, DownstreamSet>,
}

impl State {
    fn of(config: Config, before: Option<&State>) -> State {
        let mut sets = BTreeMap::new();
        for listener in &config.listeners {
            let old = before.and_then(|before| before.listener(listener.id));
            let old = old.filter(|old| old.name == listener.name || old.bind == listener.bind);
            let known = old.and_then(|old| before?.sets.get(&old.id));
            let set = match &listener.source {
                DownstreamSource::Static(downstreams) => Some((1, downstreams)),
                _ => known.map(|set| {
                    let same = old.is_some_and(|old| old.source == listener.source);
                    (if same { set.generation } else { 0 }, &set.downstreams)
                }),
            };
            if let Some((generation, downstreams)) = set {
                sets.insert(listener.id, DownstreamSet { generation, downstreams: downstreams.clone() });
            }
        }
        State { config, sets }
    }

    fn listener(&self, id: ListenerId) -> Option<&ListenerConfig> {
        self.config.listeners.iter().find(|listener| listener.id == id)
    }

    fn take_set(&mut self, id: ListenerId, set: &DownstreamSet) {
        let Some(listener) = self.listener(id) else { return };
        let newer = self.sets.get(&id).is_none_or(|old| old.generation < set.generation);
        if newer && !matches!(listener.source, DownstreamSource::Static(_)) {
            self.sets.insert(id, set.clone());
        }
    }
}

impl Simulation {
    pub fn new(seed: u64) -> (Simulation, Controller) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let config = configurations()[rng.random_range(0..configurations().len())].clone();
        Simulation::with(rng, config)
    }

    pub fn at_the_reference(seed: u64) -> (Simulation, Controller) {
        Simulation::with(SmallRng::seed_from_u64(seed), Config::parse(REFERENCE, Path::new("random.toml")).unwrap())
    }

    fn with(rng: SmallRng, config: Config) -> (Simulation, Controller) {
        let mut simulation = Simulation {
            rng,
            now: Duration::ZERO,
            generation: 1,
            facts: HostFacts::default(),
            believed: State::of(config.clone(), None),
            fallback: None,
            numbers: ListenerIdAllocator::default(),
            handed_out: None,
            in_force: false,
            wake_at: None,
            look_again: false,
            script: Vec::new(),
        };
        simulation.facts = simulation.random_facts(true);
        let controller = Controller::new(config, &Ok(()), simulation.facts.clone()).unwrap();
        (simulation, controller)
    }

    pub fn config(&self) -> &Config {
        &self.believed.config
    }

    /// A random successor of this configuration.
    pub fn another(&mut self) -> Config {
        let committed = self.fallback.as_ref().unwrap_or(&self.believed);
        let mut next = configurations()[self.rng.random_range(0..configurations().len())].clone();
        // The limits stay as they are: changing them takes a restart.
        next.limits = committed.config.limits.clone();
        next.inherit_listener_ids(&committed.config, true, &mut self.numbers).unwrap()
    }

    pub fn expect_refusal(&mut self) {
        self.script = vec![true, false];
    }

    fn random_facts(&mut self, whole: bool) -> HostFacts {
        let mut links = Vec::new();
        for (index, name) in [(1, "lo"), (2, "eth0"), (3, "eth1")] {
            if whole || index == 1 || self.rng.random_bool(0.8) {
                let loopback = index == 1;
                links.push(Link {
                    index,
                    name: name.into(),
                    kind: None,
                    up: true,
                    ethernet: !loopback,
                    loopback,
                    mtu: 1500,
                    ..Link::default()
                });
            }
        }
        let mut routes = BTreeMap::new();
        for n in 1..=8 {
            let ip = address(n).ip();
            let route = match self.rng.random_range(0..10) {
                0 => Route::Unreachable { reason: "Network is unreachable".into() },
                1 => Route::Local { loopback: false },
                n => Route::Via { link: 2 + n % 2, next_hop: ip, mtu: 1500 },
            };
            routes.insert(ip, route);
        }
        let addresses = vec![HostAddress { link: 2, address: IpAddr::from([192, 0, 2, 1]) }];
        HostFacts { links, addresses, default_route_links: vec![2], routes, ..HostFacts::default() }
    }

    fn random_set(&mut self) -> DownstreamSet {
        // Sometimes an old set arrives late.
        self.generation += 1;
        let generation = if self.rng.random_bool(0.1) { self.generation / 2 } else { self.generation };
        let downstreams = (1..=8)
            .filter(|_| self.rng.random_bool(0.5))
            .map(|n| Downstream { name: "d".into(), address: address(n), weight: 1, sample: Downstream::ALL })
            .collect();
        DownstreamSet { generation, downstreams }
    }

    fn random_health(&mut self) -> HealthMap {
        let mut standings = Vec::new();
        for listener in 0..7 {
            for n in 1..=8 {
                if self.rng.random_bool(0.2) {
                    standings.push(((ListenerId(listener), address(n)), HealthMark::Unhealthy(self.now)));
                }
            }
        }
        standings.into_iter().collect()
    }

    pub fn random_event(&mut self, controller: &Controller) -> ControllerEvent {
        self.now += Duration::from_millis(self.rng.random_range(0..700));
        if std::mem::take(&mut self.look_again) {
            return ControllerEvent::Host(self.read_host(&controller.route_addresses()));
        }
        match self.rng.random_range(0..10) {
            0 => ControllerEvent::Disturbed("filter gone".into()),
            1 | 2 => {
                self.facts = self.random_facts(false);
                let asked = controller.route_addresses();
                self.facts.routes.retain(|ip, _| asked.contains(ip));
                ControllerEvent::Host(self.facts.clone())
            }
            3 => ControllerEvent::Tick,
            4 => ControllerEvent::Health(self.random_health()),
            5 | 6 => {
                let config = self.another();
                match controller.prepare(config.clone(), &Ok(())) {
                    Ok(prepared) => {
                        let next = State::of(config, Some(&self.believed));
                        let before = std::mem::replace(&mut self.believed, next);
                        self.fallback.get_or_insert(before);
                        ControllerEvent::Config(prepared)
                    }
                    // An interface that a listener should move to is missing.
                    Err(refusal) => {
                        assert!(refusal.to_string().contains("interface"), "{refusal}");
                        ControllerEvent::Tick
                    }
                }
            }
            _ => {
                let listener = ListenerId(self.rng.random_range(0..7));
                let set = self.random_set();
                self.believed.take_set(listener, &set);
                if let Some(fallback) = &mut self.fallback {
                    fallback.take_set(listener, &set);
                }
                ControllerEvent::Downstreams { listener, origin: DownstreamOrigin::Kubernetes, set }
            }
        }
    }

    /// Feeds an event and all events that follow from it, as the event loop does.
    pub fn step(&mut self, controller: &mut Controller, event: ControllerEvent) {
        let mut events = vec![event];
        let mut rounds = 0;
        while let Some(event) = events.pop() {
            rounds += 1;
            assert!(rounds < 20, "the controller keeps itself busy");
            for action in controller.handle(event, self.now) {
                match action {
                    ControllerAction::Apply(plan) => events.push(self.apply(plan)),
                    ControllerAction::ReadHostFacts(_) if self.script.is_empty() && self.rng.random_bool(0.05) => {
                        self.look_again = true;
                    }
                    ControllerAction::ReadHostFacts(addresses) => {
                        events.push(ControllerEvent::Host(self.read_host(&addresses)))
                    }
                    ControllerAction::WakeAt(at) => {
                        assert!(at > self.now, "woken in the past");
                        self.wake_at = Some(at);
                    }
                    ControllerAction::Warn(text) => assert!(!text.is_empty()),
                    ControllerAction::ReloadFinished(outcome) => {
                        let before = self.fallback.take();
                        assert!(before.is_some() || !self.script.is_empty(), "settled twice");
                        if let (Err(_), Some(before)) = (outcome, before) {
                            self.believed = before;
                        }
                    }
                }
            }
        }
    }

    /// As [`step`](Self::step), without faults other than scripted ones.
    pub fn step_surely(&mut self, controller: &mut Controller, event: ControllerEvent, success: bool) {
        if success {
            self.script = vec![true; 4];
        }
        self.step(controller, event);
        self.script.clear();
    }

    fn read_host(&mut self, addresses: &BTreeSet<IpAddr>) -> HostFacts {
        let whole = self.random_facts(false);
        // In a script, the host is unchanged.
        if self.script.is_empty() {
            self.facts.routes.extend(whole.routes);
        } else {
            for (ip, route) in whole.routes {
                self.facts.routes.entry(ip).or_insert(route);
            }
        }
        HostFacts {
            routes: self
                .facts
                .routes
                .iter()
                .filter(|(ip, _)| addresses.contains(ip))
                .map(|(&ip, r)| (ip, r.clone()))
                .collect(),
            ..self.facts.clone()
        }
    }

    fn apply(&mut self, plan: Plan) -> ControllerEvent {
        self.handed_out = Some(plan);
        let by_chance = self.rng.random_bool(0.8);
        self.in_force = self.script.pop().unwrap_or(by_chance);
        if self.in_force { ControllerEvent::Applied } else { ControllerEvent::ApplyFailed("no memory".into()) }
    }

    pub fn check(&self, controller: &Controller) {
        let plan = controller.plan();
        assert_eq!(
            self.handed_out.as_ref().unwrap_or(&Plan::default()),
            plan,
            "the plan in hand is the one handed out"
        );
        if !self.in_force && !self.look_again {
            assert_eq!(self.wake_at.map(|at| at <= self.now + RETRY), Some(true), "a failed plan is tried again");
        }
        if self.look_again {
            // Later changes are not in the plan yet.
            return;
        }
        assert!(self.fallback.is_none(), "an edited configuration has been decided on");
        let ids: Vec<ListenerId> = plan.listeners.iter().map(|listener| listener.id).collect();
        assert!(ids.is_sorted_by(|a, b| a < b), "{ids:?}");
        let expected: Vec<ListenerId> = self.believed.sets.keys().copied().collect();
        assert_eq!(ids, expected, "those in the plan are those with a set");
        let ready = controller.readiness();
        assert_eq!(ready.len(), self.believed.config.listeners.len());
        for ((name, state), listener) in ready.iter().zip(&self.believed.config.listeners) {
            assert_eq!(*name, listener.name, "in the order of the file");
            let has_set = self.believed.sets.contains_key(&listener.id);
            assert!(state.is_err() || (has_set && self.in_force), "{name} is ready too soon");
        }
        plan.listeners.iter().for_each(|listener| self.check_listener(listener));
    }

    fn check_listener(&self, listener: &ListenerPlan) {
        let config = self.believed.listener(listener.id).unwrap();
        assert_eq!(
            (&*listener.name, listener.bind, listener.policy),
            (config.name.as_str(), config.bind, config.policy)
        );
        let targets = listener.targets.len();
        assert!(listener.table.iter().all(|&index| (index as usize) < targets));
        assert_eq!(listener.table.is_empty(), targets == 0);
        let in_table: BTreeSet<u32> = listener.table.iter().copied().collect();
        assert_eq!(in_table.len(), targets, "every downstream has a slot");
        let known: Vec<SocketAddr> = self.believed.sets[&listener.id].downstreams.iter().map(|to| to.address).collect();
        let planned: Vec<SocketAddr> = listener.targets.iter().map(|target| target.downstream.address).collect();
        if self.believed.config.health.is_none() {
            assert_eq!(planned, known, "the newest set is the one in the plan");
        } else {
            assert!(planned.iter().all(|address| known.contains(address)), "only downstreams of the newest set");
            assert_eq!(planned.is_empty(), known.is_empty(), "at least one of them is active");
        }
        self.check_host(listener);
    }

    fn check_host(&self, listener: &ListenerPlan) {
        if listener.mode == Mode::Userspace {
            assert!(listener.links.is_empty() && listener.match_addresses.is_empty());
            return;
        }
        for link in &listener.links {
            assert!(self.facts.link(link.index).is_some(), "attached to a link that is gone");
        }
        for target in listener.targets.iter() {
            let route = self.facts.routes.get(&target.downstream.address.ip());
            let expected = match route {
                Some(Route::Via { .. }) => matches!(target.delivery, Delivery::Neighbour { .. }),
                Some(Route::Local { .. }) => target.delivery == Delivery::Local,
                _ => target.delivery == Delivery::Unreachable,
            };
            assert!(expected, "{:?} for {route:?}", target.delivery);
        }
    }
}
