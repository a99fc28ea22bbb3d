//! Replays the inputs that are kept for fuzzing: the seeds, and what has failed once. `make fuzz` looks for more.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

#[path = "../fuzz/src/lib.rs"]
#[allow(dead_code, reason = "other tests use more of what is shared")]
mod fuzz;

const DIRECTORIES: [&str; 2] = ["seeds", "regressions"];

fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(name)
}

/// The names of what is in a directory; none if it is not there.
fn names_in(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn replay(target: &str, run: fn(&[u8])) {
    let mut inputs = 0;
    for directory in DIRECTORIES.map(|name| directory(name).join(target)) {
        for name in names_in(&directory) {
            let path = directory.join(name);
            eprintln!("{}", path.display());
            run(&fs::read(path).unwrap());
            inputs += 1;
        }
    }
    assert!(inputs > 0, "no inputs for {target}");
}

/// A test for each target.
macro_rules! replayed {
    ($($test:ident: $target:ident,)*) => {
        const TARGETS: &[&str] = &[$(stringify!($target)),*];
        $(
            #[test]
            fn $test() {
                replay(stringify!($target), fuzz::$target::run);
            }
        )*
    };
}

replayed! {
    kept_inputs_of_headers_in_senders_names: preserve_source,
    kept_inputs_of_configurations: config,
    kept_inputs_of_health_checks: health,
    kept_inputs_of_the_host: host,
    root_kept_inputs_of_the_kernel_program: kernel,
    kept_inputs_of_slices: slices,
    kept_inputs_of_the_status_socket: status,
    netns_kept_inputs_of_the_userspace_datapath: user,
}

/// Nothing is kept that no test replays, and no target goes without.
#[test]
fn every_target_is_replayed() {
    let targets: BTreeSet<String> = TARGETS.iter().map(|&target| target.to_owned()).collect();
    let programs = names_in(&directory("fuzz_targets")).iter().map(|file| file.replace(".rs", "")).collect();
    assert_eq!(targets, programs);
    let manifest = fs::read_to_string(directory("Cargo.toml")).unwrap();
    for target in &targets {
        assert!(manifest.contains(&format!("path = \"fuzz_targets/{target}.rs\"")), "{target}");
    }
    assert!(names_in(&directory("regressions")).is_subset(&targets));
    assert_eq!(names_in(&directory("seeds")), targets);
}
