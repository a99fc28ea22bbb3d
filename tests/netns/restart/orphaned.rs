//! How long an orphaned program goes on forwarding.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::{Pins, counted, end, exchange, lab, start};
use udp_fanout_lab::traffic::bind;

/// How long the program may take to stop forwarding. Only a failing test waits that long.
const LIMIT: Duration = Duration::from_secs(30);

#[test]
fn netns_without_a_daemon_the_program_goes_on_only_for_so_long() {
    for (on_exit, signal) in [("keep", Signal::SIGTERM), ("keep", Signal::SIGKILL), ("detach", Signal::SIGKILL)] {
        let (lab, pins) = (lab(), Pins::new());
        let mut config = pins.config(&lab, on_exit);
        config.head += "max_headless_secs = 2\n";
        let daemon = start(&lab, &config);
        exchange(&lab, 30);
        end(daemon, signal);
        // Collects datagrams for the receivers, which no one reads; once the program passes datagrams, they arrive
        // here.
        let here = bind(&lab.gateway, lab.listener()).unwrap();
        here.set_nonblocking(true).unwrap();
        let sender = bind(&lab.sender, "10.0.0.2:0".parse().unwrap()).unwrap();
        let deadline = Instant::now() + LIMIT;
        let mut buffer = [0; 32];
        loop {
            sender.send_to(b"who is there?", lab.listener()).unwrap();
            match here.recv(&mut buffer) {
                Ok(length) => break assert_eq!(&buffer[..length], b"who is there?"),
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
            assert!(Instant::now() < deadline, "the program still forwards");
        }
        drop(here);
        // The next daemon takes over nevertheless.
        let daemon = start(&lab, &config);
        let before = counted(&lab, &daemon).0;
        exchange(&lab, 300);
        assert_eq!(counted(&lab, &daemon).0, before + 300);
        assert_eq!(before > 30, on_exit == "keep");
    }
}

#[test]
fn netns_a_daemon_that_lives_is_not_taken_for_dead() {
    let (lab, pins) = (lab(), Pins::new());
    let mut config = pins.config(&lab, "keep");
    config.head += "max_headless_secs = 2\n";
    let daemon = start(&lab, &config);
    let start = Instant::now();
    let mut sent = 0;
    while start.elapsed() < Duration::from_secs(5) {
        exchange(&lab, 300);
        sent += 300;
    }
    assert_eq!(counted(&lab, &daemon), (sent, sent, sent));
    end(daemon, Signal::SIGTERM);
}
