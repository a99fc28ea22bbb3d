//! Policies other than round robin: the test computes each receiver from the plan's table, which must be the
//! same as in the kernel program, whose tests compute it in the same way.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use udp_fanout::testing::datapath::Datapath;
use udp_fanout::testing::model::{HashOn, Policy};
use udp_fanout::testing::plan::{ListenerPlan, hash, maglev};

use udp_fanout_testkit::flow::{Flow, GUARD, ID, final_counters, listener, plan, serving};

/// A listener with this policy, three workers, and the policy's table.
fn with_policy(policy: Policy, bind: &str, receivers: &[(SocketAddr, u32)]) -> ListenerPlan {
    let mut listener = listener(0, "netflow", bind, receivers);
    listener.policy = policy;
    listener.settings.workers = 3;
    if let Policy::Hash(_) = policy {
        listener.table = maglev::table(receivers, 0).into();
    }
    listener
}

/// Receivers of one datagram at a time.
struct Receivers(Vec<UdpSocket>);

impl Receivers {
    fn new(ip: &str) -> Receivers {
        Receivers((0..3).map(|_| UdpSocket::bind((ip, 0)).unwrap()).collect())
    }

    fn addresses(&self) -> Vec<(SocketAddr, u32)> {
        self.0.iter().map(|socket| (socket.local_addr().unwrap(), 1)).collect()
    }

    /// Sends a datagram and returns the index of its receiver.
    fn who_gets(&self, from: &UdpSocket, to: SocketAddr, payload: &[u8]) -> usize {
        from.send_to(payload, to).unwrap();
        let mut ready: Vec<PollFd> = self.0.iter().map(|s| PollFd::new(s.as_fd(), PollFlags::POLLIN)).collect();
        assert_eq!(poll(&mut ready, PollTimeout::try_from(GUARD).unwrap()), Ok(1), "no receiver got the datagram");
        let index = ready.iter().position(|socket| socket.any() == Some(true)).unwrap();
        let mut buffer = [0; 1000];
        let length = self.0[index].recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], payload);
        index
    }
}

/// Sends from many addresses and ports, to each of the listener's addresses, and compares with the plan's table.
fn check_hash(on: HashOn, bind: &str, destinations: &[&str]) {
    let v6 = bind.starts_with('[');
    let receivers = Receivers::new(if v6 { "::1" } else { "127.0.0.1" });
    let listener = with_policy(Policy::Hash(on), bind, &receivers.addresses());
    let mut datapath = serving(&[&listener]);
    let port = datapath.local_address(ID).unwrap().port();
    let mut hit = BTreeSet::new();
    for n in 1..=40 {
        let ip = if v6 { "::1".to_owned() } else { format!("127.1.0.{n}") };
        let senders = [UdpSocket::bind((ip.as_str(), 0)).unwrap(), UdpSocket::bind((ip.as_str(), 0)).unwrap()];
        for (sender, destination) in senders.iter().flat_map(|sender| destinations.iter().map(move |to| (sender, to))) {
            let to = SocketAddr::new(destination.parse::<IpAddr>().unwrap(), port);
            let hash = hash::flow_hash(on, sender.local_addr().unwrap(), to);
            let expected = listener.table[hash::table_slot(hash, listener.table.len() as u32) as usize] as usize;
            for payload in [&b"first"[..], b"second"] {
                assert_eq!(receivers.who_gets(sender, to, payload), expected, "{sender:?} to {to}");
            }
            hit.insert(expected);
        }
    }
    assert!(hit.len() == 3 || (v6 && on == HashOn::SourceIp), "only {hit:?} got anything");
    assert_eq!(final_counters(&mut datapath).listeners[&ID].packets_forwarded, 160 * destinations.len() as u64);
}

#[test]
fn hashing_sends_each_source_where_the_table_says() {
    check_hash(HashOn::SourceIp, "127.0.0.1:0", &["127.0.0.1"]);
    check_hash(HashOn::SourceIp, "[::1]:0", &["::1"]);
    check_hash(HashOn::Source, "127.0.0.1:0", &["127.0.0.1"]);
    check_hash(HashOn::Source, "[::1]:0", &["::1"]);
}

#[test]
fn hashing_flows_knows_the_destination_also_behind_a_wildcard() {
    check_hash(HashOn::Flow, "127.0.0.1:0", &["127.0.0.1"]);
    check_hash(HashOn::Flow, "0.0.0.0:0", &["127.0.0.1", "127.7.8.9"]);
    check_hash(HashOn::Flow, "[::]:0", &["::1"]);
}

#[test]
fn chunks_of_a_gelf_message_stay_together_and_whole_messages_go_round() {
    let receivers = Receivers::new("127.0.0.1");
    let listener = with_policy(Policy::GelfMessage, "127.0.0.1:0", &receivers.addresses());
    let mut datapath = serving(&[&listener]);
    let to = datapath.local_address(ID).unwrap();
    let senders: Vec<_> = (0..4).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    let (mut whole, mut hit) = ([0; 3], BTreeSet::new());
    for message in 0..60u64 {
        let id = message.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
        let slot = hash::table_slot(hash::message_hash(id), listener.table.len() as u32);
        let expected = listener.table[slot as usize] as usize;
        for chunk in 0..3u8 {
            let payload = [&[0x1e, 0x0f][..], &id, &[chunk, 3], &b"some text"[..usize::from(chunk)]].concat();
            // From any sender: only the message's ID matters.
            let sender = &senders[usize::from(chunk)];
            assert_eq!(receivers.who_gets(sender, to, &payload), expected);
        }
        hit.insert(expected);
        // Neither a compressed message nor too short a one is a chunk.
        for payload in [&b"{\"version\":\"1.1\"}"[..], &[0x1e, 0x0f, 1, 2, 3, 4, 5, 6, 7], &[]] {
            whole[receivers.who_gets(&senders[message as usize % 4], to, payload)] += 1;
        }
    }
    assert_eq!((whole, hit.len()), ([60, 60, 60], 3));
    final_counters(&mut datapath);
}

#[test]
fn policies_that_promise_order_keep_it_with_several_workers() {
    for policy in [Policy::Hash(HashOn::SourceIp), Policy::GelfMessage] {
        let mut flow = Flow::new("127.0.0.1", 2);
        let mut datapath = serving(&[&with_policy(policy, "127.0.0.1:0", &flow.receivers())]);
        flow.run(datapath.local_address(ID).unwrap(), 3000, 1);
        flow.assert_each_exactly_once();
        for numbers in &flow.order {
            assert!(numbers.is_sorted(), "out of order under {policy:?}");
        }
        final_counters(&mut datapath);
    }
}

#[test]
fn a_policy_that_changes_while_datagrams_flow_loses_nothing() {
    let mut flow = Flow::new("127.0.0.1", 3);
    let receivers = flow.receivers();
    let listener = |policy| with_policy(policy, "127.0.0.1:0", &receivers);
    let mut datapath = serving(&[&listener(Policy::RoundRobin)]);
    let to = datapath.local_address(ID).unwrap();
    for n in 0..100 {
        let policies =
            [Policy::Hash(HashOn::Flow), Policy::RoundRobin, Policy::GelfMessage, Policy::Hash(HashOn::Source)];
        for _ in 0..20 {
            flow.send_one(to, 64);
        }
        datapath.apply(&plan(&[&listener(policies[n % 4])])).unwrap();
        while flow.arrived() < flow.sent() {
            flow.receive();
        }
    }
    flow.assert_each_exactly_once();
    assert_eq!(final_counters(&mut datapath).listeners[&ID].packets_forwarded, 2000);
}
