//! Datagrams that the kernel delivers coalesced (`UDP_GRO`) and accepts coalesced (`UDP_SEGMENT`): each is handled
//! alone, whatever it is coalesced with. On loopback, a coalesced message arrives as one.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use nix::sys::socket::{setsockopt, sockopt::UdpGroSegment};
use udp_fanout::testing::admission::{Meter, Prefix, SourceRules, TICKS_PER_SECOND};
use udp_fanout::testing::datapath::Datapath;
use udp_fanout::testing::model::{DropReason, HashOn, Policy};
use udp_fanout::testing::plan::{hash, maglev};

use udp_fanout_testkit::flow::{
    Flow, GUARD, ID, addresses, final_counters, listener, numbered, receive, send_joined, serving_in_order, sinks,
    totals, until,
};

#[test]
fn joined_datagrams_go_round_one_by_one_and_in_order() {
    let sinks = sinks(3);
    let mut syslog = listener(0, "syslog", "127.0.0.1:0", &addresses(&sinks));
    // With one worker, the receiver of each is deterministic.
    syslog.settings.workers = 1;
    let mut datapath = serving_in_order(&[&syslog]);
    let (to, from) = (datapath.local_address(ID).unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    let mut next = 0;
    for (count, each, last) in [(2, 8, 8), (64, 100, 100), (5, 1400, 9), (44, 1472, 8), (64, 8, 8), (7, 100, 99)] {
        send_joined(&from, to, &numbered(next..next + count, each, last), each as u16);
        for (index, sink) in sinks.iter().enumerate() {
            let own: Vec<u64> = (next..next + count).filter(|number| number % 3 == index as u64).collect();
            let got = receive(sink, own.len());
            let expected = own.into_iter().map(|number| (number, if number + 1 == next + count { last } else { each }));
            assert_eq!(got, expected.collect::<Vec<_>>());
        }
        next += count;
    }
    let totals = totals(&mut datapath, next);
    assert_eq!((totals.packets_forwarded, totals.bytes_forwarded), (next, totals.bytes_received));
}

#[test]
fn datagrams_of_any_length_between_each_other_arrive_whole_and_in_order() {
    let sinks = sinks(1);
    let mut mixed = listener(0, "mixed", "127.0.0.1:0", &addresses(&sinks));
    mixed.settings.workers = 1;
    let mut datapath = serving_in_order(&[&mixed]);
    let (to, from) = (datapath.local_address(ID).unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    let mut next = 0;
    for round in 0..200u64 {
        let mut expected = Vec::new();
        for count in 1..=1 + round % 5 {
            let each = 8 + (round * 37 + count * 411) as usize % 1400;
            let last = 8 + each / (1 + round as usize % 3) / 2;
            let (each, last) = (each.max(last), last);
            send_joined(&from, to, &numbered(next..next + count, each, last), each as u16);
            expected.extend((next..next + count).map(|n| (n, if n + 1 == next + count { last } else { each })));
            next += count;
        }
        assert_eq!(receive(&sinks[0], expected.len()), expected);
    }
    assert_eq!(totals(&mut datapath, next).packets_forwarded, next);
}

#[test]
fn empty_datagrams_between_others_keep_their_place() {
    let sinks = sinks(1);
    let mut empty = listener(0, "empty", "127.0.0.1:0", &addresses(&sinks));
    empty.settings.workers = 1;
    let mut datapath = serving_in_order(&[&empty]);
    let (to, from) = (datapath.local_address(ID).unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    let lengths = [5, 0, 0, 5, 5, 0, 3, 5];
    for _ in 0..100 {
        for length in lengths {
            from.send_to(&b"12345"[..length], to).unwrap();
        }
        let got: Vec<usize> = lengths.iter().map(|_| sinks[0].recv(&mut [0; 8]).unwrap()).collect();
        assert_eq!(got, lengths);
    }
    assert_eq!(totals(&mut datapath, 800).bytes_forwarded, 100 * 23);
}

#[test]
fn each_of_joined_datagrams_takes_a_token_and_those_refused_take_no_turn() {
    for policy in [Policy::RoundRobin, Policy::GelfMessage, Policy::Replicate] {
        let sinks = sinks(2);
        let mut limited = listener(0, "limited", "127.0.0.1:0", &addresses(&sinks));
        limited.policy = policy;
        limited.settings.workers = 1;
        let interval = 3600 * TICKS_PER_SECOND;
        limited.meter = Some(Meter { interval, depth: 5 * interval, prefix: 32, senders: 1024 });
        let deny = vec![Prefix::parse("127.0.0.3").unwrap()];
        limited.sources = SourceRules { allow: Vec::new(), deny }.into();
        let mut datapath = serving_in_order(&[&limited]);
        let to = datapath.local_address(ID).unwrap();
        for (source, numbers) in [("127.0.0.3:0", 0..10), ("127.0.0.1:0", 10..20), ("127.0.0.2:0", 20..22)] {
            send_joined(&UdpSocket::bind(source).unwrap(), to, &numbered(numbers, 100, 50), 100);
        }
        let all: Vec<u64> = (10..15).chain(20..22).collect();
        for (index, sink) in sinks.iter().enumerate() {
            let mine = |turn: usize| policy == Policy::Replicate || turn % 2 == index;
            let expected: Vec<u64> = all.iter().enumerate().filter(|(turn, _)| mine(*turn)).map(|(_, &n)| n).collect();
            let got: Vec<u64> = receive(sink, expected.len()).into_iter().map(|(number, _)| number).collect();
            assert_eq!(got, expected, "{policy:?}");
        }
        let totals = totals(&mut datapath, 22);
        let dropped = [DropReason::SourceDenied, DropReason::RateLimited].map(|reason| totals.dropped.get(reason));
        assert_eq!((totals.packets_forwarded, dropped), (7, [10, 5]), "{policy:?}");
    }
}

#[test]
fn of_joined_datagrams_only_those_longer_than_the_limit_are_missing() {
    let sinks = sinks(1);
    let mut short = listener(0, "short", "127.0.0.1:0", &addresses(&sinks));
    short.settings.max_packet_size = 99;
    // There is no order between the datagrams of two workers.
    short.settings.workers = 1;
    let mut datapath = serving_in_order(&[&short]);
    let (to, from) = (datapath.local_address(ID).unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    send_joined(&from, to, &numbered(0..10, 100, 99), 100);
    send_joined(&from, to, &numbered(10..20, 99, 20), 99);
    let numbers: Vec<u64> = receive(&sinks[0], 11).into_iter().map(|(number, _)| number).collect();
    assert_eq!(numbers, (9..20).collect::<Vec<_>>());
    let totals = totals(&mut datapath, 20);
    assert_eq!((totals.packets_forwarded, totals.dropped.get(DropReason::Truncated)), (11, 9));
    assert_eq!(totals.bytes_received, 900 + 99 + 9 * 99 + 20);
}

#[test]
fn chunks_of_gelf_messages_are_told_apart_within_what_was_joined() {
    let sinks = sinks(3);
    let mut gelf = listener(0, "gelf", "127.0.0.1:0", &addresses(&sinks));
    gelf.policy = Policy::GelfMessage;
    let mut datapath = serving_in_order(&[&gelf]);
    let (to, from) = (datapath.local_address(ID).unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    sinks.iter().for_each(|sink| sink.set_nonblocking(true).unwrap());
    let (mut expected, mut chunks, mut round, mut whole) = ([0u64; 3], [0u64; 3], [0u64; 3], 0);
    for sent in 0..50u64 {
        let mut payload = Vec::new();
        for n in 0..20 {
            let id = (sent * 20 + n).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
            if n % 4 == 0 {
                payload.extend(b"{\"version\": 1}!!");
                whole += 1;
            } else {
                payload.extend([&[0x1e, 0x0f][..], &id, b"chunk!"].concat());
                let slot = hash::table_slot(hash::message_hash(id), gelf.table.len() as u32);
                expected[gelf.table[slot as usize] as usize] += 1;
            }
        }
        send_joined(&from, to, &payload, 16);
        let all = (sent + 1) * 20;
        until("all are sent", || datapath.counters().unwrap().listeners[&ID].packets_forwarded == all);
        for (index, sink) in sinks.iter().enumerate() {
            let mut bytes = [0; 16];
            while let Ok(length) = sink.recv(&mut bytes) {
                assert_eq!(length, 16);
                let counts = if bytes.starts_with(&[0x1e, 0x0f]) { &mut chunks } else { &mut round };
                counts[index] += 1;
            }
        }
    }
    final_counters(&mut datapath);
    assert_eq!(chunks, expected);
    // Whole messages go round robin.
    assert_eq!(round.iter().sum::<u64>(), whole);
    assert!(round.iter().all(|&count| count.abs_diff(whole / 3) <= 1), "{round:?}");
}

#[test]
fn hashing_and_replicating_see_each_of_the_joined() {
    let sinks = sinks(3);
    for policy in [Policy::Hash(HashOn::Source), Policy::Replicate] {
        let mut each = listener(0, "each", "127.0.0.1:0", &addresses(&sinks));
        each.policy = policy;
        if let Policy::Hash(_) = policy {
            each.table = maglev::table(&addresses(&sinks), 0).into();
        }
        let mut datapath = serving_in_order(&[&each]);
        let to = datapath.local_address(ID).unwrap();
        for _ in 0..20 {
            let from = UdpSocket::bind("127.0.0.1:0").unwrap();
            let hash = hash::flow_hash(HashOn::Source, from.local_addr().unwrap(), to);
            let own = each.table[hash::table_slot(hash, each.table.len() as u32) as usize] as usize;
            send_joined(&from, to, &numbered(0..50, 64, 30), 64);
            for (index, sink) in sinks.iter().enumerate() {
                if policy == Policy::Replicate || index == own {
                    let numbers: Vec<u64> = receive(sink, 50).into_iter().map(|(number, _)| number).collect();
                    assert!(numbers.is_sorted() && numbers.len() == 50, "{numbers:?}");
                }
            }
        }
        let totals = totals(&mut datapath, 1000);
        assert_eq!((totals.packets_forwarded, totals.copies_dropped.total()), (1000, 0));
    }
}

#[test]
fn what_a_full_queue_loses_counts_as_many_datagrams_as_were_joined() {
    let sinks = sinks(1);
    sinks[0].set_nonblocking(true).unwrap();
    let mut syslog = listener(0, "syslog", "127.0.0.1:0", &addresses(&sinks));
    syslog.settings.recv_buf_size = Some(4096);
    let mut datapath = serving_in_order(&[&syslog]);
    let (to, from) = (datapath.local_address(ID).unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    let payload = numbered(0..10, 100, 100);
    for _ in 0..2000 {
        send_joined(&from, to, &payload, 100);
    }
    until("all are accounted for", || datapath.counters().unwrap().listeners[&ID].packets_received == 20_000);
    let totals = final_counters(&mut datapath).listeners[&ID];
    assert_eq!(totals.packets_forwarded + totals.dropped.get(DropReason::ReceiveQueueFull), 20_000);
    assert_eq!(totals.packets_forwarded % 10, 0);
}

#[test]
fn a_closed_port_is_charged_for_every_datagram_of_a_message() {
    let sinks = sinks(1);
    let closed = UdpSocket::bind("127.0.0.8:0").unwrap().local_addr().unwrap();
    let mut syslog = listener(0, "syslog", "127.0.0.1:0", &[addresses(&sinks)[0], (closed, 1)]);
    syslog.settings.workers = 1;
    let mut datapath = serving_in_order(&[&syslog]);
    let (to, from) = (datapath.local_address(ID).unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    for _ in 0..50 {
        send_joined(&from, to, &numbered(0..64, 64, 64), 64);
        receive(&sinks[0], 32);
    }
    let totals = totals(&mut datapath, 3200);
    // On loopback no ICMP error is still in flight at the end.
    assert_eq!((totals.packets_forwarded, totals.dropped.get(DropReason::Refused)), (1600, 1600));
}

#[test]
fn joined_ipv6_datagrams_reach_downstreams_of_both_families() {
    let v4 = sinks(1).remove(0);
    let v6 = UdpSocket::bind("[::1]:0").unwrap();
    v6.set_read_timeout(Some(GUARD)).unwrap();
    let downstreams = [(v6.local_addr().unwrap(), 1), (v4.local_addr().unwrap(), 1)];
    let mut both = listener(0, "both", "[::1]:0", &downstreams);
    both.settings.workers = 1;
    let mut datapath = serving_in_order(&[&both]);
    let (to, from) = (datapath.local_address(ID).unwrap(), UdpSocket::bind("[::1]:0").unwrap());
    for _ in 0..20 {
        send_joined(&from, to, &numbered(0..40, 1200, 700), 1200);
        for sink in [&v4, &v6] {
            assert_eq!(receive(sink, 20).iter().map(|&(number, _)| number % 2).sum::<u64>() % 20, 0);
        }
    }
    assert_eq!(totals(&mut datapath, 800).packets_forwarded, 800);
}

#[test]
fn receivers_that_join_what_arrives_get_what_was_sent_together_together() {
    // The datagrams for one downstream leave in one message, for speed.
    let sinks = sinks(2);
    sinks.iter().for_each(|sink| setsockopt(sink, UdpGroSegment, &true).unwrap());
    let mut syslog = listener(0, "syslog", "127.0.0.1:0", &addresses(&sinks));
    syslog.settings.workers = 1;
    let mut datapath = serving_in_order(&[&syslog]);
    let (to, from) = (datapath.local_address(ID).unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    send_joined(&from, to, &numbered(0..40, 64, 64), 64);
    let mut buffer = [0; 65_536];
    for sink in &sinks {
        assert_eq!(sink.recv(&mut buffer).unwrap(), 20 * 64);
    }
    assert_eq!(totals(&mut datapath, 40).packets_forwarded, 40);
}

#[test]
fn flow_of_a_wildcard_listener_knows_the_destination_of_what_was_joined() {
    let flow = Flow::new("127.0.0.1", 3);
    let mut wide = listener(0, "wide", "0.0.0.0:0", &flow.receivers());
    wide.policy = Policy::Hash(HashOn::Flow);
    wide.table = maglev::table(&flow.receivers(), 0).into();
    let mut datapath = serving_in_order(&[&wide]);
    let port = datapath.local_address(ID).unwrap().port();
    let mut expected = [0u64; 3];
    for n in 1..=40u8 {
        let from = UdpSocket::bind((IpAddr::from([127, 2, 0, n]), 0)).unwrap();
        let to = SocketAddr::new(IpAddr::from([127, 3, 0, n]), port);
        let hash = hash::flow_hash(HashOn::Flow, from.local_addr().unwrap(), to);
        expected[wide.table[hash::table_slot(hash, wide.table.len() as u32) as usize] as usize] += 5;
        send_joined(&from, to, &numbered(0..5, 64, 64), 64);
    }
    until("all are counted", || datapath.counters().unwrap().listeners[&ID].packets_received == 200);
    let counters = final_counters(&mut datapath);
    let got = flow.receivers().iter().map(|&(to, _)| counters.downstreams[&(ID, to)].packets).collect::<Vec<_>>();
    assert_eq!(got, expected);
}
