//! Hand-written packets, one rule each: the expected bytes, verdict and counters.

use std::time::{Duration, Instant};

use udp_fanout::testing::admission::{Meter, Prefix, SourceRules, TICKS_PER_SECOND};
use udp_fanout::testing::datapath::Datapath;
use udp_fanout::testing::model::ListenerId;
use udp_fanout::testing::plan::{Delivery, ListenerPlan, MacPair, Plan};

use udp_fanout_testkit::kernel::oracle::{REDIRECT, SHOT, UNSPEC};
use udp_fanout_testkit::kernel::packet::{Checksum, Frame};
use udp_fanout_testkit::kernel::run::{Gso, Program, Ran, listener, pod, target, via};

const SENDER: &str = "203.0.113.5:40000";
const SENDER6: &str = "[2001:db8:5::5]:40000";

fn plan() -> Vec<ListenerPlan> {
    let mut socket_only = listener(4, "192.0.2.1:5004", vec![target("127.0.0.1:9000", Delivery::Local)]);
    socket_only.socket_only = Some("test".into());
    vec![
        listener(0, "192.0.2.1:5000", vec![target("198.51.100.7:6000", via("198.51.100.7", 1500))]),
        listener(1, "192.0.2.1:5001", vec![target("192.0.2.1:6001", Delivery::Local)]),
        listener(2, "192.0.2.1:5002", vec![target("198.51.100.8:5002", Delivery::Unreachable)]),
        listener(3, "192.0.2.1:5003", vec![]),
        socket_only,
        listener(5, "[2001:db8::1]:5000", vec![target("[2001:db8:9::7]:6000", via("fe80::1", 1500))]),
        listener(6, "192.0.2.1:5006", vec![target("198.51.100.7:5006", via("198.51.100.254", 1500))]),
    ]
}

fn check(frame: &Frame, gso: Gso, verdict: i32, expected: &Frame, id: u32, stats: [u64; 6]) {
    let program = Program::load(plan());
    let ran = program.run(&frame.bytes(), gso);
    assert_eq!(ran, Ran { verdict, packet: expected.bytes() });
    assert_eq!(program.stats(id), stats);
    for other in (0..7).filter(|other| *other != id) {
        assert_eq!(program.stats(other), [0; 6], "listener {other} counted");
    }
}

/// Untouched and uncounted.
fn check_foreign(bytes: &[u8]) {
    let program = Program::load(plan());
    let ran = program.run(bytes, Gso::default());
    assert_eq!(ran, Ran { verdict: UNSPEC, packet: bytes.to_vec() });
    for id in 0..7 {
        assert_eq!(program.stats(id), [0; 6], "listener {id} counted a foreign packet");
    }
}

#[test]
fn root_a_datagram_is_rewritten_and_redirected() {
    let frame = Frame::new(SENDER, "192.0.2.1:5000", b"hello");
    let mut out = Frame::new(SENDER, "198.51.100.7:6000", b"hello");
    out.ttl = 63;
    check(&frame, Gso::default(), REDIRECT, &out, 0, [1, 1, 0, 0, 5, 5]);
}

#[test]
fn root_the_port_may_stay_the_same() {
    let frame = Frame::new(SENDER, "192.0.2.1:5006", b"hello");
    let mut out = Frame::new(SENDER, "198.51.100.7:5006", b"hello");
    out.ttl = 63;
    check(&frame, Gso::default(), REDIRECT, &out, 6, [1, 1, 0, 0, 5, 5]);
}

#[test]
fn root_an_empty_datagram_is_a_datagram() {
    let frame = Frame::new(SENDER, "192.0.2.1:5000", b"");
    let mut out = Frame::new(SENDER, "198.51.100.7:6000", b"");
    out.ttl = 63;
    check(&frame, Gso::default(), REDIRECT, &out, 0, [1, 1, 0, 0, 0, 0]);
}

#[test]
fn root_a_zero_udp_checksum_stays_zero() {
    let mut frame = Frame::new(SENDER, "192.0.2.1:5000", b"hello");
    frame.udp_checksum = Checksum::Zero;
    let mut out = Frame::new(SENDER, "198.51.100.7:6000", b"hello");
    (out.ttl, out.udp_checksum) = (63, Checksum::Zero);
    check(&frame, Gso::default(), REDIRECT, &out, 0, [1, 1, 0, 0, 5, 5]);
}

#[test]
fn root_a_checksum_that_becomes_zero_is_written_as_ffff() {
    // Two payload bytes are chosen so that the outgoing datagram's checksum computes to zero.
    let right = Frame::new(SENDER, "198.51.100.7:6000", &[0, 0]).bytes();
    let check_of_zeros = u16::from_be_bytes([right[40], right[41]]);
    let payload = check_of_zeros.to_be_bytes();
    let frame = Frame::new(SENDER, "192.0.2.1:5000", &payload);
    let mut out = Frame::new(SENDER, "198.51.100.7:6000", &payload);
    out.ttl = 63;
    assert_eq!(out.bytes()[40..42], [0xff, 0xff]);
    check(&frame, Gso::default(), REDIRECT, &out, 0, [1, 1, 0, 0, 2, 2]);
}

#[test]
fn root_a_local_receiver_gets_it_up_the_stack_with_its_ttl() {
    let mut frame = Frame::new(SENDER, "192.0.2.1:5001", b"hello");
    frame.ttl = 1;
    let mut out = Frame::new(SENDER, "192.0.2.1:6001", b"hello");
    out.ttl = 1;
    check(&frame, Gso::default(), UNSPEC, &out, 1, [1, 1, 0, 0, 5, 5]);
}

#[test]
fn root_ipv6_is_rewritten_and_redirected() {
    let frame = Frame::new(SENDER6, "[2001:db8::1]:5000", b"hello");
    let mut out = Frame::new(SENDER6, "[2001:db8:9::7]:6000", b"hello");
    out.ttl = 63;
    check(&frame, Gso::default(), REDIRECT, &out, 5, [1, 1, 0, 0, 5, 5]);
}

#[test]
fn root_a_super_packet_counts_as_its_datagrams() {
    let payload = vec![7; 2500];
    let frame = Frame::new(SENDER, "192.0.2.1:5000", &payload);
    let mut out = Frame::new(SENDER, "198.51.100.7:6000", &payload);
    out.ttl = 63;
    check(&frame, Gso { size: 1000, segments: 3 }, REDIRECT, &out, 0, [3, 3, 0, 0, 2500, 2500]);
    check(&frame, Gso { size: 1000, segments: 0 }, REDIRECT, &out, 0, [3, 3, 0, 0, 2500, 2500]);
}

#[test]
fn root_a_datagram_exceeding_the_egress_mtu_is_left_to_the_socket() {
    let fits = Frame::new(SENDER, "192.0.2.1:5000", &[7; 1472]);
    let mut out = Frame::new(SENDER, "198.51.100.7:6000", &[7; 1472]);
    out.ttl = 63;
    check(&fits, Gso::default(), REDIRECT, &out, 0, [1, 1, 0, 0, 1472, 1472]);
    let over = Frame::new(SENDER, "192.0.2.1:5000", &[7; 1473]);
    check(&over, Gso::default(), UNSPEC, &over, 0, [1, 0, 0, 1, 1473, 0]);
    check(&over, Gso { size: 1473, segments: 1 }, UNSPEC, &over, 0, [1, 0, 0, 1, 1473, 0]);
}

#[test]
fn root_a_groups_datagram_is_for_one_host_from_here_on() {
    let program = Program::load(vec![
        listener(0, "239.1.1.1:5000", vec![target("198.51.100.7:6000", via("198.51.100.7", 1500))]),
        listener(1, "[ff05::1:3]:5000", vec![target("[2001:db8:9::7]:6000", via("fe80::1", 1500))]),
    ]);
    for (id, from, group, to) in
        [(0, SENDER, "239.1.1.1:5000", "198.51.100.7:6000"), (1, SENDER6, "[ff05::1:3]:5000", "[2001:db8:9::7]:6000")]
    {
        // The TTL limits how far multicast reaches, not how far away a receiver may be.
        for ttl in [1, 0, 255] {
            let mut frame = Frame::new(from, group, b"hello");
            (frame.ttl, frame.destination_mac) = (ttl, [1, 0, 0x5e, 1, 1, 1]);
            let mut out = Frame::new(from, to, b"hello");
            out.ttl = 64;
            let mut packet = out.bytes();
            packet[..12].fill(0);
            assert_eq!(program.run(&frame.bytes(), Gso::default()), Ran { verdict: REDIRECT, packet });
        }
        assert_eq!(program.stats(id), [3, 3, 0, 0, 15, 15]);
        // A multicast address in a unicast frame, or a unicast address in a multicast frame, is left to the stack.
        let alone = Frame::new(from, group, b"hello").bytes();
        assert_eq!(program.run(&alone, Gso::default()), Ran { verdict: UNSPEC, packet: alone });
        assert_eq!(program.stats(id)[0], 3);
    }
    let program = Program::load(plan());
    for host in ["192.0.2.1:5000", "[2001:db8::1]:5000"] {
        let mut frame = Frame::new(if host.starts_with('[') { SENDER6 } else { SENDER }, host, b"hello");
        frame.destination_mac = [1, 0, 0x5e, 1, 1, 1];
        assert_eq!(program.run(&frame.bytes(), Gso::default()).verdict, UNSPEC);
    }
    assert_eq!((program.stats(0)[0], program.stats(5)[0]), (0, 0));
}

#[test]
fn root_options_and_link_local_sources_are_left_to_the_socket() {
    let mut frame = Frame::new(SENDER, "192.0.2.1:5000", b"hello");
    frame.options = vec![1, 1, 1, 0];
    check(&frame, Gso::default(), UNSPEC, &frame, 0, [1, 0, 0, 1, 5, 0]);
    let frame = Frame::new("[fe80::5]:40000", "[2001:db8::1]:5000", b"hello");
    check(&frame, Gso::default(), UNSPEC, &frame, 5, [1, 0, 0, 1, 5, 0]);
}

#[test]
fn root_a_socket_only_listener_passes_everything() {
    let frame = Frame::new(SENDER, "192.0.2.1:5004", b"hello");
    check(&frame, Gso::default(), UNSPEC, &frame, 4, [1, 0, 0, 1, 5, 0]);
}

#[test]
fn root_every_drop_has_its_reason() {
    let mut expired = Frame::new(SENDER, "192.0.2.1:5000", b"hello");
    expired.ttl = 1;
    let unreachable = Frame::new(SENDER, "192.0.2.1:5002", b"hello");
    let no_downstream = Frame::new(SENDER, "192.0.2.1:5003", b"hello");
    for (frame, id, reason) in
        [(expired, 0, "ttl_expired"), (unreachable, 2, "no_route"), (no_downstream, 3, "no_downstream")]
    {
        let mut program = Program::load(plan());
        assert_eq!(program.run(&frame.bytes(), Gso::default()).verdict, SHOT, "{reason}");
        assert_eq!(program.stats(id), [1, 0, 1, 0, 5, 0], "{reason}");
        assert_eq!(program.drops(id), [(reason, 1)].into_iter().collect());
    }
}

#[test]
fn root_foreign_packets_pass_untouched() {
    let ours = || Frame::new(SENDER, "192.0.2.1:5000", b"hello");
    let mut frames = vec![
        ("another port", Frame::new(SENDER, "192.0.2.1:5999", b"hello")),
        ("another address", Frame::new(SENDER, "192.0.2.2:5000", b"hello")),
        ("a martian source", Frame::new("127.0.0.1:1", "192.0.2.1:5000", b"hello")),
        ("a multicast source", Frame::new("224.0.0.1:1", "192.0.2.1:5000", b"hello")),
        ("the other family", Frame::new(SENDER6, "[2001:db8::2]:5000", b"hello")),
    ];
    let mut change = |what, edit: fn(&mut Frame)| {
        let mut frame = ours();
        edit(&mut frame);
        frames.push((what, frame));
    };
    change("another host's MAC", |frame| frame.destination_mac = [2, 0, 0, 0, 0, 1]);
    change("TCP", |frame| frame.protocol = 6);
    change("a first fragment", |frame| frame.fragment = 0x2000);
    change("a last fragment", |frame| frame.fragment = 185);
    change("a bad header checksum", |frame| frame.ip_checksum = Checksum::Wrong);
    for (what, frame) in frames {
        println!("{what}");
        check_foreign(&frame.bytes());
    }
}

#[test]
fn root_malformed_packets_pass_untouched() {
    let whole = Frame::new(SENDER, "192.0.2.1:5000", b"hello").bytes();
    let whole6 = Frame::new(SENDER6, "[2001:db8::1]:5000", b"hello").bytes();
    for length in 34..whole.len() {
        check_truncated(&whole, length);
    }
    for length in 54..whole6.len() {
        check_truncated(&whole6, length);
    }
    let mut short_udp = whole.clone();
    short_udp[39] = 7;
    check_foreign(&short_udp);
    let mut long_udp = whole.clone();
    long_udp[39] = 14;
    check_foreign(&long_udp);
    let mut no_checksum = whole6;
    no_checksum[60..62].fill(0);
    check_foreign(&no_checksum);
    let mut tagged = whole;
    tagged.splice(12..12, [0x81, 0x00, 0x00, 0x05]);
    check_foreign(&tagged);
}

fn check_truncated(whole: &[u8], length: usize) {
    check_foreign(&whole[..length]);
}

/// A listener whose only downstream is a neighbour that user space knows.
fn known_neighbour(into_pod: bool) -> Program {
    let macs = Some(MacPair { neighbour: [2, 0, 0, 0, 0, 7], own: [2, 0, 0, 0, 0, 1] });
    let delivery =
        Delivery::Neighbour { link: 77, next_hop: "198.51.100.7".parse().unwrap(), mtu: 1500, macs, into_pod };
    Program::load(vec![listener(0, "192.0.2.1:5000", vec![target("198.51.100.7:6000", delivery)])])
}

/// The expected packet: only destination and TTL differ; with an Ethernet header if `addressed`.
fn delivered(addressed: bool) -> Vec<u8> {
    let mut out = Frame::new(SENDER, "198.51.100.7:6000", b"hello");
    out.ttl = 63;
    let mut bytes = out.bytes();
    if addressed {
        bytes[..12].copy_from_slice(&[2, 0, 0, 0, 0, 7, 2, 0, 0, 0, 0, 1]);
    }
    bytes
}

#[test]
fn root_a_known_neighbour_is_addressed_and_now_and_then_left_to_the_kernel() {
    let program = known_neighbour(false);
    let frame = Frame::new(SENDER, "192.0.2.1:5000", b"hello").bytes();
    let left = |ran: Ran| {
        assert_eq!(ran.verdict, REDIRECT);
        let addressed = ran.packet == delivered(true);
        assert!(addressed || ran.packet == delivered(false));
        !addressed
    };
    assert!(
        left(program.run(&frame, Gso::default())),
        "the first one goes to the kernel, which verifies the neighbour"
    );
    // Repeatedly, some milliseconds apart; most are addressed.
    let (mut again, mut addressed, deadline) = (0, 0, Instant::now() + Duration::from_secs(30));
    while again < 5 {
        *if left(program.run(&frame, Gso::default())) { &mut again } else { &mut addressed } += 1;
        assert!(Instant::now() < deadline, "no later datagram goes to the kernel");
    }
    assert!(addressed > 0);
}

#[test]
fn root_what_goes_straight_into_a_pod_is_always_addressed() {
    let program = known_neighbour(true);
    let frame = Frame::new(SENDER, "192.0.2.1:5000", b"hello").bytes();
    for _ in 0..2_000 {
        let ran = program.run(&frame, Gso::default());
        assert_eq!(ran, Ran { verdict: REDIRECT, packet: delivered(true) });
    }
}

#[test]
fn root_an_old_kernel_addresses_what_it_can_and_leaves_the_rest_to_the_socket() {
    let plan = known_neighbour(false).plan.listeners.iter().map(|listener| (**listener).clone()).collect();
    let frame = Frame::new(SENDER, "192.0.2.1:5000", b"hello").bytes();
    let program = Program::load_with(plan, |setup| setup.redirects = false);
    for _ in 0..2_000 {
        assert_eq!(program.run(&frame, Gso::default()), Ran { verdict: REDIRECT, packet: delivered(true) });
    }
    let unknown = listener(0, "192.0.2.1:5000", vec![target("198.51.100.7:6000", via("198.51.100.7", 1500))]);
    let program = Program::load_with(vec![unknown], |setup| setup.redirects = false);
    assert_eq!(program.run(&frame, Gso::default()), Ran { verdict: UNSPEC, packet: frame });
    assert_eq!(program.stats(0), [1, 0, 0, 1, 5, 0]);
}

/// Other tables follow each table; a cursor from a longer table must not reach them.
#[test]
fn root_a_round_whose_table_becomes_shorter_stays_within_it() {
    let of_length = |id: u8, length: usize| {
        let targets = (1..=length).map(|n| target(&format!("10.{id}.0.{n}:6000"), pod("198.51.100.7", 1500)));
        listener(id.into(), &format!("192.0.2.{id}:5000"), targets.collect())
    };
    let plan = |turn: usize| (0..4).map(|id| of_length(id, 1 + (turn * 11 + usize::from(id) * 17) % 40)).collect();
    let mut program = Program::load(plan(0));
    let frames: [Vec<u8>; 4] =
        std::array::from_fn(|id| Frame::new(SENDER, &format!("192.0.2.{id}:5000"), b"x").bytes());
    let judging = program.runner().meanwhile(move |runner| {
        for (id, frame) in frames.iter().enumerate() {
            let ran = runner.run(frame, Gso::default());
            // The first bytes of the destination address.
            assert_eq!((ran.verdict, &ran.packet[30..32]), (REDIRECT, &[10, id as u8][..]));
        }
    });
    (1..200).for_each(|turn| program.apply(plan(turn)));
    assert!(judging.end() > 0);
}

#[test]
fn root_a_round_gives_each_downstream_its_share() {
    let hosts = ["198.51.100.1:6000", "198.51.100.2:6000", "198.51.100.3:6000"];
    let mut spread =
        listener(0, "192.0.2.1:5000", hosts.iter().map(|host| target(host, via("198.51.100.1", 1500))).collect());
    spread.table = [0, 1, 0, 2].into();
    let mut program = Program::load(vec![spread]);
    let frame = Frame::new(SENDER, "192.0.2.1:5000", b"x").bytes();
    for _ in 0..400 {
        assert_eq!(program.run(&frame, Gso::default()).verdict, REDIRECT);
    }
    let counters = program.datapath_counters();
    let packets: Vec<u64> =
        hosts.iter().map(|host| counters[&(ListenerId(0), host.parse().unwrap())].packets).collect();
    assert_eq!(packets, [200, 100, 100]);
}

#[test]
fn root_a_thousand_tables_lose_nothing_and_counters_never_fall() {
    let one = |n: u32| {
        let hosts: Vec<String> = (0..1 + n % 5).map(|i| format!("198.51.100.{}:6000", 1 + (n * 7 + i) % 200)).collect();
        vec![listener(0, "192.0.2.1:5000", hosts.iter().map(|host| target(host, via("198.51.100.1", 1500))).collect())]
    };
    let mut program = Program::load(one(0));
    let frame = Frame::new(SENDER, "192.0.2.1:5000", b"x").bytes();
    for n in 1..=1000 {
        assert_eq!(program.run(&frame, Gso::default()).verdict, REDIRECT);
        program.apply(one(n));
        assert_eq!(program.stats(0), [u64::from(n), u64::from(n), 0, 0, u64::from(n), u64::from(n)]);
    }
}

#[test]
fn root_a_downstream_that_stays_keeps_its_count_while_ids_are_reused() {
    let with = |other: u32| {
        let moving = format!("198.51.100.{}:6000", 2 + other % 100);
        let hosts = ["198.51.100.1:6000", &moving];
        let delivery = if other.is_multiple_of(2) { via("198.51.100.1", 1500) } else { via("198.51.100.254", 1500) };
        vec![listener(0, "192.0.2.1:5000", hosts.iter().map(|host| target(host, delivery)).collect())]
    };
    let mut program = Program::load(with(0));
    let frame = Frame::new(SENDER, "192.0.2.1:5000", b"x").bytes();
    for n in 1..=500u64 {
        program.run(&frame, Gso::default());
        program.run(&frame, Gso::default());
        program.apply(with(n as u32));
        let counters = program.datapath_counters();
        assert_eq!(counters[&(ListenerId(0), "198.51.100.1:6000".parse().unwrap())].packets, n);
    }
}

/// A listener that allows only these prefixes.
fn allowing(prefixes: &[&str]) -> Vec<ListenerPlan> {
    let mut plan = listener(0, "192.0.2.1:5000", vec![target("198.51.100.7:6000", via("198.51.100.7", 1500))]);
    let allow = prefixes.iter().map(|prefix| Prefix::parse(prefix).unwrap()).collect();
    plan.sources = SourceRules { allow, deny: Vec::new() }.into();
    vec![plan]
}

#[test]
fn root_changing_who_may_send_never_lets_in_the_wrong_or_keeps_out_the_right() {
    let mut program = Program::load(allowing(&["203.0.113.0/24", "192.0.2.0/25"]));
    let [right, wrong] = [SENDER, "198.18.0.1:40000"].map(|sender| Frame::new(sender, "192.0.2.1:5000", b"x").bytes());
    let judging = program.runner().meanwhile(move |runner| {
        assert_eq!(runner.run(&right, Gso::default()).verdict, REDIRECT);
        assert_eq!(runner.run(&wrong, Gso::default()).verdict, SHOT);
    });
    // More prefixes in all than the map holds, so replaced ones must be deleted.
    for n in 0..1000 {
        let others: Vec<String> = (0..100).map(|i| format!("10.{}.{i}.0/24", n % 200)).collect();
        let own = ["203.0.113.0/24", "203.0.113.5/32", "203.0.0.0/16"][n % 3];
        let prefixes: Vec<&str> = others.iter().map(String::as_str).chain([own]).collect();
        program.apply(allowing(&prefixes));
    }
    let judged = judging.end();
    assert!(judged > 0);
    assert_eq!(program.stats(0)[..4], [2 * judged, judged, judged, 0]);
    assert_eq!(program.drops(0), [("source_denied", judged)].into());
}

#[test]
fn root_rules_that_do_not_fit_change_nothing() {
    let mut program = Program::load(allowing(&["203.0.113.0/24"]));
    let many: Vec<String> = (0..600).map(|i| format!("10.{}.{}.0/24", i / 256, i % 256)).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let error = program.datapath.apply(&Plan::from(allowing(&many))).unwrap_err();
    assert!(format!("{error:#}").contains("raise limits.max_sources"), "{error:#}");
    let frame = Frame::new(SENDER, "192.0.2.1:5000", b"x").bytes();
    assert_eq!(program.run(&frame, Gso::default()).verdict, REDIRECT);
    // And the part of them that had been written is deleted.
    for n in 0..3 {
        program.apply(allowing(&many[n..n + 200]));
        assert_eq!(program.run(&frame, Gso::default()).verdict, SHOT);
    }
    program.apply(allowing(&["203.0.113.5"]));
    assert_eq!(program.run(&frame, Gso::default()).verdict, REDIRECT);
}

#[test]
fn root_a_rule_for_every_address_applies() {
    for (bind, sender, any) in [("192.0.2.1:5000", SENDER, "0.0.0.0/0"), ("[2001:db8::1]:5000", SENDER6, "::/0")] {
        let any = || vec![Prefix::parse(any).unwrap()];
        let frame = Frame::new(sender, bind, b"x").bytes();
        for (allow, deny, verdict) in [(any(), vec![], UNSPEC), (vec![], any(), SHOT)] {
            let mut plan = listener(0, bind, vec![target(&bind.replace("5000", "6000"), Delivery::Local)]);
            plan.sources = SourceRules { allow, deny }.into();
            assert_eq!(Program::load(vec![plan]).run(&frame, Gso::default()).verdict, verdict, "{bind}");
        }
    }
}

fn limited(meter: Meter) -> Vec<ListenerPlan> {
    let mut plan = listener(0, "192.0.2.1:5000", vec![target("198.51.100.7:6000", via("198.51.100.7", 1500))]);
    plan.meter = Some(meter);
    vec![plan]
}

/// A bucket of `burst` datagrams that does not refill while a test runs.
fn slow(burst: u64) -> Meter {
    let interval = 3600 * TICKS_PER_SECOND;
    Meter { interval, depth: burst * interval, prefix: 32, senders: 1024 }
}

#[test]
fn root_a_bucket_fills_at_its_rate() {
    let program =
        Program::load(limited(Meter { interval: TICKS_PER_SECOND / 2000, depth: TICKS_PER_SECOND / 200, ..slow(1) }));
    let frame = Frame::new(SENDER, "192.0.2.1:5000", b"x").bytes();
    let passes = || program.run(&frame, Gso::default()).verdict == REDIRECT;
    let begun = Instant::now();
    assert!((0..10).all(|_| passes()), "a burst at once");
    let (mut passed, mut sent) = (10, 10u64);
    while passed < 1000 {
        passed += u64::from(passes());
        sent += 1;
    }
    // A token takes 0.5 ms. The loop ended with the last one, and none came too early.
    assert!(begun.elapsed() >= Duration::from_micros(990 * 500), "1000 datagrams took {:?}", begun.elapsed());
    assert_eq!(program.stats(0)[..4], [sent, 1000, sent - 1000, 0]);
}

#[test]
fn root_another_limit_begins_with_full_buckets_and_none_lets_everything_pass() {
    let mut program = Program::load(limited(slow(5)));
    let frame = Frame::new(SENDER, "192.0.2.1:5000", b"x").bytes();
    let at_once =
        |program: &Program| (0..50).take_while(|_| program.run(&frame, Gso::default()).verdict == REDIRECT).count();
    assert_eq!(at_once(&program), 5);
    // The same again is no change.
    program.apply(limited(slow(5)));
    assert_eq!(at_once(&program), 0);
    program.apply(limited(slow(7)));
    assert_eq!(at_once(&program), 7);
    let mut open = limited(slow(7));
    open[0].meter = None;
    program.apply(open);
    assert_eq!(at_once(&program), 50);
}

#[test]
fn root_a_flood_of_senders_leaves_memory_alone_and_no_busy_one_forgotten() {
    let program = Program::load(limited(slow(5)));
    let busy = Frame::new(SENDER, "192.0.2.1:5000", b"x").bytes();
    let mut passed = 0;
    // Far more senders than the map has buckets, each with a full bucket, and one that continues to send.
    for n in 0..20_000u32 {
        let from = format!("198.18.{}.{}:9", n >> 8, n & 255);
        let other = Frame::new(&from, "192.0.2.1:5000", b"x").bytes();
        assert_eq!(program.run(&other, Gso::default()).verdict, REDIRECT);
        if n % 50 == 0 {
            passed += u32::from(program.run(&busy, Gso::default()).verdict == REDIRECT);
        }
    }
    assert_eq!(passed, 5);
}

#[test]
fn root_a_super_packet_needs_one_token_and_owes_the_others() {
    let program = Program::load(limited(slow(2)));
    let frame = Frame::new(SENDER, "192.0.2.1:5000", &[7; 60]).bytes();
    let six = Gso { size: 10, segments: 6 };
    assert_eq!(program.run(&frame, six).verdict, REDIRECT);
    assert_eq!(program.run(&frame, six).verdict, SHOT);
    assert_eq!(program.run(&frame, Gso::default()).verdict, SHOT);
    assert_eq!(program.stats(0)[..4], [13, 6, 7, 0]);
}
