//! The daemon's end of the status socket, on the event loop.
//!
//! It never waits: a request that has come in part, or a client that does not read its answer, is left until the
//! kernel says that there is more to do. Each client has one request at a time, so what is kept for it is bounded; of
//! clients there are at most [`CONNECTIONS`], and one more costs the one that has been silent the longest its place. So
//! nobody who holds the socket open keeps others out.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fs, mem};

use anyhow::{Context, Result, anyhow, bail};
use mio::net::{UnixListener, UnixStream};
use mio::{Interest, Registry, Token};
use nix::sys::stat::{Mode, fchmod};
use slab::Slab;
use socket2::{Domain, SockAddr, Socket, Type};

use super::protocol::{StatusRequest, StatusResponse};
use super::trace::TraceSubscription;
use crate::error_hints;

/// Clients at one time.
pub const CONNECTIONS: usize = 16;
/// Tokens that must be free from the first on.
pub const TOKENS: usize = CONNECTIONS + 1;
/// What is kept for a client that traces and does not read, in bytes. The rest is left out.
const UNREAD: usize = 256 * 1024;
/// Longest request, in bytes.
const REQUEST: usize = 4096;
/// How long after a refused `accept` it is tried again: mostly there are no descriptors left. The kernel tells of a client
/// once, so nothing else would bring the waiting ones back to mind.
const ACCEPT_AGAIN: Duration = Duration::from_millis(500);

/// The socket and its clients. Dropping it removes the socket.
#[derive(Debug)]
pub struct StatusServer {
    path: PathBuf,
    /// Device and inode of the socket's file: only our own is removed.
    file: (u64, u64),
    listener: UnixListener,
    registry: Registry,
    first: usize,
    connections: Slab<StatusConnection>,
    /// Counts what clients have done, to tell who has been silent the longest.
    turn: u64,
    /// When clients that could not be accepted are tried again; none while all could.
    again: Option<Instant>,
}

#[derive(Debug)]
struct StatusConnection {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    written: usize,
    /// When it last did anything.
    turn: u64,
    /// The answer is its last: the request made no sense.
    closing: bool,
    /// It is told of datagrams.
    subscription: Option<TraceSubscription>,
    /// Lines that it has not been told.
    left_out: u64,
}

/// What is answered to a request.
#[derive(Debug)]
pub struct StatusReply {
    /// The answer, or the first one.
    pub response: StatusResponse,
    /// What the client is told of from then on, if that is what it wants.
    pub subscription: Option<TraceSubscription>,
}

impl From<StatusResponse> for StatusReply {
    fn from(response: StatusResponse) -> StatusReply {
        StatusReply { response, subscription: None }
    }
}

/// Whether a connection goes on.
enum Then {
    Stays,
    Ends,
}

impl StatusServer {
    /// Puts the socket there, for its owner alone, in place of one that a daemon which died has left. `registry`'s tokens
    /// from `first` on must be free, [`TOKENS`] of them.
    ///
    /// # Errors
    /// When another daemon answers there, when something else is there, or with the kernel's reason; in one line with
    /// the fix.
    pub fn bind(path: &Path, registry: &Registry, first: Token) -> Result<StatusServer> {
        let listener =
            listen(path).with_context(|| format!("cannot answer `udp-fanout status` at {}", path.display()))?;
        let file = fs::symlink_metadata(path).map(|file| (file.dev(), file.ino())).unwrap_or_default();
        let mut server = StatusServer {
            path: path.to_owned(),
            file,
            listener: UnixListener::from_std(listener),
            registry: registry.try_clone().context("cannot share the event loop with the status socket")?,
            first: first.0,
            connections: Slab::with_capacity(CONNECTIONS),
            turn: 0,
            again: None,
        };
        registry.register(&mut server.listener, first, Interest::READABLE).context("cannot watch the status socket")?;
        Ok(server)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether an event with this token is for [`on_event`](Self::on_event).
    #[must_use]
    pub fn owns(&self, token: Token) -> bool {
        (self.first..self.first + TOKENS).contains(&token.0)
    }

    /// When [`on_timer`](Self::on_timer) is to be called, if at all.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        self.again
    }

    /// Tries again to accept those who could not be.
    pub fn on_timer(&mut self, now: Instant) {
        if self.again.is_some_and(|due| due <= now) {
            self.accept();
        }
    }

    /// Takes in what has come, and answers what is complete.
    pub fn on_event<A: Into<StatusReply>>(&mut self, token: Token, mut answer: impl FnMut(&StatusRequest) -> A) {
        if token.0 == self.first {
            self.accept();
            return;
        }
        let key = token.0 - self.first - 1;
        self.turn += 1;
        let turn = self.turn;
        let Some(connection) = self.connections.get_mut(key) else { return };
        connection.turn = turn;
        if let Then::Ends = connection.proceed(&mut |request| answer(request).into()) {
            self.close(key);
        }
    }

    /// What clients want to be told of.
    pub fn subscriptions(&self) -> impl Iterator<Item = TraceSubscription> {
        self.connections.iter().filter_map(|(_, connection)| connection.subscription)
    }

    /// Tells clients that are being told of datagrams, those that want to know of this one.
    pub fn publish(&mut self, response: &StatusResponse, wants: impl Fn(&TraceSubscription) -> bool) {
        let line = response.to_line();
        self.turn += 1;
        let turn = self.turn;
        let mut gone = Vec::new();
        for (key, connection) in &mut self.connections {
            if connection.subscription.as_ref().is_some_and(&wants) {
                connection.turn = turn;
                if let Then::Ends = connection.tell(&line) {
                    gone.push(key);
                }
            }
        }
        gone.into_iter().for_each(|key| self.close(key));
    }

    /// Tells clients that they are told of nothing any more, and lets go of them.
    pub fn end_traces(&mut self, response: &StatusResponse) {
        self.publish(response, |_| true);
        let ended: Vec<usize> = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.subscription.is_some())
            .map(|(key, _)| key)
            .collect();
        ended.into_iter().for_each(|key| self.close(key));
    }

    fn accept(&mut self) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return self.all_accepted(),
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => continue,
                Err(error) => return self.not_accepted(&error),
            };
            if self.connections.len() == CONNECTIONS
                && let Some(silent) = self.connections.iter().min_by_key(|(_, c)| c.turn).map(|(key, _)| key)
            {
                self.close(silent);
            }
            self.turn += 1;
            let (input, output) = (Vec::new(), Vec::new());
            let (turn, closing) = (self.turn, false);
            let connection =
                StatusConnection { stream, input, output, written: 0, turn, closing, subscription: None, left_out: 0 };
            let key = self.connections.insert(connection);
            let interest = Interest::READABLE | Interest::WRITABLE;
            let token = Token(self.first + 1 + key);
            if let Err(error) = self.registry.register(&mut self.connections[key].stream, token, interest) {
                tracing::warn!("cannot watch a connection to the status socket: {error}");
                self.connections.remove(key);
            }
        }
    }

    fn all_accepted(&mut self) {
        if self.again.take().is_some() {
            tracing::info!("connections to the status socket are accepted again");
        }
    }

    fn not_accepted(&mut self, error: &io::Error) {
        if self.again.replace(Instant::now() + ACCEPT_AGAIN).is_none() {
            let error = error_hints::add_open_files_hint(error.to_string());
            tracing::warn!(error, "cannot accept connections to the status socket, trying again");
        }
    }

    fn close(&mut self, key: usize) {
        let mut connection = self.connections.remove(key);
        // Closing the stream would end the watch as well.
        let _ = self.registry.deregister(&mut connection.stream);
    }
}

impl Drop for StatusServer {
    fn drop(&mut self) {
        // Another daemon may have put its own there, should someone have removed ours.
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.file);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!("cannot remove the status socket {}: {error}", self.path.display());
        }
    }
}

impl StatusConnection {
    /// Writes and reads as far as both go.
    fn proceed(&mut self, answer: &mut impl FnMut(&StatusRequest) -> StatusReply) -> Then {
        loop {
            // Whatever it says ends a trace, be it only that it has gone, which it must not take reading to find out.
            if self.subscription.is_some() && !matches!(self.read(), Ok(false)) {
                return Then::Ends;
            }
            match self.write() {
                Ok(true) if self.closing => return Then::Ends,
                Ok(true) if self.subscription.is_some() => return Then::Stays,
                Ok(true) => {}
                // Nothing more is read before the answer is out: that is what bounds what is kept here.
                Ok(false) => return Then::Stays,
                Err(_) => return Then::Ends,
            }
            if let Some(end) = self.input.iter().position(|&byte| byte == b'\n') {
                let response = match StatusRequest::from_line(&self.input[..end]) {
                    Ok(_) if end + 1 < self.input.len() => self.refuse("one request at a time: wait for the answer"),
                    Ok(request) => {
                        let StatusReply { response, subscription } = answer(&request);
                        self.subscription = subscription;
                        response
                    }
                    Err(reason) => self.refuse(&reason),
                };
                self.input.clear();
                self.output = response.to_line();
                self.written = 0;
                continue;
            }
            if self.input.len() >= REQUEST {
                self.output = self.refuse(&format!("a request has at most {REQUEST} bytes")).to_line();
                self.input.clear();
                continue;
            }
            match self.read() {
                Ok(true) => {}
                Ok(false) => return Then::Stays,
                Err(_) => return Then::Ends,
            }
        }
    }

    /// Adds a line to what is being written. For a client that does not keep up, it is left out and counted.
    fn tell(&mut self, line: &[u8]) -> Then {
        if self.output.len() - self.written > UNREAD {
            self.left_out += 1;
            return Then::Stays;
        }
        if self.left_out > 0 {
            let note = format!("{} lines are left out: they came faster than they were read", self.left_out);
            self.left_out = 0;
            self.output.extend_from_slice(&StatusResponse::Note(note).to_line());
        }
        self.output.extend_from_slice(line);
        match self.write() {
            Ok(_) => Then::Stays,
            Err(_) => Then::Ends,
        }
    }

    fn refuse(&mut self, reason: &str) -> StatusResponse {
        self.closing = true;
        StatusResponse::Error(reason.to_owned())
    }

    /// True once everything is written.
    fn write(&mut self) -> io::Result<bool> {
        while self.written < self.output.len() {
            match self.stream.write(&self.output[self.written..]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => self.written += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    // What is added line by line would grow for ever.
                    self.output.drain(..mem::take(&mut self.written));
                    return Ok(false);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.written > 0 {
            // An answer may be large, and the next request far away.
            self.written = 0;
            drop(mem::take(&mut self.output));
        }
        Ok(true)
    }

    /// True if there was something to read.
    fn read(&mut self) -> io::Result<bool> {
        let mut buffer = [0; REQUEST];
        loop {
            match self.stream.read(&mut buffer[self.input.len()..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    self.input.extend_from_slice(&buffer[self.input.len()..][..n]);
                    return Ok(true);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// A listening socket at this path that only its owner may open.
fn listen(path: &Path) -> Result<net::UnixListener> {
    if let Some(directory) = path.parent().filter(|directory| !directory.exists()) {
        let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(directory);
        made.map_err(|error| explain(&error, &format!("cannot make the directory {}", directory.display())))?;
    }
    make_room(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    // The file gets the socket's mode as it is when it is bound, so there is no moment at which others can open it.
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR).context("cannot set a socket's mode")?;
    socket.bind(&SockAddr::unix(path)?).map_err(|error| explain(&error, "cannot make it"))?;
    socket.listen(CONNECTIONS as libc::c_int)?;
    Ok(OwnedFd::from(socket).into())
}

/// Removes the socket of a daemon that died.
fn make_room(path: &Path) -> Result<()> {
    let there = match fs::symlink_metadata(path) {
        Ok(there) => there,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(explain(&error, "cannot look at it")),
    };
    if !there.file_type().is_socket() {
        bail!("something that is no socket is there already; remove it, or set status_socket to another path");
    }
    match net::UnixStream::connect(path) {
        Ok(_) => bail!("another udp-fanout answers there already; give this one a status_socket of its own"),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|error| explain(&error, "cannot remove the one that is left there"))
        }
        Err(error) => Err(explain(&error, "cannot find out who answers there")),
    }
}

fn explain(error: &io::Error, what: &str) -> anyhow::Error {
    let fix = match error.kind() {
        ErrorKind::PermissionDenied => {
            "; run as root, or set status_socket to a path in a directory that this user may write to"
        }
        ErrorKind::ReadOnlyFilesystem => "; mount a writable directory there, or set status_socket to another path",
        _ => "; set status_socket to another path",
    };
    anyhow!("{what}: {error}{fix}")
}

#[cfg(test)]
mod tests;
