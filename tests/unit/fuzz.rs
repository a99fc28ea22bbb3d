//! Replays the saved fuzzing inputs: the seeds, and those that have failed before. `make fuzz` searches for more.
//! The test programs `root` and `netns` replay the targets that need root.

use std::collections::BTreeSet;
use std::fs;

use udp_fanout_testkit::fuzz::{TARGETS, directory, names_in, replay};

#[test]
fn kept_inputs_of_headers_in_senders_names() {
    replay("preserve_source");
}

#[test]
fn kept_inputs_of_configurations() {
    replay("config");
}

#[test]
fn kept_inputs_of_health_checks() {
    replay("health");
}

#[test]
fn kept_inputs_of_the_host() {
    replay("host");
}

#[test]
fn kept_inputs_of_slices() {
    replay("slices");
}

#[test]
fn kept_inputs_of_the_status_socket() {
    replay("status");
}

/// Every directory of saved inputs has a test that replays it, and every target has saved inputs.
#[test]
fn every_target_is_replayed() {
    let targets: BTreeSet<String> = TARGETS.iter().map(|&target| target.to_owned()).collect();
    let programs = names_in(&directory("fuzz_targets")).iter().map(|file| file.replace(".rs", "")).collect();
    assert_eq!(targets, programs);
    let manifest = fs::read_to_string(directory("Cargo.toml")).unwrap();
    let tests = concat!(include_str!("fuzz.rs"), include_str!("../root/fuzz.rs"), include_str!("../netns/fuzz.rs"));
    for target in &targets {
        assert!(manifest.contains(&format!("path = \"fuzz_targets/{target}.rs\"")), "{target}");
        assert!(tests.contains(&format!("replay(\"{target}\")")), "{target}");
    }
    assert!(names_in(&directory("regressions")).is_subset(&targets));
    assert_eq!(names_in(&directory("seeds")), targets);
}
