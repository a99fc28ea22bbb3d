//! The status socket's place in the daemon: where it is, and what becomes of it when the configuration changes.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use mio::{Registry, Token};

use super::Daemon;
use crate::config::{Config, STATUS_SOCKET};
use crate::control::protocol::Response;
use crate::control::server::{Server, TOKENS};
use crate::control::trace::Watch;

/// The tokens of the status socket start here; those of one that takes its place come behind.
const FIRST: Token = Token(1 << 10);

/// The status socket, if there is one.
#[derive(Debug)]
pub(super) struct Control {
    server: Option<Server>,
    first: Token,
    /// The path that the command line names, which wins over the configuration's.
    named: Option<PathBuf>,
}

impl Control {
    /// Opens the socket, or says why there is none. The one that the operator has named must work; without the default one,
    /// which takes a directory that not everybody may make, datagrams are forwarded all the same.
    ///
    /// # Errors
    /// When the path that the operator has named cannot be had.
    pub(super) fn open(
        config: &Config,
        named: Option<PathBuf>,
        registry: &Registry,
    ) -> Result<(Control, Option<anyhow::Error>)> {
        let mut control = Control { server: None, first: FIRST, named };
        match Server::bind(control.path(config), registry, FIRST) {
            Ok(server) => control.server = Some(server),
            Err(error) if control.path(config) == Path::new(STATUS_SOCKET) => return Ok((control, Some(error))),
            Err(error) => return Err(error),
        }
        Ok((control, None))
    }

    fn path<'a>(&'a self, config: &'a Config) -> &'a Path {
        self.named.as_deref().unwrap_or(&config.status_socket)
    }

    pub(super) fn owns(&self, token: Token) -> bool {
        self.server.as_ref().is_some_and(|server| server.owns(token))
    }

    /// When [`Daemon::serve_waiting_clients`] is to be called, if at all.
    pub(super) fn due(&self) -> Option<Instant> {
        self.server.as_ref().and_then(Server::due)
    }

    /// The socket that takes this one's place under a new configuration; none if it stays.
    ///
    /// # Errors
    /// When it cannot be had.
    pub(super) fn succeeding(&self, old: &Config, new: &Config, registry: &Registry) -> Result<Option<Server>> {
        if self.path(old) == self.path(new) {
            return Ok(None);
        }
        Server::bind(self.path(new), registry, self.other_tokens()).map(Some)
    }

    fn other_tokens(&self) -> Token {
        if self.first == FIRST { Token(FIRST.0 + TOKENS) } else { FIRST }
    }

    /// All that clients want to be told of.
    pub(super) fn watches(&self) -> Option<Watch> {
        Watch::over(self.server.iter().flat_map(Server::watches))
    }

    /// Tells clients of a datagram.
    pub(super) fn tell(&mut self, response: &Response, wants: impl Fn(&Watch) -> bool) {
        if let Some(server) = &mut self.server {
            server.tell(response, wants);
        }
    }

    /// Tells clients that there is nothing to be told of any more.
    pub(super) fn end_watches(&mut self, response: &Response) {
        if let Some(server) = &mut self.server {
            server.end_watches(response);
        }
    }

    /// Takes the socket away, and lets go of its clients.
    pub(super) fn close(&mut self) {
        self.server = None;
    }

    /// Puts it in place. Clients of the one before are let go of.
    pub(super) fn succeed(&mut self, server: Server) {
        self.first = self.other_tokens();
        self.server = Some(server);
    }
}

impl Daemon {
    /// Tries again to accept clients that could not be.
    pub(super) fn serve_waiting_clients(&mut self, now: Instant) {
        if let Some(server) = &mut self.control.server {
            server.on_timer(now);
        }
    }

    pub(super) fn control_event(&mut self, token: Token) {
        if let Some(mut server) = self.control.server.take() {
            server.on_event(token, |request| self.respond(request));
            self.control.server = Some(server);
            self.follow_traces();
        }
    }
}
