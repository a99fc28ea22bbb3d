//! Directories in a BPF file system, used so that no other account can redirect what this process does there.
//!
//! A BPF file system may be writable by everybody (a plain `mount -t bpf` has mode 1777), so a directory found there may
//! be another account's. Therefore:
//!
//! - Below the mount point, no path is followed: each component is opened on its own, without following a symbolic link,
//!   and everything else is done by name in a directory that is open (`openat`, `mkdirat`, `unlinkat`).
//! - The directories above ours must be owned by root or this account, and be sticky if others may write there.
//! - Our directories must not be writable by group or others. Their owner must be as [`OwnerRule`] says.
//! - A pin is used only if it is a pin, not a link to one, and has the owner of its directory.
//!
//! `BPF_OBJ_PIN` and `BPF_OBJ_GET` take descriptors only since Linux 6.5. They get paths below `/proc/self/fd` instead,
//! which name the open directory or pin itself.

use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use libbpf_rs::libbpf_sys;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat, major, minor, mkdirat};
use nix::sys::statfs::{FsType, fstatfs};
use nix::unistd::{Uid, UnlinkatFlags, unlinkat};

/// `BPF_FS_MAGIC`.
const BPF_FS: FsType = FsType(libc::BPF_FS_MAGIC as _);
/// How long to wait for a lock. Daemons that start or stop hold it for milliseconds.
const LOCK_TIMEOUT: Duration = Duration::from_secs(3);
const LOCK_RETRY: Duration = Duration::from_millis(20);
/// What to do about a BPF file system that everybody may write to.
const CLOSE_BPF_FS: &str =
    "let only root write to the BPF file system (`chmod 0700 /sys/fs/bpf`, or mount it with `-o mode=0700`)";

/// Who may own a directory of pins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OwnerRule {
    /// Root or this account: for a daemon, which trusts what it finds.
    Ours,
    /// Any account: for `detach`, which root runs on the directory of the service's account, and which only removes.
    Any,
}

/// A directory that another account could redirect or fill. The text names it, its owner, its mode and the fix.
#[derive(Debug)]
pub struct UntrustedDirectory(String);

impl std::fmt::Display for UntrustedDirectory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UntrustedDirectory {}

/// An open directory in a BPF file system, checked as the module says.
#[derive(Debug)]
pub(super) struct BpfDirectory {
    file: File,
    /// The directory that this one is in, opened with `O_PATH`.
    parent: OwnedFd,
    name: OsString,
    /// For messages only.
    path: PathBuf,
    owner: u32,
}

impl BpfDirectory {
    /// Opens a directory. `None` if there is none, or if it is not in a BPF file system.
    pub(super) fn open(path: &Path, rule: OwnerRule) -> Result<Option<BpfDirectory>> {
        match open_parent(path)? {
            Some(parent) => Self::open_in(parent.as_fd(), name_of(path)?, path, rule),
            None => Ok(None),
        }
    }

    /// Opens a directory of this account or root, and makes it before if necessary.
    pub(super) fn create(path: &Path) -> Result<BpfDirectory> {
        let name = name_of(path)?;
        let parent = open_parent(path)?.ok_or_else(|| {
            let missing = io::Error::from(Errno::ENOENT);
            if has_bpf_ancestor(path) { explain(&missing.into(), path) } else { no_bpf_fs(path) }
        })?;
        if is_in_bpf_fs(parent.as_fd())? {
            make(parent.as_fd(), name, path)?;
        }
        Self::open_in(parent.as_fd(), name, path, OwnerRule::Ours)?.ok_or_else(|| no_bpf_fs(path))
    }

    /// Opens a directory in this one. Its owner is this one's, root or this account.
    pub(super) fn child(&self, name: &str) -> Result<Option<BpfDirectory>> {
        let path = self.path.join(name);
        let Some(child) = Self::open_in(self.file.as_fd(), name.as_ref(), &path, OwnerRule::Any)? else {
            return Ok(None);
        };
        if child.owner != self.owner && !is_trusted(child.owner) {
            return Err(wrong_owner(&path, &fstat(&child.file).map_err(io::Error::from)?));
        }
        Ok(Some(child))
    }

    /// Makes a directory in this one, unless it exists.
    pub(super) fn create_child(&self, name: &str) -> Result<BpfDirectory> {
        let path = self.path.join(name);
        make(self.file.as_fd(), name.as_ref(), &path)?;
        self.child(name)?.with_context(|| format!("{} has been removed", path.display()))
    }

    fn open_in(parent: BorrowedFd<'_>, name: &OsStr, path: &Path, rule: OwnerRule) -> Result<Option<BpfDirectory>> {
        let Some(file) = open_directory(parent, name, path, OFlag::O_RDONLY | OFlag::O_NOFOLLOW)? else {
            return Ok(None);
        };
        if !is_in_bpf_fs(file.as_fd())? {
            return Ok(None);
        }
        let found = fstat(&file).map_err(io::Error::from)?;
        if rule == OwnerRule::Ours && !is_trusted(found.st_uid) {
            return Err(wrong_owner(path, &found));
        }
        if found.st_mode & 0o022 != 0 {
            return untrusted(format!(
                "other accounts may write to {} ({}); type `chmod go-w {}` after a look at what is in it",
                path.display(),
                owner_and_mode(&found),
                path.display()
            ));
        }
        // Not a duplicate, which would share a lock.
        let parent = openat(parent, ".", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
        let parent = parent.map_err(io::Error::from).with_context(|| format!("cannot open {}/..", path.display()))?;
        let (file, owner) = (File::from(file), found.st_uid);
        Ok(Some(BpfDirectory { file, parent, name: name.to_owned(), path: path.to_owned(), owner }))
    }

    /// The path that it was opened by, for messages.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// User id of the owner.
    pub(super) fn owner(&self) -> u32 {
        self.owner
    }

    /// Names of the entries.
    pub(super) fn names(&self) -> Result<Vec<String>> {
        names_in(self.file.as_fd()).with_context(|| format!("cannot read {}", self.path.display()))
    }

    /// True if there is an entry of this name, of whatever kind.
    pub(super) fn has(&self, name: &str) -> bool {
        fstatat(&self.file, name, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok()
    }

    /// Pins an object under this name, which must be free.
    pub(super) fn pin(&self, object: BorrowedFd<'_>, name: &str) -> Result<()> {
        let path = format!("{}/{name}", proc_path(self.file.as_fd()).display());
        let path = CString::new(path).context("a name contains a zero byte")?;
        // SAFETY: the path is valid for the whole call, and the descriptor is borrowed for as long.
        let result = unsafe { libbpf_sys::bpf_obj_pin(object.as_raw_fd(), path.as_ptr()) };
        if result < 0 {
            return Err(explain(&io::Error::from_raw_os_error(-result).into(), &self.path.join(name)));
        }
        Ok(())
    }

    /// Opens a pin with `open`, which gets a path that names the pin itself.
    pub(super) fn open_pin<T, E>(&self, name: &str, open: impl FnOnce(&Path) -> Result<T, E>) -> Result<T>
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let what = || format!("cannot open the pin {}", self.path.join(name).display());
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let pin = openat(&self.file, name, flags, Mode::empty()).map_err(io::Error::from).with_context(what)?;
        let found = fstat(&pin).map_err(io::Error::from).with_context(what)?;
        if kind_of(&found) != SFlag::S_IFREG || found.st_uid != self.owner {
            return untrusted(format!("{}: it is a link, or of another owner ({})", what(), owner_and_mode(&found)));
        }
        open(&proc_path(pin.as_fd())).with_context(what)
    }

    /// Removes a pin, or a symbolic link. Nothing happens if there is none.
    pub(super) fn unlink(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.file, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Removes this directory, which must be empty.
    pub(super) fn remove(&self) -> io::Result<()> {
        Ok(unlinkat(&self.parent, self.name.as_os_str(), UnlinkatFlags::RemoveDir)?)
    }

    /// Locks the directory until this value is dropped.
    ///
    /// # Errors
    /// When another process holds the lock for some seconds.
    pub(super) fn lock(&self) -> Result<()> {
        let deadline = Instant::now() + LOCK_TIMEOUT;
        while !self.try_lock()? {
            if Instant::now() >= deadline {
                let path = self.path.display();
                let holder = self.lock_holder().map_or_else(
                    || format!("`fuser {path}` shows the process that holds it"),
                    |pid| format!("the process {pid} holds it"),
                );
                bail!("cannot lock {path} within {} s: {holder}; end that process", LOCK_TIMEOUT.as_secs());
            }
            thread::sleep(LOCK_RETRY);
        }
        Ok(())
    }

    /// As [`BpfDirectory::lock`], without waiting. False if another process holds the lock.
    pub(super) fn try_lock(&self) -> Result<bool> {
        match self.file.try_lock() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => {
                Err(error).with_context(|| format!("cannot lock {}", self.path.display()))
            }
        }
    }

    /// The process that holds the lock, if it is in this PID namespace.
    fn lock_holder(&self) -> Option<u32> {
        let found = self.file.metadata().ok()?;
        let wanted = format!("{:02x}:{:02x}:{}", major(found.dev()), minor(found.dev()), found.ino());
        let locks = fs::read_to_string("/proc/locks").ok()?;
        // 1: FLOCK  ADVISORY  WRITE 4711 00:27:334781 0 EOF
        let holder = |line: &str| -> Option<u32> {
            let mut fields = line.split_whitespace().skip_while(|field| *field != "FLOCK").skip(3);
            let pid = fields.next()?.parse().ok()?;
            (pid > 0 && fields.next()? == wanted).then_some(pid)
        };
        locks.lines().find_map(holder)
    }
}

/// Names of the directories beside this one, and the directory that they are in.
pub(super) fn siblings(path: &Path) -> Result<Option<(OwnedFd, Vec<String>)>> {
    let Some(parent) = open_parent(path)?.filter(|parent| is_in_bpf_fs(parent.as_fd()).unwrap_or(false)) else {
        return Ok(None);
    };
    let own = name_of(path)?.to_string_lossy().into_owned();
    let names = names_in(parent.as_fd())?.into_iter().filter(|name| *name != own).collect();
    Ok(Some((parent, names)))
}

/// Opens a directory in `parent`, of any owner.
pub(super) fn open_sibling(parent: &OwnedFd, name: &str) -> Result<Option<BpfDirectory>> {
    BpfDirectory::open_in(parent.as_fd(), name.as_ref(), Path::new(name), OwnerRule::Any)
}

/// Opens the directory that `path` is in, with `O_PATH`. `None` if it does not exist.
fn open_parent(path: &Path) -> Result<Option<OwnedFd>> {
    let start = if path.is_absolute() { "/" } else { "." };
    let mut shown = PathBuf::from(start);
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let opened = openat(nix::fcntl::AT_FDCWD, start, flags, Mode::empty());
    let mut directory = opened.map_err(io::Error::from).with_context(|| format!("cannot open {start}"))?;
    for component in path.parent().into_iter().flat_map(Path::components) {
        if matches!(component, Component::RootDir | Component::CurDir) {
            continue;
        }
        let follow = if is_in_bpf_fs(directory.as_fd())? { OFlag::O_NOFOLLOW } else { OFlag::empty() };
        shown.push(component);
        match open_directory(directory.as_fd(), component.as_os_str(), &shown, OFlag::O_PATH | follow)? {
            Some(next) => directory = next,
            None => return Ok(None),
        }
        if is_in_bpf_fs(directory.as_fd())? {
            check_ancestor(directory.as_fd(), &shown)?;
        }
    }
    Ok(Some(directory))
}

/// In a directory with the sticky bit, others cannot replace what root or this account owns.
fn check_ancestor(directory: BorrowedFd<'_>, path: &Path) -> Result<()> {
    let found = fstat(directory).map_err(io::Error::from)?;
    let replaceable = found.st_mode & 0o022 != 0 && found.st_mode & libc::S_ISVTX == 0;
    if is_trusted(found.st_uid) && !replaceable {
        return Ok(());
    }
    untrusted(format!(
        "other accounts may replace what is in {} ({}); {CLOSE_BPF_FS}",
        path.display(),
        owner_and_mode(&found)
    ))
}

/// Opens a directory. `None` if there is no entry of this name.
fn open_directory(parent: BorrowedFd<'_>, name: &OsStr, path: &Path, flags: OFlag) -> Result<Option<OwnedFd>> {
    match openat(parent, name, flags | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()) {
        Ok(directory) => Ok(Some(directory)),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno @ (Errno::ENOTDIR | Errno::ELOOP)) => match fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(found) => {
                let kind = if kind_of(&found) == SFlag::S_IFLNK { "a symbolic link" } else { "no directory" };
                untrusted(format!(
                    "{} is {kind} ({}); remove it (`rm {}`), and {CLOSE_BPF_FS}",
                    path.display(),
                    owner_and_mode(&found),
                    path.display()
                ))
            }
            Err(_) => Err(io::Error::from(errno)).with_context(|| format!("cannot open {}", path.display())),
        },
        Err(errno) => Err(io::Error::from(errno)).with_context(|| format!("cannot open {}", path.display())),
    }
}

fn make(parent: BorrowedFd<'_>, name: &OsStr, path: &Path) -> Result<()> {
    match mkdirat(parent, name, Mode::S_IRWXU) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(errno) => Err(explain(&io::Error::from(errno).into(), path)),
    }
}

fn names_in(directory: BorrowedFd<'_>) -> io::Result<Vec<String>> {
    let name = |entry: io::Result<fs::DirEntry>| entry.map(|entry| entry.file_name().to_string_lossy().into_owned());
    fs::read_dir(proc_path(directory))?.map(name).collect()
}

/// A path to what is open. It is not looked up again.
fn proc_path(file: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn name_of(path: &Path) -> Result<&OsStr> {
    path.file_name().with_context(|| format!("{} does not name a directory", path.display()))
}

fn is_in_bpf_fs(file: BorrowedFd<'_>) -> Result<bool> {
    let found = fstatfs(file).map_err(io::Error::from).context("cannot identify the file system of the pins")?;
    Ok(found.filesystem_type() == BPF_FS)
}

fn has_bpf_ancestor(path: &Path) -> bool {
    let there = path.ancestors().skip(1).find_map(|ancestor| File::open(ancestor).ok());
    there.is_some_and(|there| is_in_bpf_fs(there.as_fd()).unwrap_or(false))
}

fn is_trusted(owner: u32) -> bool {
    owner == 0 || owner == Uid::effective().as_raw()
}

fn kind_of(found: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT
}

fn owner_and_mode(found: &FileStat) -> String {
    format!("owner uid {}, mode {:04o}", found.st_uid, found.st_mode & 0o7777)
}

fn untrusted<T>(text: String) -> Result<T> {
    Err(UntrustedDirectory(text).into())
}

fn wrong_owner(path: &Path, found: &FileStat) -> anyhow::Error {
    let (shown, us) = (path.display(), Uid::effective());
    UntrustedDirectory(format!(
        "{shown} is neither root's nor this account's, uid {us} ({}); look at what is in it, then type \
         `udp-fanout detach --pin-path {shown}` as root to remove pins of another account, or `chown {us} {shown}`; and \
         {CLOSE_BPF_FS}",
        owner_and_mode(found)
    ))
    .into()
}

fn no_bpf_fs(path: &Path) -> anyhow::Error {
    anyhow!(
        "cannot pin the TC program in {}: there is no BPF file system; mount one (`mount -t bpf -o mode=0700 bpf \
         /sys/fs/bpf`, in a container the host's /sys/fs/bpf), or set on_exit = \"detach\"",
        path.display()
    )
}

fn explain(error: &anyhow::Error, path: &Path) -> anyhow::Error {
    anyhow!(
        "cannot pin the TC program at {}: {error:#}; let the daemon write there (root, or the directory's owner), or set \
         on_exit = \"detach\"",
        path.display()
    )
}
