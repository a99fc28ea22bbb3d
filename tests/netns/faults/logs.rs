//! A log that cannot be written, or that is not read, loses lines and nothing else.

use std::fs;
use std::io::PipeWriter;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Instant;

use nix::sys::signal::Signal;

use super::{LIMIT, MODES, config, exchange, lab, metrics, start_behind, status, wait_until_counted};
use udp_fanout_lab::{Daemon, DaemonConfig, Lab};

/// Starts the daemon with its standard output and error sent elsewhere by a shell.
fn start_with(lab: &Lab, redirection: &str, config: &DaemonConfig) -> Daemon {
    start_behind(lab, &["sh", "-c", &format!("exec \"$@\" {redirection}"), "sh"], config)
}

/// Starts the daemon with a pipe as its standard error.
fn start_into(lab: &Lab, pipe: &PipeWriter, config: &DaemonConfig) -> Daemon {
    let path = format!("/proc/{}/fd/{}", std::process::id(), pipe.as_raw_fd());
    start_with(lab, &format!("2>{path}"), config)
}

fn reloads(lab: &Lab) -> u64 {
    metrics(lab).sum("udp_fanout_config_reloads_total", &[("result", "success")])
}

/// Sends SIGHUP and waits for the reload counter, as the daemon cannot log.
fn reload(lab: &Lab, daemon: &Daemon, config: &DaemonConfig) {
    let before = reloads(lab);
    daemon.write_config(&config.to_toml()).unwrap();
    daemon.signal(Signal::SIGHUP).unwrap();
    let deadline = Instant::now() + LIMIT;
    while reloads(lab) == before {
        assert!(Instant::now() < deadline, "the new configuration is not applied");
    }
}

/// Checks that the daemon works: it forwards, counts, replies, reloads, and ends on a signal.
fn check_daemon_works(lab: &Lab, mode: &str, daemon: Daemon) {
    let mut config = config(lab, mode);
    exchange(lab, 300);
    wait_until_counted(lab, 300);
    // Each writes several lines to the log.
    for turn in 1..=10 {
        config.listeners[0].downstreams[0].2 = 1 + turn % 3;
        reload(lab, &daemon, &config);
    }
    let answer = status(lab, &daemon.status_socket());
    assert!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
    exchange(lab, 300);
    wait_until_counted(lab, 600);
    let (ended, _, _) = daemon.stop().unwrap();
    assert!(ended.success(), "{ended}");
}

#[test]
fn netns_a_full_disk_for_the_log_stops_nothing() {
    let lab = lab();
    for mode in MODES {
        check_daemon_works(&lab, mode, start_with(&lab, ">/dev/full 2>&1", &config(&lab, mode)));
        // A file system that fills up while the daemon runs: one page, of which the log fills the rest.
        let script = "mount -t tmpfs -o size=4096 tmpfs /mnt && exec \"$@\" >/mnt/log 2>&1";
        let before = ["unshare", "--mount", "--", "sh", "-c", script, "sh"];
        let mut config = config(&lab, mode);
        let daemon = start_behind(&lab, &before, &config);
        let log = format!("/proc/{}/root/mnt/log", daemon.pid());
        let mut turn = 0;
        while fs::metadata(Path::new(&log)).unwrap().len() < 4096 {
            turn += 1;
            config.listeners[0].downstreams[0].2 = 1 + turn % 3;
            reload(&lab, &daemon, &config);
        }
        check_daemon_works(&lab, mode, daemon);
    }
}

#[test]
fn netns_a_log_whose_reader_has_gone_stops_nothing() {
    let lab = lab();
    for mode in MODES {
        let (reader, writer) = std::io::pipe().unwrap();
        let daemon = start_into(&lab, &writer, &config(&lab, mode));
        drop(reader);
        check_daemon_works(&lab, mode, daemon);
    }
}

/// The reader exists, but does not read: the pipe fills up after a while.
#[test]
fn netns_a_log_that_is_not_read_stops_nothing() {
    let lab = lab();
    for mode in MODES {
        let (_reader, writer) = std::io::pipe().unwrap();
        nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
        let daemon = start_into(&lab, &writer, &config(&lab, mode));
        check_daemon_works(&lab, mode, daemon);
    }
}
