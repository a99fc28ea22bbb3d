//! Events for single datagrams: the first drops, and traces.

use std::time::Instant;

use udp_fanout::testing::datapath::kernel::events::{DatagramEvent, DatagramOutcome, DeliveryPath, TraceFilter};
use udp_fanout::testing::model::{DropReason, ListenerId, Policy};
use udp_fanout::testing::plan::{Delivery, ListenerPlan};

use udp_fanout_testkit::kernel::packet::Frame;
use udp_fanout_testkit::kernel::run::{Gso, Program, listener, pod, target, via};

const SENDER: &str = "203.0.113.5:40000";
const SENDER6: &str = "[2001:db8:5::5]:40000";

fn plan() -> Vec<ListenerPlan> {
    let mut socket_only = listener(4, "192.0.2.1:5004", vec![target("127.0.0.1:9000", Delivery::Local)]);
    socket_only.socket_only = Some("test".into());
    let mut copies = listener(
        7,
        "192.0.2.1:5007",
        vec![target("198.51.100.8:1", Delivery::Unreachable), target("192.0.2.1:2", Delivery::Local)],
    );
    copies.policy = Policy::Replicate;
    vec![
        listener(0, "192.0.2.1:5000", vec![target("198.51.100.7:6000", via("198.51.100.7", 1500))]),
        listener(1, "192.0.2.1:5001", vec![target("192.0.2.1:6001", Delivery::Local)]),
        listener(2, "192.0.2.1:5002", vec![target("198.51.100.8:5002", Delivery::Unreachable)]),
        listener(3, "192.0.2.1:5003", vec![]),
        socket_only,
        listener(5, "[2001:db8::1]:5000", vec![target("[2001:db8:9::7]:6000", via("fe80::1", 1500))]),
        listener(6, "192.0.2.1:5006", vec![target("198.51.100.7:6000", pod("198.51.100.7", 1500))]),
        copies,
    ]
}

fn send(program: &Program, source: &str, destination: &str) {
    program.run(&Frame::new(source, destination, b"hello").bytes(), Gso::default());
}

/// Copies for this host are received again on the packet's ingress device, in a test run the loopback interface.
fn loopback_up() {
    let status = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
    assert!(status.success());
}

fn take(program: &mut Program) -> Vec<DatagramEvent> {
    program.datapath.events().drain().unwrap()
}

#[test]
fn root_the_first_drop_of_each_reason_is_reported() {
    let mut program = Program::load(plan());
    let mut expired = Frame::new(SENDER, "192.0.2.1:5000", b"hello");
    expired.ttl = 1;
    program.run(&expired.bytes(), Gso::default());
    send(&program, SENDER, "192.0.2.1:5002");
    send(&program, SENDER, "192.0.2.1:5003");
    let events = take(&mut program);
    let seen: Vec<_> = events.iter().map(|event| (event.listener.0, event.outcome, event.downstream)).collect();
    let to = |address: &str| Some(address.parse().unwrap());
    assert_eq!(
        seen,
        [
            (0, DatagramOutcome::Dropped(DropReason::TtlExpired), to("198.51.100.7:6000")),
            (2, DatagramOutcome::Dropped(DropReason::NoRoute), to("198.51.100.8:5002")),
            (3, DatagramOutcome::Dropped(DropReason::NoDownstream), None),
        ]
    );
    for (event, port) in events.iter().zip([5000, 5002, 5003]) {
        assert_eq!(event.source, SENDER.parse().unwrap());
        assert_eq!(event.destination, format!("192.0.2.1:{port}").parse().unwrap());
        assert_eq!((event.datagrams, event.bytes, event.logged, event.traced), (1, 5, Some(0), false));
        assert_eq!(event.link, 1, "test runs use the loopback interface");
    }
}

#[test]
fn root_a_flood_of_drops_is_reported_once_a_second_and_counted_whole() {
    let mut program = Program::load(plan());
    let start = Instant::now();
    for _ in 0..5_000 {
        send(&program, SENDER, "192.0.2.1:5002");
    }
    let events = take(&mut program);
    let most = start.elapsed().as_secs() as usize + 1;
    assert!((1..=most).contains(&events.len()), "{} events in {:?}", events.len(), start.elapsed());
    assert_eq!(events[0].logged, Some(0));
    assert_eq!(program.stats(2), [5_000, 0, 5_000, 0, 25_000, 0]);
    assert_eq!(program.datapath.events().lost(), 0);
}

#[test]
fn root_a_failed_copy_is_reported_apart_from_its_datagram() {
    let mut program = Program::load(plan());
    loopback_up();
    for _ in 0..4 {
        send(&program, SENDER, "192.0.2.1:5007");
    }
    let events = take(&mut program);
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(events[0].outcome, DatagramOutcome::CopyDropped(DropReason::NoRoute));
    assert_eq!(events[0].destination, "192.0.2.1:5007".parse().unwrap());
    assert_eq!(events[0].downstream, Some("198.51.100.8:1".parse().unwrap()));
}

#[test]
fn root_nothing_but_drops_is_reported_unless_traced() {
    let mut program = Program::load(plan());
    loopback_up();
    let everywhere = ["192.0.2.1:5000", "192.0.2.1:5001", "192.0.2.1:5004", "192.0.2.1:5006", "192.0.2.1:5007"]
        .map(|to| (SENDER, to));
    let everywhere = || everywhere.into_iter().chain([(SENDER6, "[2001:db8::1]:5000")]);
    program.datapath.events().trace(None).unwrap();
    everywhere().for_each(|(from, to)| send(&program, from, to));
    take(&mut program);
    everywhere().for_each(|(from, to)| send(&program, from, to));
    assert_eq!(take(&mut program), []);

    program.datapath.events().trace(Some(&TraceFilter { listener: None, source: None })).unwrap();
    everywhere().for_each(|(from, to)| send(&program, from, to));
    let events = take(&mut program);
    assert!(events.iter().all(|event| event.traced), "{events:?}");
    let outcomes = |id: u32| -> Vec<DatagramOutcome> {
        events.iter().filter(|event| event.listener == ListenerId(id)).map(|event| event.outcome).collect()
    };
    assert_eq!(outcomes(0), [DatagramOutcome::Forwarded(DeliveryPath::Neighbour)]);
    assert_eq!(outcomes(1), [DatagramOutcome::Forwarded(DeliveryPath::Local)]);
    assert_eq!(outcomes(4), [DatagramOutcome::Passed]);
    assert_eq!(outcomes(5), [DatagramOutcome::Forwarded(DeliveryPath::Neighbour)]);
    assert_eq!(outcomes(6), [DatagramOutcome::Forwarded(DeliveryPath::Pod)]);
    let copies = outcomes(7);
    assert_eq!(copies.last(), Some(&DatagramOutcome::Forwarded(DeliveryPath::None)), "{copies:?}");
    for copy in [DatagramOutcome::CopyDropped(DropReason::NoRoute), DatagramOutcome::Copied(DeliveryPath::Local)] {
        assert!(copies.contains(&copy), "{copies:?}");
    }
    let v6 = events.iter().find(|event| event.listener == ListenerId(5)).unwrap();
    assert_eq!((v6.source, v6.out_link), (SENDER6.parse().unwrap(), 77));
    assert_eq!(v6.downstream, Some("[2001:db8:9::7]:6000".parse().unwrap()));

    program.datapath.events().trace(None).unwrap();
    everywhere().for_each(|(from, to)| send(&program, from, to));
    assert_eq!(take(&mut program), []);
}

#[test]
fn root_a_trace_shows_only_what_it_is_about() {
    let mut program = Program::load(plan());
    let mut seen = |listener: Option<u32>, source: Option<(&str, u8)>| -> Vec<u32> {
        let source = source.map(|(address, bits)| (address.parse().unwrap(), bits));
        let filter = TraceFilter { listener: listener.map(ListenerId), source };
        program.datapath.events().trace(Some(&filter)).unwrap();
        for (from, to) in [
            (SENDER, "192.0.2.1:5000"),
            ("203.0.113.9:1", "192.0.2.1:5001"),
            ("198.51.100.9:1", "192.0.2.1:5001"),
            (SENDER6, "[2001:db8::1]:5000"),
        ] {
            send(&program, from, to);
        }
        take(&mut program).iter().map(|event| event.listener.0).collect()
    };
    assert_eq!(seen(None, None), [0, 1, 1, 5]);
    assert_eq!(seen(Some(1), None), [1, 1]);
    assert_eq!(seen(None, Some(("203.0.113.0", 24))), [0, 1]);
    assert_eq!(seen(Some(1), Some(("203.0.113.0", 24))), [1]);
    assert_eq!(seen(None, Some(("203.0.113.5", 32))), [0]);
    assert_eq!(seen(None, Some(("203.0.113.4", 31))), [0]);
    assert_eq!(seen(None, Some(("0.0.0.0", 0))), [0, 1, 1]);
    assert_eq!(seen(None, Some(("2001:db8:5::", 48))), [5]);
    assert_eq!(seen(None, Some(("::", 0))), [0, 1, 1, 5]);
}

#[test]
fn root_what_the_ring_buffer_cannot_hold_is_counted() {
    let mut program = Program::load(plan());
    program.datapath.events().trace(Some(&TraceFilter { listener: None, source: None })).unwrap();
    for _ in 0..10_000 {
        send(&program, SENDER, "192.0.2.1:5001");
    }
    let lost = program.datapath.events().lost();
    assert!(lost > 0);
    assert_eq!(take(&mut program).len() as u64 + lost, 10_000);
    assert_eq!(program.stats(1), [10_000, 10_000, 0, 0, 50_000, 50_000]);
}

#[test]
fn root_without_ring_buffers_nothing_is_reported_and_all_else_is_as_ever() {
    let mut program = Program::load_with(plan(), |setup| setup.ring_buffer = false);
    send(&program, SENDER, "192.0.2.1:5002");
    assert!(program.datapath.events().descriptor().is_none());
    assert_eq!(take(&mut program), []);
    assert_eq!(program.stats(2), [1, 0, 1, 0, 5, 0]);
    let refusal = program.datapath.events().trace(Some(&TraceFilter { listener: None, source: None })).unwrap_err();
    assert!(refusal.to_string().contains("no BPF ring buffers"), "{refusal}");
}
