//! The effect of a receiver's failure: when all fail, when one recovers, when the settings change.

use std::path::Path;

use super::{active, ignore_pings, metrics, shares, updated, wait_for_metrics};
use udp_fanout_lab::{Daemon, DaemonConfig, Lab, Place, Sender};

const QUICK: &str = "[health]\nenabled = true\ninterval_secs = 0.4\ntimeout_secs = 0.4\nhealthy_threshold = 1\n";

fn config(lab: &Lab, mode: &str, health: &str) -> DaemonConfig {
    let mut config = DaemonConfig::for_lab(lab, mode);
    config.head = format!("watch_config = false\n{health}");
    config
}

fn start(lab: &Lab, config: &DaemonConfig) -> Daemon {
    Daemon::start(&lab.gateway, Path::new(env!("CARGO_BIN_EXE_udp-fanout")), config).unwrap()
}

fn no_downstream(lab: &Lab, mode: &str) -> u64 {
    let labels = [("listener", "lab"), ("mode", mode), ("reason", "no_downstream")];
    metrics(lab).sum("udp_fanout_packets_dropped_total", &labels)
}

fn closed_when_all_fail(mode: &str) {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap();
    let mut daemon = start(&lab, &config(&lab, mode, &format!("{QUICK}fail_open = false\n")));
    assert_eq!(shares(&lab, 100), [50, 50]);
    ignore_pings(&lab, 0, true);
    ignore_pings(&lab, 1, true);
    daemon.wait_for_line("dropping all datagrams, since fail_open = false").unwrap();
    wait_for_metrics(&lab, "no receiver is active", |page| {
        page.sum("udp_fanout_downstream_active", &[("listener", "lab")]) == 0
    });
    let sender = Sender::in_lab(&lab).unwrap();
    for _ in 0..7 {
        sender.socket().send_to(b"for nobody", lab.listener()).unwrap();
    }
    wait_for_metrics(&lab, "seven are dropped and counted", |_| no_downstream(&lab, mode) == 7);
    ignore_pings(&lab, 0, false);
    daemon.wait_for_line("not all downstreams are unhealthy any more").unwrap();
    daemon.wait_for_line(&updated(mode, 1)).unwrap();
    assert_eq!(shares(&lab, 100), [100, 0]);
    daemon.stop().unwrap();
}

#[test]
fn netns_the_kernel_drops_and_counts_when_all_fail_and_that_is_wanted() {
    closed_when_all_fail("tc_ebpf");
}

#[test]
fn netns_sockets_drop_and_count_when_all_fail_and_that_is_wanted() {
    closed_when_all_fail("userspace");
}

#[test]
fn netns_one_that_is_back_starts_small() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap();
    let slow = format!("{QUICK}slow_start_secs = 3600\n");
    for mode in ["tc_ebpf", "userspace"] {
        let mut daemon = start(&lab, &config(&lab, mode, &slow));
        ignore_pings(&lab, 1, true);
        daemon.wait_for_line("health check failed").unwrap();
        daemon.wait_for_line(&updated(mode, 1)).unwrap();
        ignore_pings(&lab, 1, false);
        daemon.wait_for_line("health check passed again").unwrap();
        daemon.wait_for_line(&updated(mode, 2)).unwrap();
        // A tenth of the share of the other, for the first six minutes.
        assert_eq!(shares(&lab, 110), [100, 10], "{mode}");
        daemon.stop().unwrap();
    }
}

#[test]
fn netns_what_the_host_notices_is_looked_into_at_once() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::BehindRouter]).build().unwrap();
    // The interval is an hour, so nothing is probed meanwhile.
    let rare = "[health]\nenabled = true\ninterval_secs = 3600\ntimeout_secs = 0.4\nhealthy_threshold = 1\n";
    for mode in ["tc_ebpf", "userspace"] {
        let mut daemon = start(&lab, &config(&lab, mode, rare));
        let address = lab.sites[1].address.ip();
        lab.gateway.ip(&format!("route add unreachable {address}/32")).unwrap();
        let line = daemon.wait_for_line("health check failed").unwrap();
        assert!(line.contains(&format!("downstream={}", lab.sites[1].address)), "{line}");
        daemon.wait_for_line(&updated(mode, 1)).unwrap();
        lab.gateway.ip(&format!("route del unreachable {address}/32")).unwrap();
        daemon.wait_for_line("health check passed again").unwrap();
        daemon.stop().unwrap();
    }
}

#[test]
fn netns_a_reload_changes_who_is_checked_and_how() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap();
    ignore_pings(&lab, 1, true);
    for mode in ["tc_ebpf", "userspace"] {
        let off = config(&lab, mode, "");
        let mut daemon = start(&lab, &off);
        assert_eq!(shares(&lab, 100), [50, 50]);
        // On, for all listeners.
        daemon.reload(&config(&lab, mode, QUICK).to_toml()).unwrap();
        daemon.wait_for_logged("health check failed").unwrap();
        wait_for_metrics(&lab, "one is left", |page| page.sum("udp_fanout_downstream_active", &[]) == 1);
        assert_eq!(shares(&lab, 100), [100, 0]);
        // A receiver's state is kept when only the timing changes.
        let slower = QUICK.replace("0.4", "3600");
        daemon.reload(&config(&lab, mode, &slower).to_toml()).unwrap();
        assert_eq!((active(&lab), shares(&lab, 100)), (1, vec![100, 0]));
        // A bad one changes nothing.
        daemon.write_config(&config(&lab, mode, &slower).extra("health = { port = 1 }").to_toml()).unwrap();
        daemon.signal(nix::sys::signal::Signal::SIGHUP).unwrap();
        daemon.wait_for_line("listeners[0].health.port: has no effect with protocol = \"icmp\"").unwrap();
        daemon.wait_for_line("configuration not reloaded").unwrap();
        assert_eq!(shares(&lab, 100), [100, 0]);
        // Off for this listener alone.
        daemon.reload(&config(&lab, mode, QUICK).extra("health = { enabled = false }").to_toml()).unwrap();
        wait_for_metrics(&lab, "all are back", |page| page.sum("udp_fanout_downstream_active", &[]) == 2);
        assert_eq!(shares(&lab, 100), [50, 50]);
        assert!(!metrics(&lab).has("udp_fanout_downstream_health", &[]));
        // On again, with a kind of probe to which neither replies: all stay active.
        let tcp = "health = { protocol = \"tcp\", port = 7003 }";
        daemon.reload(&config(&lab, mode, QUICK).extra(tcp).to_toml()).unwrap();
        daemon.wait_for_logged("still sending to all of them, since fail_open = true").unwrap();
        wait_for_metrics(&lab, "all are kept", |page| page.sum("udp_fanout_downstream_active", &[]) == 2);
        assert_eq!(shares(&lab, 100), [50, 50]);
        daemon.stop().unwrap();
    }
}
