//! Standard output of the commands that print something. A reader that has gone, such as `head`, is not an error.

use std::io::{ErrorKind, Write};

use anyhow::{Context, Result};

/// Writes to standard output.
///
/// # Errors
/// When standard output cannot be written to, for example because a disk is full.
pub fn print(text: &[u8]) -> Result<()> {
    print_while_read(text).map(drop)
}

/// Writes to standard output. False if its reader has gone.
///
/// # Errors
/// As for [`print`].
pub fn print_while_read(text: &[u8]) -> Result<bool> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        result => result.map(|()| true).context("cannot write to standard output"),
    }
}
