//! The userspace datapath in network namespaces of the tests' own: what the kernel refuses to send, and the counted
//! reason.

use std::net::{SocketAddr, UdpSocket};

use udp_fanout::testing::datapath::Datapath;
use udp_fanout::testing::model::{DownstreamCounters, DropReason};
use udp_fanout_lab::{in_new_netns, ip};
use udp_fanout_testkit::flow::{
    Flow, ID, addresses, final_counters, listener, numbered, receive, replicating, send_joined, serving,
    serving_in_order, sinks, totals, until,
};

const LOCALHOST: &str = "127.0.0.1:0";

#[test]
fn netns_an_unreachable_network_costs_only_its_own_datagrams() {
    in_new_netns(|| {
        let mut flow = Flow::new("127.0.0.1", 1);
        let downstreams = [("240.0.0.1:514".parse().unwrap(), 1), flow.receivers()[0]];
        let mut datapath = serving(&[&listener(0, "syslog", LOCALHOST, &downstreams)]);
        flow.run(datapath.local_address(ID).unwrap(), 2000, 2);
        until("all are received", || datapath.counters().unwrap().listeners[&ID].packets_received == 2000);
        let totals = final_counters(&mut datapath).listeners[&ID];
        assert_eq!(flow.per_receiver(), [1000]);
        assert_eq!((totals.packets_forwarded, totals.dropped.get(DropReason::Unreachable)), (1000, 1000));
    });
}

/// Neighbours that do not answer hold datagrams in the send buffer while the kernel asks for them.
#[test]
fn netns_dead_neighbours_stall_no_others_and_are_counted_once_the_kernel_knows() {
    in_new_netns(|| {
        ip("link add fo0 type veth peer name fo1");
        ip("address add 10.77.0.1/24 dev fo0");
        ip("link set fo0 up");
        ip("link set fo1 up");
        // The kernel gives up on a neighbour after 20 ms rather than three seconds.
        ip("ntable change name arp_cache dev fo0 retrans 10 mcast_probes 2");
        let mut flow = Flow::new("127.0.0.1", 1);
        let mut downstreams = flow.receivers();
        downstreams.extend((2..6).map(|host| (SocketAddr::from(([10, 77, 0, host], 514)), 1)));
        let mut datapath = serving(&[&listener(0, "syslog", LOCALHOST, &downstreams)]);
        let to = datapath.local_address(ID).unwrap();
        until("the kernel's verdict is counted", || {
            flow.run(to, 500, 5);
            datapath.counters().unwrap().listeners[&ID].dropped.get(DropReason::Unreachable) > 100
        });
        let sent = flow.sent();
        until("all are received", || datapath.counters().unwrap().listeners[&ID].packets_received == sent);
        assert_eq!(flow.per_receiver(), [sent / 5]);
        let counters = final_counters(&mut datapath);
        assert_eq!(counters.downstreams[&(ID, downstreams[0].0)].packets, sent / 5);
        let totals = counters.listeners[&ID];
        let known = totals.dropped.get(DropReason::Unreachable) + totals.dropped.get(DropReason::SendBufferFull);
        assert_eq!(totals.packets_forwarded + known, sent);
    });
}

fn ethtool(arguments: &str) {
    let output = std::process::Command::new("ethtool").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ethtool {arguments}: {output:?}");
}

/// A downstream behind a device with this MTU, in the namespace of the calling thread. The kernel segments messages
/// before the device sees them, and does not report it.
fn behind_mtu(mtu: u32) {
    std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
    ip(&format!("link add fo0 mtu {mtu} type veth peer name fo1"));
    ip("address add 10.77.0.1/24 dev fo0");
    ip("link set fo0 up");
    ip("link set fo1 up");
    let far = "lladdr 02:00:00:00:00:01 nud permanent dev fo0";
    ip(&format!("neigh add 10.77.0.2 {far}"));
    ethtool("-K fo0 tx-udp-segmentation off");
}

#[test]
fn netns_datagrams_longer_than_the_mtu_go_out_one_by_one_and_cost_the_others_nothing() {
    in_new_netns(|| {
        behind_mtu(1000);
        let sinks = sinks(1);
        let far: SocketAddr = "10.77.0.2:514".parse().unwrap();
        let mut both = listener(0, "both", "127.0.0.1:0", &[addresses(&sinks)[0], (far, 1)]);
        both.settings.workers = 1;
        let mut datapath = serving_in_order(&[&both]);
        let (to, from) = (datapath.local_address(ID).unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        let sent = || -> u64 {
            let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
            let line = text.lines().find(|line| line.trim_start().starts_with("fo0:")).unwrap();
            line.split_whitespace().nth(10).unwrap().parse().unwrap()
        };
        let before = sent();
        // Those that fit; those that do not, in two fragments each; those that fit again.
        for (each, frames) in [(972, 10), (973, 20), (1400, 20), (800, 10)] {
            let before = sent();
            send_joined(&from, to, &numbered(0..20, each, each), each as u16);
            receive(&sinks[0], 10);
            until("all are sent", || sent() - before >= frames);
            assert_eq!(sent() - before, frames, "datagrams of {each} bytes");
        }
        assert_eq!(sent() - before, 60);
        until("all are counted", || datapath.counters().unwrap().listeners[&ID].packets_received == 80);
        let counters = final_counters(&mut datapath);
        let totals = counters.listeners[&ID];
        assert_eq!((totals.packets_forwarded, totals.dropped.total()), (80, 0));
        let expected = DownstreamCounters { packets: 40, bytes: 10 * (972 + 973 + 1400 + 800) };
        assert_eq!(counters.downstreams[&(ID, far)], expected);
    });
}

#[test]
fn netns_a_device_that_cannot_cut_messages_apart_still_gets_them_all() {
    in_new_netns(|| {
        behind_mtu(1500);
        // Without checksums there is no segmentation, so kernels before 6.11 refuse the message: EIO.
        ethtool("-K fo0 tx off");
        let far: SocketAddr = "10.77.0.2:514".parse().unwrap();
        let mut syslog = listener(0, "syslog", "127.0.0.1:0", &[(far, 1)]);
        syslog.settings.workers = 1;
        let mut datapath = serving_in_order(&[&syslog]);
        let (to, from) = (datapath.local_address(ID).unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        for _ in 0..10 {
            send_joined(&from, to, &numbered(0..30, 500, 100), 500);
        }
        let totals = totals(&mut datapath, 300);
        assert_eq!((totals.packets_forwarded, totals.bytes_forwarded), (300, 10 * (29 * 500 + 100)));
    });
}

#[test]
fn netns_an_unreachable_receiver_costs_exactly_its_own_copies() {
    in_new_netns(|| {
        let mut flow = Flow::new("127.0.0.1", 3);
        let mut receivers = flow.receivers();
        receivers.insert(1, ("240.0.0.1:514".parse().unwrap(), 1));
        let mut datapath = serving(&[&replicating(&receivers, 16)]);
        flow.run_copied(datapath.local_address(ID).unwrap(), 2000);
        flow.assert_each_once_everywhere();
        let totals = totals(&mut datapath, 2000);
        assert_eq!((totals.packets_forwarded, totals.dropped.total()), (2000, 0));
        assert_eq!(totals.copies_dropped.get(DropReason::Unreachable), 2000);
        assert_eq!(totals.copies_dropped.total(), 2000);
    });
}

#[test]
fn netns_a_datagram_of_which_no_copy_could_be_sent_is_dropped() {
    in_new_netns(|| {
        let mut flow = Flow::new("127.0.0.1", 0);
        let nowhere = [("240.0.0.1:514".parse().unwrap(), 1), ("240.0.0.2:514".parse().unwrap(), 1)];
        let mut datapath = serving(&[&replicating(&nowhere, 16)]);
        let to = datapath.local_address(ID).unwrap();
        flow.send(to, 10);
        let totals = totals(&mut datapath, 10);
        assert_eq!((totals.packets_forwarded, totals.dropped.get(DropReason::Unreachable)), (0, 10));
        assert_eq!(totals.copies_dropped.get(DropReason::Unreachable), 20);
    });
}
