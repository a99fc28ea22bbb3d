//! Seeded random histories for the controller, which does no I/O. Its invariants must hold after every step. The host
//! changes, sets of downstreams arrive, plans fail, health changes, and the configuration is edited.
//!
//! `CONTROLLER_SEED` runs one history again; a failure prints its seed.
mod simulation;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use udp_fanout::testing::controller::{Controller, ControllerAction, ControllerEvent, DownstreamOrigin};
use udp_fanout::testing::host::{HostAddress, Route};
use udp_fanout::testing::model::{Downstream, DownstreamSet, ListenerId};

use simulation::{Simulation, address, configurations};

const HISTORIES: u64 = 100_000;
const STEPS: usize = 12;
/// One history in this many is much longer.
const LONG: u64 = 1_000;

fn history(seed: u64) {
    let (mut simulation, mut controller) = Simulation::new(seed);
    let facts = simulation.facts.clone();
    simulation.step(&mut controller, ControllerEvent::Host(facts));
    simulation.check(&controller);
    for _ in 0..if seed.is_multiple_of(LONG) { 50 * STEPS } else { STEPS } {
        let event = simulation.random_event(&controller);
        simulation.step(&mut controller, event);
        simulation.check(&controller);
    }
}

#[test]
fn random_histories_keep_the_invariants() {
    if let Ok(seed) = std::env::var("CONTROLLER_SEED") {
        return history(seed.parse().unwrap());
    }
    // Made beforehand, once for all threads.
    assert!(configurations().len() > 100);
    let next = AtomicU64::new(0);
    let work = || {
        while let seed = next.fetch_add(1, Ordering::Relaxed)
            && seed < HISTORIES
        {
            let outcome = std::panic::catch_unwind(|| history(seed));
            assert!(outcome.is_ok(), "CONTROLLER_SEED={seed}");
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
}

#[test]
fn the_listener_itself_is_none_of_its_downstreams() {
    let (mut simulation, mut controller) = Simulation::at_the_reference(1);
    let mut facts = simulation.facts.clone();
    let listener = ListenerId(2);
    let own: SocketAddr = "192.0.2.7:5002".parse().unwrap();
    let downstream = |address| Downstream { name: "d".into(), address, weight: 1, sample: Downstream::ALL };
    let set = DownstreamSet { generation: 2, downstreams: vec![downstream(address(1)), downstream(own)] };
    simulation.step_surely(
        &mut controller,
        ControllerEvent::Downstreams { listener, origin: DownstreamOrigin::Kubernetes, set },
        true,
    );
    let planned = |controller: &Controller| -> Vec<SocketAddr> {
        let plan = controller.plan().listeners.iter().find(|plan| plan.id == listener).unwrap();
        plan.targets.iter().map(|target| target.downstream.address).collect()
    };
    assert_eq!(planned(&controller), [address(1), own], "it may be another host's");
    facts.addresses.push(HostAddress { link: 2, address: own.ip() });
    let about = |actions: &[ControllerAction]| -> usize {
        let text = |action: &&ControllerAction| matches!(action, ControllerAction::Warn(text) if text.contains("is the listener itself"));
        actions.iter().filter(text).count()
    };
    assert_eq!(about(&controller.handle(ControllerEvent::Host(facts.clone()), Duration::ZERO)), 1);
    assert_eq!(planned(&controller), [address(1)]);
    assert_eq!(about(&controller.handle(ControllerEvent::Host(facts.clone()), Duration::ZERO)), 0, "said once");
    facts.addresses.pop();
    controller.handle(ControllerEvent::Host(facts), Duration::ZERO);
    assert_eq!(planned(&controller), [address(1), own]);
}

#[test]
fn what_is_wrong_is_said_once() {
    let (mut simulation, mut controller) = Simulation::at_the_reference(1);
    simulation.facts.routes.insert(address(1).ip(), Route::Unreachable { reason: "no".into() });
    let warnings = |actions: Vec<ControllerAction>| {
        actions.iter().filter(|action| matches!(action, ControllerAction::Warn(_))).count()
    };
    let first = warnings(controller.handle(ControllerEvent::Host(simulation.facts.clone()), Duration::ZERO));
    assert!(first > 0);
    assert_eq!(warnings(controller.handle(ControllerEvent::Host(simulation.facts.clone()), Duration::ZERO)), 0);
}

#[test]
fn a_configuration_that_cannot_be_put_in_force_leaves_the_one_before_in_force() {
    let (mut simulation, mut controller) = Simulation::at_the_reference(7);
    simulation.step_surely(&mut controller, ControllerEvent::Host(simulation.facts.clone()), true);
    let before = controller.plan().clone();
    let prepared = controller.prepare(simulation.another(), &Ok(())).unwrap();
    simulation.expect_refusal();
    simulation.step_surely(&mut controller, ControllerEvent::Config(prepared), false);
    assert_eq!(*controller.plan(), before);
    assert!(controller.readiness().iter().all(|(name, state)| state.is_ok() || name != "static"), "in force again");
}

#[test]
fn a_listener_whose_interface_is_away_does_not_keep_another_from_changing() {
    let (mut simulation, mut controller) = Simulation::at_the_reference(3);
    simulation.step_surely(&mut controller, ControllerEvent::Host(simulation.facts.clone()), true);
    simulation.facts.links.retain(|link| link.name != "eth1");
    simulation.step_surely(&mut controller, ControllerEvent::Host(simulation.facts.clone()), true);
    let mut edited = simulation.config().clone();
    edited.listeners[0].policy = udp_fanout::testing::model::Policy::Replicate;
    assert!(controller.prepare(edited.clone(), &Ok(())).is_ok());
    // But no listener can move to a missing interface.
    edited.listeners[0].interfaces = udp_fanout::testing::config::Interfaces::Named(vec!["eth1".into()]);
    let refusal = controller.prepare(edited, &Ok(())).unwrap_err().to_string();
    assert!(refusal.contains("interface not found: eth1"), "{refusal}");
}
