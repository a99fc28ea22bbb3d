//! The wall clock jumps, so only text for people may use it.

use std::fs;
use std::path::{Path, PathBuf};

/// The places that read the wall clock, only for text that people read.
const FOR_PEOPLE: [&str; 6] = [
    "src/event_loop.rs",
    "src/event_loop/reload.rs",
    "src/event_loop/start.rs",
    "src/event_loop/trace.rs",
    "src/metrics/render.rs",
    "src/metrics/snapshot.rs",
];

/// Calls that read the wall clock, or a clock that includes suspend, in user space and in the kernel program.
const WALL_CLOCKS: [&str; 8] = [
    "SystemTime",
    "CLOCK_REALTIME",
    "CLOCK_TAI",
    "CLOCK_BOOTTIME",
    "gettimeofday",
    "Utc::now",
    "bpf_ktime_get_boot_ns",
    "bpf_ktime_get_tai_ns",
];

fn sources(directory: &Path, all: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, all);
        } else {
            all.push(path);
        }
    }
}

#[test]
fn the_wall_clock_is_for_people_only() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut all = Vec::new();
    sources(&root.join("src"), &mut all);
    sources(&root.join("bpf"), &mut all);
    assert!(all.len() > 100);
    for path in all {
        let name = path.strip_prefix(root).unwrap().display().to_string();
        let text = fs::read_to_string(&path).unwrap();
        let found: Vec<_> = WALL_CLOCKS.iter().filter(|clock| text.contains(**clock)).collect();
        let allowed = FOR_PEOPLE.contains(&name.as_str()) || name.ends_with("tests.rs");
        assert!(found.is_empty() || allowed, "{name} reads {found:?}, which jumps: take Instant or CLOCK_MONOTONIC");
    }
}
