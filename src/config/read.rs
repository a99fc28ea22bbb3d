//! Reads a configuration file's bytes. Only a regular file is read, so that opening and reading cannot wait for a writer,
//! and only up to a size, so that a wrong file cannot take all memory.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use crate::error_hints;

/// Largest file accepted, in bytes: enough for 100,000 downstreams or 500,000 prefixes.
pub(super) const MAX_FILE_SIZE: u64 = 8 << 20;

/// The file's bytes, or why it cannot be read and the fix. Symbolic links are followed.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, String> {
    let file = open(path).map_err(|error| describe_error(&error))?;
    let metadata = file.metadata().map_err(|error| describe_error(&error))?;
    let kind = metadata.file_type();
    if kind.is_dir() {
        return Err("is a directory; name a file in it with --config".to_owned());
    }
    if !kind.is_file() {
        let what = if kind.is_fifo() { "a named pipe (FIFO)" } else { "a device" };
        return Err(format!("is {what}, but a configuration must be a regular file; name one with --config"));
    }
    let too_large = || format!("is larger than {} MiB; name a configuration file with --config", MAX_FILE_SIZE >> 20);
    if metadata.len() > MAX_FILE_SIZE {
        return Err(too_large());
    }
    // The file may grow while it is read, and files in /proc have no size.
    let mut bytes = Vec::new();
    file.take(MAX_FILE_SIZE + 1).read_to_end(&mut bytes).map_err(|error| describe_error(&error))?;
    if bytes.len() as u64 > MAX_FILE_SIZE { Err(too_large()) } else { Ok(bytes) }
}

/// Opens without waiting: a FIFO would otherwise wait for a writer, and a terminal could become the daemon's own.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY).open(path)
}

/// Why a file cannot be read, and the fix.
pub(super) fn describe_error(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "no such file; create it (config/reference.toml shows every key), or name another \
                                    with --config"
            .to_owned(),
        io::ErrorKind::PermissionDenied => {
            "permission denied; run as a user who may read it, or change its owner or mode".to_owned()
        }
        _ if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => {
            "is a socket or a device, but a configuration must be a regular file; name one with --config".to_owned()
        }
        _ if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
            error_hints::add_open_files_hint(format!("cannot be read: {error}"))
        }
        _ => format!("cannot be read: {error}; name another with --config"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use nix::sys::stat::Mode;

    use super::*;

    /// What [`read`] says; fails if it waits.
    fn read_soon(path: &Path) -> Result<Vec<u8>, String> {
        let (sender, result) = mpsc::channel();
        let path = path.to_owned();
        thread::spawn(move || sender.send(read(&path)));
        result.recv_timeout(Duration::from_secs(10)).expect("reading waits")
    }

    #[test]
    fn only_regular_files_are_read_and_none_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::write(path("file"), "a").unwrap();
        symlink("file", path("link")).unwrap();
        symlink("link", path("link-to-link")).unwrap();
        assert_eq!(read_soon(&path("link-to-link")).unwrap(), b"a");
        // A file without a size, as all in /proc.
        assert!(!read_soon(Path::new("/proc/self/status")).unwrap().is_empty());

        nix::unistd::mkfifo(&path("fifo"), Mode::S_IRWXU).unwrap();
        symlink("fifo", path("link-to-fifo")).unwrap();
        let _socket = UnixListener::bind(path("socket")).unwrap();
        for (file, what) in [
            (path("fifo"), "a named pipe (FIFO)"),
            (path("link-to-fifo"), "a named pipe (FIFO)"),
            ("/dev/zero".into(), "a device"),
            ("/dev/null".into(), "a device"),
            (path("socket"), "a socket or a device"),
        ] {
            let expected = format!("is {what}, but a configuration must be a regular file; name one with --config");
            assert_eq!(read_soon(&file).unwrap_err(), expected, "{}", file.display());
        }
        assert_eq!(read_soon(directory.path()).unwrap_err(), "is a directory; name a file in it with --config");
    }

    #[test]
    fn a_file_has_a_largest_size() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("large");
        fs::write(&path, vec![b'#'; MAX_FILE_SIZE as usize]).unwrap();
        assert_eq!(read(&path).unwrap().len() as u64, MAX_FILE_SIZE);
        fs::write(&path, vec![b'#'; MAX_FILE_SIZE as usize + 1]).unwrap();
        assert_eq!(read(&path).unwrap_err(), "is larger than 8 MiB; name a configuration file with --config");
    }

    #[test]
    fn a_refusal_by_the_kernel_is_explained() {
        // Root may read everything, so that the kernel's refusal cannot be had in every test run.
        let refused = io::Error::from(io::ErrorKind::PermissionDenied);
        assert_eq!(
            describe_error(&refused),
            "permission denied; run as a user who may read it, or change its owner or mode"
        );
    }
}
