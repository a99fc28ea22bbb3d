//! Leaves nothing behind: not after a panic, not after Ctrl-C, not after the process was killed.
//!
//! Values clean up after themselves when dropped. This module covers the two cases in which nothing is dropped:
//! a signal (a thread ends the children and removes the namespaces, then lets the signal have its usual effect), and
//! `SIGKILL` (the next run removes the namespaces of processes that are no more).

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

/// Names of our namespaces are this, the process id, a number and a label: `uf-4711-0-gateway`.
pub const PREFIX: &str = "uf-";
/// Names of our directories below the system's temporary directory are this, the process id and a unique suffix.
pub const DIRECTORY_PREFIX: &str = "udp-fanout-lab-";
/// Where tests pin programs, in directories named likewise.
pub const BPF_FS: &str = "/sys/fs/bpf";
/// Where `ip netns` keeps its names.
const NAMES: &str = "/run/netns";
/// How long a child may take to end once asked to.
const GRACE: Duration = Duration::from_secs(5);

/// What exists at the moment and would outlive us.
#[derive(Default)]
pub struct Registry {
    namespaces: Vec<String>,
    children: Vec<Pid>,
    directories: Vec<PathBuf>,
}

static REGISTRY: Mutex<Registry> =
    Mutex::new(Registry { namespaces: Vec::new(), children: Vec::new(), directories: Vec::new() });

/// The registry, locked. Whoever creates or removes something holds the lock while doing so, so that the signal
/// thread, which never gives it back, sees a true list and nothing is created behind its back.
pub fn registry() -> MutexGuard<'static, Registry> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registry {
    /// Notes a namespace for removal.
    pub fn add_namespace(&mut self, name: &str) {
        self.namespaces.push(name.to_owned());
    }

    /// Removes a namespace and its note.
    pub fn remove_namespace(&mut self, name: &str) {
        self.namespaces.retain(|known| known != name);
        delete_namespace(name);
    }

    /// Notes a child process to be ended.
    pub fn add_child(&mut self, pid: Pid) {
        self.children.push(pid);
    }

    /// Forgets a child; to be called before it is reaped, so that its number is still its own.
    pub fn forget_child(&mut self, pid: Pid) {
        self.children.retain(|known| *known != pid);
    }

    /// Notes a temporary directory for removal.
    pub fn add_directory(&mut self, path: &Path) {
        self.directories.push(path.to_owned());
    }

    /// Forgets a directory, which its owner removes.
    pub fn forget_directory(&mut self, path: &Path) {
        self.directories.retain(|known| known != path);
    }
}

/// A temporary directory, removed when dropped, after a signal, or by the next run.
#[derive(Debug)]
pub struct TempDirectory(PathBuf);

impl TempDirectory {
    /// Makes an empty directory that every user can enter and read.
    ///
    /// # Errors
    /// When the system's temporary directory is not writable.
    pub fn new() -> Result<Self> {
        let template = std::env::temp_dir().join(format!("{DIRECTORY_PREFIX}{}-XXXXXX", std::process::id()));
        let mut registry = registry();
        let path = mkdtemp(&template).with_context(|| format!("cannot make a directory {}", template.display()))?;
        registry.add_directory(&path);
        let directory = TempDirectory(path);
        drop(registry);
        fs::set_permissions(directory.path(), Permissions::from_mode(0o755))?;
        Ok(directory)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDirectory {
    fn drop(&mut self) {
        let mut registry = registry();
        let _ = fs::remove_dir_all(&self.0);
        registry.forget_directory(&self.0);
    }
}

/// Prepares the process for making namespaces: checks the privilege, removes what dead processes have left, and
/// arranges for signals. Does so once, however often it is called.
///
/// # Errors
/// When not root: namespaces cannot be made.
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
            // Kept until the process ends: nothing may be created from here on.
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

/// Asks a child to end and makes it, after a while.
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

/// A descriptor that becomes readable when the process ends.
///
/// # Errors
/// When there is no such process, or the kernel is older than 5.3.
pub fn pidfd(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
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

/// True if the name is one of ours, `prefix`-PID-rest, and there is no such process.
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
