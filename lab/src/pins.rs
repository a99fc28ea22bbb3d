//! A directory in the BPF file system for the pins of one test's daemons.

#![allow(clippy::unwrap_used, reason = "only tests use this, and a panic is how a test fails")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::{DaemonConfig, Lab, cleanup};

/// A directory for the pins of one test. Dropping it removes the directory.
pub struct Pins(PathBuf);

impl Pins {
    /// Creates the parent of the pin directory.
    ///
    /// # Panics
    /// When the directory cannot be created, which needs root.
    #[expect(clippy::new_without_default, reason = "it makes a directory")]
    pub fn new() -> Pins {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        // In a separate parent directory: the daemon also examines siblings of its pin directory.
        let around = format!("{}/{}{}-{number}", cleanup::BPF_FS, cleanup::DIRECTORY_PREFIX, std::process::id());
        cleanup::arm().unwrap();
        let mut registry = cleanup::registry();
        fs::create_dir(&around).unwrap_or_else(|error| {
            panic!(
                "cannot create {around}: {error}; `make test` mounts a BPF file system there if the machine has none"
            )
        });
        registry.add_directory(Path::new(&around));
        Pins(around.into())
    }

    /// The pin directory, which the daemon creates.
    pub fn path(&self) -> PathBuf {
        self.0.join("pins")
    }

    /// The directories of pinned programs.
    pub fn programs(&self) -> Vec<PathBuf> {
        fs::read_dir(self.path()).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
    }

    /// The default configuration of the lab, with this value of `on_exit`.
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
        registry.unregister_directory(&self.0);
    }
}
