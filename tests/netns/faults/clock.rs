//! The wall clock jumps by years, forward and back. Timers and measurements must use a monotonic clock.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use super::{MODES, Pins, binary, exchange, lab, metrics, status, wait_until_counted};
use udp_fanout_lab::{Daemon, Lab, Surroundings};

/// The library that changes a program's wall clock (Debian package faketime).
fn library() -> PathBuf {
    let candidates = fs::read_dir("/usr/lib").unwrap().map(|entry| entry.unwrap().path().join("faketime"));
    let mut candidates = candidates.chain([PathBuf::from("/usr/lib/faketime")]);
    let directory = candidates.find(|directory| directory.exists()).expect("libfaketime is there (package faketime)");
    directory.join("libfaketimeMT.so.1")
}

/// A wall clock for one daemon, set by a file. Monotonic clocks stay real.
struct Clock(tempfile::TempDir);

impl Clock {
    fn new() -> Clock {
        let clock = Clock(tempfile::tempdir().unwrap());
        clock.set("+0");
        clock
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("time")
    }

    /// Sets its offset from the real clock.
    fn set(&self, offset: &str) {
        let new = self.0.path().join("new");
        fs::write(&new, format!("{offset}\n")).unwrap();
        fs::rename(new, self.file()).unwrap();
    }

    fn surroundings(&self) -> Surroundings {
        let environment = [
            ("LD_PRELOAD", library().display().to_string()),
            ("FAKETIME_TIMESTAMP_FILE", self.file().display().to_string()),
            ("FAKETIME_NO_CACHE", "1".into()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
        ];
        let environment = environment.map(|(name, value)| (name.to_owned(), value)).into();
        Surroundings { environment, ..Surroundings::default() }
    }
}

/// The year of the reload, by the daemon's wall clock.
fn year(daemon: &mut Daemon) -> u32 {
    daemon.signal(Signal::SIGHUP).unwrap();
    daemon.wait_for_line("configuration reloaded").unwrap()[..4].parse().unwrap()
}

fn uptime(lab: &Lab, daemon: &Daemon) -> f64 {
    let report: Value = serde_json::from_slice(&status(lab, &daemon.status_socket()).stdout).unwrap();
    report["daemon"]["uptime_secs"].as_f64().unwrap()
}

#[test]
fn netns_a_clock_that_jumps_changes_nothing() {
    let lab = lab();
    for mode in MODES {
        let (clock, pins) = (Clock::new(), Pins::new());
        let mut config = pins.config(&lab, "keep");
        config.listeners = super::config(&lab, mode).listeners;
        // A rate limit that is never reached, so that the program measures time.
        config.listeners[0].extra = "rate_limit = { packets_per_second = 10000000, burst = 100000000 }".into();
        config.head += "max_headless_secs = 2\n[health]\nenabled = true\ninterval_secs = 0.5\ntimeout_secs = 0.4\n";
        let mut daemon = Daemon::spawn_in(&lab.gateway, binary(), &config, &clock.surroundings()).unwrap();
        daemon.wait_until_ready(&lab.gateway, 1).unwrap();
        let start = Instant::now();
        let now = year(&mut daemon);
        let mut sent = 0;
        let mut probes = 0;
        for (offset, years) in [("+3650d", 10), ("-3650d", -10), ("+36500d", 100), ("+0", 0)] {
            clock.set(offset);
            let believed = year(&mut daemon);
            assert!(believed.abs_diff(now.saturating_add_signed(years)) <= 1, "{offset}: {believed}");
            // Long enough for a heartbeat to expire if it is not renewed.
            let jumped = Instant::now();
            while jumped.elapsed() < Duration::from_millis(2_500) {
                exchange(&lab, 100);
                sent += 100;
            }
            wait_until_counted(&lab, sent);
            let page = metrics(&lab);
            // Health checks continue at their interval, and find every receiver healthy.
            let probed = page.sum("udp_fanout_health_probes_total", &[]);
            let rounds = u64::try_from(start.elapsed().as_millis() / 500).unwrap() + 1;
            assert!(probed > probes && probed <= 2 * 3 * rounds, "{offset}: {probed} probes in {rounds} rounds");
            probes = probed;
            assert_eq!(page.sum("udp_fanout_downstream_health_transitions_total", &[]), 0, "{offset}");
            let uptime = uptime(&lab, &daemon);
            assert!(
                uptime <= start.elapsed().as_secs_f64() + super::LIMIT.as_secs_f64(),
                "{offset}: up for {uptime} s"
            );
        }
        // A receiver that does not reply is still detected.
        clock.set("-7300d");
        lab.namespace_of(&lab.sites[0]).sysctl("net.ipv4.icmp_echo_ignore_all", "1").unwrap();
        daemon.wait_for_line("health check failed").unwrap();
        lab.namespace_of(&lab.sites[0]).sysctl("net.ipv4.icmp_echo_ignore_all", "0").unwrap();
        clock.set("+7300d");
        daemon.wait_for_line("health check passed again").unwrap();
        assert!(daemon.stop().unwrap().0.success());
        // The orphaned program stops by its own clock, so it does not stop at once.
        if mode == "tc_ebpf" {
            udp_fanout_lab::Daemon::start(&lab.gateway, binary(), &config).unwrap().stop().unwrap();
        }
    }
}
