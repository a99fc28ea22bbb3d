//! Packets that resemble a listener's plain datagrams, but that the fast path must not take.

use udp_fanout::testing::admission::{Prefix, SourceRules};
use udp_fanout::testing::plan::{Delivery, ListenerPlan};

use udp_fanout_testkit::kernel::oracle::{REDIRECT, SHOT, UNSPEC};
use udp_fanout_testkit::kernel::packet::Frame;
use udp_fanout_testkit::kernel::run::{Gso, Program, Ran, listener, pod, target, via};

const SENDER: &str = "203.0.113.5:40000";
const SENDER6: &str = "[2001:db8:5::5]:40000";

/// The mark of reinjected clones (bpf/parse.h), with the downstream's ID in the low bits.
const REINJECT_MARK: u32 = 0xfa00_0000;

/// Listeners of both families, whose only receivers are pods with known neighbours.
fn plan() -> Vec<ListenerPlan> {
    vec![
        listener(0, "192.0.2.1:5000", vec![target("198.51.100.7:6000", pod("198.51.100.7", 1500))]),
        listener(1, "[2001:db8::1]:5000", vec![target("[2001:db8:9::7]:6000", pod("fe80::7", 1500))]),
    ]
}

/// The program after a datagram to each listener, so that it knows their neighbours.
fn started() -> Program {
    let program = Program::load(plan());
    for frame in listener_datagrams() {
        assert_eq!(program.run(&frame, Gso::default()).verdict, REDIRECT);
    }
    program
}

fn listener_datagrams() -> [Vec<u8>; 2] {
    [(SENDER, "192.0.2.1:5000"), (SENDER6, "[2001:db8::1]:5000")].map(|(from, to)| Frame::new(from, to, b"x").bytes())
}

#[test]
fn root_what_was_left_to_the_stack_at_one_hook_is_not_taken_at_the_next() {
    let program = started();
    for frame in listener_datagrams() {
        let left = program.run_as(&frame, |context| context.cb[..2].copy_from_slice(&[0x5a17_fa0d, 0xc3d2_0e91]));
        assert_eq!(left, Ran { verdict: UNSPEC, packet: frame.clone() });
        let others = program.run_as(&frame, |context| context.cb[..2].copy_from_slice(&[0x5a17_fa0d, 1]));
        assert_eq!(others.verdict, REDIRECT);
    }
    assert_eq!([program.stats(0)[0], program.stats(1)[0]], [2, 2]);
}

#[test]
fn root_a_clone_that_comes_around_goes_where_its_mark_says_and_is_not_counted_again() {
    let program = started();
    let clones = [(0, SENDER, "198.51.100.7:6000"), (1, SENDER6, "[2001:db8:9::7]:6000")];
    for (id, from, to) in clones {
        let clone = Frame::new(from, to, b"x").bytes();
        // The kernel resolves its neighbour, and refuses multicast addresses; the program writes none.
        let mut sent = clone.clone();
        sent[..12].fill(0);
        let around = program.run_as(&clone, |context| context.mark = REINJECT_MARK | id);
        assert_eq!(around, Ran { verdict: REDIRECT, packet: sent });
        // With another downstream's ID it is not our clone, nor with a foreign mark.
        for mark in [REINJECT_MARK | (1 - id), REINJECT_MARK | 77, 0xfb00_0000 | id] {
            let foreign = program.run_as(&clone, |context| context.mark = mark);
            assert_eq!(foreign, Ran { verdict: UNSPEC, packet: clone.clone() });
        }
    }
    for frame in listener_datagrams() {
        let others = program.run_as(&frame, |context| context.mark = REINJECT_MARK | 77);
        assert_eq!(others.verdict, REDIRECT, "other programs use marks, too");
    }
    assert_eq!([program.stats(0)[0], program.stats(1)[0]], [2, 2]);
}

fn any_source(listener: &ListenerPlan) -> Prefix {
    Prefix::parse(if listener.bind.is_ipv4() { "0.0.0.0/0" } else { "::/0" }).unwrap()
}

#[test]
fn root_what_is_left_to_the_socket_or_refused_from_now_on_is_from_the_next_datagram_on() {
    let mut program = started();
    let mut plan = plan();
    for listener in &mut plan {
        listener.socket_only = Some("test".into());
    }
    program.apply(plan);
    for frame in listener_datagrams() {
        assert_eq!(program.run(&frame, Gso::default()), Ran { verdict: UNSPEC, packet: frame });
    }
    assert_eq!([program.stats(0), program.stats(1)], [[2, 1, 0, 1, 2, 1]; 2]);

    let mut program = started();
    let mut plan = self::plan();
    for listener in &mut plan {
        listener.sources = SourceRules { allow: Vec::new(), deny: vec![any_source(listener)] }.into();
    }
    program.apply(plan);
    for frame in listener_datagrams() {
        assert_eq!(program.run(&frame, Gso::default()).verdict, SHOT);
    }
    assert_eq!([program.stats(0), program.stats(1)], [[2, 1, 1, 0, 2, 1]; 2]);
}

/// The program caches a neighbour by its downstream, whose delivery path may change.
#[test]
fn root_a_downstream_whose_path_changes_gets_nothing_by_the_old_one() {
    for changed in [Delivery::Local, Delivery::Unreachable, via("198.51.100.9", 1500), pod("198.51.100.9", 1500)] {
        let mut program = started();
        let mut listeners = plan();
        listeners[0].targets = vec![target("198.51.100.7:6000", changed)].into();
        program.apply(listeners);
        let ran = program.run(&listener_datagrams()[0], Gso::default());
        let addressed = ran.packet[..6].to_vec();
        match changed {
            Delivery::Local => assert_eq!((ran.verdict, addressed), (UNSPEC, vec![0; 6])),
            Delivery::Unreachable => assert_eq!((ran.verdict, addressed), (SHOT, vec![0; 6])),
            Delivery::Neighbour { into_pod: true, .. } => assert_eq!(addressed, [2, 0, 0, 0, 0, 9]),
            _ => assert_eq!((ran.verdict, addressed), (REDIRECT, vec![0; 6])),
        }
    }
}
