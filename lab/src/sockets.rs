//! Queue lengths and counters of a namespace's UDP sockets, read from `/proc/net`, for programs without such an interface of their own.

#![allow(clippy::expect_used, reason = "only tests use this, and a panic is how a test fails")]

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use super::netns::Namespace;

/// Polls until the condition holds.
///
/// # Panics
/// If it does not hold within 30 s.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(30), "timed out waiting: {what}");
        thread::yield_now();
    }
}

/// A UDP counter of a namespace, such as `OutDatagrams`.
///
/// # Panics
/// If there is no counter of that name.
pub fn udp_count(namespace: &Namespace, name: &str) -> u64 {
    let lines: Vec<_> = proc_net(namespace, "snmp").into_iter().filter(|line| line[0] == "Udp:").collect();
    let column = lines[0].iter().position(|column| column == name).expect("no UDP counter of this name");
    lines[1][column].parse().expect("a counter is a number")
}

/// Bytes in the receive queues of the IPv4 sockets on this port; none without such a socket.
///
/// # Panics
/// If the kernel's table cannot be read.
pub fn waiting_at(namespace: &Namespace, port: u16) -> Option<u64> {
    let port = format!(":{port:04X}");
    let queue = |line: &Vec<String>| {
        let (_, received) = line[4].split_once(':').expect("two queues");
        u64::from_str_radix(received, 16).expect("hexadecimal")
    };
    let sockets = proc_net(namespace, "udp");
    let ours = sockets.iter().filter(|line| line.get(1).is_some_and(|local| local.ends_with(&port)));
    ours.map(queue).reduce(|a, b| a + b)
}

/// Fields of a file of `/proc/net` in a namespace, line by line.
fn proc_net(namespace: &Namespace, file: &str) -> Vec<Vec<String>> {
    let text = namespace.run(|| Ok(fs::read_to_string(format!("/proc/thread-self/net/{file}"))?));
    let text = text.expect("/proc/net is readable");
    text.lines().map(|line| line.split_whitespace().map(str::to_owned).collect()).collect()
}
