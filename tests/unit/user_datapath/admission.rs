//! Admission rules and rate limits that change: datagrams sent once a plan is in force follow it.

use std::net::UdpSocket;
use std::sync::Arc;

use udp_fanout::testing::admission::{Meter, Prefix, SourceRules, TICKS_PER_SECOND};
use udp_fanout::testing::datapath::Datapath;
use udp_fanout::testing::model::DropReason;
use udp_fanout::testing::plan::ListenerPlan;

use udp_fanout_testkit::flow::{Flow, ID, final_counters, listener, plan, serving, until};

/// A listener that denies these prefixes.
fn denying(flow: &Flow, prefixes: &[&str]) -> ListenerPlan {
    let mut plan = listener(0, "syslog", "127.0.0.1:0", &flow.receivers());
    plan.settings.workers = 3;
    let deny = prefixes.iter().map(|prefix| Prefix::parse(prefix).unwrap()).collect();
    plan.sources = SourceRules { allow: Vec::new(), deny }.into();
    plan
}

#[test]
fn no_datagram_is_judged_by_rules_of_before() {
    let mut flow = Flow::new("127.0.0.1", 2);
    let wrong = UdpSocket::bind("127.0.0.2:0").unwrap();
    let mut datapath = serving(&[&denying(&flow, &[])]);
    let to = datapath.local_address(ID).unwrap();
    let rounds = 100;
    for round in 0..rounds {
        // Continuous traffic, so that workers have batches in progress while the rules change.
        flow.send(to, 20);
        let rules: &[&str] = if round % 2 == 0 { &["127.0.0.2"] } else { &["127.0.0.2/31", "10.0.0.0/8"] };
        datapath.apply(&plan(&[&denying(&flow, rules)])).unwrap();
        for _ in 0..5 {
            wrong.send_to(&[0; 8], to).unwrap();
        }
        flow.send(to, 5);
        until("all are counted", || {
            let totals = datapath.counters().unwrap().listeners[&ID];
            totals.packets_received == 30 * (round + 1)
        });
        datapath.apply(&plan(&[&denying(&flow, &[])])).unwrap();
        while flow.arrived() < flow.sent() {
            flow.receive();
        }
    }
    flow.assert_each_exactly_once();
    let totals = final_counters(&mut datapath).listeners[&ID];
    assert_eq!((totals.packets_forwarded, totals.dropped.get(DropReason::SourceDenied)), (25 * rounds, 5 * rounds));
}

#[test]
fn all_workers_take_from_one_bucket_which_outlives_tables_and_workers() {
    let mut flow = Flow::new("127.0.0.1", 2);
    let mut limited = denying(&flow, &[]);
    let interval = 3600 * TICKS_PER_SECOND;
    limited.meter = Some(Meter { interval, depth: 100 * interval, prefix: 8, senders: 1024 });
    let mut datapath = serving(&[&limited]);
    let to = datapath.local_address(ID).unwrap();
    flow.send(to, 60);
    until("60 are counted", || datapath.counters().unwrap().listeners[&ID].packets_received == 60);
    Arc::make_mut(&mut limited.table).reverse();
    datapath.apply(&plan(&[&limited])).unwrap();
    flow.send(to, 20);
    until("80 are counted", || datapath.counters().unwrap().listeners[&ID].packets_received == 80);
    limited.settings.batch_size = 4;
    datapath.apply(&plan(&[&limited])).unwrap();
    flow.send(to, 100);
    // Another address of the same network has the same bucket.
    UdpSocket::bind("127.0.0.2:0").unwrap().send_to(&[0; 8], to).unwrap();
    until("all are counted", || datapath.counters().unwrap().listeners[&ID].packets_received == 181);
    let totals = final_counters(&mut datapath).listeners[&ID];
    assert_eq!((totals.packets_forwarded, totals.dropped.get(DropReason::RateLimited)), (100, 81));
    while flow.arrived() < 100 {
        flow.receive();
    }
}

#[test]
fn replication_checks_admission_first() {
    let flow = Flow::new("127.0.0.1", 2);
    let mut all = denying(&flow, &["127.0.0.2"]);
    all.policy = udp_fanout::testing::model::Policy::Replicate;
    let mut datapath = serving(&[&all]);
    let to = datapath.local_address(ID).unwrap();
    UdpSocket::bind("127.0.0.2:0").unwrap().send_to(&[0; 8], to).unwrap();
    until("it is counted", || datapath.counters().unwrap().listeners[&ID].packets_received == 1);
    let counters = final_counters(&mut datapath);
    assert_eq!(counters.listeners[&ID].dropped.get(DropReason::SourceDenied), 1);
    assert!(counters.downstreams.values().all(|to| to.packets == 0));
}
