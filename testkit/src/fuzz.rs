//! The fuzz targets, one per module. `run` takes an input's bytes and panics if the program misbehaves.
//!
//! `fuzz/fuzz_targets/` passes them to libFuzzer. The tests replay the inputs in `fuzz/seeds/` and `fuzz/regressions/`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

pub mod bytes;
pub mod config;
pub mod health;
pub mod host;
pub mod kernel;
pub mod preserve_source;
pub mod slices;
pub mod status;
pub mod user;

/// The names of all targets.
pub const TARGETS: [&str; 8] = ["config", "health", "host", "kernel", "preserve_source", "slices", "status", "user"];

/// The directories of `fuzz/` with committed inputs.
pub const DIRECTORIES: [&str; 2] = ["seeds", "regressions"];

/// A directory of `fuzz/`.
pub fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz").join(name)
}

/// The names of the files in a directory; empty if it does not exist.
pub fn names_in(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Runs a target on its committed inputs.
pub fn replay(target: &str) {
    let run = match target {
        "config" => config::run,
        "health" => health::run,
        "host" => host::run,
        "kernel" => kernel::run,
        "preserve_source" => preserve_source::run,
        "slices" => slices::run,
        "status" => status::run,
        "user" => user::run,
        unknown => panic!("no fuzz target {unknown}"),
    };
    let mut inputs = 0;
    for directory in DIRECTORIES.map(|name| directory(name).join(target)) {
        for name in names_in(&directory) {
            let path = directory.join(name);
            eprintln!("{}", path.display());
            run(&fs::read(path).unwrap());
            inputs += 1;
        }
    }
    assert!(inputs > 0, "no inputs for the target {target} in fuzz/");
}
