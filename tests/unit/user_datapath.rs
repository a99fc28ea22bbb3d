//! The userspace datapath through its public API: plans, datagrams, counters. Everything on loopback, or in
//! network namespaces that the tests make themselves (`netns_*`, which need root).

mod admission;
mod gro;
mod policies;
mod replicate;

use std::net::{SocketAddr, UdpSocket};

use udp_fanout::testing::datapath::Datapath;
use udp_fanout::testing::model::{DownstreamCounters, DropReason, ListenerId, Mode};
use udp_fanout_testkit::flow::{Flow, GUARD, ID, balanced, final_counters, listener, plan, serving, until};

const LOCALHOST: &str = "127.0.0.1:0";

#[test]
fn one_senders_datagrams_arrive_once_each_spread_evenly_by_all_workers() {
    let mut flow = Flow::new("127.0.0.1", 3);
    let mut syslog = listener(0, "syslog", LOCALHOST, &flow.receivers());
    syslog.settings.workers = 3;
    let mut datapath = serving(&[&syslog]);
    assert_eq!(datapath.worker_packets(ID).len(), 3);
    flow.run(datapath.local_address(ID).unwrap(), 3001, 1);
    flow.assert_each_exactly_once();
    let mut counts = flow.per_receiver();
    counts.sort_unstable();
    assert_eq!(counts, [1000, 1000, 1001]);
    until("every datagram counted", || datapath.worker_packets(ID).iter().sum::<u64>() == 3001);
    let workers = datapath.worker_packets(ID);
    assert!(workers.iter().all(|&packets| packets > 0), "idle workers: {workers:?}");

    let counters = final_counters(&mut datapath);
    let totals = counters.listeners[&ID];
    assert_eq!((totals.packets_received, totals.packets_forwarded, totals.dropped.total()), (3001, 3001, 0));
    assert_eq!((totals.bytes_received, totals.bytes_forwarded), (3001 * 64, 3001 * 64));
    for ((address, _), count) in flow.receivers().iter().zip(flow.per_receiver()) {
        let expected = DownstreamCounters { packets: count, bytes: count * 64 };
        assert_eq!(counters.downstreams[&(ID, *address)], expected);
    }
}

#[test]
fn weights_are_kept_exactly() {
    let mut flow = Flow::new("127.0.0.1", 3);
    let weights: Vec<_> =
        flow.receivers().iter().zip([5, 1, 2]).map(|(&(address, _), weight)| (address, weight)).collect();
    let mut datapath = serving(&[&listener(0, "syslog", LOCALHOST, &weights)]);
    flow.run(datapath.local_address(ID).unwrap(), 8 * 200, 1);
    flow.assert_each_exactly_once();
    assert_eq!(flow.per_receiver(), [1000, 200, 400]);
    final_counters(&mut datapath);
}

#[test]
fn the_longest_datagrams_pass_whole() {
    let mut flow = Flow::new("127.0.0.1", 2);
    let mut datapath = serving(&[&listener(0, "gelf", LOCALHOST, &flow.receivers())]);
    for bytes in [65_507, 8, 65_506, 1472, 1473, 65_507] {
        flow.send_one(datapath.local_address(ID).unwrap(), bytes);
        flow.receive();
    }
    flow.assert_each_exactly_once();
    let total = 65_507 + 8 + 65_506 + 1472 + 1473 + 65_507;
    assert_eq!(final_counters(&mut datapath).listeners[&ID].bytes_forwarded, total);
}

#[test]
fn datagrams_longer_than_the_limit_are_counted_and_never_forwarded_cut() {
    let mut flow = Flow::new("127.0.0.1", 1);
    let mut short = listener(0, "statsd", LOCALHOST, &flow.receivers());
    short.settings.max_packet_size = 1000;
    let mut datapath = serving(&[&short]);
    let to = datapath.local_address(ID).unwrap();
    for bytes in [1001, 1000, 65_507, 999] {
        flow.send_one(to, bytes);
    }
    while flow.arrived() < 2 {
        flow.receive();
    }
    until("all are received", || datapath.counters().unwrap().listeners[&ID].packets_received == 4);
    flow.collect();
    assert_eq!(flow.seen.keys().copied().collect::<Vec<_>>(), [1, 3]);
    let totals = final_counters(&mut datapath).listeners[&ID];
    assert_eq!((totals.packets_received, totals.packets_forwarded), (4, 2));
    assert_eq!(totals.dropped.get(DropReason::Truncated), 2);
    assert_eq!((totals.bytes_received, totals.bytes_forwarded), (1001 + 1000 + 65_507 + 999, 1999));
}

#[test]
fn empty_datagrams_are_forwarded_too() {
    let sink = UdpSocket::bind(LOCALHOST).unwrap();
    sink.set_read_timeout(Some(GUARD)).unwrap();
    let mut datapath = serving(&[&listener(0, "empty", LOCALHOST, &[(sink.local_addr().unwrap(), 1)])]);
    UdpSocket::bind(LOCALHOST).unwrap().send_to(&[], datapath.local_address(ID).unwrap()).unwrap();
    assert_eq!(sink.recv(&mut [0; 8]).unwrap(), 0);
    let totals = final_counters(&mut datapath).listeners[&ID];
    assert_eq!((totals.packets_forwarded, totals.bytes_forwarded), (1, 0));
}

#[test]
fn without_downstreams_datagrams_are_dropped_and_counted() {
    let mut flow = Flow::new("127.0.0.1", 1);
    let without_downstreams = listener(0, "syslog", LOCALHOST, &[]);
    let mut datapath = serving(&[&without_downstreams]);
    let to = datapath.local_address(ID).unwrap();
    for _ in 0..10 {
        flow.send_one(to, 100);
    }
    until("all are received", || datapath.counters().unwrap().listeners[&ID].packets_received == 10);
    // A downstream is added.
    datapath.apply(&plan(&[&listener(0, "syslog", LOCALHOST, &flow.receivers())])).unwrap();
    flow.run(to, 100, 1);
    let totals = final_counters(&mut datapath).listeners[&ID];
    assert_eq!((totals.packets_received, totals.packets_forwarded), (110, 100));
    assert_eq!(totals.dropped.get(DropReason::NoDownstream), 10);
}

#[test]
fn a_closed_port_costs_only_its_own_datagrams() {
    let mut flow = Flow::new("127.0.0.1", 1);
    // The temporary sink has bound and closed this port, so nothing listens there.
    let closed = UdpSocket::bind("127.0.0.2:0").unwrap().local_addr().unwrap();
    let downstreams = [(closed, 1), flow.receivers()[0], (closed_port(), 1)];
    let mut datapath = serving(&[&listener(0, "syslog", LOCALHOST, &downstreams)]);
    flow.run(datapath.local_address(ID).unwrap(), 3000, 3);
    until("all are received", || datapath.counters().unwrap().listeners[&ID].packets_received == 3000);
    let counters = final_counters(&mut datapath);
    let totals = counters.listeners[&ID];
    let refused = totals.dropped.get(DropReason::Refused);
    assert_eq!(flow.per_receiver(), [1000]);
    assert_eq!(counters.downstreams[&(ID, flow.receivers()[0].0)].packets, 1000);
    // A datagram whose ICMP error is still in flight at the end counts as forwarded; each worker may have some.
    assert!(refused > 1000 && refused <= 2000, "{totals:?}");
    assert_eq!((totals.packets_received, totals.packets_forwarded + refused), (3000, 3000));
}

fn closed_port() -> SocketAddr {
    UdpSocket::bind("127.0.0.3:0").unwrap().local_addr().unwrap()
}

#[test]
fn a_send_that_is_not_permitted_costs_only_its_own_datagrams() {
    let mut flow = Flow::new("127.0.0.1", 1);
    // Broadcast without SO_BROADCAST: EACCES; without any route: ENETUNREACH.
    let broadcast = "255.255.255.255:9".parse().unwrap();
    let downstreams = [flow.receivers()[0], (broadcast, 1)];
    let mut datapath = serving(&[&listener(0, "syslog", LOCALHOST, &downstreams)]);
    flow.run(datapath.local_address(ID).unwrap(), 1000, 2);
    until("all are received", || datapath.counters().unwrap().listeners[&ID].packets_received == 1000);
    let totals = final_counters(&mut datapath).listeners[&ID];
    let failed = totals.dropped.get(DropReason::SendFailed) + totals.dropped.get(DropReason::Unreachable);
    assert_eq!((totals.packets_forwarded, failed), (500, 500));
}

#[test]
fn tables_swapped_while_datagrams_flow_lose_and_duplicate_nothing() {
    let mut flow = Flow::new("127.0.0.1", 3);
    let all = flow.receivers();
    let tables: Vec<Vec<_>> = vec![
        all.clone(),
        vec![all[2], all[0]],
        vec![all[1]],
        vec![all[2], all[1], all[0]],
        vec![(all[0].0, 7), all[2]],
    ];
    let mut datapath = serving(&[&listener(0, "syslog", LOCALHOST, &tables[0])]);
    let to = datapath.local_address(ID).unwrap();
    let mut last = datapath.counters().unwrap().listeners[&ID];
    for n in 0..1000 {
        let table = &tables[n % tables.len()];
        // Some are in flight when the table changes.
        for _ in 0..10 {
            flow.send_one(to, 64);
        }
        datapath.apply(&plan(&[&listener(0, "syslog", LOCALHOST, table)])).unwrap();
        while flow.sent() - flow.arrived() > 40 {
            flow.receive();
        }
        let now = datapath.counters().unwrap();
        assert!(balanced(&now.listeners[&ID]));
        assert!(now.listeners[&ID].packets_received >= last.packets_received);
        assert_eq!(now.downstreams.len(), table.len());
        last = now.listeners[&ID];
    }
    while flow.arrived() < flow.sent() {
        flow.receive();
    }
    flow.assert_each_exactly_once();
    assert_eq!(final_counters(&mut datapath).listeners[&ID].packets_forwarded, 10_000);
}

#[test]
fn what_is_sent_after_a_swap_follows_the_new_table() {
    let mut flow = Flow::new("127.0.0.1", 2);
    let receivers = flow.receivers();
    let mut datapath = serving(&[&listener(0, "syslog", LOCALHOST, &receivers)]);
    let to = datapath.local_address(ID).unwrap();
    for n in 0..500 {
        let only = n % 2;
        datapath.apply(&plan(&[&listener(0, "syslog", LOCALHOST, &[receivers[only]])])).unwrap();
        let number = flow.send_one(to, 64);
        flow.receive();
        assert_eq!(flow.seen[&number], [only]);
    }
    final_counters(&mut datapath);
}

#[test]
fn new_settings_while_datagrams_flow_lose_nothing_and_keep_the_counters() {
    let mut flow = Flow::new("127.0.0.1", 2);
    let mut syslog = listener(0, "syslog", LOCALHOST, &flow.receivers());
    let mut datapath = serving(&[&syslog]);
    let to = datapath.local_address(ID).unwrap();
    let mut last = 0;
    for (workers, batch_size, mode) in [
        (4, 16, Mode::Userspace),
        (1, 16, Mode::Userspace),
        (3, 1, Mode::Userspace),
        (3, 64, Mode::Userspace),
        (0, 64, Mode::TcEbpf),
        (2, 64, Mode::TcEbpf),
    ] {
        for _ in 0..40 {
            flow.send_one(to, 64);
        }
        syslog.settings.workers = workers;
        syslog.settings.batch_size = batch_size;
        syslog.settings.pin_cpus = workers == 2;
        syslog.mode = mode;
        datapath.apply(&plan(&[&syslog])).unwrap();
        assert_eq!(datapath.worker_packets(ID).len(), if workers == 0 { 1 } else { workers as usize });
        while flow.arrived() < flow.sent() {
            flow.receive();
        }
        flow.run(to, 200, 1);
        let counters = datapath.counters().unwrap();
        assert!(counters.listeners[&ID].packets_received > last);
        last = counters.listeners[&ID].packets_received;
    }
    flow.assert_each_exactly_once();
    let counters = final_counters(&mut datapath);
    assert_eq!(counters.listeners[&ID].packets_forwarded, flow.sent());
    assert_eq!(counters.downstreams.values().map(|d| d.packets).sum::<u64>(), flow.sent());
}

#[test]
fn the_same_plan_again_touches_nothing() {
    let mut flow = Flow::new("127.0.0.1", 2);
    let syslog = listener(0, "syslog", LOCALHOST, &flow.receivers());
    let mut datapath = serving(&[&syslog]);
    let to = datapath.local_address(ID).unwrap();
    flow.run(to, 100, 1);
    until("all are counted", || datapath.worker_packets(ID).iter().sum::<u64>() == 100);
    let workers = datapath.worker_packets(ID);
    datapath.apply(&plan(&[&syslog])).unwrap();
    assert_eq!((datapath.worker_packets(ID), datapath.local_address(ID)), (workers, Some(to)));
    assert_eq!(datapath.restart_dead_workers().unwrap(), 0);
    assert_eq!(datapath.restart_dead_workers().unwrap(), 0);
}

#[test]
fn a_full_receive_queue_is_accounted_for_to_the_last_datagram() {
    let sink = UdpSocket::bind(LOCALHOST).unwrap();
    sink.set_nonblocking(true).unwrap();
    let mut syslog = listener(0, "syslog", LOCALHOST, &[(sink.local_addr().unwrap(), 1)]);
    syslog.settings.recv_buf_size = Some(4096);
    let mut datapath = serving(&[&syslog]);
    let to = datapath.local_address(ID).unwrap();
    let sender = UdpSocket::bind(LOCALHOST).unwrap();
    for _ in 0..20_000 {
        sender.send_to(&[1; 100], to).unwrap();
    }
    // Neither lost nor counted twice, however many the worker had handled in time.
    until("all are accounted for", || datapath.counters().unwrap().listeners[&ID].packets_received == 20_000);
    let totals = final_counters(&mut datapath).listeners[&ID];
    assert_eq!(totals.packets_forwarded + totals.dropped.get(DropReason::ReceiveQueueFull), 20_000);
    assert_eq!(totals.bytes_received, totals.packets_forwarded * 100);
}

#[test]
fn ipv6_listeners_serve_downstreams_of_both_families() {
    let mut flow = Flow::new("::1", 2);
    let sink = UdpSocket::bind(LOCALHOST).unwrap();
    sink.set_read_timeout(Some(GUARD)).unwrap();
    let mut downstreams = flow.receivers();
    downstreams.push((sink.local_addr().unwrap(), 1));
    let mut datapath = serving(&[&listener(0, "syslog", "[::1]:0", &downstreams)]);
    let to = datapath.local_address(ID).unwrap();
    for _ in 0..10 {
        for _ in 0..3 {
            flow.send_one(to, 64);
        }
        assert_eq!(sink.recv(&mut [0; 100]).unwrap(), 64);
    }
    while flow.arrived() < 20 {
        flow.receive();
    }
    assert_eq!(flow.per_receiver(), [10, 10]);
    let counters = final_counters(&mut datapath);
    assert_eq!(counters.listeners[&ID].packets_forwarded, 30);
    assert!(counters.downstreams.values().all(|downstream| downstream.packets == 10));
}

#[test]
fn ipv6_wildcards_leave_ipv4_to_others_and_refusals_are_attributed() {
    let mut flow = Flow::new("::1", 1);
    let closed = [UdpSocket::bind("[::1]:0").unwrap().local_addr().unwrap(), closed_port()];
    let downstreams = [flow.receivers()[0], (closed[0], 1), (closed[1], 1)];
    let mut datapath = serving(&[&listener(0, "syslog", "[::]:0", &downstreams)]);
    let port = datapath.local_address(ID).unwrap().port();
    // An address that nothing else here uses.
    UdpSocket::bind(("127.0.0.4", port)).unwrap();
    flow.run(SocketAddr::new("::1".parse().unwrap(), port), 300, 3);
    until("all are received", || datapath.counters().unwrap().listeners[&ID].packets_received == 300);
    let totals = final_counters(&mut datapath).listeners[&ID];
    let refused = totals.dropped.get(DropReason::Refused);
    assert_eq!(flow.per_receiver(), [100]);
    assert!(refused > 100 && totals.packets_forwarded + refused == 300, "{totals:?}");
}

#[test]
fn a_port_in_use_is_named_and_the_listeners_before_it_serve() {
    let mut flow = Flow::new("127.0.0.1", 1);
    let taken = UdpSocket::bind(LOCALHOST).unwrap();
    let address = taken.local_addr().unwrap();
    let first = listener(0, "first", LOCALHOST, &flow.receivers());
    let second = listener(1, "syslog", &address.to_string(), &flow.receivers());
    let mut datapath = serving(&[]);
    let error = format!("{:#}", datapath.apply(&plan(&[&first, &second])).unwrap_err());
    assert!(
        error.starts_with(&format!("listener \"syslog\": cannot bind {address}: address already in use")),
        "{error}"
    );
    assert!(error.contains("`ss -ulpn sport = :"), "{error}");
    flow.run(datapath.local_address(ID).unwrap(), 10, 1);
    assert_eq!(datapath.worker_packets(ListenerId(1)).len(), 0);
    drop(taken);
    datapath.apply(&plan(&[&first, &second])).unwrap();
    flow.run(address, 10, 1);
    let counters = final_counters(&mut datapath);
    assert_eq!(counters.listeners[&ID].packets_forwarded, 10);
    assert_eq!(counters.listeners[&ListenerId(1)].packets_forwarded, 10);
}

#[test]
fn a_listener_that_goes_forwards_what_it_holds_and_frees_its_address() {
    let mut flow = Flow::new("127.0.0.1", 1);
    let stays = listener(0, "stays", LOCALHOST, &flow.receivers());
    let goes = listener(1, "goes", LOCALHOST, &flow.receivers());
    let mut datapath = serving(&[&stays, &goes]);
    let address = datapath.local_address(ListenerId(1)).unwrap();
    flow.run(address, 10, 1);
    datapath.apply(&plan(&[&stays])).unwrap();
    assert_eq!(datapath.counters().unwrap().listeners.keys().copied().collect::<Vec<_>>(), [ID]);
    UdpSocket::bind(address).unwrap();
    flow.run(datapath.local_address(ID).unwrap(), 10, 1);
    final_counters(&mut datapath);
}

#[test]
fn a_listener_that_moves_in_the_file_keeps_its_socket_and_its_counts() {
    let mut flow = Flow::new("127.0.0.1", 1);
    let first = listener(0, "first", LOCALHOST, &flow.receivers());
    let mut second = listener(1, "second", LOCALHOST, &flow.receivers());
    let mut datapath = serving(&[&first, &second]);
    let address = datapath.local_address(ListenerId(1)).unwrap();
    flow.run(address, 10, 1);
    second.id = ID;
    datapath.apply(&plan(&[&second])).unwrap();
    assert_eq!(datapath.local_address(ID), Some(address));
    flow.run(address, 10, 1);
    assert_eq!(final_counters(&mut datapath).listeners[&ID].packets_forwarded, 20);
}

#[test]
fn a_listener_moves_to_an_overlapping_address_and_keeps_its_counts() {
    let mut flow = Flow::new("127.0.0.1", 2);
    let wide = listener(0, "syslog", "0.0.0.0:0", &flow.receivers());
    let mut datapath = serving(&[&wide]);
    let port = datapath.local_address(ID).unwrap().port();
    let to = SocketAddr::from(([127, 0, 0, 1], port));
    flow.run(to, 10, 1);
    for bind in [format!("127.0.0.1:{port}"), format!("0.0.0.0:{port}")] {
        datapath.apply(&plan(&[&listener(0, "syslog", &bind, &flow.receivers())])).unwrap();
        assert_eq!(datapath.local_address(ID), Some(bind.parse().unwrap()));
        flow.run(to, 10, 1);
    }
    // If the new address cannot be bound, the listener keeps the old one.
    let nowhere = listener(0, "syslog", "192.0.2.1:5514", &flow.receivers());
    let error = format!("{:#}", datapath.apply(&plan(&[&nowhere])).unwrap_err());
    assert!(error.contains("cannot bind 192.0.2.1:5514"), "{error}");
    flow.run(to, 10, 1);
    let counters = final_counters(&mut datapath);
    assert_eq!(counters.listeners[&ID].packets_forwarded, 40);
    assert_eq!(counters.downstreams.values().map(|d| d.packets).sum::<u64>(), 40);
}
