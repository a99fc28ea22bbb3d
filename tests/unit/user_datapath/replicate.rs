//! One copy for every downstream: exactly once, in order, and unaffected by failing downstreams.

use std::net::UdpSocket;
use std::sync::Arc;

use udp_fanout::testing::datapath::Datapath;
use udp_fanout::testing::model::{Downstream, DownstreamCounters, DropReason};

use udp_fanout_testkit::flow::{Flow, ID, final_counters, plan, replicating, serving, totals, until};

#[test]
fn every_receiver_gets_every_datagram_once_and_in_order() {
    for (receivers, batch_size) in [(1, 16), (2, 1), (3, 7), (8, 64), (20, 4)] {
        let mut flow = Flow::new("127.0.0.1", receivers);
        let mut datapath = serving(&[&replicating(&flow.receivers(), batch_size)]);
        flow.run_copied(datapath.local_address(ID).unwrap(), 1000);
        flow.assert_each_once_everywhere();
        until("all are counted", || datapath.counters().unwrap().listeners[&ID].packets_received == 1000);
        let counters = final_counters(&mut datapath);
        let totals = counters.listeners[&ID];
        assert_eq!((totals.packets_forwarded, totals.bytes_forwarded), (1000, 64_000));
        assert_eq!((totals.dropped.total(), totals.copies_dropped.total()), (0, 0));
        let each = DownstreamCounters { packets: 1000, bytes: 64_000 };
        assert!(counters.downstreams.len() == receivers && counters.downstreams.values().all(|d| *d == each));
    }
}

#[test]
fn a_closed_port_costs_only_its_own_copies() {
    let mut flow = Flow::new("127.0.0.1", 2);
    let closed = UdpSocket::bind("127.0.0.7:0").unwrap().local_addr().unwrap();
    let receivers = [flow.receivers()[0], (closed, 1), flow.receivers()[1]];
    let mut datapath = serving(&[&replicating(&receivers, 16)]);
    flow.run_copied(datapath.local_address(ID).unwrap(), 2000);
    flow.assert_each_once_everywhere();
    let totals = totals(&mut datapath, 2000);
    assert_eq!((totals.packets_forwarded, totals.dropped.total()), (2000, 0));
    // A copy whose ICMP error is still in flight at the end counts as sent; ICMP is rate-limited.
    let refused = totals.copies_dropped.get(DropReason::Refused);
    assert!(refused > 0 && refused <= 2000 && refused == totals.copies_dropped.total(), "{totals:?}");
}

#[test]
fn a_sample_is_of_the_size_asked_for_and_costs_the_others_nothing() {
    let mut flow = Flow::new("127.0.0.1", 1);
    let sampler = UdpSocket::bind("127.0.0.1:0").unwrap();
    sampler.set_nonblocking(true).unwrap();
    let receivers = [flow.receivers()[0], (sampler.local_addr().unwrap(), 1)];
    let mut listener = replicating(&receivers, 16);
    Arc::make_mut(&mut listener.targets)[1].downstream.sample = u32::MAX / 10;
    let mut datapath = serving(&[&listener]);
    let to = datapath.local_address(ID).unwrap();
    let mut sampled = 0;
    for _ in 0..100 {
        flow.run(to, 200, 1);
        while sampler.recv(&mut [0; 100]).is_ok() {
            sampled += 1;
        }
    }
    flow.assert_each_once_everywhere();
    until("all are counted", || datapath.counters().unwrap().listeners[&ID].packets_received == 20_000);
    let counters = final_counters(&mut datapath);
    while sampler.recv(&mut [0; 100]).is_ok() {
        sampled += 1;
    }
    assert_eq!(counters.downstreams[&(ID, receivers[1].0)].packets, sampled);
    // 2,000 expected; the standard deviation is 42.4, and one in half a million runs is more than five of them away.
    assert!((1_788..=2_212).contains(&sampled), "{sampled} of 20000");
    let totals = counters.listeners[&ID];
    assert_eq!((totals.packets_forwarded, totals.copies_dropped.total()), (20_000, 0));
}

#[test]
fn a_datagram_in_no_sample_counts_as_forwarded() {
    let mut flow = Flow::new("127.0.0.1", 1);
    let mut listener = replicating(&flow.receivers(), 16);
    // A probability of one in 4 * 10^9.
    Arc::make_mut(&mut listener.targets)[0].downstream.sample = 0;
    let mut datapath = serving(&[&listener]);
    let to = datapath.local_address(ID).unwrap();
    flow.send(to, 20);
    let totals = totals(&mut datapath, 20);
    assert_eq!((totals.packets_forwarded, totals.bytes_forwarded), (20, 20 * 64));
    flow.collect();
    assert_eq!(flow.arrived(), 0);
}

#[test]
fn samples_and_receivers_that_change_while_datagrams_flow_lose_nothing() {
    let mut flow = Flow::new("127.0.0.1", 2);
    let elsewhere: Vec<UdpSocket> = (0..3).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    let mut datapath = serving(&[&replicating(&flow.receivers(), 16)]);
    let to = datapath.local_address(ID).unwrap();
    for n in 0..100 {
        flow.send(to, 10);
        let mut receivers = flow.receivers();
        receivers.extend(elsewhere[..n % 4].iter().map(|socket| (socket.local_addr().unwrap(), 1)));
        let mut listener = replicating(&receivers, 16);
        Arc::make_mut(&mut listener.targets)[2..]
            .iter_mut()
            .for_each(|target| target.downstream.sample = Downstream::ALL / 2);
        datapath.apply(&plan(&[&listener])).unwrap();
        while flow.arrived() < flow.sent() * 2 {
            flow.receive();
        }
    }
    flow.assert_each_once_everywhere();
    assert_eq!(totals(&mut datapath, 1000).packets_forwarded, 1000);
}

#[test]
fn without_receivers_datagrams_are_dropped_and_counted() {
    let mut flow = Flow::new("127.0.0.1", 0);
    let mut datapath = serving(&[&replicating(&[], 16)]);
    let to = datapath.local_address(ID).unwrap();
    flow.send(to, 10);
    assert_eq!(totals(&mut datapath, 10).dropped.get(DropReason::NoDownstream), 10);
}
