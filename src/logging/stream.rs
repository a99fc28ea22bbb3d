//! Non-blocking writes to standard error: a line that cannot be written soon is dropped and counted.
//!
//! The disk may be full, the reader gone, or alive but not reading. A plain write would then block the thread that logs. So
//! [`NonBlockingWriter`] polls for room first and waits [`WRITE_TIMEOUT`] at most. [`take_lost_lines`] returns the count.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing_subscriber::fmt::MakeWriter;

/// How long to wait for a reader that has kept up so far.
const WRITE_TIMEOUT: Duration = Duration::from_millis(100);
/// `PIPE_BUF`: a pipe that is writable has room for this many bytes.
const PIPE_CHUNK: usize = 4_096;

/// NonBlockingWriter lost and not yet reported.
static LOST: AtomicU64 = AtomicU64::new(0);
/// Whether the last line was lost.
static LOSING: AtomicBool = AtomicBool::new(false);

/// Returns the number of lost lines and resets it, once lines can be written again; 0 until then.
#[must_use]
pub fn take_lost_lines() -> u64 {
    // Nothing was logged since the last line was lost, so check whether the next one could be written.
    if LOSING.load(Ordering::Relaxed) && !has_room(io::stderr().as_fd(), Duration::ZERO) {
        return 0;
    }
    LOST.swap(0, Ordering::Relaxed)
}

/// Writes log lines to a stream without blocking.
#[derive(Debug)]
pub(super) struct NonBlockingWriter<W> {
    stream: W,
    /// True after a line that was written in part. A line break must precede the next one.
    truncated: Mutex<bool>,
}

impl<W> NonBlockingWriter<W> {
    pub(super) fn new(stream: W) -> NonBlockingWriter<W> {
        NonBlockingWriter { stream, truncated: Mutex::new(false) }
    }

    fn truncated(&self) -> MutexGuard<'_, bool> {
        self.truncated.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'w, W: AsFd + 'w> MakeWriter<'w> for NonBlockingWriter<W> {
    type Writer = &'w NonBlockingWriter<W>;

    fn make_writer(&'w self) -> &'w NonBlockingWriter<W> {
        self
    }
}

impl<W: AsFd> Write for &NonBlockingWriter<W> {
    /// Writes a line or drops it. Always reports success, so that the caller does not try again.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut truncated = self.truncated();
        let stream = self.stream.as_fd();
        let timeout = if LOSING.load(Ordering::Relaxed) { Duration::ZERO } else { WRITE_TIMEOUT };
        let begin: &[u8] = if *truncated { b"\n" } else { b"" };
        let mut written = 0;
        let whole = [begin, line].into_iter().flat_map(|part| part.chunks(PIPE_CHUNK)).all(|piece| {
            let done = write_piece(stream, piece, timeout);
            written += done;
            done == piece.len()
        });
        // The line break may be all that was written.
        *truncated = !whole && (written > begin.len() || (*truncated && written == 0));
        LOSING.store(!whole, Ordering::Relaxed);
        LOST.fetch_add(u64::from(!whole), Ordering::Relaxed);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes as much as there is room for, and returns the number of bytes.
fn write_piece(stream: BorrowedFd<'_>, piece: &[u8], timeout: Duration) -> usize {
    let mut written = 0;
    while written < piece.len() && has_room(stream, timeout) {
        match nix::unistd::write(stream, &piece[written..]) {
            Ok(0) => break,
            Ok(length) => written += length,
            Err(Errno::EINTR) => {}
            Err(_) => break,
        }
    }
    written
}

fn has_room(stream: BorrowedFd<'_>, timeout: Duration) -> bool {
    let mut stream = [PollFd::new(stream, PollFlags::POLLOUT)];
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::ZERO);
    loop {
        match poll(&mut stream, timeout) {
            Err(Errno::EINTR) => {}
            // If polling fails, the write will show the reason.
            Err(_) => return true,
            Ok(_) => return stream[0].any().unwrap_or(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn unread_lines_are_lost_and_later_ones_begin_on_a_new_line() {
        let (mut reader, writer) = io::pipe().unwrap();
        let size = nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(8_192)).unwrap();
        assert_eq!(size, 8_192);
        let lines = NonBlockingWriter::new(writer);
        let mut to = &lines;
        // The pipe has room for a part of the second line.
        let long = [vec![b'x'; 5_999], b"\n".to_vec()].concat();
        assert_eq!(to.write(b"short\n").unwrap(), 6);
        for _ in 0..5 {
            assert_eq!(to.write(&long).unwrap(), 6_000);
        }
        let mut bytes = vec![0; 20_000];
        let length = reader.read(&mut bytes).unwrap();
        assert!(bytes[..length].starts_with(b"short\nxxx") && bytes[..length].ends_with(b"x"));
        to.write_all(b"again\n").unwrap();
        let length = reader.read(&mut bytes).unwrap();
        assert_eq!(&bytes[..length], b"\nagain\n");
        to.write_all(b"whole\n").unwrap();
        drop(reader);
        to.write_all(b"nobody\n").unwrap();
        assert!(matches!(to.write(b"nobody\n"), Ok(7)));
    }
}
