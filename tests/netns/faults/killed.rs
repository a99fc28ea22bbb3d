//! The daemon is killed while it takes over from its predecessor, at each step, and so is the next one:
//! in the end every datagram has been counted once, and nothing is left behind.

use std::fs;
use std::path::Path;

use nix::sys::signal::Signal;

use super::{Pins, binary, counted, exchange, lab, start_behind};
use udp_fanout_lab::{Daemon, DaemonConfig, Lab};

/// The system calls of a takeover that change something.
const CALLS: [&str; 2] = ["bpf", "unlinkat"];
/// The commands of `bpf` that change something. Of the pins, the first and the last.
const CHANGES: [&str; 6] = [
    "bpf(BPF_MAP_UPDATE_ELEM",
    "bpf(BPF_MAP_DELETE_ELEM",
    "bpf(BPF_LINK_",
    "/program\", bpf_fd=",
    "/heartbeat\", bpf_fd=",
    "/about\", bpf_fd=",
];

/// A call that changes something: its number among the calls of its kind, from 1, and its line from strace.
#[derive(Debug)]
struct Step {
    call: &'static str,
    nth: usize,
    what: String,
}

/// The calls between start and readiness.
fn steps(trace: &Path) -> Vec<Step> {
    let text = fs::read_to_string(trace).unwrap();
    let steps_of = |call: &'static str| {
        let calls = text.lines().filter(move |line| line.contains(&format!(" {call}("))).enumerate();
        let changing = calls.filter(move |(_, line)| {
            call != "bpf" || (CHANGES.iter().any(|what| line.contains(what)) && !line.contains("BPF_OBJ_GET"))
        });
        changing.map(move |(nth, line)| Step { call, nth: nth + 1, what: named(line).to_owned() })
    };
    CALLS.into_iter().flat_map(steps_of).collect()
}

/// The call's name and, of `bpf`, its command.
fn named(line: &str) -> &str {
    let call = line.split_once(' ').unwrap().1.trim_start();
    let end = if call.starts_with("bpf(") { call.find([',', '"']) } else { call.find('(') };
    &call[..end.unwrap()]
}

fn traced(trace: &Path, fault: &str) -> Vec<String> {
    let calls = format!("trace={}", CALLS.join(","));
    // Not with --seccomp-bpf, with which strace sends no signals.
    let words = ["strace", "-D", "-f", "-e", &calls, "-e", fault, "-o", trace.to_str().unwrap()];
    words.map(str::to_owned).into()
}

/// Starts a daemon that is killed at the nth such call. True if it was not ready before.
fn start_and_kill(lab: &Lab, config: &DaemonConfig, trace: &Path, step: &Step) -> bool {
    let Step { call, nth, .. } = step;
    let fault = format!("inject={call}:signal=SIGKILL:when={nth}");
    let words = traced(trace, &fault);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let ready = Daemon::start_behind(&lab.gateway, &words, binary(), config);
    let early = ready.is_err();
    if let Ok(daemon) = ready {
        kill(daemon);
    }
    early
}

fn kill(mut daemon: Daemon) {
    daemon.signal(Signal::SIGKILL).unwrap();
    daemon.wait().unwrap();
}

#[test]
fn netns_killed_at_any_step_of_taking_over_it_counts_nothing_twice() {
    let (lab, pins) = (lab(), Pins::new());
    let directory = tempfile::tempdir().unwrap();
    let trace = directory.path().join("trace");
    let config = pins.config(&lab, "keep");
    // Once undisturbed, to record the steps, with carried counters in the map, as in each later run.
    let words = traced(&trace, "inject=vhangup:signal=SIGKILL");
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    for before in [&[][..], &[], &words] {
        kill(start_behind(&lab, before, &config));
        exchange(&lab, 30);
    }
    let steps = steps(&trace);
    assert!(steps.len() > 20, "{steps:?}");
    let mut sent = 90;
    for step in &steps {
        for again in [false, true] {
            let early = start_and_kill(&lab, &config, &trace, step);
            if !again {
                let text = fs::read_to_string(&trace).unwrap();
                let last = text.lines().rev().find(|line| line.contains('(')).unwrap();
                assert!(early && named(last) == step.what, "killed at {last} instead of {step:?}");
            }
            exchange(&lab, 30);
            sent += 30;
        }
        let mut daemon = start_behind(&lab, &[], &config);
        assert_eq!(counted(&lab), (sent, sent, sent), "{step:?}: {}", daemon.log());
        assert_eq!(pins.programs().len(), 1, "{step:?}: {}", daemon.log());
        kill(daemon);
    }
}
