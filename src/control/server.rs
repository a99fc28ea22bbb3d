//! The daemon's end of the status socket: a small HTTP server on the event loop.
//!
//! It never blocks: a partial request, or a client that does not read its response, waits for the next readiness event.
//! Memory per client is bounded, because a client has one request at a time and a trace drops lines beyond [`MAX_UNREAD`].
//! Of at most [`CONNECTIONS`] clients, the one silent for longest gives way to a new one, so idle connections keep nobody
//! out.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fs, mem};

use anyhow::{Context, Result, anyhow, bail};
use http::StatusCode;
use mio::net::{UnixListener, UnixStream};
use mio::{Interest, Registry, Token};
use nix::sys::stat::{Mode, fchmod};
use slab::Slab;
use socket2::{Domain, SockAddr, Socket, Type};

use super::protocol::{MAX_REQUEST, RequestError, StatusReply, StatusRequest, TraceLine, TraceQuery};
use super::trace::TraceSubscription;
use crate::error_hints;

/// Clients at one time.
pub const CONNECTIONS: usize = 16;
/// Tokens that the server uses, from the first on.
pub const TOKENS: usize = CONNECTIONS + 1;
/// Bytes kept for a client that traces and does not read. Further lines are dropped and counted.
const MAX_UNREAD: usize = 256 * 1024;
/// How long after a failed `accept` it is tried again, mostly for lack of descriptors. epoll reports a waiting client only
/// once.
const ACCEPT_RETRY: Duration = Duration::from_millis(500);

/// The socket and its clients. Dropping it removes the socket.
#[derive(Debug)]
pub struct StatusServer {
    path: PathBuf,
    /// Device and inode of our socket's file, so that only our own is removed.
    file: (u64, u64),
    listener: UnixListener,
    registry: Registry,
    first_token: usize,
    connections: Slab<StatusConnection>,
    /// Counts events of clients, to find the one silent for longest.
    turn: u64,
    /// When `accept` is tried again after a failure.
    accept_retry: Option<Instant>,
}

#[derive(Debug)]
struct StatusConnection {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    written: usize,
    /// Its last event, as counted by the server's `turn`.
    turn: u64,
    /// The connection ends once `output` is written.
    closing: bool,
    /// The datagrams it traces, if it does.
    subscription: Option<TraceSubscription>,
    /// Datagrams after which its trace ends.
    remaining: Option<u64>,
    /// Lines of its trace that were dropped since the last one it got.
    dropped: u64,
}

/// What to do with a connection after reading and writing.
enum AfterIo {
    KeepOpen,
    Close,
}

impl StatusServer {
    /// Creates the socket, with permissions for its owner alone. Replaces one that a killed daemon has left. The
    /// [`TOKENS`] tokens from `first` on must be free in `registry`.
    ///
    /// # Errors
    /// When another daemon answers there, when the path is not a socket, or with the kernel's reason; in one line with the
    /// fix.
    pub fn bind(path: &Path, registry: &Registry, first: Token) -> Result<StatusServer> {
        let listener = listen(path).with_context(|| format!("cannot create the status socket {}", path.display()))?;
        let file = fs::symlink_metadata(path).map(|file| (file.dev(), file.ino())).unwrap_or_default();
        let mut server = StatusServer {
            path: path.to_owned(),
            file,
            listener: UnixListener::from_std(listener),
            registry: registry.try_clone().context("cannot share the event loop with the status socket")?,
            first_token: first.0,
            connections: Slab::with_capacity(CONNECTIONS),
            turn: 0,
            accept_retry: None,
        };
        registry.register(&mut server.listener, first, Interest::READABLE).context("cannot watch the status socket")?;
        Ok(server)
    }

    /// Whether an event with this token is for [`on_event`](Self::on_event).
    #[must_use]
    pub fn owns(&self, token: Token) -> bool {
        (self.first_token..self.first_token + TOKENS).contains(&token.0)
    }

    /// When [`on_timer`](Self::on_timer) is to be called, if at all.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        self.accept_retry
    }

    /// Accepts waiting clients, if it is time to try again.
    pub fn on_timer(&mut self, now: Instant) {
        if self.accept_retry.is_some_and(|due| due <= now) {
            self.accept();
        }
    }

    /// Reads what has arrived, and answers a complete request.
    pub fn on_event(&mut self, token: Token, mut answer: impl FnMut(&StatusRequest) -> StatusReply) {
        if token.0 == self.first_token {
            self.accept();
            return;
        }
        let key = token.0 - self.first_token - 1;
        self.turn += 1;
        let turn = self.turn;
        let Some(connection) = self.connections.get_mut(key) else { return };
        connection.turn = turn;
        if let AfterIo::Close = connection.proceed(&mut answer) {
            self.close(key);
        }
    }

    /// What clients trace.
    pub fn subscriptions(&self) -> impl Iterator<Item = TraceSubscription> {
        self.connections.iter().filter_map(|(_, connection)| connection.subscription)
    }

    /// Sends a line to the clients whose subscription matches.
    pub fn publish(&mut self, line: &TraceLine, matches: impl Fn(&TraceSubscription) -> bool) {
        let bytes = line.to_line();
        let is_record = matches!(line, TraceLine::Record(_));
        self.turn += 1;
        let turn = self.turn;
        let mut gone = Vec::new();
        for (key, connection) in &mut self.connections {
            if connection.subscription.as_ref().is_some_and(&matches) {
                connection.turn = turn;
                if let AfterIo::Close = connection.send_line(&bytes, is_record) {
                    gone.push(key);
                }
            }
        }
        gone.into_iter().for_each(|key| self.close(key));
    }

    /// Ends all traces with this last line.
    pub fn end_traces(&mut self, line: &TraceLine) {
        self.publish(line, |_| true);
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
            let key = self.connections.insert(StatusConnection::new(stream, self.turn));
            let interest = Interest::READABLE | Interest::WRITABLE;
            let token = Token(self.first_token + 1 + key);
            if let Err(error) = self.registry.register(&mut self.connections[key].stream, token, interest) {
                tracing::warn!("cannot watch a connection to the status socket: {error}");
                self.connections.remove(key);
            }
        }
    }

    fn all_accepted(&mut self) {
        if self.accept_retry.take().is_some() {
            tracing::info!("connections to the status socket are accepted again");
        }
    }

    fn not_accepted(&mut self, error: &io::Error) {
        if self.accept_retry.replace(Instant::now() + ACCEPT_RETRY).is_none() {
            let error = error_hints::add_open_files_hint(error.to_string());
            tracing::warn!(error, "cannot accept connections to the status socket, trying again");
        }
    }

    fn close(&mut self, key: usize) {
        let mut connection = self.connections.remove(key);
        // A failure is harmless: closing the stream ends its registration as well.
        let _ = self.registry.deregister(&mut connection.stream);
    }
}

impl Drop for StatusServer {
    fn drop(&mut self) {
        // If our file was removed, another daemon may have created its own at the same path.
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.file);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!("cannot remove the status socket {}: {error}", self.path.display());
        }
    }
}

impl StatusConnection {
    fn new(stream: UnixStream, turn: u64) -> StatusConnection {
        StatusConnection {
            stream,
            input: Vec::new(),
            output: Vec::new(),
            written: 0,
            turn,
            closing: false,
            subscription: None,
            remaining: None,
            dropped: 0,
        }
    }

    /// Writes and reads as far as both go.
    fn proceed(&mut self, answer: &mut impl FnMut(&StatusRequest) -> StatusReply) -> AfterIo {
        loop {
            // Anything that a client sends ends its trace. Reading also finds out that it has gone.
            if self.subscription.is_some() && !matches!(self.read(), Ok(false)) {
                return AfterIo::Close;
            }
            match self.write() {
                Ok(true) if self.closing => return AfterIo::Close,
                Ok(true) if self.subscription.is_some() => return AfterIo::KeepOpen,
                Ok(true) => {}
                // Nothing more is read before the response is written, which bounds the memory.
                Ok(false) => return AfterIo::KeepOpen,
                Err(_) => return AfterIo::Close,
            }
            match StatusRequest::parse(&self.input) {
                Ok(Some(parsed)) if parsed.length < self.input.len() => {
                    self.refuse(StatusCode::BAD_REQUEST, "one request at a time: wait for the response");
                }
                Ok(Some(parsed)) => {
                    let reply = answer(&parsed.request);
                    self.respond(&parsed.request, &reply, parsed.keep_alive);
                }
                Ok(None) if self.input.len() >= MAX_REQUEST => {
                    let reason = format!("a request has at most {MAX_REQUEST} bytes");
                    self.refuse(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, &reason);
                }
                Ok(None) => match self.read() {
                    Ok(true) => {}
                    Ok(false) => return AfterIo::KeepOpen,
                    Err(_) => return AfterIo::Close,
                },
                Err(error) => self.set_output(&StatusReply::Error(error), false),
            }
        }
    }

    fn respond(&mut self, request: &StatusRequest, reply: &StatusReply, keep_alive: bool) {
        if let StatusReply::Trace(subscription, _) = reply {
            self.subscription = Some(*subscription);
            self.remaining = match request {
                StatusRequest::Trace(TraceQuery { count, .. }) => *count,
                StatusRequest::Status | StatusRequest::Alive => None,
            };
        }
        self.set_output(reply, keep_alive);
    }

    fn refuse(&mut self, code: StatusCode, reason: &str) {
        self.set_output(&StatusReply::Error(RequestError::new(code, reason)), false);
    }

    fn set_output(&mut self, reply: &StatusReply, keep_alive: bool) {
        self.input.clear();
        self.output = reply.to_bytes(keep_alive);
        self.written = 0;
        self.closing = match reply {
            StatusReply::Report(_) | StatusReply::Alive => !keep_alive,
            StatusReply::Trace(..) => false,
            StatusReply::Error(_) => true,
        };
    }

    /// Adds a line of its trace to the output. If the client does not keep up, the line is dropped and counted.
    fn send_line(&mut self, line: &[u8], is_record: bool) -> AfterIo {
        if self.output.len() - self.written > MAX_UNREAD {
            self.dropped += 1;
            return AfterIo::KeepOpen;
        }
        if self.dropped > 0 {
            let note =
                format!("{} lines were dropped: they came faster than they were read", mem::take(&mut self.dropped));
            self.output.extend_from_slice(&TraceLine::Note { note }.to_line());
        }
        self.output.extend_from_slice(line);
        if let Some(remaining) = self.remaining.as_mut().filter(|_| is_record) {
            *remaining = remaining.saturating_sub(1);
            if *remaining == 0 {
                self.subscription = None;
                self.closing = true;
            }
        }
        match self.write() {
            Ok(written) if written && self.closing => AfterIo::Close,
            Ok(_) => AfterIo::KeepOpen,
            Err(_) => AfterIo::Close,
        }
    }

    /// True once everything is written.
    fn write(&mut self) -> io::Result<bool> {
        while self.written < self.output.len() {
            match self.stream.write(&self.output[self.written..]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => self.written += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    // A trace adds to the output for as long as it lasts, so what is written must go.
                    self.output.drain(..mem::take(&mut self.written));
                    return Ok(false);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.written > 0 {
            // A report may be large, and the next request far away.
            self.written = 0;
            drop(mem::take(&mut self.output));
        }
        Ok(true)
    }

    /// True if there was something to read.
    fn read(&mut self) -> io::Result<bool> {
        let mut buffer = [0; MAX_REQUEST];
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
        made.map_err(|error| bind_error(&error, &format!("cannot create the directory {}", directory.display())))?;
    }
    remove_stale(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    // `bind` gives the file the socket's mode, so others can open it at no time.
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR).context("cannot set the socket's permissions")?;
    socket.bind(&SockAddr::unix(path)?).map_err(|error| bind_error(&error, "cannot create it"))?;
    socket.listen(CONNECTIONS as libc::c_int)?;
    Ok(OwnedFd::from(socket).into())
}

/// Removes the socket of a daemon that was killed.
fn remove_stale(path: &Path) -> Result<()> {
    let there = match fs::symlink_metadata(path) {
        Ok(there) => there,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(bind_error(&error, "cannot read its type")),
    };
    if !there.file_type().is_socket() {
        bail!("there is a file that is not a socket; remove it, or set status_socket to another path");
    }
    match net::UnixStream::connect(path) {
        Ok(_) => bail!("another udp-fanout answers there already; give this one a status_socket of its own"),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|error| bind_error(&error, "cannot remove the one that is left there"))
        }
        Err(error) => Err(bind_error(&error, "cannot find out whether a daemon answers there")),
    }
}

fn bind_error(error: &io::Error, what: &str) -> anyhow::Error {
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
