//! Endpoints change while datagrams flow: nothing is lost, and removed endpoints get nothing more.

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;

use super::kubernetes_lab::{KubernetesLab, NAMESPACE, shares};
use udp_fanout_lab::apiserver::Kind;
use udp_fanout_lab::cluster::{leaving, unready};
use udp_fanout_lab::{Collectors, Expect, Place};

const PLACES: [Place; 4] = [Place::OtherInterface, Place::Pod, Place::BehindRouter, Place::SameInterface];

/// One change by the control plane: new endpoints for each named slice, or none to delete it; and the receivers
/// of the listener afterwards.
type Step = (Vec<(&'static str, Option<Vec<Value>>)>, &'static [usize]);

fn steps(k8s: &KubernetesLab) -> Vec<Step> {
    let ready = |receivers: &[usize]| k8s.ready(receivers);
    let with = |mut endpoints: Vec<Value>, more: Value| {
        endpoints.push(more);
        Some(endpoints)
    };
    vec![
        // A pod fails its readiness probe.
        (vec![("a", with(ready(&[0, 2]), unready(&k8s.ip(1))))], &[0, 2]),
        // Another comes up, in a slice of its own.
        (vec![("b", Some(ready(&[3])))], &[0, 2, 3]),
        // An endpoint moves to another slice, and is in both for a while.
        (vec![("b", Some(ready(&[3, 0]))), ("a", Some(ready(&[1, 2])))], &[0, 1, 2, 3]),
        // A slice is deleted.
        (vec![("a", None)], &[0, 3]),
        // All remaining endpoints are terminating, and serve until another one is ready.
        (vec![("b", Some(vec![leaving(&k8s.ip(0)), leaving(&k8s.ip(3))])), ("a", Some(ready(&[1])))], &[1]),
        // The terminating ones are removed, and another one is added.
        (vec![("b", None), ("a", Some(ready(&[1, 2])))], &[1, 2]),
        // One replaces another.
        (vec![("a", Some(ready(&[1, 3])))], &[1, 3]),
    ]
}

fn changes_under_flow(mode: &'static str) {
    let k8s = KubernetesLab::new(mode, PLACES);
    k8s.apply("a", k8s.ready(&[0, 1, 2]));
    let mut daemon = k8s.start(&k8s.config(&KubernetesLab::by_number()), 3);
    let collectors = Collectors::start(&k8s.lab, Expect::OneOfThem).unwrap();
    let mut senders = vec![k8s.rounds(&collectors)];
    let mut steady = vec![(senders[0].run_id(), &[0, 1, 2][..])];
    for (slices, expected) in steps(&k8s) {
        senders.push(k8s.while_flowing(&collectors, || {
            for (name, endpoints) in slices {
                match endpoints {
                    Some(endpoints) => k8s.apply(name, endpoints),
                    None => k8s.server.delete(Kind::EndpointSlice, NAMESPACE, name),
                }
            }
            daemon.wait_for_line(&k8s.updated(expected.len())).unwrap();
        }));
        // Sent after the change is in force.
        let after = k8s.rounds(&collectors);
        steady.push((after.run_id(), expected));
        senders.push(after);
    }
    let senders: Vec<_> = senders.iter().collect();
    let report = collectors.finish(&senders).unwrap();
    assert!(report.is_complete(), "{report}\n{}", daemon.log());
    for (run, expected) in steady {
        assert_eq!(report.counts_of(run), shares(4, expected), "{mode}, {expected:?}: {report}\n{}", daemon.log());
    }
    let page = k8s.metrics();
    assert_eq!(page.sum("udp_fanout_packets_dropped_total", &[]), 0);
    assert_eq!(page.sum("udp_fanout_packets_forwarded_total", &[("mode", mode)]), report.sent);
    let (status, _, log) = daemon.stop().unwrap();
    assert!(status.success() && !log.contains("ERROR"), "{log}");
}

#[test]
fn netns_the_kernel_follows_slices_while_datagrams_flow() {
    changes_under_flow("tc_ebpf");
}

#[test]
fn netns_sockets_follow_slices_while_datagrams_flow() {
    changes_under_flow("userspace");
}

/// Endpoints change at random, as fast as the server takes it.
fn storm(mode: &'static str, seed: u64) {
    let k8s = KubernetesLab::new(mode, PLACES);
    k8s.apply("a", k8s.ready(&[0, 1]));
    let mut daemon = k8s.start(&k8s.config(&KubernetesLab::by_number()), 2);
    let collectors = Collectors::start(&k8s.lab, Expect::OneOfThem).unwrap();
    let mut rng = SmallRng::seed_from_u64(seed);
    let during = k8s.while_flowing(&collectors, || {
        for _ in 0..400 {
            // Never fewer than two in both together: only the last change leaves one.
            let mut all: Vec<usize> = (0..4).filter(|_| rng.random_bool(0.3)).collect();
            all.extend([rng.random_range(0..2), rng.random_range(2..4)]);
            let (a, b): (Vec<usize>, Vec<usize>) = all.into_iter().partition(|_| rng.random_bool(0.5));
            // An endpoint that would be in neither for a moment is in both instead.
            k8s.apply("b", k8s.ready(&[&a[..], &b[..]].concat()));
            k8s.apply("a", k8s.ready(&a));
        }
        k8s.apply("a", k8s.ready(&[2]));
        k8s.apply("b", k8s.ready(&[2]));
        daemon.wait_for_line(&k8s.updated(1)).unwrap();
    });
    let after = k8s.rounds(&collectors);
    let report = collectors.finish(&[&during, &after]).unwrap();
    assert!(report.is_complete(), "seed {seed}: {report}");
    assert_eq!(report.counts_of(after.run_id()), shares(4, &[2]), "seed {seed}: {report}");
}

#[test]
fn netns_a_storm_of_changes_loses_nothing() {
    storm("tc_ebpf", 1);
    storm("userspace", 2);
}
