//! `udp-fanout demo`: a short run in each mode, and its message where it cannot run.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

fn demo(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_udp-fanout")).arg("demo").args(arguments).output().unwrap()
}

fn text(stream: &[u8]) -> String {
    String::from_utf8_lossy(stream).into_owned()
}

/// Runs the demo and returns what it printed. Every check must have passed.
fn passed(mode: &str) -> String {
    let output = demo(&["--mode", mode, "--count", "300"]);
    let (printed, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{printed}{errors}");
    assert_eq!(errors, "");
    assert!(!printed.contains("FAILED"), "{printed}");
    for row in ["receiver-1", "receiver-2", "receiver-3"] {
        let row = printed.lines().find(|line| line.trim_start().starts_with(row)).unwrap();
        let cells: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(cells[1..5], ["100", "-", "0", "0"], "{printed}");
    }
    printed
}

#[test]
fn netns_demo_forwards_in_the_kernel() {
    let printed = passed("tc_ebpf");
    assert!(printed.contains("300 of 300 sent, 300 arrived"), "{printed}");
    assert!(printed.contains("pref 49152 bpf"), "{printed}");
    assert!(printed.contains("  ok     every receiver saw the sender's own address"), "{printed}");
    assert_eq!(printed.matches("  ok     ").count(), 13, "{printed}");
}

#[test]
fn netns_demo_forwards_through_sockets() {
    let printed = passed("userspace");
    assert!(printed.contains("(no filter)"), "{printed}");
    assert!(printed.contains("  ok     every receiver saw an address of the gateway"), "{printed}");
    assert_eq!(printed.matches("  ok     ").count(), 13, "{printed}");
}

/// Runs a command that must end with one line on standard error and nothing else, and returns the line.
fn one_line(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let errors = text(&output.stderr);
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(1), ""), "{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
    errors.trim_end().to_owned()
}

#[test]
fn netns_demo_without_root_says_so() {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let program = directory.path().join("udp-fanout");
    let mut install = Command::new("install");
    assert!(install.args(["--mode=755", env!("CARGO_BIN_EXE_udp-fanout")]).arg(&program).status().unwrap().success());
    let mut unprivileged = Command::new("setpriv");
    unprivileged
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"])
        .arg(&program)
        .arg("demo");
    assert_eq!(
        one_line(&mut unprivileged),
        "the demo needs root to make network namespaces: run `sudo udp-fanout demo`"
    );
}

#[test]
fn netns_demo_without_iproute2_names_the_package() {
    let empty = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_udp-fanout"));
    let line = one_line(command.arg("demo").env("PATH", empty.path()));
    assert!(line.starts_with("the demo cannot find ip and tc in $PATH: install iproute2 "), "{line}");
}

#[test]
fn netns_demo_refuses_wrong_arguments() {
    for arguments in [["--mode", "auto"], ["--count", "0"], ["--count", "many"]] {
        let output = demo(&arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(text(&output.stderr).contains(&format!("'{}'", arguments[1])), "{}", text(&output.stderr));
    }
}
