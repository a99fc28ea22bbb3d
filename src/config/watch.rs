//! Notices that the configuration file may have changed.
//!
//! The caller reads the file again and compares. Watched are the directory of the file and every directory on the way
//! with a symbolic link in it: the file may be written, replaced, or reached through a link that is switched, as Kubernetes
//! does with the `..data` of a mounted ConfigMap. A file that is being written counts as changed when it is closed.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};

/// Most symbolic links followed; the kernel's own limit.
const MOST_LINKS: usize = 40;

/// Watches one configuration file. A [`mio::event::Source`].
#[derive(Debug)]
pub struct ConfigWatcher {
    inotify: Inotify,
    path: PathBuf,
    directories: HashMap<WatchDescriptor, WatchedDirectory>,
    /// Every directory on the way to the file is watched.
    complete: bool,
}

/// A directory, and which of its entries lead to the file.
#[derive(Debug)]
struct WatchedDirectory {
    path: PathBuf,
    names: BTreeSet<OsString>,
}

impl ConfigWatcher {
    /// Starts to watch the file, which need not exist yet.
    ///
    /// # Errors
    /// When the kernel has no inotify instance left.
    pub fn new(path: &Path) -> Result<ConfigWatcher> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).context(
            "cannot watch the configuration file (inotify; sysctl fs.inotify.max_user_instances); send SIGHUP after a change",
        )?;
        let path = std::path::absolute(path).context("cannot find out the current directory")?;
        let mut watch = ConfigWatcher { inotify, path, directories: HashMap::new(), complete: false };
        watch.update_watches();
        Ok(watch)
    }

    /// Reads the events since the last call. True if the file may have changed. Does not block.
    pub fn drain(&mut self) -> bool {
        let mut changed = false;
        loop {
            match self.inotify.read_events() {
                Ok(events) => changed |= events.iter().any(|event| self.is_relevant(event)),
                Err(Errno::EINTR) => {}
                // EAGAIN: no more events.
                Err(_) => break,
            }
        }
        if changed {
            self.update_watches();
        }
        changed
    }

    /// Watches directories that did not exist before. True if there are any: the file may have changed. Cheap while all are
    /// watched; call it every few seconds.
    pub fn rescan(&mut self) -> bool {
        if self.complete {
            return false;
        }
        let before = self.directories.len();
        self.update_watches();
        self.complete || self.directories.len() != before
    }

    /// Watches exactly the directories that lead to the file now.
    fn update_watches(&mut self) {
        let interesting = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        let mut directories: HashMap<WatchDescriptor, WatchedDirectory> = HashMap::new();
        self.complete = true;
        for (directory, name) in watch_points(&self.path) {
            // A directory that is watched already gives the same descriptor again.
            match self.inotify.add_watch(&directory, interesting) {
                Ok(descriptor) => {
                    let entry = WatchedDirectory { path: directory, names: BTreeSet::new() };
                    directories.entry(descriptor).or_insert(entry).names.insert(name);
                }
                Err(error) => {
                    self.complete = false;
                    tracing::debug!(directory = %directory.display(), %error, "cannot watch for a configuration file");
                }
            }
        }
        for descriptor in self.directories.keys().filter(|descriptor| !directories.contains_key(descriptor)) {
            // An error means that the directory is gone, and its watch with it.
            let _ = self.inotify.rm_watch(*descriptor);
        }
        self.directories = directories;
    }

    fn is_relevant(&self, event: &InotifyEvent) -> bool {
        if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            return true;
        }
        let Some(directory) = self.directories.get(&event.wd) else { return false };
        let Some(name) = &event.name else { return true };
        directory.names.contains(name)
            && !(event.mask.contains(AddWatchFlags::IN_CREATE) && is_being_written(&directory.path.join(name)))
    }
}

/// True for a new file that is still being written: closing it is an event of its own. Symbolic links and hard links are
/// complete at once.
fn is_being_written(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|file| file.is_file() && file.nlink() == 1)
}

/// The directory entries that decide which file the path leads to: the file's own, and those of symbolic links.
fn watch_points(path: &Path) -> Vec<(PathBuf, OsString)> {
    let mut watch_points = Vec::new();
    let mut at = PathBuf::from("/");
    let mut ahead: VecDeque<OsString> = steps(path).collect();
    let mut links = 0;
    while let Some(step) = ahead.pop_front() {
        if step == ".." {
            at.pop();
            continue;
        }
        let next = at.join(&step);
        match fs::read_link(&next) {
            Ok(target) if links < MOST_LINKS => {
                links += 1;
                watch_points.push((at.clone(), step));
                if target.is_absolute() {
                    at = PathBuf::from("/");
                }
                let whole: Vec<OsString> = steps(&target).collect();
                whole.into_iter().rev().for_each(|step| ahead.push_front(step));
            }
            _ if ahead.is_empty() => watch_points.push((at.clone(), step)),
            _ => at = next,
        }
    }
    watch_points
}

/// The names in a path, `..` among them.
fn steps(path: &Path) -> impl Iterator<Item = OsString> {
    let name = |component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsStr::new("..").to_owned()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    };
    path.components().filter_map(name)
}

impl mio::event::Source for ConfigWatcher {
    fn register(&mut self, registry: &Registry, token: Token, interests: Interest) -> io::Result<()> {
        SourceFd(&self.inotify.as_fd().as_raw_fd()).register(registry, token, interests)
    }

    fn reregister(&mut self, registry: &Registry, token: Token, interests: Interest) -> io::Result<()> {
        SourceFd(&self.inotify.as_fd().as_raw_fd()).reregister(registry, token, interests)
    }

    fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        SourceFd(&self.inotify.as_fd().as_raw_fd()).deregister(registry)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write as _;
    use std::os::unix::fs::symlink;

    use super::*;

    struct Bench {
        directory: tempfile::TempDir,
        watch: ConfigWatcher,
    }

    impl Bench {
        /// A file `c.toml` that is there, watched.
        fn new() -> Bench {
            let directory = tempfile::tempdir().unwrap();
            fs::write(directory.path().join("c.toml"), "a").unwrap();
            let mut watch = ConfigWatcher::new(&directory.path().join("c.toml")).unwrap();
            assert!(watch.complete && !watch.drain());
            Bench { directory, watch }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }
    }

    #[test]
    fn a_file_that_is_written_counts_when_it_is_closed() {
        let mut bench = Bench::new();
        let mut file = File::create(bench.path("c.toml")).unwrap();
        file.write_all(b"half of").unwrap();
        assert!(!bench.watch.drain(), "still open");
        file.write_all(b" it").unwrap();
        drop(file);
        assert!(bench.watch.drain());
        assert!(!bench.watch.drain(), "said once");
    }

    #[test]
    fn a_file_that_is_replaced_counts_and_its_neighbours_do_not() {
        let mut bench = Bench::new();
        fs::write(bench.path("c.toml.new"), "b").unwrap();
        assert!(!bench.watch.drain());
        fs::rename(bench.path("c.toml.new"), bench.path("c.toml")).unwrap();
        assert!(bench.watch.drain());
        // As some editors do it: away with the old one, then a new one.
        fs::rename(bench.path("c.toml"), bench.path("c.toml~")).unwrap();
        let file = File::create(bench.path("c.toml")).unwrap();
        assert!(!bench.watch.drain(), "nothing to read yet");
        drop(file);
        assert!(bench.watch.drain());
        fs::remove_file(bench.path("c.toml")).unwrap();
        assert!(!bench.watch.drain(), "nothing to read any more");
        fs::hard_link(bench.path("c.toml~"), bench.path("c.toml")).unwrap();
        assert!(bench.watch.drain());
    }

    /// The way in which Kubernetes mounts a ConfigMap and changes it.
    #[test]
    fn a_config_map_that_changes_counts() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let version = |name: &str| {
            fs::create_dir(path(name)).unwrap();
            fs::write(path(name).join("config.toml"), name).unwrap();
        };
        version("..1");
        symlink("..1", path("..data")).unwrap();
        symlink("..data/config.toml", path("config.toml")).unwrap();
        let mut watch = ConfigWatcher::new(&path("config.toml")).unwrap();
        assert!(watch.complete);
        for (old, new) in [("..1", "..2"), ("..2", "..3")] {
            version(new);
            symlink(new, path("..data_tmp")).unwrap();
            assert!(!watch.drain(), "{new}: not in place yet");
            fs::rename(path("..data_tmp"), path("..data")).unwrap();
            assert!(watch.drain(), "{new}");
            assert_eq!(watch.directories.len(), 2);
            fs::remove_dir_all(path(old)).unwrap();
            assert!(!watch.drain(), "{old} leads nowhere");
        }
        // Written through all links.
        fs::write(path("config.toml"), "x").unwrap();
        assert!(watch.drain());
    }

    #[test]
    fn a_directory_may_go_and_come_back() {
        let directory = tempfile::tempdir().unwrap();
        let (inner, file) = (directory.path().join("d"), directory.path().join("d/c.toml"));
        let mut watch = ConfigWatcher::new(&file).unwrap();
        assert!(!watch.complete && !watch.rescan());
        fs::create_dir(&inner).unwrap();
        assert!(watch.rescan() && watch.complete && !watch.rescan());
        fs::write(&file, "a").unwrap();
        assert!(watch.drain());
        fs::remove_dir_all(&inner).unwrap();
        assert!(watch.drain() && !watch.complete);
        fs::create_dir(&inner).unwrap();
        fs::write(&file, "b").unwrap();
        assert!(watch.rescan() && watch.complete);
    }

    #[test]
    fn every_link_on_the_way_is_a_place_to_watch() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("real/inner")).unwrap();
        symlink("real/../real", root.join("link")).unwrap();
        symlink(root.join("link/inner/c.toml"), root.join("c.toml")).unwrap();
        let expected = [(&*root, "c.toml"), (&*root, "link"), (&*root.join("real/inner"), "c.toml")];
        let found = watch_points(&root.join("c.toml"));
        let found: Vec<(&Path, &str)> = found.iter().map(|(at, name)| (at.as_path(), name.to_str().unwrap())).collect();
        assert_eq!(found, expected);
        // A link to itself is no reason to go round for ever.
        symlink("loop", root.join("loop")).unwrap();
        assert!(watch_points(&root.join("loop")).len() <= MOST_LINKS + 1);
    }
}
