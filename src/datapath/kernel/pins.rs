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
//! network namespace are in the map `about`. Other accounts may be able to write to the BPF file system: `directory`
//! opens and checks directories, and only pins with names from here are used and removed.

mod directory;

use std::ffi::CString;
use std::fs::{self, DirEntry};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use libbpf_rs::{MapCore, MapHandle, Program, libbpf_sys};
use nix::unistd::Uid;

use self::directory::BpfDirectory;
pub use self::directory::{OwnerRule, UntrustedDirectory};
use super::abi::{MAX_IMPORTED, OLDEST_PINS_VERSION, PINS_VERSION};
use super::counters::CounterMaps;
use super::heartbeat::Heartbeat;
use super::maps::{lookup, store};
use super::skel::{LoadedProgram, types};

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
/// Name of the pin of the map with version and network namespace.
const ABOUT: &str = "about";
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
    /// The directory of this program's pins, locked.
    directory: Option<BpfDirectory>,
    persistent: bool,
}

/// The pins of a daemon that no longer runs.
#[derive(Debug)]
pub struct StalePins {
    /// Locked.
    directory: BpfDirectory,
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
        Self::create(path, loaded).map_err(|error| {
            if !error.is::<UntrustedDirectory>() {
                return error;
            }
            error.context(format!("cannot pin the TC program in {}", path.display()))
        })
    }

    fn create(path: &Path, loaded: &LoadedProgram) -> Result<Pins> {
        let id = Program::id_from_fd(loaded.program.as_fd()).context("cannot read the program's id")?;
        let above = BpfDirectory::create(path)?;
        above.lock()?;
        let name = id.to_string();
        // The id is this program's now, so these pins are stale.
        if let Some(stale) = above.child(&name)? {
            remove(&stale)?;
        }
        let directory = above.create_child(&name)?;
        ensure!(directory.try_lock()?, "{} is locked already", directory.path().display());
        let pinned = pin_all(&directory, loaded);
        let pins = Pins { path: path.to_owned(), directory: Some(directory), persistent: false };
        // Otherwise dropping them removes what has been pinned.
        pinned.map(|()| pins)
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
        let name = link_name(interface);
        // There may be none, or one of another interface that had this index.
        let _ = directory.unlink(&name);
        directory.pin(link, &name)
    }

    /// Unpins the link of a TCX program.
    pub fn unpin_link(&self, interface: u32) {
        if let Some(directory) = &self.directory {
            let _ = directory.unlink(&link_name(interface));
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
            if let Err(error) = remove(&directory) {
                tracing::warn!("{error:#}; remove it with `rm -r {}`", directory.path().display());
            }
            remove_if_empty(&self.path, OwnerRule::Ours);
        }
    }
}

/// Removes the directory for pins if it is empty.
pub fn remove_if_empty(path: &Path, rule: OwnerRule) {
    if let Ok(Some(directory)) = BpfDirectory::open(path, rule) {
        // Fails if other pins are there.
        let _ = directory.remove();
    }
}

/// Removes the directory for pins if it is empty and not needed. A directory that belongs to another user, as under
/// systemd, is kept while any of that user's processes runs: a daemon of that user could not create it again.
pub fn remove_unused(path: &Path) {
    let Ok(Some(directory)) = BpfDirectory::open(path, OwnerRule::Any) else { return };
    if directory.owner() == Uid::effective().as_raw() || !has_processes(directory.owner()) {
        // Fails if it is not empty.
        let _ = directory.remove();
    }
}

fn has_processes(user: u32) -> bool {
    let is_process = |entry: &DirEntry| entry.file_name().to_string_lossy().parse::<u32>().is_ok();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten().filter(is_process);
    processes.filter_map(|process| process.metadata().ok()).any(|process| process.uid() == user)
}

impl StalePins {
    /// Finds stale pins below `path`, of this network namespace or of any.
    ///
    /// # Errors
    /// When the directory exists and cannot be read or locked; [`UntrustedDirectory`] when it breaks `rule`.
    pub fn find(path: &Path, of_any_namespace: bool, rule: OwnerRule) -> Result<Vec<StalePins>> {
        let Some(above) = BpfDirectory::open(path, rule)? else { return Ok(Vec::new()) };
        above.lock()?;
        let us = own_namespace()?;
        let mut all = Vec::new();
        for name in above.names()? {
            let Ok(id) = name.parse() else { continue };
            let directory = match above.child(&name) {
                Ok(Some(directory)) => directory,
                Ok(None) => continue,
                Err(error) if error.is::<UntrustedDirectory>() => {
                    tracing::warn!("ignored what is not a directory of pins: {error:#}");
                    continue;
                }
                Err(error) => return Err(error),
            };
            if !directory.try_lock()? {
                continue;
            }
            let about = about(&directory);
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

    fn open(directory: BpfDirectory, id: u32, about: Option<types::pins_about>) -> StalePins {
        let version = about.as_ref().map_or(PINS_VERSION, |about| about.version);
        let pinned = |name| directory.open_pin(pin_name(name, version), |path| MapHandle::from_pinned_path(path));
        let program = directory.open_pin(PROGRAM, |path| Program::fd_from_pinned_path(path)).ok();
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
        self.directory.path()
    }

    /// True if the program is attached to this interface as a TCX program.
    #[must_use]
    pub fn has_link(&self, interface: u32) -> bool {
        self.directory.has(&link_name(interface))
    }

    /// True if the program is attached to any interface as a TCX program.
    #[must_use]
    pub fn has_any_link(&self) -> bool {
        !link_names(&self.directory).is_empty()
    }

    /// Detaches the TCX program from this interface.
    ///
    /// # Errors
    /// With the kernel's reason.
    pub fn detach_link(&self, interface: u32) -> Result<()> {
        detach_pinned_link(&self.directory, &link_name(interface))
    }

    /// Detaches the TCX program from all interfaces. No new packet reaches it once this returns.
    ///
    /// # Errors
    /// Names one interface that failed; the others are detached.
    pub fn detach_all_links(&self) -> Result<()> {
        let links = link_names(&self.directory);
        links.iter().map(|name| detach_pinned_link(&self.directory, name)).fold(Ok(()), Result::and)
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
        remove(&self.directory)
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
    let Ok(Some((parent, names))) = directory::siblings(path) else { return false };
    let pinned = |name: &String| {
        let program = directory::open_sibling(&parent, name).ok()??.child(&id.to_string()).ok()??;
        let program = program.open_pin(PROGRAM, |path| Program::fd_from_pinned_path(path)).ok()?;
        Program::id_from_fd(program.as_fd()).ok()
    };
    names.iter().any(|name| pinned(name) == Some(id))
}

/// True if a live daemon of this network namespace has pins below `path`, whoever owns them.
///
/// # Errors
/// When the directory exists and cannot be read.
pub fn in_use(path: &Path) -> Result<bool> {
    let us = own_namespace()?;
    let Some(above) = BpfDirectory::open(path, OwnerRule::Any)? else { return Ok(false) };
    for name in above.names()? {
        let Ok(Some(directory)) = above.child(&name) else { continue };
        let ours = about(&directory)
            .is_some_and(|about| (about.netns_device, about.netns_inode) == (us.netns_device, us.netns_inode));
        if ours && !directory.try_lock()? {
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
fn about(directory: &BpfDirectory) -> Option<types::pins_about> {
    let map = directory.open_pin(ABOUT, |path| MapHandle::from_pinned_path(path)).ok()?;
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

/// Pins the program and its maps.
fn pin_all(directory: &BpfDirectory, loaded: &LoadedProgram) -> Result<()> {
    let about = types::pins_about { version: PINS_VERSION, ..own_namespace()? };
    store(&loaded.about, &0u32, &about)?;
    directory.pin(loaded.program.as_fd(), PROGRAM)?;
    let all = maps_of(loaded).into_iter().zip(MAPS);
    let mut all = all.chain([(&loaded.heartbeat, HEARTBEAT), (&loaded.about, ABOUT)]);
    all.try_for_each(|(map, name)| directory.pin(map.as_fd(), name))
}

/// Names of the pins of BPF links.
fn link_names(directory: &BpfDirectory) -> Vec<String> {
    let is_link = |name: &str| name.strip_prefix(LINK).is_some_and(|index| index.parse::<u32>().is_ok());
    directory.names().unwrap_or_default().into_iter().filter(|name| is_link(name)).collect()
}

/// Detaches a TCX program by its pinned link. Unpinning is not enough: the kernel would detach the program only some
/// time later.
fn detach_pinned_link(directory: &BpfDirectory, name: &str) -> Result<()> {
    let what = || format!("cannot detach the TCX program held by {}", directory.path().join(name).display());
    let link = directory.open_pin(name, open_object).with_context(what)?;
    // SAFETY: takes a number, touches no memory of ours.
    match unsafe { libbpf_sys::bpf_link_detach(link.as_raw_fd()) } {
        0 => {}
        // The interface is gone, or something else has detached the program.
        errno if errno == -libc::ENOLINK => {}
        errno => return Err(io::Error::from_raw_os_error(-errno)).with_context(what),
    }
    directory.unlink(name).with_context(what)
}

fn open_object(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the path is valid for the whole call.
    let fd = unsafe { libbpf_sys::bpf_obj_get(path.as_ptr()) };
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(-fd));
    }
    // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Removes a program's directory with the pins that a daemon makes, of any version. Anything else in it is kept, and the
/// directory with it.
fn remove(directory: &BpfDirectory) -> Result<()> {
    let what = || format!("cannot remove the pins in {}", directory.path().display());
    let old_names = VERSION_2_NAMES.iter().map(|&(_, old)| old);
    for name in MAPS.into_iter().chain([PROGRAM, ABOUT, HEARTBEAT]).chain(old_names) {
        directory.unlink(name).with_context(what)?;
    }
    for name in link_names(directory) {
        directory.unlink(&name).with_context(what)?;
    }
    let unknown = directory.names().with_context(what)?;
    ensure!(unknown.is_empty(), "{}: udp-fanout has not made {}", what(), unknown.join(", "));
    directory.remove().with_context(what)
}
