//! Interfaces flap, and netlink messages overflow the socket: the daemon must reach the host's final state.

use std::fmt::Write;
use std::net::SocketAddr;
use std::time::Instant;

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use super::{LIMIT, config, exchange, lab, metrics, start_behind};
use udp_fanout_lab::{Collectors, Daemon, Expect, Lab, Sender};

/// An address that the gateway gets as the last change.
const NEW: &str = "10.0.0.7";

/// The route to a receiver, and addresses, come and go.
fn storm() -> String {
    let mut lines = String::new();
    for n in 0..300 {
        let address = format!("10.77.{}.{}/32", n / 200, 1 + n % 200);
        let _ = writeln!(lines, "link set out1 down\naddress add {address} dev eth0\nlink set out1 up");
        let _ = writeln!(lines, "address del {address} dev eth0");
    }
    lines + &format!("address add {NEW}/24 dev eth0\n")
}

fn forwarded_by_the_kernel(lab: &Lab) -> u64 {
    metrics(lab).sum("udp_fanout_packets_forwarded_total", &[("mode", "tc_ebpf")])
}

/// The socket serves the new address until the daemon has seen the last change; then the kernel program does.
fn wait_until_seen(lab: &Lab) {
    let before = forwarded_by_the_kernel(lab);
    let target: SocketAddr = format!("{NEW}:{}", lab.listener().port()).parse().unwrap();
    let collectors = Collectors::start(lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::open(&lab.sender, (Lab::SENDER, 0), target).unwrap();
    let deadline = Instant::now() + LIMIT;
    while forwarded_by_the_kernel(lab) == before {
        // Each arrives before the next one is sent, so none is in flight at the end.
        sender.send(1, &collectors).unwrap();
        assert!(Instant::now() < deadline, "the new address has not been noticed");
    }
    let report = collectors.finish(&[&sender]).unwrap();
    assert!(report.is_perfect(), "{report}");
}

/// How many messages the daemon's netlink sockets have lost. No other process has any in its namespace.
fn overruns(lab: &Lab) -> u64 {
    let table = lab.gateway.tool("cat", "/proc/thread-self/net/netlink").unwrap();
    table.lines().skip(1).map(|line| line.split_whitespace().nth(8).unwrap().parse::<u64>().unwrap()).sum()
}

fn start(lab: &Lab) -> Daemon {
    let mut config = config(lab, "tc_ebpf");
    config.listeners[0].bind = format!("0.0.0.0:{}", lab.listener().port());
    start_behind(lab, &[], &config)
}

#[test]
fn netns_an_interface_that_flaps_is_followed() {
    let lab = lab();
    let daemon = start(&lab);
    exchange(&lab, 100);
    lab.gateway.ip_batch(&storm()).unwrap();
    wait_until_seen(&lab);
    exchange(&lab, 300);
    let (ended, _, log) = daemon.stop().unwrap();
    assert!(ended.success() && !log.contains("ERROR"), "{log}");
}

#[test]
fn netns_more_changes_than_netlink_can_tell_of_are_followed() {
    let lab = lab();
    let daemon = start(&lab);
    exchange(&lab, 100);
    assert_eq!(overruns(&lab), 0);
    // The stopped daemon reads no messages.
    daemon.signal(Signal::SIGSTOP).unwrap();
    let stopped = waitpid(daemon.pid(), Some(WaitPidFlag::WUNTRACED)).unwrap();
    assert!(matches!(stopped, WaitStatus::Stopped(..)), "{stopped:?}");
    while overruns(&lab) == 0 {
        lab.gateway.ip_batch(&storm()).unwrap();
        lab.gateway.ip(&format!("address del {NEW}/24 dev eth0")).unwrap();
    }
    lab.gateway.ip(&format!("address add {NEW}/24 dev eth0")).unwrap();
    daemon.signal(Signal::SIGCONT).unwrap();
    wait_until_seen(&lab);
    exchange(&lab, 300);
    let (ended, _, log) = daemon.stop().unwrap();
    assert!(ended.success() && !log.contains("ERROR"), "{log}");
}
