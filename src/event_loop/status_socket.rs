//! The status socket on the event loop: where it is, and its replacement when the configuration changes its path.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use mio::{Registry, Token};

use super::Daemon;
use crate::config::{Config, STATUS_SOCKET};
use crate::control::protocol::TraceLine;
use crate::control::server::{StatusServer, TOKENS};
use crate::control::trace::TraceSubscription;

/// First token of the status socket; its replacement takes the [`TOKENS`] after, and the next one these again.
const FIRST: Token = Token(1 << 10);

/// The status socket, unless it could not be opened.
#[derive(Debug)]
pub(super) struct StatusSocket {
    server: Option<StatusServer>,
    first_token: Token,
    /// The path named on the command line; it takes precedence over the configuration.
    path_override: Option<PathBuf>,
}

impl StatusSocket {
    /// Opens the socket. A failure at the default path is returned beside the daemon's part, which works without: not every
    /// user may create that directory.
    ///
    /// # Errors
    /// When the socket cannot be opened at a path that the operator has chosen.
    pub(super) fn open(
        config: &Config,
        path_override: Option<PathBuf>,
        registry: &Registry,
    ) -> Result<(StatusSocket, Option<anyhow::Error>)> {
        let mut socket = StatusSocket { server: None, first_token: FIRST, path_override };
        match StatusServer::bind(socket.path(config), registry, FIRST) {
            Ok(server) => socket.server = Some(server),
            Err(error) if socket.path(config) == Path::new(STATUS_SOCKET) => return Ok((socket, Some(error))),
            Err(error) => return Err(error),
        }
        Ok((socket, None))
    }

    fn path<'a>(&'a self, config: &'a Config) -> &'a Path {
        self.path_override.as_deref().unwrap_or(&config.status_socket)
    }

    pub(super) fn owns(&self, token: Token) -> bool {
        self.server.as_ref().is_some_and(|server| server.owns(token))
    }

    /// When [`retry_accept`](Self::retry_accept) is to be called, if at all.
    pub(super) fn due(&self) -> Option<Instant> {
        self.server.as_ref().and_then(StatusServer::due)
    }

    /// A socket at the new configuration's path; none if the path stays.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub(super) fn replacement(&self, old: &Config, new: &Config, registry: &Registry) -> Result<Option<StatusServer>> {
        if self.path(old) == self.path(new) {
            return Ok(None);
        }
        StatusServer::bind(self.path(new), registry, self.other_tokens()).map(Some)
    }

    fn other_tokens(&self) -> Token {
        if self.first_token == FIRST { Token(FIRST.0 + TOKENS) } else { FIRST }
    }

    /// The narrowest subscription that covers those of all clients; none if no client traces.
    pub(super) fn subscriptions(&self) -> Option<TraceSubscription> {
        TraceSubscription::covering(self.server.iter().flat_map(StatusServer::subscriptions))
    }

    /// Sends a line to the clients whose subscription matches.
    pub(super) fn publish(&mut self, line: &TraceLine, matches: impl Fn(&TraceSubscription) -> bool) {
        if let Some(server) = &mut self.server {
            server.publish(line, matches);
        }
    }

    /// Ends all traces with this last line.
    pub(super) fn end_traces(&mut self, line: &TraceLine) {
        if let Some(server) = &mut self.server {
            server.end_traces(line);
        }
    }

    /// Removes the socket and disconnects its clients.
    pub(super) fn close(&mut self) {
        self.server = None;
    }

    /// Replaces the socket and disconnects the clients of the old one.
    pub(super) fn replace(&mut self, server: StatusServer) {
        self.first_token = self.other_tokens();
        self.server = Some(server);
    }

    /// Accepts clients that could not be accepted before, once it is time to try again.
    pub(super) fn retry_accept(&mut self, now: Instant) {
        if let Some(server) = &mut self.server {
            server.on_timer(now);
        }
    }
}

impl Daemon {
    pub(super) fn on_status_socket_event(&mut self, token: Token) {
        if let Some(mut server) = self.status_socket.server.take() {
            server.on_event(token, |request| self.answer_status_request(request));
            self.status_socket.server = Some(server);
            self.update_trace_filter();
        }
    }
}
