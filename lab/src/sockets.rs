//! What a namespace's UDP sockets hold and have counted, as the kernel says it in `/proc/net`, and waiting for that: for
//! programs which nobody can ask.

#![allow(clippy::expect_used, reason = "only tests use this, and a panic is how a test fails")]

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use super::netns::Namespace;

/// Tries until it holds.
///
/// # Panics
/// If it does not within half a minute.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(30), "never happened: {what}");
        thread::yield_now();
    }
}

/// One of a namespace's counts of UDP, such as `OutDatagrams`.
///
/// # Panics
/// If there is none of that name.
pub fn udp_count(namespace: &Namespace, name: &str) -> u64 {
    let lines: Vec<_> = proc_net(namespace, "snmp").into_iter().filter(|line| line[0] == "Udp:").collect();
    let column = lines[0].iter().position(|column| column == name).expect("no such count");
    lines[1][column].parse().expect("not a count")
}

/// Bytes that wait in the IPv4 sockets of this port; none if there is no such socket.
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
    let text = text.expect("cannot read the kernel's table");
    text.lines().map(|line| line.split_whitespace().map(str::to_owned).collect()).collect()
}
