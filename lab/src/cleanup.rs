//! Removes namespaces, directories and child processes: after a panic, after Ctrl-C, and after SIGKILL.
//!
//! Values clean up when they are dropped. This module covers the two cases in which nothing is dropped: a signal (a thread
//! ends the children, removes the namespaces, then lets the signal have its default effect), and `SIGKILL` (the next run
//! removes the namespaces of processes that no longer exist).

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, mkdtemp};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Prefix of namespace names, followed by process ID, number and label: `uf-4711-0-gateway`.
pub const PREFIX: &str = "uf-";
/// Prefix of directory names below the system's temporary directory, followed by process ID and a unique suffix.
pub const DIRECTORY_PREFIX: &str = "udp-fanout-lab-";
/// The directory in which tests pin programs, in directories named the same way.
pub const BPF_FS: &str = "/sys/fs/bpf";
/// The directory in which `ip netns` mounts named namespaces.
const NAMES: &str = "/run/netns";
/// How long a child may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);

/// Everything that would outlive this process.
#[derive(Default)]
pub struct Registry {
    namespaces: Vec<String>,
    children: Vec<Pid>,
    directories: Vec<PathBuf>,
}

static REGISTRY: Mutex<Registry> =
    Mutex::new(Registry { namespaces: Vec::new(), children: Vec::new(), directories: Vec::new() });

/// Locks the registry. Code that creates or removes something holds the lock meanwhile. The signal thread never releases it,
/// so its list is complete and nothing is created after that.
pub fn registry() -> MutexGuard<'static, Registry> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registry {
    /// Registers a namespace for removal.
    pub fn add_namespace(&mut self, name: &str) {
        self.namespaces.push(name.to_owned());
    }

    /// Removes a namespace and its registration.
    pub fn remove_namespace(&mut self, name: &str) {
        self.namespaces.retain(|known| known != name);
        delete_namespace(name);
    }

    /// Registers a child process to be ended.
    pub fn add_child(&mut self, pid: Pid) {
        self.children.push(pid);
    }

    /// Unregisters a child. Must be called before the child is reaped, because its process ID may be reused afterwards.
    pub fn unregister_child(&mut self, pid: Pid) {
        self.children.retain(|known| *known != pid);
    }

    /// Registers a temporary directory for removal.
    pub fn add_directory(&mut self, path: &Path) {
        self.directories.push(path.to_owned());
    }

    /// Unregisters a directory, which its owner removes.
    pub fn unregister_directory(&mut self, path: &Path) {
        self.directories.retain(|known| known != path);
    }
}

/// A temporary directory, removed when dropped, after a signal, or by the next run.
#[derive(Debug)]
pub struct TempDirectory(PathBuf);

impl TempDirectory {
    /// Creates an empty directory that every user can enter and read.
    ///
    /// # Errors
    /// When the system's temporary directory is not writable.
    pub fn new() -> Result<Self> {
        let template = std::env::temp_dir().join(format!("{DIRECTORY_PREFIX}{}-XXXXXX", std::process::id()));
        let mut registry = registry();
        let path = mkdtemp(&template).with_context(|| format!("cannot create the directory {}", template.display()))?;
        registry.add_directory(&path);
        let directory = TempDirectory(path);
        drop(registry);
        fs::set_permissions(directory.path(), Permissions::from_mode(0o755))?;
        Ok(directory)
    }

    /// The path of the directory.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDirectory {
    fn drop(&mut self) {
        let mut registry = registry();
        let _ = fs::remove_dir_all(&self.0);
        registry.unregister_directory(&self.0);
    }
}

/// Prepares the process for creating namespaces: checks the privilege, removes the remains of dead processes, and starts the
/// signal thread. Only the first call does anything.
///
/// # Errors
/// When not root, which creating namespaces needs.
pub fn arm() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("network namespaces need root: run it as root, or through `make test` or `make demo`, which use sudo");
    }
    static ONCE: Once = Once::new();
    let mut outcome = Ok(());
    ONCE.call_once(|| {
        remove_stale();
        outcome = spawn_signal_thread();
    });
    outcome
}

fn spawn_signal_thread() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot listen for signals")?;
    thread::Builder::new().name("cleanup".into()).spawn(move || {
        if let Some(signal) = signals.forever().next() {
            // Held until the process ends: nothing may be created from here on.
            let mut registry = registry();
            for pid in std::mem::take(&mut registry.children) {
                end(pid);
            }
            for name in std::mem::take(&mut registry.namespaces) {
                delete_namespace(&name);
            }
            for path in std::mem::take(&mut registry.directories) {
                let _ = fs::remove_dir_all(path);
            }
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    })?;
    Ok(())
}

/// Sends a child SIGTERM, and SIGKILL if it does not end in time.
fn end(pid: Pid) {
    let Ok(handle) = pidfd(pid) else { return };
    let _ = kill(pid, Signal::SIGTERM);
    if !wait_readable(&handle, GRACE) {
        let _ = kill(pid, Signal::SIGKILL);
    }
}

/// Waits until the process behind `handle` has ended; false if it has not within `limit`.
pub fn wait_readable(handle: &OwnedFd, limit: Duration) -> bool {
    let mut fds = [PollFd::new(handle.as_fd(), PollFlags::POLLIN)];
    let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    loop {
        match nix::poll::poll(&mut fds, limit) {
            Err(Errno::EINTR) => {}
            Ok(0) | Err(_) => return false,
            Ok(_) => return true,
        }
    }
}

/// Opens a descriptor that becomes readable when the process ends.
///
/// # Errors
/// When the process does not exist, or the kernel is older than 5.3.
pub fn pidfd(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and accesses no memory of this process.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Removes the namespaces and directories of processes that no longer exist.
fn remove_stale() {
    for name in names_in(Path::new(NAMES)) {
        if owner_is_gone(&name, PREFIX) {
            delete_namespace(&name);
        }
    }
    for around in [std::env::temp_dir(), PathBuf::from(BPF_FS)] {
        for name in names_in(&around) {
            if owner_is_gone(&name, DIRECTORY_PREFIX) {
                let _ = fs::remove_dir_all(around.join(name));
            }
        }
    }
}

fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// True if the name has the form `prefix`-PID-rest and the process does not exist.
fn owner_is_gone(name: &str, prefix: &str) -> bool {
    let pid = name.strip_prefix(prefix).and_then(|rest| rest.split('-').next());
    let Some(pid) = pid.and_then(|pid| pid.parse().ok()) else { return false };
    kill(Pid::from_raw(pid), None) == Err(Errno::ESRCH)
}

fn delete_namespace(name: &str) {
    if Path::new(NAMES).join(name).exists() {
        let _ = Command::new("ip").args(["netns", "del", name]).stderr(Stdio::null()).status();
    }
}
