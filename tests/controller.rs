//! Seeded random histories for the controller, which does no I/O: after every step its invariants must hold.
//!
//! `CONTROLLER_SEED` runs one history again; a failure prints its seed.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use udp_fanout::config::Config;
use udp_fanout::controller::{Action, Controller, Event, RETRY};
use udp_fanout::host::{Address, HostFacts, Link, Route};
use udp_fanout::model::{Downstream, DownstreamSet, ListenerId, Mode};
use udp_fanout::plan::{Delivery, Plan};

const HISTORIES: u64 = 2_000;
const STEPS: usize = 60;

const CONFIG: &str = r#"
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

/// What a history has done so far, kept apart from the controller.
struct World {
    rng: SmallRng,
    now: Duration,
    generation: u64,
    sets: BTreeMap<ListenerId, DownstreamSet>,
    facts: HostFacts,
    /// The plan that was last to be applied, and whether it was.
    handed_out: Option<Plan>,
    in_force: bool,
    wake_at: Option<Duration>,
}

fn address(n: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, n], 1))
}

impl World {
    fn new(seed: u64) -> World {
        let mut world = World {
            rng: SmallRng::seed_from_u64(seed),
            now: Duration::ZERO,
            generation: 1,
            sets: BTreeMap::new(),
            facts: HostFacts::default(),
            handed_out: None,
            in_force: false,
            wake_at: None,
        };
        world.facts = world.random_facts(true);
        world
    }

    fn random_facts(&mut self, whole: bool) -> HostFacts {
        let mut links = Vec::new();
        for (index, name) in [(1, "lo"), (2, "eth0"), (3, "eth1")] {
            if whole || index == 1 || self.rng.random_bool(0.8) {
                let loopback = index == 1;
                links.push(Link {
                    index,
                    name: name.into(),
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
        let addresses = vec![Address { link: 2, address: IpAddr::from([192, 0, 2, 1]) }];
        HostFacts { links, addresses, default_route_links: vec![2], routes, ..HostFacts::default() }
    }

    fn random_set(&mut self) -> DownstreamSet {
        // Now and then an old set arrives late.
        self.generation += 1;
        let generation = if self.rng.random_bool(0.1) { self.generation / 2 } else { self.generation };
        let downstreams = (1..=8)
            .filter(|_| self.rng.random_bool(0.5))
            .map(|n| Downstream { name: "d".into(), address: address(n), weight: 1, sample: Downstream::ALL })
            .collect();
        DownstreamSet { generation, downstreams }
    }

    fn random_event(&mut self, controller: &Controller) -> Event {
        self.now += Duration::from_millis(self.rng.random_range(0..700));
        match self.rng.random_range(0..7) {
            0 => Event::Disturbed("filter gone".into()),
            1 | 2 => {
                self.facts = self.random_facts(false);
                let asked = controller.route_addresses();
                self.facts.routes.retain(|ip, _| asked.contains(ip));
                Event::Host(self.facts.clone())
            }
            3 => Event::Tick,
            _ => {
                let listener = ListenerId(self.rng.random_range(1..3));
                let set = self.random_set();
                let newer = self.sets.get(&listener).is_none_or(|old| old.generation < set.generation);
                if newer {
                    self.sets.insert(listener, set.clone());
                }
                Event::Downstreams { listener, set }
            }
        }
    }

    /// Feeds an event and whatever follows from it, as the event loop does.
    fn step(&mut self, controller: &mut Controller, event: Event) {
        let mut events = vec![event];
        let mut rounds = 0;
        while let Some(event) = events.pop() {
            rounds += 1;
            assert!(rounds < 20, "the controller keeps itself busy");
            for action in controller.handle(event, self.now) {
                match action {
                    Action::Apply(plan) => events.push(self.apply(plan)),
                    Action::LookAtHost(addresses) => events.push(Event::Host(self.look(&addresses))),
                    Action::WakeAt(at) => {
                        assert!(at > self.now, "woken in the past");
                        self.wake_at = Some(at);
                    }
                    Action::Warn(text) => assert!(!text.is_empty()),
                }
            }
        }
    }

    fn look(&mut self, addresses: &BTreeSet<IpAddr>) -> HostFacts {
        let whole = self.random_facts(false);
        self.facts.routes.extend(whole.routes);
        self.facts.routes.retain(|ip, _| addresses.contains(ip));
        self.facts.clone()
    }

    fn apply(&mut self, plan: Plan) -> Event {
        self.handed_out = Some(plan);
        self.in_force = self.rng.random_bool(0.8);
        if self.in_force { Event::Applied } else { Event::ApplyFailed("no memory".into()) }
    }

    fn check(&self, controller: &Controller) {
        let plan = controller.plan();
        assert_eq!(self.handed_out.as_ref(), Some(plan), "the plan in hand is the one handed out");
        let ready = controller.readiness();
        for (name, state) in &ready {
            let has_set =
                name == "static" || self.sets.contains_key(&ListenerId(if name == "sockets" { 2 } else { 1 }));
            assert!(state.is_err() || (has_set && self.in_force), "{name} is ready too soon");
        }
        if !self.in_force {
            assert_eq!(self.wake_at.map(|at| at <= self.now + RETRY), Some(true), "a failed plan is tried again");
        }
        for listener in &plan.listeners {
            let targets = listener.targets.len();
            assert!(listener.table.iter().all(|&index| (index as usize) < targets));
            assert_eq!(listener.table.is_empty(), targets == 0);
            let in_table: BTreeSet<u32> = listener.table.iter().copied().collect();
            assert_eq!(in_table.len(), targets, "every downstream has a place");
            if let Some(set) = self.sets.get(&listener.id) {
                let expected: Vec<SocketAddr> = set.downstreams.iter().map(|to| to.address).collect();
                let planned: Vec<SocketAddr> =
                    listener.targets.iter().map(|target| target.downstream.address).collect();
                assert_eq!(planned, expected, "the newest set is the one in the plan");
            }
            self.check_host(listener);
        }
    }

    fn check_host(&self, listener: &udp_fanout::plan::ListenerPlan) {
        if listener.mode == Mode::Userspace {
            assert!(listener.links.is_empty() && listener.match_addresses.is_empty());
            return;
        }
        for link in &listener.links {
            assert!(self.facts.link(link.index).is_some(), "attached to a link that is gone");
        }
        for target in &listener.targets {
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

fn history(seed: u64) {
    let config = Config::parse(CONFIG, Path::new("random.toml")).unwrap();
    let mut world = World::new(seed);
    let mut controller = Controller::new(config, &Ok(()), world.facts.clone()).unwrap();
    let facts = world.facts.clone();
    world.step(&mut controller, Event::Host(facts));
    world.check(&controller);
    for _ in 0..STEPS {
        let event = world.random_event(&controller);
        world.step(&mut controller, event);
        world.check(&controller);
    }
}

#[test]
fn random_histories_keep_the_invariants() {
    if let Ok(seed) = std::env::var("CONTROLLER_SEED") {
        return history(seed.parse().unwrap());
    }
    for seed in 0..HISTORIES {
        let outcome = std::panic::catch_unwind(|| history(seed));
        assert!(outcome.is_ok(), "CONTROLLER_SEED={seed}");
    }
}

#[test]
fn the_listener_itself_is_none_of_its_downstreams() {
    let config = Config::parse(CONFIG, Path::new("random.toml")).unwrap();
    let mut world = World::new(1);
    let mut facts = world.facts.clone();
    let mut controller = Controller::new(config, &Ok(()), facts.clone()).unwrap();
    let listener = ListenerId(2);
    let own: SocketAddr = "192.0.2.7:5002".parse().unwrap();
    let downstream = |address| Downstream { name: "d".into(), address, weight: 1, sample: Downstream::ALL };
    let set = DownstreamSet { generation: 2, downstreams: vec![downstream(address(1)), downstream(own)] };
    world.step(&mut controller, Event::Downstreams { listener, set });
    let planned = |controller: &Controller| -> Vec<SocketAddr> {
        let plan = controller.plan().listeners.iter().find(|plan| plan.id == listener).unwrap();
        plan.targets.iter().map(|target| target.downstream.address).collect()
    };
    assert_eq!(planned(&controller), [address(1), own], "it may be another host's");
    facts.addresses.push(Address { link: 2, address: own.ip() });
    let about = |actions: &[Action]| -> usize {
        let text = |action: &&Action| matches!(action, Action::Warn(text) if text.contains("is the listener itself"));
        actions.iter().filter(text).count()
    };
    assert_eq!(about(&controller.handle(Event::Host(facts.clone()), Duration::ZERO)), 1);
    assert_eq!(planned(&controller), [address(1)]);
    assert_eq!(about(&controller.handle(Event::Host(facts.clone()), Duration::ZERO)), 0, "said once");
    facts.addresses.pop();
    controller.handle(Event::Host(facts), Duration::ZERO);
    assert_eq!(planned(&controller), [address(1), own]);
}

#[test]
fn what_is_wrong_is_said_once() {
    let config = Config::parse(CONFIG, Path::new("random.toml")).unwrap();
    let mut world = World::new(1);
    let mut controller = Controller::new(config, &Ok(()), world.facts.clone()).unwrap();
    world.facts.routes.insert(address(1).ip(), Route::Unreachable { reason: "no".into() });
    let warnings = |actions: Vec<Action>| actions.iter().filter(|action| matches!(action, Action::Warn(_))).count();
    let first = warnings(controller.handle(Event::Host(world.facts.clone()), Duration::ZERO));
    assert!(first > 0);
    assert_eq!(warnings(controller.handle(Event::Host(world.facts.clone()), Duration::ZERO)), 0);
}
