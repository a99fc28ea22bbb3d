//! Obstacles to a handover: pins that cannot be read, a start that fails, receivers that are not known yet.

use std::fs;
use std::path::Path;
use std::process::Command;

use libbpf_rs::{MapCore, MapFlags, MapHandle};
use nix::sys::signal::Signal;

use super::{Pins, binary, counted, end, exchange, filter, lab, start};
use udp_fanout_lab::{Daemon, Lab, Place};

fn bpftool(arguments: &[&str]) {
    let output = Command::new("bpftool").args(arguments).output().expect("bpftool runs (Debian package bpftool)");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn netns_pins_of_another_version_cost_the_counters_and_nothing_else() {
    let (lab, pins) = (lab(), Pins::new());
    let config = pins.config(&lab, "keep");
    end(start(&lab, &config), Signal::SIGTERM);
    let about = pins.programs()[0].join("about");
    let dumped = Command::new("bpftool").args(["-j", "map", "dump", "pinned"]).arg(&about).output().unwrap();
    let dumped: serde_json::Value = serde_json::from_slice(&dumped.stdout).unwrap();
    let mut value: Vec<&str> = dumped[0]["value"].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
    assert_eq!(value[..4], ["0x03", "0x00", "0x00", "0x00"]);
    value[0] = "0x63";
    let mut arguments = vec!["map", "update", "pinned", about.to_str().unwrap(), "key", "0", "0", "0", "0", "value"];
    arguments.extend(value);
    bpftool(&arguments);
    exchange(&lab, 300);

    let mut daemon = start(&lab, &config);
    let warning = daemon.wait_for_logged("counters begin at zero").unwrap();
    assert!(warning.contains("they have version 99, and this udp-fanout reads 2 to 3"), "{warning}");
    exchange(&lab, 300);
    assert_eq!(counted(&lab, &daemon), (300, 300, 300));
    assert_eq!(pins.programs().len(), 1);

    // Half of them are missing, as if their daemon had been killed while it pinned them.
    end(daemon, Signal::SIGKILL);
    fs::remove_file(pins.programs()[0].join("stat_owners")).unwrap();
    let mut daemon = start(&lab, &config);
    let warning = daemon.wait_for_logged("counters begin at zero").unwrap();
    assert!(warning.contains("stat_owners is missing"), "{warning}");
    exchange(&lab, 300);
    assert_eq!(counted(&lab, &daemon), (300, 300, 300));
    end(daemon, Signal::SIGTERM);
    assert_eq!(pins.programs().len(), 1);
}

/// Replaces a pinned map by one whose entries have the same counters, but no fields after them.
fn cut_down(pin: &Path, bytes: u32) {
    let (whole, options) = (
        MapHandle::from_pinned_path(pin).unwrap(),
        libbpf_rs::libbpf_sys::bpf_map_create_opts {
            sz: size_of::<libbpf_rs::libbpf_sys::bpf_map_create_opts>() as _,
            ..Default::default()
        },
    );
    assert!(whole.value_size() > bytes);
    let name = whole.name().to_owned();
    let mut cut = MapHandle::create(whole.map_type(), Some(name), 4, bytes, whole.max_entries(), &options).unwrap();
    for key in whole.keys() {
        let mut values = whole.lookup_percpu(&key, MapFlags::ANY).unwrap().unwrap();
        values.iter_mut().for_each(|value| value.truncate(bytes as usize));
        cut.update_percpu(&key, &values, MapFlags::ANY).unwrap();
    }
    fs::remove_file(pin).unwrap();
    cut.pin(pin).unwrap();
}

#[test]
fn netns_counters_of_a_version_that_kept_nothing_behind_them_go_on() {
    let (lab, pins) = (lab(), Pins::new());
    let config = pins.config(&lab, "keep");
    let daemon = start(&lab, &config);
    exchange(&lab, 300);
    end(daemon, Signal::SIGTERM);
    cut_down(&pins.programs()[0].join("STATS"), 48);
    cut_down(&pins.programs()[0].join("DOWNSTREAM_STAT"), 16);

    let mut daemon = start(&lab, &config);
    daemon.wait_for_logged("counters go on").unwrap();
    exchange(&lab, 300);
    assert_eq!(counted(&lab, &daemon), (600, 600, 600));
}

#[test]
fn netns_a_start_that_fails_leaves_the_program_before_in_force() {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).build().unwrap();
    let pins = Pins::new();
    let config = pins.config(&lab, "keep");
    end(start(&lab, &config), Signal::SIGTERM);
    let before = filter(&lab);
    exchange(&lab, 300);
    // A foreign filter has our preference and handle on the other interface.
    lab.gateway.tc("qdisc add dev out1 clsact").unwrap();
    let program = pins.programs()[0].join("program");
    let others = "filter add dev out1 ingress pref 49152 handle 0x7566 bpf da pinned";
    lab.gateway.tc(&format!("{others} {}", program.display())).unwrap();
    let mut second = config.clone();
    second.metrics = None;
    second.listeners[0].interface = None;
    second.listeners[0].extra = "interface = [\"eth0\", \"out1\"]".into();
    let mut daemon = Daemon::spawn(&lab.gateway, binary(), &second.to_toml()).unwrap();
    assert_eq!(daemon.wait().unwrap().code(), Some(1));
    let log = daemon.log().to_owned();
    assert!(
        log.contains("is another program's") && log.contains("restored the TC program of the earlier daemon"),
        "{log}"
    );
    assert_eq!(filter(&lab), before, "{log}");
    assert_eq!(pins.programs().len(), 1);
    exchange(&lab, 300);

    let daemon = start(&lab, &config);
    exchange(&lab, 300);
    assert_eq!(counted(&lab, &daemon), (900, 900, 900));
}

#[test]
fn netns_the_program_before_goes_on_until_all_receivers_are_known() {
    let (lab, pins) = (lab(), Pins::new());
    let mut config = pins.config(&lab, "keep");
    let mut second = config.listeners[0].clone();
    (second.name, second.bind) = ("second".into(), "10.0.0.1:9125".into());
    config.listeners.push(second);
    end(start(&lab, &config), Signal::SIGTERM);
    let before = filter(&lab);

    let mut unknown = config.clone();
    unknown.listeners[1].downstreams.clear();
    unknown.listeners[1].extra = "downstream = [{ address = \"nobody.invalid:514\" }]".into();
    let mut daemon = Daemon::spawn(&lab.gateway, binary(), &unknown.to_toml()).unwrap();
    daemon.wait_for_line("keeps forwarding until the receivers of all listeners are known").unwrap();
    exchange(&lab, 300);
    assert_eq!(filter(&lab), before);
    daemon.reload(&config.to_toml()).unwrap();
    assert_ne!(filter(&lab), before);
    daemon.wait_for_logged("counters go on").unwrap();
    exchange(&lab, 300);
    end(daemon, Signal::SIGTERM);
    let daemon = start(&lab, &config);
    assert_eq!(counted(&lab, &daemon), (600, 600, 600));
}
