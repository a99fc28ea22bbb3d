//! The daemon is killed while it takes over from the one before, at every single step of that, and again the next time:
//! every datagram has been counted once in the end, and nothing is left lying about.

use std::fs;
use std::path::Path;

use nix::sys::signal::Signal;

use super::{Pins, binary, counted, exchange, lab, start_behind};
use udp_fanout_lab::{Daemon, DaemonConfig, Lab};

/// The calls that change something, of which a takeover consists.
const CALLS: [&str; 2] = ["bpf", "unlinkat"];
/// How those begin that do, of the calls to `bpf`. Of the pins, the first and the last.
const CHANGES: [&str; 6] = [
    "bpf(BPF_MAP_UPDATE_ELEM",
    "bpf(BPF_MAP_DELETE_ELEM",
    "bpf(BPF_LINK_",
    "/program\", bpf_fd=",
    "/heartbeat\", bpf_fd=",
    "/about\", bpf_fd=",
];

/// A call that changes something: which of the calls of its kind, counted from 1, and what strace says of it.
#[derive(Debug)]
struct Step {
    call: &'static str,
    nth: usize,
    what: String,
}

/// Those between start and readiness.
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

/// The call and, of `bpf`, its command.
fn named(line: &str) -> &str {
    let call = line.split_once(' ').unwrap().1.trim_start();
    let end = if call.starts_with("bpf(") { call.find([',', '"']) } else { call.find('(') };
    &call[..end.unwrap()]
}

fn traced(trace: &Path, fault: &str) -> Vec<String> {
    let calls = format!("trace={}", CALLS.join(","));
    // Not with --seccomp-bpf, which has it send no signals.
    let words = ["strace", "-D", "-f", "-e", &calls, "-e", fault, "-o", trace.to_str().unwrap()];
    words.map(str::to_owned).into()
}

/// Starts a daemon that is killed as it makes the nth such call. True if it had not been ready by then.
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
    // Once undisturbed, to know the steps; by then the ledger has entries, as it will have each time.
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
                assert!(early && named(last) == step.what, "{step:?} was meant, and it was {last}");
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
