//! The daemon is killed while it takes over from the one before, at every single step of that, and again the next time:
//! every datagram has been counted once in the end, and nothing is left lying about.

use std::fs;
use std::path::Path;

use nix::sys::signal::Signal;

use crate::support::{Daemon, DaemonConfig, Lab};
use crate::{Pins, binary, counted, exchange, lab, start_behind};

/// The calls that change something, of which a takeover consists.
const CALLS: [&str; 3] = ["bpf", "unlink", "rmdir"];
/// The commands of `bpf` that do.
const CHANGES: [&str; 5] =
    ["BPF_MAP_UPDATE_ELEM", "BPF_MAP_DELETE_ELEM", "BPF_OBJ_PIN", "BPF_LINK_CREATE", "BPF_LINK_UPDATE"];

/// Which of the calls of each kind, counted from 1, change something between start and readiness; by what strace has written.
fn steps(trace: &Path) -> Vec<(&'static str, usize)> {
    let text = fs::read_to_string(trace).unwrap();
    let calls_of = |call: &'static str| {
        let calls = text.lines().filter(move |line| line.contains(&format!(" {call}("))).enumerate();
        let changing = calls.filter(move |(_, line)| call != "bpf" || CHANGES.iter().any(|name| line.contains(name)));
        changing.map(move |(nth, _)| (call, nth + 1))
    };
    CALLS.into_iter().flat_map(calls_of).collect()
}

fn traced(trace: &Path, fault: &str) -> Vec<String> {
    let calls = format!("trace={}", CALLS.join(","));
    let words = ["strace", "-D", "-f", "--seccomp-bpf", "-e", &calls, "-e", fault, "-o", trace.to_str().unwrap()];
    words.map(str::to_owned).into()
}

/// Starts a daemon that is killed as it makes the nth such call; if it makes so many before it is ready.
fn start_and_kill(lab: &Lab, config: &DaemonConfig, trace: &Path, (call, nth): (&str, usize)) {
    let fault = format!("inject={call}:signal=SIGKILL:when={nth}");
    let words = traced(trace, &fault);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    if let Ok(daemon) = Daemon::start_behind(&lab.gateway, &words, binary(), config) {
        kill(daemon);
    }
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
    let config = pins.config(&lab);
    kill(start_behind(&lab, &[], &config));
    exchange(&lab, 30);
    // Once undisturbed, to know the steps.
    let words = traced(&trace, "inject=vhangup:signal=SIGKILL");
    kill(start_behind(&lab, &words.iter().map(String::as_str).collect::<Vec<_>>(), &config));
    let steps = steps(&trace);
    assert!(steps.len() > 30, "{steps:?}");
    let mut sent = 30;
    for step in steps {
        for _ in 0..2 {
            start_and_kill(&lab, &config, &trace, step);
            exchange(&lab, 30);
            sent += 30;
        }
        let mut daemon = start_behind(&lab, &[], &config);
        assert_eq!(counted(&lab), (sent, sent, sent), "{step:?}: {}", daemon.log());
        assert_eq!(pins.programs().len(), 1, "{step:?}: {}", daemon.log());
        kill(daemon);
    }
}
