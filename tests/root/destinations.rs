//! Which listener gets a datagram: many destinations, and destinations that move to another listener.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use udp_fanout::testing::plan::ListenerPlan;

use udp_fanout_testkit::kernel::oracle::{REDIRECT, UNSPEC};
use udp_fanout_testkit::kernel::packet::Frame;
use udp_fanout_testkit::kernel::run::{Gso, Program, listener, pod, target, via};

/// A listener for these addresses, with one receiver.
fn at(id: u32, port: u16, addresses: &[IpAddr]) -> ListenerPlan {
    let to = |v4: &str, v6: &str| if addresses[0].is_ipv4() { v4.to_owned() } else { v6.to_owned() };
    let receiver = to(&format!("198.51.100.{}:6000", 10 + id), &format!("[2001:db8:9::{id:x}]:6000"));
    // One receiver for the fast path, and one that only the slow path serves.
    let delivery = if id.is_multiple_of(2) { pod } else { via };
    let delivery = delivery(&to("198.51.100.254", "fe80::1"), 1500);
    let bind = SocketAddr::new(addresses[0], port).to_string();
    ListenerPlan { match_addresses: addresses.to_vec(), ..listener(id, &bind, vec![target(&receiver, delivery)]) }
}

/// A datagram to this destination.
fn frame(to: SocketAddr) -> Vec<u8> {
    let from = if to.is_ipv4() { "203.0.113.5:40000" } else { "[2001:db8:5::5]:40000" };
    Frame::new(from, &to.to_string(), b"x").bytes()
}

/// Addresses of both families that are alike in their last words.
fn addresses(numbers: std::ops::Range<u16>) -> Vec<IpAddr> {
    let [high, low] = [|n: u16| (n >> 8) as u8, |n: u16| n as u8];
    numbers.map(|n| Ipv4Addr::new(10, 7, high(n), low(n)).into()).collect()
}

fn addresses6(numbers: std::ops::Range<u16>) -> Vec<IpAddr> {
    numbers.map(|n| Ipv6Addr::new(0x2001, 0xdb8, n / 7, 0, 0, 0, 0x0a07, n).into()).collect()
}

/// Checks that a datagram to each of these is taken, and counted for this listener.
fn all_taken(program: &Program, id: u32, port: u16, addresses: &[IpAddr]) {
    let before = program.stats(id)[1];
    for &address in addresses {
        let ran = program.run(&frame(SocketAddr::new(address, port)), Gso::default());
        assert_eq!(ran.verdict, REDIRECT, "{address}");
    }
    assert_eq!(program.stats(id)[1] - before, addresses.len() as u64, "listener {id}");
}

/// Checks that a datagram to any of these is foreign traffic.
fn none_taken(program: &Program, port: u16, addresses: &[IpAddr]) {
    for &address in addresses {
        let ran = program.run(&frame(SocketAddr::new(address, port)), Gso::default());
        assert_eq!(ran.verdict, UNSPEC, "{address}");
    }
}

/// So many that several must share an entry of the listener cache.
#[test]
fn root_every_destination_is_its_listeners_however_many_there_are() {
    let (v4, v6) = (addresses(0..3000), addresses6(0..1500));
    let mut program = Program::load(vec![at(0, 5000, &v4[..1500]), at(1, 5000, &v4[1500..2500]), at(2, 5000, &v6)]);
    all_taken(&program, 0, 5000, &v4[..1500]);
    all_taken(&program, 1, 5000, &v4[1500..2500]);
    all_taken(&program, 2, 5000, &v6);
    none_taken(&program, 5000, &v4[2500..]);
    none_taken(&program, 5001, &v4);

    // Some are removed, some move to another listener, some are added.
    program.apply(vec![at(0, 5000, &v4[..700]), at(1, 5000, &v4[1000..3000]), at(2, 5001, &v6[..500])]);
    all_taken(&program, 0, 5000, &v4[..700]);
    all_taken(&program, 1, 5000, &v4[1000..]);
    all_taken(&program, 2, 5001, &v6[..500]);
    none_taken(&program, 5000, &v4[700..1000]);
    none_taken(&program, 5000, &v6);

    // Few enough that most have a cache entry of their own, which others shared before.
    program.apply(vec![at(0, 5000, &v4[990..1030]), at(1, 5000, &v4[10..20]), at(2, 5000, &v6[40..60])]);
    all_taken(&program, 0, 5000, &v4[990..1030]);
    all_taken(&program, 1, 5000, &v4[10..20]);
    all_taken(&program, 2, 5000, &v6[40..60]);
    none_taken(&program, 5000, &v4[1030..]);
    none_taken(&program, 5000, &v4[20..990]);
    none_taken(&program, 5000, &v6[60..]);

    program.apply(vec![]);
    none_taken(&program, 5000, &v4);
    none_taken(&program, 5000, &v6);
}

/// Two addresses move between listeners all the time. That must not affect a third address, or the many that come and
/// go.
#[test]
fn root_a_reassigned_destination_always_belongs_to_exactly_one_listener() {
    let own = |n: u8| -> Vec<IpAddr> { vec![Ipv4Addr::new(192, 0, 2, n).into()] };
    let many = addresses(0..1200);
    let shared = |turn: usize| -> Vec<ListenerPlan> {
        let (one, other) = if turn.is_multiple_of(2) { (0, 1) } else { (1, 0) };
        let some = (turn % 6) * 200;
        vec![
            at(one, 5000, &own(1)),
            at(other, 5000, &own(2)),
            at(2, 5000, &own(3)),
            at(3, 5000, &many[some..some + 200]),
        ]
    };
    let mut program = Program::load(shared(0));
    let [first, second, third] = [1, 2, 3].map(|n| frame(SocketAddr::new(own(n)[0], 5000)));
    let judging = program.runner().meanwhile(move |runner| {
        for (frame, receivers) in [(&first, 10..12), (&second, 10..12), (&third, 12..13)] {
            let ran = runner.run(frame, Gso::default());
            assert_eq!(ran.verdict, REDIRECT);
            // The last byte of the destination's address.
            assert!(receivers.contains(&ran.packet[33]), "sent to {}", ran.packet[33]);
        }
    });
    (1..100).for_each(|turn| program.apply(shared(turn)));
    let judged = judging.end();
    assert!(judged > 0);
    assert_eq!(program.stats(2)[1], judged);
    assert_eq!(program.stats(3)[1], 0);
}
