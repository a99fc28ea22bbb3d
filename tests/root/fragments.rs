//! Hand-written fragmented datagrams.

use std::time::Duration;

use udp_fanout::testing::plan::{Delivery, ListenerPlan};

use udp_fanout_testkit::kernel::oracle::{REDIRECT, SHOT, UNSPEC};
use udp_fanout_testkit::kernel::packet::{Checksum, Frame, fragmented};
use udp_fanout_testkit::kernel::run::{Gso, Program, Ran, listener, target, via};

const SENDER: &str = "203.0.113.5:40000";
const SENDER6: &str = "[2001:db8:5::5]:40000";

/// Listeners with two receivers each, so that a wrong step of the round robin would show.
fn plan() -> Vec<ListenerPlan> {
    let both = |a: &str, b: &str, hop: &str| vec![target(a, via(hop, 1500)), target(b, via(hop, 1500))];
    vec![
        listener(0, "192.0.2.1:5000", both("198.51.100.7:6000", "198.51.100.8:6000", "198.51.100.254")),
        listener(1, "[2001:db8::1]:5000", both("[2001:db8:9::7]:6000", "[2001:db8:9::8]:6000", "fe80::1")),
        listener(2, "192.0.2.1:5002", vec![target("192.0.2.9:7000", Delivery::Local)]),
        listener(3, "192.0.2.1:5003", vec![]),
    ]
}

fn program() -> Program {
    Program::load_with(plan(), |setup| setup.fragment_timeout = Duration::from_secs(3600))
}

fn payload() -> Vec<u8> {
    (0..4000u32).map(|n| (n * 7) as u8).collect()
}

/// A datagram in four fragments of up to 1024 bytes.
fn datagram(from: &str, to: &str) -> Vec<u8> {
    Frame::new(from, to, &payload()).bytes()
}

/// The expected fragments of the rewritten datagram, for each of the two receivers.
fn expected(from: &str, to: [&str; 2], number: u32) -> [Vec<Vec<u8>>; 2] {
    to.map(|to| {
        let mut frame = Frame::new(from, to, &payload());
        frame.ttl = 63;
        fragmented(&frame.bytes(), 1024, number)
    })
}

fn redirected(ran: &[Ran]) -> Vec<Vec<u8>> {
    assert!(ran.iter().all(|ran| ran.verdict == REDIRECT), "{ran:02x?}");
    ran.iter().map(|ran| ran.packet.clone()).collect()
}

#[test]
fn root_all_fragments_follow_the_first_and_count_as_one_datagram() {
    for (from, to, id, receivers) in [
        (SENDER, "192.0.2.1:5000", 0, ["198.51.100.7:6000", "198.51.100.8:6000"]),
        (SENDER6, "[2001:db8::1]:5000", 1, ["[2001:db8:9::7]:6000", "[2001:db8:9::8]:6000"]),
    ] {
        let mut program = program();
        // Two datagrams with interleaved fragments.
        let [one, two] = [7, 8].map(|number| fragmented(&datagram(from, to), 1024, number));
        let mixed: Vec<Vec<u8>> = one.iter().zip(&two).flat_map(|(a, b)| [a.clone(), b.clone()]).collect();
        let out = redirected(&program.run_all(&mixed));
        let of = |which: usize| out.iter().skip(which).step_by(2).cloned().collect::<Vec<_>>();
        let [seven, eight] = [7, 8].map(|number| expected(from, receivers, number));
        let straight = of(0) == seven[0] && of(1) == eight[1];
        let crossed = of(0) == seven[1] && of(1) == eight[0];
        assert!(straight || crossed, "{out:02x?}");
        assert_eq!(program.stats(id), [2, 2, 0, 0, 8000, 8000]);
        assert_eq!(program.fragments(), (0, 0));
    }
}

#[test]
fn root_fragments_that_come_before_the_first_take_the_whole_datagram_up_the_stack() {
    let mut program = program();
    let mut fragments = fragmented(&datagram(SENDER, "192.0.2.1:5000"), 1024, 7);
    fragments.rotate_left(1);
    // Up to the first fragment, and those after it.
    for ran in program.run_all(&fragments) {
        assert_eq!(ran.verdict, UNSPEC);
    }
    assert_eq!(program.stats(0), [1, 0, 0, 1, 4000, 0]);
    assert_eq!(program.fragments(), (1, 0));
    // The same ID again, in order: the last fragment has deleted its map entry.
    let in_order = fragmented(&datagram(SENDER, "192.0.2.1:5000"), 1024, 7);
    redirected(&program.run_all(&in_order));
    // The last one first.
    let mut reversed = in_order;
    reversed.reverse();
    assert!(program.run_all(&reversed).iter().all(|ran| ran.verdict == UNSPEC));
    assert_eq!(program.stats(0), [3, 1, 0, 2, 12_000, 4000]);
    assert_eq!(program.fragments(), (2, 0));
}

#[test]
fn root_foreign_fragments_pass_even_at_a_listeners_address() {
    let mut program = program();
    for to in ["192.0.2.1:2049", "192.0.2.2:5000"] {
        let frames = fragmented(&datagram(SENDER, to), 1024, 7);
        for (ran, frame) in program.run_all(&frames).into_iter().zip(&frames) {
            assert_eq!(ran, Ran { verdict: UNSPEC, packet: frame.clone() });
        }
    }
    assert_eq!(program.fragments(), (0, 0));
    // The ID may be that of a listener's unfinished datagram.
    let ours = fragmented(&datagram(SENDER, "192.0.2.1:5000"), 1024, 9);
    redirected(&program.run_all(&ours[..2]));
    let theirs = fragmented(&datagram(SENDER, "192.0.2.1:2049"), 1024, 9);
    assert!(program.run_all(&theirs).iter().all(|ran| ran.verdict == UNSPEC));
    assert_eq!(program.stats(0)[0], 1);
}

#[test]
fn root_fragments_of_what_is_dropped_are_dropped_and_those_for_local_receivers_go_up() {
    let mut program = program();
    let frames = fragmented(&datagram(SENDER, "192.0.2.1:5003"), 1024, 7);
    assert!(program.run_all(&frames).iter().all(|ran| ran.verdict == SHOT));
    assert_eq!(program.stats(3), [1, 0, 1, 0, 4000, 0]);
    assert_eq!(program.drops(3), [("no_downstream", 1)].into());

    let frames = fragmented(&datagram(SENDER, "192.0.2.1:5002"), 1024, 8);
    let out = program.run_all(&frames);
    assert!(out.iter().all(|ran| ran.verdict == UNSPEC));
    let expected = fragmented(&datagram(SENDER, "192.0.2.9:7000"), 1024, 8);
    assert_eq!(out.into_iter().map(|ran| ran.packet).collect::<Vec<_>>(), expected);
    assert_eq!(program.stats(2), [1, 1, 0, 0, 4000, 4000]);
    assert_eq!(program.fragments(), (0, 0));
}

#[test]
fn root_a_repeated_fragment_is_not_counted_and_goes_where_it_went() {
    let mut program = program();
    let frames = fragmented(&datagram(SENDER, "192.0.2.1:5000"), 1024, 7);
    let twice: Vec<Vec<u8>> = frames.iter().flat_map(|frame| [frame.clone(), frame.clone()]).collect();
    let out = redirected(&program.run_all(&twice[..7]));
    assert!(out.chunks_exact(2).all(|pair| pair[0] == pair[1]));
    assert_eq!(out[2][30..34], out[0][30..34], "one receiver gets all");
    assert_eq!(program.stats(0), [1, 1, 0, 0, 4000, 4000]);
    // Once the datagram is complete, further fragments are strays.
    assert_eq!(program.run(&twice[7], Gso::default()).verdict, UNSPEC);
    assert_eq!(program.fragments(), (1, 0));
}

#[test]
fn root_fragments_that_cannot_follow_are_lost_and_counted() {
    let mut program = program();
    let mut frame = Frame::new(SENDER, "192.0.2.1:5000", &payload());
    let first = fragmented(&frame.bytes(), 1024, 7).remove(0);
    redirected(&program.run_all(&[first]));
    // One whose TTL has expired, and one longer than the egress MTU.
    frame.ttl = 1;
    let tired = fragmented(&frame.bytes(), 1024, 7).remove(1);
    frame.ttl = 64;
    let long = fragmented(&frame.bytes(), 2048, 7).remove(1);
    assert!(program.run_all(&[tired, long]).iter().all(|ran| ran.verdict == SHOT));
    assert_eq!(program.fragments(), (0, 2));
    assert_eq!(program.stats(0), [1, 1, 0, 0, 4000, 4000]);
}

#[test]
fn root_a_first_fragment_exceeding_the_egress_mtu_takes_all_to_the_socket() {
    let mut program = program();
    let frames = fragmented(&datagram(SENDER, "192.0.2.1:5000"), 2048, 7);
    assert!(program.run_all(&frames).iter().all(|ran| ran.verdict == UNSPEC));
    assert_eq!(program.stats(0), [1, 0, 0, 1, 4000, 0]);
    assert_eq!(program.fragments(), (0, 0));
}

#[test]
fn root_no_more_than_two_datagrams_lengths_follow_one_first_fragment() {
    let mut program = program();
    let frames = fragmented(&datagram(SENDER, "192.0.2.1:5000"), 1024, 7);
    redirected(&program.run_all(&frames[..2]));
    let verdicts: Vec<i32> = (0..300).map(|_| program.run(&frames[1], Gso::default()).verdict).collect();
    let followed = 2 * 65_535 / 1024 - 2;
    assert!(verdicts[..followed].iter().all(|verdict| *verdict == REDIRECT));
    assert!(verdicts[followed..].iter().all(|verdict| *verdict == SHOT));
    assert_eq!(program.fragments(), (0, (300 - followed) as u64));
    assert_eq!(program.stats(0)[0], 1);
}

#[test]
fn root_what_is_known_is_forgotten_after_a_while() {
    let mut program = Program::load_with(plan(), |setup| setup.fragment_timeout = Duration::ZERO);
    let frames = fragmented(&datagram(SENDER, "192.0.2.1:5000"), 1024, 7);
    let verdicts: Vec<i32> = program.run_all(&frames).iter().map(|ran| ran.verdict).collect();
    assert_eq!(verdicts, [REDIRECT, UNSPEC, UNSPEC, UNSPEC]);
    // Strays leave no entry either.
    assert_eq!(program.fragments(), (3, 0));
}

#[test]
fn root_a_downstream_that_goes_or_moves_takes_no_fragment_to_another() {
    let one = |to: &str| vec![listener(0, "192.0.2.1:5000", vec![target(to, via("198.51.100.254", 1500))])];
    let mut program =
        Program::load_with(one("198.51.100.7:6000"), |setup| setup.fragment_timeout = Duration::from_secs(3600));
    let frames = fragmented(&datagram(SENDER, "192.0.2.1:5000"), 1024, 7);
    let first = redirected(&program.run_all(&frames[..1]));
    // A removed downstream still gets the rest of its datagram.
    program.apply(one("198.51.100.8:6000"));
    let second = redirected(&program.run_all(&frames[1..2]));
    assert_eq!(second[0][30..34], first[0][30..34]);
    // Until its ID belongs to another downstream.
    for n in 0..600 {
        program.apply(one(&format!("198.51.100.{}:6000", 9 + n % 200)));
    }
    assert_eq!(program.run(&frames[2], Gso::default()).verdict, SHOT);
    assert_eq!(program.fragments(), (0, 1));
}

#[test]
fn root_a_flood_of_fragments_leaves_memory_and_others_alone() {
    let mut program = program();
    for round in 0..40u32 {
        let ours = fragmented(&datagram(SENDER, "192.0.2.1:5000"), 1024, 10_000 + round);
        assert_eq!(ours.len(), 4);
        for (n, frame) in (0..).zip(&ours) {
            // Hundreds of fragments of incomplete datagrams between any two of one datagram.
            for flood in 0..200u32 {
                let number = (round * 4 + n) * 200 + flood;
                let from = format!("198.18.{}.{}:9", number >> 8 & 255, number & 255);
                let other = Frame::new(&from, "192.0.2.1:5000", &[0; 80]).bytes();
                let part = fragmented(&other, 64, number >> 16)[(flood % 2) as usize].clone();
                program.run(&part, Gso::default());
            }
            assert_eq!(program.run(frame, Gso::default()).verdict, REDIRECT, "fragment {n} of round {round}");
        }
    }
    assert_eq!(program.stats(0)[1], 40 + 40 * 4 * 100);
    assert_eq!(program.fragments(), (40 * 4 * 100, 0));
}

#[test]
fn root_checksums_of_fragments_stay_what_they_were() {
    let program = program();
    for checksum in [Checksum::Zero, Checksum::Wrong] {
        let mut frame = Frame::new(SENDER, "192.0.2.1:5000", &payload());
        frame.udp_checksum = checksum;
        let out = redirected(&program.run_all(&fragmented(&frame.bytes(), 1024, 7)));
        let to = if out[0][33] == 7 { "198.51.100.7:6000" } else { "198.51.100.8:6000" };
        let mut expected = Frame::new(SENDER, to, &payload());
        expected.ttl = 63;
        if checksum == Checksum::Zero {
            expected.udp_checksum = Checksum::Zero;
            assert_eq!(out, fragmented(&expected.bytes(), 1024, 7));
        } else {
            assert_ne!(out, fragmented(&expected.bytes(), 1024, 7), "a wrong one must stay wrong");
        }
    }
}
