//! Pins: the program and its maps in a BPF file system, where they outlive the daemon and the next one finds them.
//!
//! ```text
//! pin_path/                   shared by the daemons of all network namespaces
//!   4711/                     the program's id
//!     program, about, heartbeat, STATS, …
//!     link-2                  the BPF link of a TCX program on the interface with index 2
//! ```
//!
//! A live daemon holds a lock on its program's directory; a directory without a lock is stale. Its version and
//! network namespace are in the map `about`.

use std::ffi::CString;
use std::fs::{self, DirBuilder, DirEntry, File};
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use libbpf_rs::{MapCore, MapHandle, Program, libbpf_sys};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::statfs::{FsType, statfs};
use nix::unistd::Uid;

use super::abi::{MAX_IMPORTED, OLDEST_PINS_VERSION, PINS_VERSION};
use super::counters::CounterMaps;
use super::heartbeat::Heartbeat;
use super::maps::{lookup, store};
use super::skel::{LoadedProgram, types};

/// `BPF_FS_MAGIC`.
const BPF_FS: FsType = FsType(libc::BPF_FS_MAGIC as _);
/// Name of the program's pin.
const PROGRAM: &str = "program";
/// Prefix of the pins of BPF links, which hold TCX programs on interfaces.
const LINK: &str = "link-";
/// The maps with counters, in the order of [`PinnedCounters`].
const MAPS: [&str; 9] = [
    "STATS",
    "DROPS",
    "COPY_DROPS",
    "DOWNSTREAM_STAT",
    "FRAGMENT_STAT",
    "downstreams",
    "listener_names",
    "stat_owners",
    "carried_counts",
];
/// Name of the heartbeat's pin.
const HEARTBEAT: &str = "heartbeat";
/// Names of pins in version 2 that differ, after today's names. The maps' layouts are the same.
const VERSION_2_NAMES: [(&str, &str); 4] =
    [("listener_names", "names"), ("stat_owners", "owners"), ("carried_counts", "ledger"), (HEARTBEAT, "lease")];

/// Maps whose values begin with this many bytes of counters. The rest may differ between versions.
const COUNTERS_FIRST: [(&str, u32); 2] = [("STATS", 6 * 8), ("DOWNSTREAM_STAT", 2 * 8)];

/// The pins of this daemon's program. Dropping them removes them, unless they are persistent.
#[derive(Debug)]
pub struct Pins {
    path: PathBuf,
    directory: Option<PinDirectory>,
    persistent: bool,
}

/// The directory of a program's pins, locked.
#[derive(Debug)]
struct PinDirectory {
    path: PathBuf,
    _lock: Flock<File>,
}

/// The pins of a daemon that no longer runs.
#[derive(Debug)]
pub struct StalePins {
    directory: PinDirectory,
    id: u32,
    /// The program, to restore it.
    program: Option<OwnedFd>,
    /// Its heartbeat, to keep it acting.
    heartbeat: Option<Heartbeat>,
    /// Its counters, or why they cannot be read.
    counters: Result<PinnedCounters>,
}

/// The pinned maps with counters.
#[derive(Debug)]
struct PinnedCounters {
    maps: Vec<MapHandle>,
    about: types::pins_about,
}

impl Pins {
    /// Pins a program and its maps below `path`, which is created if necessary.
    ///
    /// # Errors
    /// In one line with the fix: there is no BPF file system, or no permission to write there.
    pub fn new(path: &Path, loaded: &LoadedProgram) -> Result<Pins> {
        let id = Program::id_from_fd(loaded.program.as_fd()).context("cannot read the program's id")?;
        ensure_bpf_fs(path)?;
        create_directory(path)?;
        let _order = lock_parent(path)?;
        let own = path.join(id.to_string());
        // The id is this program's now, so these pins are stale.
        remove(&own)?;
        create_directory(&own)?;
        let directory = lock(&own)?.with_context(|| format!("{} is locked already", own.display()))?;
        let pins = Pins { path: path.to_owned(), directory: Some(directory), persistent: false };
        let about = types::pins_about { version: PINS_VERSION, ..own_namespace()? };
        store(&loaded.about, &0u32, &about)?;
        pin(loaded.program.as_fd(), &own.join(PROGRAM))?;
        let all = maps_of(loaded).into_iter().zip(MAPS);
        for (map, name) in all.chain([(&loaded.heartbeat, HEARTBEAT), (&loaded.about, "about")]) {
            pin(map.as_fd(), &own.join(name))?;
        }
        Ok(pins)
    }

    /// The directory above the program's own.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Pins the link of a TCX program, replacing an earlier pin for this interface.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn pin_link(&self, interface: u32, link: BorrowedFd<'_>) -> Result<()> {
        let Some(directory) = &self.directory else { return Ok(()) };
        let path = directory.path.join(link_name(interface));
        // There may be none, or one of another interface that had this index.
        let _ = fs::remove_file(&path);
        pin(link, &path)
    }

    /// Unpins the link of a TCX program.
    pub fn unpin_link(&self, interface: u32) {
        if let Some(directory) = &self.directory {
            let _ = fs::remove_file(directory.path.join(link_name(interface)));
        }
    }

    /// Whether the pins stay when this value is dropped.
    pub fn set_persistent(&mut self, persistent: bool) {
        self.persistent = persistent;
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        if let Some(directory) = self.directory.take()
            && !self.persistent
        {
            directory.remove_or_warn();
            // Fails if other pins are there.
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// Removes the directory for pins if it is empty and not needed. A directory that belongs to another user, as under
/// systemd, is kept while any of that user's processes runs: a daemon of that user could not create it again.
pub fn remove_unused(path: &Path) {
    let owner = fs::metadata(path).map(|found| found.uid());
    if owner.is_ok_and(|owner| owner == Uid::effective().as_raw() || !has_processes(owner)) {
        // Fails if it is not empty.
        let _ = fs::remove_dir(path);
    }
}

fn has_processes(user: u32) -> bool {
    let is_process = |entry: &DirEntry| entry.file_name().to_string_lossy().parse::<u32>().is_ok();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten().filter(is_process);
    processes.filter_map(|process| process.metadata().ok()).any(|process| process.uid() == user)
}

impl PinDirectory {
    fn remove_or_warn(self) {
        if let Err(error) = remove(&self.path) {
            tracing::warn!("{error:#}; remove it with `rm -r {}`", self.path.display());
        }
    }
}

impl StalePins {
    /// Finds stale pins below `path`, of this network namespace or of any.
    ///
    /// # Errors
    /// When the directory exists and cannot be read.
    pub fn find(path: &Path, of_any_namespace: bool) -> Result<Vec<StalePins>> {
        let entries = match fs::read_dir(path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read the pins in {}", path.display()));
            }
        };
        let _order = lock_parent(path)?;
        let us = own_namespace()?;
        let mut all = Vec::new();
        for entry in entries.flatten() {
            let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let Some(directory) = lock(&entry.path())? else { continue };
            let about = about(&directory.path);
            let theirs = about
                .as_ref()
                .is_some_and(|about| (about.netns_device, about.netns_inode) != (us.netns_device, us.netns_inode));
            if of_any_namespace || !theirs {
                all.push(StalePins::open(directory, id, about));
            }
        }
        all.sort_by_key(|stale| stale.id);
        Ok(all)
    }

    fn open(directory: PinDirectory, id: u32, about: Option<types::pins_about>) -> StalePins {
        let version = about.as_ref().map_or(PINS_VERSION, |about| about.version);
        let pinned = |name| MapHandle::from_pinned_path(directory.path.join(pin_name(name, version)));
        let program = Program::fd_from_pinned_path(directory.path.join(PROGRAM)).ok();
        let heartbeat = pinned(HEARTBEAT).ok().and_then(|map| Heartbeat::new(&map).ok());
        let counters = about.context("they are incomplete").and_then(|about| {
            ensure!(
                (OLDEST_PINS_VERSION..=PINS_VERSION).contains(&version),
                "they have version {version}, and this udp-fanout reads {OLDEST_PINS_VERSION} to {PINS_VERSION}"
            );
            let maps =
                MAPS.iter().map(|name| pinned(name).with_context(|| format!("{} is missing", pin_name(name, version))));
            Ok(PinnedCounters { maps: maps.collect::<Result<_>>()?, about })
        });
        StalePins { directory, id, program, heartbeat, counters }
    }

    /// The program's id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The directory of these pins.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.directory.path
    }

    /// True if the program is attached to this interface as a TCX program.
    #[must_use]
    pub fn has_link(&self, interface: u32) -> bool {
        self.directory.path.join(link_name(interface)).exists()
    }

    /// True if the program is attached to any interface as a TCX program.
    #[must_use]
    pub fn has_any_link(&self) -> bool {
        let entries = fs::read_dir(&self.directory.path).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with(LINK))
    }

    /// Detaches the TCX program from this interface.
    ///
    /// # Errors
    /// With the kernel's reason.
    pub fn detach_link(&self, interface: u32) -> Result<()> {
        detach_pinned_link(&self.directory.path.join(link_name(interface)))
    }

    /// Detaches the TCX program from all interfaces. No new packet reaches it once this returns.
    ///
    /// # Errors
    /// Names one interface that failed; the others are detached.
    pub fn detach_all_links(&self) -> Result<()> {
        let entries = fs::read_dir(&self.directory.path).into_iter().flatten().flatten();
        let links = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(LINK));
        links.map(|entry| detach_pinned_link(&entry.path())).fold(Ok(()), Result::and)
    }

    /// The pinned program, if it could be opened.
    #[must_use]
    pub fn program(&self) -> Option<BorrowedFd<'_>> {
        self.program.as_ref().map(AsFd::as_fd)
    }

    /// The pinned heartbeat, if it could be mapped.
    pub fn heartbeat(&mut self) -> Option<&mut Heartbeat> {
        self.heartbeat.as_mut()
    }

    /// The maps with its counters.
    ///
    /// # Errors
    /// Why they cannot be read, for instance because they have another version.
    pub fn maps(&self, loaded: &LoadedProgram) -> Result<CounterMaps<'_>> {
        let counters = self.counters.as_ref().map_err(|error| anyhow!("{error:#}"))?;
        for (theirs, ours) in counters.maps.iter().zip(maps_of(loaded)) {
            let name = ours.name().to_string_lossy().into_owned();
            let shape = |map: &MapHandle| (map.map_type(), map.key_size());
            let sized = match COUNTERS_FIRST.iter().find(|(counted, _)| *counted == name) {
                Some(&(_, counters)) => theirs.value_size() >= counters,
                None => theirs.value_size() == ours.value_size(),
            };
            ensure!(shape(theirs) == shape(ours) && sized, "map {name} has another layout");
        }
        let [
            stats,
            drops,
            copy_drops,
            downstream_stats,
            fragment_stats,
            downstreams,
            listener_names,
            stat_owners,
            carried_counts,
        ] = counters.maps.as_slice()
        else {
            bail!("they are incomplete")
        };
        let inherited = counters.about.imported_count > 0;
        Ok(CounterMaps {
            stats,
            drops,
            copy_drops,
            downstream_stats,
            fragment_stats,
            downstreams,
            listener_names,
            stat_owners,
            carried_counts,
            inherited,
        })
    }

    /// True if its `carried_counts` include those of this program.
    #[must_use]
    pub fn has_imported(&self, id: u32) -> bool {
        self.counters.as_ref().is_ok_and(|counters| {
            let count = (counters.about.imported_count as usize).min(MAX_IMPORTED);
            counters.about.imported[..count].contains(&id)
        })
    }

    /// Detaches TCX programs and removes the pins. The program is freed with its last filter.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn remove(self) -> Result<()> {
        self.detach_all_links()?;
        remove(&self.directory.path)
    }
}

/// Records that the counts of these programs are in `carried_counts`, completely. This is the commit: from now on
/// those counts are valid, and the programs' own maps are not.
///
/// # Errors
/// When the kernel refuses.
pub fn record_imported(loaded: &LoadedProgram, ids: &[u32]) -> Result<()> {
    let mut about: types::pins_about = lookup(&loaded.about, &0u32)?.context("the map about is empty")?;
    let count = ids.len().min(MAX_IMPORTED);
    about.imported[..count].copy_from_slice(&ids[..count]);
    about.imported_count = u32::try_from(count).unwrap_or_default();
    store(&loaded.about, &0u32, &about)
}

/// True if this program is pinned in a sibling of `path`, by a daemon with another `pin_path`.
#[must_use]
pub fn is_pinned_elsewhere(path: &Path, id: u32) -> bool {
    let siblings = path.parent().and_then(|parent| fs::read_dir(parent).ok());
    let mut siblings = siblings.into_iter().flatten().flatten().map(|entry| entry.path());
    siblings.any(|sibling| sibling != path && sibling.join(id.to_string()).join(PROGRAM).exists())
}

/// True if a live daemon of this network namespace has pins below `path`.
///
/// # Errors
/// When the directory exists and cannot be read.
pub fn in_use(path: &Path) -> Result<bool> {
    let us = own_namespace()?;
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        let ours = about(&entry.path())
            .is_some_and(|about| (about.netns_device, about.netns_inode) == (us.netns_device, us.netns_inode));
        if ours && lock(&entry.path())?.is_none() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn maps_of(loaded: &LoadedProgram) -> [&MapHandle; MAPS.len()] {
    [
        &loaded.stats,
        &loaded.drops,
        &loaded.copy_drops,
        &loaded.downstream_stats,
        &loaded.fragment_stats,
        &loaded.downstreams,
        &loaded.listener_names,
        &loaded.stat_owners,
        &loaded.carried_counts,
    ]
}

/// Device and inode of the calling thread's network namespace.
fn own_namespace() -> Result<types::pins_about> {
    let namespace = fs::metadata("/proc/thread-self/ns/net").context("cannot identify the network namespace")?;
    let (netns_device, netns_inode) = (namespace.dev(), namespace.ino());
    Ok(types::pins_about { netns_device, netns_inode, ..types::pins_about::default() })
}

/// Reads the map `about` of some pins, as far as all versions agree on it.
fn about(directory: &Path) -> Option<types::pins_about> {
    let map = MapHandle::from_pinned_path(directory.join("about")).ok()?;
    let known = size_of::<types::pins_about>();
    let mut bytes = map.lookup(&0u32.to_ne_bytes(), libbpf_rs::MapFlags::ANY).ok()??;
    bytes.resize(known, 0);
    super::maps::value_of(&bytes)
}

/// The name of a map's pin in a version.
fn pin_name(name: &'static str, version: u32) -> &'static str {
    let old = VERSION_2_NAMES.iter().find(|&&(now, _)| version == 2 && now == name);
    old.map_or(name, |&(_, old)| old)
}

fn link_name(interface: u32) -> String {
    format!("{LINK}{interface}")
}

fn ensure_bpf_fs(path: &Path) -> Result<()> {
    let there = path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    let kind =
        statfs(there).with_context(|| format!("cannot stat the file system of {}", there.display()))?.filesystem_type();
    ensure!(
        kind == BPF_FS,
        "cannot pin the TC program in {}: there is no BPF file system; mount one (`mount -t bpf bpf /sys/fs/bpf`, in a \
         container the host's /sys/fs/bpf), or set on_exit = \"detach\"",
        path.display()
    );
    Ok(())
}

fn create_directory(path: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(explain(&error.into(), path)),
        _ => Ok(()),
    }
}

fn pin(object: BorrowedFd<'_>, path: &Path) -> Result<()> {
    let name = CString::new(path.as_os_str().as_bytes()).context("a path contains a zero byte")?;
    // SAFETY: the name is valid for the whole call, and the descriptor is borrowed for as long.
    let result = unsafe { libbpf_sys::bpf_obj_pin(object.as_raw_fd(), name.as_ptr()) };
    if result < 0 {
        return Err(explain(&std::io::Error::from_raw_os_error(-result).into(), path));
    }
    Ok(())
}

/// Detaches a TCX program by its pinned link. Unpinning is not enough: the kernel would detach the program only some
/// time later.
fn detach_pinned_link(path: &Path) -> Result<()> {
    let what = || format!("cannot detach the TCX program held by {}", path.display());
    let name = CString::new(path.as_os_str().as_bytes()).context("a path contains a zero byte")?;
    // SAFETY: the name is valid for the whole call.
    let fd = unsafe { libbpf_sys::bpf_obj_get(name.as_ptr()) };
    if fd < 0 {
        return Err(std::io::Error::from_raw_os_error(-fd)).with_context(what);
    }
    // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
    let link = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: takes a number, touches no memory of ours.
    match unsafe { libbpf_sys::bpf_link_detach(link.as_raw_fd()) } {
        0 => {}
        // The interface is gone, or something else has detached the program.
        errno if errno == -libc::ENOLINK => {}
        errno => return Err(std::io::Error::from_raw_os_error(-errno)).with_context(what),
    }
    fs::remove_file(path).with_context(what)
}

fn explain(error: &anyhow::Error, path: &Path) -> anyhow::Error {
    anyhow!(
        "cannot pin the TC program at {}: {error:#}; let the daemon write there (root, or the directory's owner), or set \
         on_exit = \"detach\"",
        path.display()
    )
}

/// Locks the parent directory while pins are created or searched, so that half-made pins are not taken for stale
/// ones.
fn lock_parent(path: &Path) -> Result<Flock<File>> {
    let directory = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    Flock::lock(directory, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("cannot lock {}", path.display()))
}

/// Locks a program's directory; `None` if a live daemon holds the lock.
fn lock(path: &Path) -> Result<Option<PinDirectory>> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(PinDirectory { path: path.to_owned(), _lock: lock })),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(errno).with_context(|| format!("cannot lock {}", path.display())),
    }
}

/// Removes a program's directory with all pins.
fn remove(path: &Path) -> Result<()> {
    let what = || format!("cannot remove the pins in {}", path.display());
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(what),
    };
    for entry in entries {
        fs::remove_file(entry.with_context(what)?.path()).with_context(what)?;
    }
    fs::remove_dir(path).with_context(what)
}
