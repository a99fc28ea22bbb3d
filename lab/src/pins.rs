//! A place in the BPF file system where the daemons of one test keep what outlives them.

#![allow(clippy::unwrap_used, reason = "only tests use this, and a panic is how a test fails")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::{DaemonConfig, Lab, cleanup};

/// A directory for pins of one test's own, removed with it.
pub struct Pins(PathBuf);

impl Pins {
    /// Makes the directory that the one for pins will be in.
    ///
    /// # Panics
    /// When that fails: only root may.
    #[expect(clippy::new_without_default, reason = "it makes a directory")]
    pub fn new() -> Pins {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        // With a directory of its own around it: neighbours are looked at.
        let around = format!("{}/{}{}-{number}", cleanup::BPF_FS, cleanup::DIRECTORY_PREFIX, std::process::id());
        cleanup::arm().unwrap();
        let mut registry = cleanup::registry();
        fs::create_dir(&around).unwrap_or_else(|error| {
            panic!("cannot make {around}: {error}; `make test` mounts a BPF file system there if the machine has none")
        });
        registry.add_directory(Path::new(&around));
        Pins(around.into())
    }

    /// The directory for pins, which is the daemon's to make.
    pub fn path(&self) -> PathBuf {
        self.0.join("pins")
    }

    /// The directories of programs.
    pub fn programs(&self) -> Vec<PathBuf> {
        fs::read_dir(self.path()).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
    }

    /// The lab's usual configuration, with what becomes of the program at the end.
    pub fn config(&self, lab: &Lab, on_exit: &str) -> DaemonConfig {
        let mut config = DaemonConfig::for_lab(lab, "tc_ebpf");
        config.head = format!("on_exit = \"{on_exit}\"\npin_path = {:?}\nwatch_config = false\n", self.path());
        config
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let mut registry = cleanup::registry();
        let _ = fs::remove_dir_all(&self.0);
        registry.forget_directory(&self.0);
    }
}
