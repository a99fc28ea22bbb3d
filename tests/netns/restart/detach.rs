//! `udp-fanout detach`.

use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;

use super::{Pins, end, exchange, filter, lab, run, start};
use udp_fanout_lab::{Lab, Place};

fn printed(output: &std::process::Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn netns_detach_removes_what_is_left_and_says_so() {
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let (lab, pins) = (lab(), Pins::new());
        end(start(&lab, &pins.config(&lab, "keep")), signal);
        exchange(&lab, 30);
        let text = printed(&run(&lab, &["detach"], &pins));
        let [filter_line, pins_line] = *text.lines().collect::<Vec<_>>() else { panic!("{text}") };
        assert!(filter_line.starts_with("eth0: removed the TC filter with program udp_fanout "), "{text}");
        assert!(pins_line.ends_with(": removed the pinned program and its maps"), "{text}");
        assert_eq!((filter(&lab), pins.path().exists()), (None, false));
        assert_eq!(printed(&run(&lab, &["detach"], &pins)), "nothing to remove\n");
    }
}

#[test]
fn netns_detach_leaves_the_directory_to_the_user_whose_it_is_while_that_one_runs_anything() {
    const OTHER_UID: u32 = 61_998;
    let (lab, pins) = (lab(), Pins::new());
    end(start(&lab, &pins.config(&lab, "keep")), Signal::SIGTERM);
    // As the systemd unit does for its daemon, which could not create it again.
    chown(pins.path(), Some(OTHER_UID), None).unwrap();
    let mut theirs = Command::new("cat").uid(OTHER_UID).stdin(Stdio::piped()).spawn().unwrap();
    let text = printed(&run(&lab, &["detach"], &pins));
    assert!(text.ends_with(": removed the pinned program and its maps\n"), "{text}");
    assert!(pins.path().read_dir().unwrap().next().is_none());
    drop(theirs.stdin.take());
    assert!(theirs.wait().unwrap().success());
    assert_eq!(printed(&run(&lab, &["detach"], &pins)), "nothing to remove\n");
    assert!(!pins.path().exists());
}

#[test]
fn netns_detach_refuses_while_a_daemon_runs_unless_forced() {
    let (lab, pins) = (lab(), Pins::new());
    let mut daemon = start(&lab, &pins.config(&lab, "keep"));
    let before = filter(&lab);
    for arguments in [&["detach"][..], &["detach", "--interface", "eth0"]] {
        let refused = run(&lab, arguments, &pins);
        assert_eq!(refused.status.code(), Some(1));
        let reason = String::from_utf8(refused.stderr).unwrap();
        assert!(reason.starts_with("a udp-fanout daemon is running and serves eth0; stop it first"), "{reason}");
    }
    assert_eq!(filter(&lab), before);
    let text = printed(&run(&lab, &["detach", "--force"], &pins));
    assert!(text.starts_with("eth0: removed the TC filter"), "{text}");
    assert_eq!(text.lines().count(), 1, "a running daemon's pins stay: {text}");
    daemon.wait_for_line("the TC filter has been removed by another program; attaching it again").unwrap();
    daemon.wait_for_line("attached TC eBPF program").unwrap();
    end(daemon, Signal::SIGTERM);
}

#[test]
fn netns_detach_touches_only_the_interfaces_named() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap();
    let pins = Pins::new();
    let mut config = pins.config(&lab, "keep");
    config.listeners[0].extra = "interface = [\"eth0\", \"out1\"]".into();
    config.listeners[0].interface = None;
    end(start(&lab, &config), Signal::SIGTERM);
    let text = printed(&run(&lab, &["detach", "--interface", "out1"], &pins));
    assert!(text.starts_with("out1: removed") && text.lines().count() == 1, "{text}");
    assert_eq!((filter(&lab).is_some(), pins.programs().len()), (true, 1));
    let text = printed(&run(&lab, &["detach", "--all"], &pins));
    assert!(text.starts_with("eth0: removed") && text.lines().count() == 2, "{text}");
    let refused = run(&lab, &["detach", "--interface", "eth7"], &pins);
    assert!(String::from_utf8(refused.stderr).unwrap().starts_with("interface not found: eth7"));
}
