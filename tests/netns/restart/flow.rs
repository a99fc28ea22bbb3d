//! Restarts and reloads under continuous traffic.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::sys::signal::Signal;

use super::{Pins, counted, end, exchange, filter, lab, start};
use udp_fanout_lab::{Collectors, Expect, Sender};

#[test]
fn netns_ten_restarts_lose_and_double_nothing_and_counters_go_on() {
    let (lab, pins) = (lab(), Pins::new());
    let config = pins.config(&lab, "keep");
    let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::in_lab(&lab).unwrap();
    let mut daemon = start(&lab, &config);
    let done = AtomicBool::new(false);
    let (mut daemon, sender) = thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                sender.send(200, &collectors).unwrap();
            }
            sender
        });
        let mut before = (0, 0, 0);
        for turn in 0..10 {
            let id = filter(&lab).expect("our filter is there");
            let log = end(daemon, if turn % 2 == 0 { Signal::SIGTERM } else { Signal::SIGKILL });
            assert_eq!(filter(&lab).as_ref(), Some(&id), "the program has stayed: {log}");
            daemon = start(&lab, &config);
            assert_ne!(filter(&lab), Some(id), "another program has taken over");
            daemon.wait_for_logged("took over from an earlier daemon's TC program, counters go on").unwrap();
            let now = counted(&lab, &daemon);
            assert!(now.0 >= before.0 && now.1 >= before.1 && now.2 >= before.2, "{before:?} {now:?}");
            assert_eq!(pins.programs().len(), 1);
            before = now;
        }
        done.store(true, Ordering::SeqCst);
        (daemon, traffic.join().unwrap())
    });
    let sent = sender.sent();
    let report = collectors.finish(&[&sender]).unwrap();
    assert!(report.is_complete() && report.duplicated == 0, "{report}");
    assert_eq!(counted(&lab, &daemon), (sent, sent, sent));
    let log = daemon.log().to_owned();
    assert!(!log.contains("ERROR") && !log.contains("WARN"), "{log}");
}

#[test]
fn netns_the_next_daemon_detaches_if_it_is_told_to() {
    let (lab, pins) = (lab(), Pins::new());
    end(start(&lab, &pins.config(&lab, "keep")), Signal::SIGTERM);
    exchange(&lab, 300);
    let daemon = start(&lab, &pins.config(&lab, "detach"));
    exchange(&lab, 300);
    assert_eq!(counted(&lab, &daemon), (600, 600, 600));
    assert!(!pins.path().exists());
    end(daemon, Signal::SIGTERM);
    assert_eq!(filter(&lab), None);
}

#[test]
fn netns_a_reload_changes_what_becomes_of_the_program() {
    let (lab, pins, others) = (lab(), Pins::new(), Pins::new());
    let mut daemon = start(&lab, &pins.config(&lab, "detach"));
    assert!(!pins.path().exists());
    daemon.reload(&pins.config(&lab, "keep").to_toml()).unwrap();
    assert_eq!(pins.programs().len(), 1);
    daemon.reload(&others.config(&lab, "keep").to_toml()).unwrap();
    assert_eq!((pins.programs().len(), others.programs().len()), (0, 1));
    // A setting that cannot be applied changes nothing.
    let nowhere = pins.config(&lab, "keep").to_toml().replace("/sys/fs/bpf/", "/tmp/");
    daemon.write_config(&nowhere).unwrap();
    daemon.signal(Signal::SIGHUP).unwrap();
    let refusal = daemon.wait_for_line("there is no BPF file system; mount one").unwrap();
    assert!(refusal.contains("ERROR"), "{refusal}");
    exchange(&lab, 300);
    end(daemon, Signal::SIGTERM);
    exchange(&lab, 300);
    let mut daemon = start(&lab, &others.config(&lab, "keep"));
    assert_eq!(counted(&lab, &daemon), (600, 600, 600));
    // Without a listener in tc_ebpf mode there is nothing to keep.
    let mut config = others.config(&lab, "keep");
    config.listeners[0].mode = "userspace".into();
    daemon.reload(&config.to_toml()).unwrap();
    assert_eq!((filter(&lab), others.path().exists()), (None, false));
}

/// (`attach`, `tcx_order`) of successive daemons: a filter, or a TCX program before or after others.
const ATTACH_MODES: [(&str, &str); 6] =
    [("tcx", "first"), ("tcx", "first"), ("tcx", "last"), ("clsact", "first"), ("clsact", "first"), ("tcx", "first")];

#[test]
fn netns_restarts_lose_nothing_whatever_the_hook_before_and_after() {
    let (lab, pins) = (lab(), Pins::new());
    let config = |(attach, order): (&str, &str)| {
        let mut config = pins.config(&lab, "keep");
        config.head += &format!("attach = \"{attach}\"\ntcx_order = \"{order}\"\n");
        config
    };
    let collectors = Collectors::start(&lab, Expect::OneOfThem).unwrap();
    let mut sender = Sender::in_lab(&lab).unwrap();
    let mut daemon = start(&lab, &config(ATTACH_MODES[0]));
    let done = AtomicBool::new(false);
    let (daemon, sender) = thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                sender.send(200, &collectors).unwrap();
            }
            sender
        });
        for (turn, attach_mode) in ATTACH_MODES.into_iter().enumerate().skip(1) {
            end(daemon, if turn % 2 == 0 { Signal::SIGTERM } else { Signal::SIGKILL });
            daemon = start(&lab, &config(attach_mode));
            daemon.wait_for_logged("counters go on").unwrap();
            assert_eq!(
                (filter(&lab).is_some(), pins.programs().len()),
                (attach_mode.0 == "clsact", 1),
                "{attach_mode:?}"
            );
        }
        done.store(true, Ordering::SeqCst);
        (daemon, traffic.join().unwrap())
    });
    let sent = sender.sent();
    let report = collectors.finish(&[&sender]).unwrap();
    assert!(report.is_complete() && report.duplicated == 0, "{report}");
    assert_eq!(counted(&lab, &daemon), (sent, sent, sent));
    end(daemon, Signal::SIGTERM);
    exchange(&lab, 300);
    let text = String::from_utf8(super::run(&lab, &["detach", "--interface", "eth0"], &pins).stdout).unwrap();
    assert!(text.starts_with("eth0: removed the TCX program udp_fanout ") && text.lines().count() == 2, "{text}");
    assert!(!pins.path().exists());
}
