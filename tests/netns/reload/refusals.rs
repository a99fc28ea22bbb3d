//! Refused edits: the log says why, and nothing has changed, neither the wrong part nor the rest.

use std::fs;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::stat::Mode;

use super::{metrics, reloads, start, two_listeners};
use udp_fanout_lab::traffic::bind;
use udp_fanout_lab::{Collectors, Daemon, DaemonConfig, Expect, Lab, Place, Sender};

/// Sends SIGHUP and waits for the refusal; returns the log since.
fn refused(daemon: &mut Daemon, config: &str) -> String {
    let before = daemon.log().len();
    daemon.write_config(config).unwrap();
    daemon.signal(Signal::SIGHUP).unwrap();
    daemon.wait_for_line("configuration not reloaded").unwrap();
    daemon.log()[before..].to_owned()
}

fn all_listeners_serve(lab: &Lab, expected: u64) {
    let page = metrics(lab);
    assert_eq!(page.sum("udp_fanout_downstream_active", &[]), expected);
    let collectors = Collectors::start(lab, Expect::OneOfThem).unwrap();
    let mut senders = [lab.listener(), super::second_listener()]
        .map(|listener| Sender::open(&lab.sender, (Lab::SENDER, 0), listener).unwrap());
    for sender in &mut senders {
        sender.send(100, &collectors).unwrap();
    }
    let report = collectors.finish(&[&senders[0], &senders[1]]).unwrap();
    assert!(report.is_complete(), "{report}");
}

#[test]
fn netns_a_wrong_file_changes_nothing() {
    let lab = Lab::builder().receivers([Place::Pod, Place::OtherInterface]).build().unwrap();
    for mode in ["tc_ebpf", "userspace"] {
        let config = two_listeners(&lab, mode);
        let mut daemon = start(&lab, &config);
        assert_eq!(metrics(&lab).sum("udp_fanout_config_last_reload_successful", &[]), 1);
        // One right change and one wrong one.
        let mut half = config.clone();
        half.listeners[0].downstreams.pop();
        half.listeners[1].extra = "polcy = \"hash\"".into();
        let log = refused(&mut daemon, &half.to_toml());
        let expected = "listeners[1].polcy: unknown key; did you mean `policy`?";
        assert!(log.contains(expected) && log.contains("ERROR"), "{log}");
        assert_eq!((reloads(&lab, "success"), reloads(&lab, "error")), (0, 1));
        assert_eq!(metrics(&lab).sum("udp_fanout_config_last_reload_successful", &[]), 0);
        all_listeners_serve(&lab, 4);
        daemon.reload(&config.to_toml()).unwrap();
        assert_eq!(metrics(&lab).sum("udp_fanout_config_last_reload_successful", &[]), 1);
        daemon.stop().unwrap();
    }
}

#[test]
fn netns_what_needs_a_restart_says_so() {
    let lab = Lab::builder().receivers([Place::Pod, Place::OtherInterface]).build().unwrap();
    let limits = "[limits]\nmax_downstreams = 100\n";
    let mut config = two_listeners(&lab, "tc_ebpf");
    let mut daemon = start(&lab, &config);
    config.listeners[0].downstreams.pop();
    let log = refused(&mut daemon, &(config.to_toml() + limits));
    assert!(log.contains("limits.max_downstreams: 100 needs a restart"), "{log}");
    all_listeners_serve(&lab, 4);
    daemon.stop().unwrap();
}

/// A FIFO without a writer replaces the watched file: a blocking open would never return.
#[test]
fn netns_a_fifo_as_configuration_is_refused_and_stops_nothing() {
    let lab = Lab::builder().receivers([Place::Pod, Place::OtherInterface]).build().unwrap();
    for mode in ["tc_ebpf", "userspace"] {
        let mut config = two_listeners(&lab, mode);
        config.head.clear();
        let mut daemon = start(&lab, &config);
        let fifo = daemon.config_path().with_extension("fifo");
        nix::unistd::mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        fs::rename(&fifo, daemon.config_path()).unwrap();
        let line = daemon.wait_for_line("is a named pipe (FIFO)").unwrap();
        assert!(line.contains("must be a regular file; name one with --config"), "{line}");
        daemon.wait_for_line("configuration not reloaded").unwrap();
        assert_eq!((reloads(&lab, "success"), reloads(&lab, "error")), (0, 1));
        all_listeners_serve(&lab, 4);
        // The file is still watched.
        daemon.write_config(&config.to_toml()).unwrap();
        daemon.wait_for_line("matches the configuration in force again").unwrap();
        fs::remove_file(daemon.config_path()).unwrap();
        nix::unistd::mkfifo(&daemon.config_path(), Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        daemon.wait_for_line("configuration not reloaded").unwrap();
        let (status, took, log) = daemon.stop().unwrap();
        assert!(status.success() && took < Duration::from_secs(5), "{status} after {took:?}:\n{log}");
    }
}

/// Errors that show only when the plan is applied: an address in use, a missing interface.
#[test]
fn netns_a_configuration_that_cannot_be_put_in_force_is_taken_back_whole() {
    let lab = Lab::builder().receivers([Place::Pod, Place::OtherInterface]).build().unwrap();
    let _occupied = bind(&lab.gateway, "10.0.0.1:9999".parse().unwrap()).unwrap();
    for mode in ["tc_ebpf", "userspace"] {
        let config = two_listeners(&lab, mode);
        let mut daemon = start(&lab, &config);
        let with = |edit: &dyn Fn(&mut DaemonConfig)| {
            let mut changed = config.clone();
            // One listener is removed, one changes, and a new one cannot be added.
            changed.listeners.remove(1);
            changed.listeners[0].downstreams.pop();
            let mut new = config.listeners[0].clone();
            (new.name, new.bind) = ("new".into(), "10.0.0.1:9998".into());
            changed.listeners.push(new.clone());
            (new.name, new.bind) = ("impossible".into(), "10.0.0.1:9997".into());
            changed.listeners.push(new);
            edit(&mut changed);
            changed.to_toml()
        };
        let log = refused(&mut daemon, &with(&|config| config.listeners[2].bind = "10.0.0.1:9999".into()));
        assert!(log.contains("listener \"impossible\"") && log.contains("10.0.0.1:9999"), "{log}");
        all_listeners_serve(&lab, 4);
        let log = refused(
            &mut daemon,
            &with(&|config| {
                (config.listeners[2].mode, config.listeners[2].interface) = ("tc_ebpf".into(), Some("eth9".into()))
            }),
        );
        assert!(log.contains("interface not found: eth9"), "{log}");
        all_listeners_serve(&lab, 4);
        let busy = bind_tcp(&lab);
        let log = refused(&mut daemon, &with(&|config| config.metrics = Some(busy.local_addr().unwrap())));
        assert!(log.contains("cannot serve metrics on 127.0.0.1:"), "{log}");
        all_listeners_serve(&lab, 4);
        // Nothing is left of the new listeners.
        for port in [9997, 9998] {
            drop(bind(&lab.gateway, ([10, 0, 0, 1], port).into()).unwrap());
        }
        let filters = lab.gateway.tc("filter show dev eth0 ingress").unwrap();
        assert_eq!(filters.contains("udp_fanout"), mode == "tc_ebpf", "{filters}");
        assert_eq!(reloads(&lab, "error"), 3);
        daemon.stop().unwrap();
    }
}

fn bind_tcp(lab: &Lab) -> std::net::TcpListener {
    lab.gateway.run(|| Ok(std::net::TcpListener::bind("127.0.0.1:0")?)).unwrap()
}
