//! Standard error as the log's end: a line that cannot be written at once is lost, and the daemon goes on.
//!
//! The disk may be full, the reader gone, or there and not reading: then a plain write would wait for as long as it pleases,
//! and with it the thread that has something to say. So it is asked first whether there is room, and a reader that does not
//! make any within [`PATIENCE`] costs lines, not time. How many is known to [`take_lost`].

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing_subscriber::fmt::MakeWriter;

/// How long a reader that has kept up so far may take to make room.
const PATIENCE: Duration = Duration::from_millis(100);
/// `PIPE_BUF`: where there is room in a pipe, there is so much.
const PIECE: usize = 4_096;

/// Lines lost, and whether the last one was.
static LOST: AtomicU64 = AtomicU64::new(0);
static LOSING: AtomicBool = AtomicBool::new(false);

/// How many lines have been lost, told once, as soon as lines can be written again; 0 until then.
#[must_use]
pub fn take_lost() -> u64 {
    // Nobody has had anything to say since: whether it would get through can be asked.
    if LOSING.load(Ordering::Relaxed) && !has_room(io::stderr().as_fd(), Duration::ZERO) {
        return 0;
    }
    LOST.swap(0, Ordering::Relaxed)
}

/// What lines are written to.
#[derive(Debug)]
pub(super) struct Lines<W> {
    stream: W,
    /// True after a line that was written in part: the next one must not continue it.
    torn: Mutex<bool>,
}

impl<W> Lines<W> {
    pub(super) fn new(stream: W) -> Lines<W> {
        Lines { stream, torn: Mutex::new(false) }
    }

    fn torn(&self) -> MutexGuard<'_, bool> {
        self.torn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'w, W: AsFd + 'w> MakeWriter<'w> for Lines<W> {
    type Writer = &'w Lines<W>;

    fn make_writer(&'w self) -> &'w Lines<W> {
        self
    }
}

impl<W: AsFd> Write for &Lines<W> {
    /// Writes a line, or does not: either way it is done with.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut torn = self.torn();
        let stream = self.stream.as_fd();
        let patience = if LOSING.load(Ordering::Relaxed) { Duration::ZERO } else { PATIENCE };
        let begin: &[u8] = if *torn { b"\n" } else { b"" };
        let mut written = 0;
        let whole = [begin, line].into_iter().flat_map(|part| part.chunks(PIECE)).all(|piece| {
            let done = write_piece(stream, piece, patience);
            written += done;
            done == piece.len()
        });
        // Of what was written, a line break may have been all.
        *torn = !whole && (written > begin.len() || (*torn && written == 0));
        LOSING.store(!whole, Ordering::Relaxed);
        LOST.fetch_add(u64::from(!whole), Ordering::Relaxed);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes as much as there is room for, and returns how much that was.
fn write_piece(stream: BorrowedFd<'_>, piece: &[u8], patience: Duration) -> usize {
    let mut written = 0;
    while written < piece.len() && has_room(stream, patience) {
        match nix::unistd::write(stream, &piece[written..]) {
            Ok(0) => break,
            Ok(length) => written += length,
            Err(Errno::EINTR) => {}
            Err(_) => break,
        }
    }
    written
}

fn has_room(stream: BorrowedFd<'_>, patience: Duration) -> bool {
    let mut stream = [PollFd::new(stream, PollFlags::POLLOUT)];
    let patience = PollTimeout::try_from(patience).unwrap_or(PollTimeout::ZERO);
    loop {
        match poll(&mut stream, patience) {
            Err(Errno::EINTR) => {}
            // Who cannot be asked is found out about by trying.
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
    fn what_is_not_read_is_lost_and_what_comes_later_begins_a_line() {
        let (mut reader, writer) = io::pipe().unwrap();
        let size = nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(8_192)).unwrap();
        assert_eq!(size, 8_192);
        let lines = Lines::new(writer);
        let mut to = &lines;
        // Of the second the pipe takes a piece.
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
