//! The sockets of health checks: probes out, replies in. Non-blocking, on the event loop's own mio registry.
//!
//! - [`icmp`] and `udp` send all probes of one kind and address family through one `probe_socket`;
//! - `tcp` opens a socket per probe, for TCP and HTTP; the [monitor](super::monitor) bounds their number. [`http`] builds
//!   requests and parses responses.
//! - `errors` separates failures of the target or path from errors of this host.
//!
//! Nothing is decided here: each result becomes a [`ProbeReply`] for the monitor.

mod errors;
pub mod http;
pub mod icmp;
mod probe_socket;
mod tcp;
mod udp;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::RawFd;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use slab::Slab;

pub use self::errors::SendError;
use self::icmp::IcmpProber;
use self::tcp::TcpProbe;
use self::udp::{UdpProber, UdpRequest};
use super::model::{ProbeFailure, ProbeId, ProbeTarget};
use super::settings::ProbeProtocol;

/// The number of reserved tokens, one per socket; far above any limit of open files.
pub const TOKENS: usize = 1 << 24;

/// The wait before the next attempt to open a socket.
const REOPEN: Duration = Duration::from_secs(1);

/// The result of a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeReply {
    /// The probe.
    pub probe: ProbeId,
    /// The result.
    pub verdict: ProbeVerdict,
}

/// A reply or a refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeVerdict {
    /// A valid reply.
    Answered {
        /// True if it certainly belongs to this probe, and not to an earlier one of the same target.
        exact: bool,
    },
    /// A refusal or a wrong reply.
    Failed(ProbeFailure),
}

/// All sockets of the health checks.
#[derive(Debug)]
pub struct Probers {
    registry: Registry,
    first_token: usize,
    slots: Slab<OpenSocket>,
    /// Slots of the sockets that many probes share.
    shared: HashMap<SharedSocket, usize>,
    connections: HashMap<ProbeId, usize>,
    /// Sockets that could not be opened: the error and the time of the attempt.
    closed: HashMap<SharedSocket, (SendError, Duration)>,
    /// Slots with data that is not read yet.
    unread: BTreeSet<usize>,
}

#[derive(Debug)]
enum OpenSocket {
    Icmp(IcmpProber),
    Udp(UdpProber),
    Tcp(TcpProbe),
}

/// The key of a shared socket: what its probes have in common.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum SharedSocket {
    Icmp { v6: bool },
    Udp { v6: bool, request: UdpRequest },
}

impl SharedSocket {
    /// None if each probe of the target has a socket of its own.
    fn of(target: &ProbeTarget) -> Option<SharedSocket> {
        let v6 = target.address.is_ipv6();
        match &target.settings.protocol {
            ProbeProtocol::Icmp => Some(SharedSocket::Icmp { v6 }),
            ProbeProtocol::UdpEcho { .. } => Some(SharedSocket::Udp { v6, request: UdpRequest::Echo }),
            ProbeProtocol::Udp { payload, expect, .. } => {
                let request = UdpRequest::Fixed { payload: payload.clone(), expect: expect.clone() };
                Some(SharedSocket::Udp { v6, request })
            }
            ProbeProtocol::Tcp { .. } | ProbeProtocol::Http { .. } => None,
        }
    }
}

impl OpenSocket {
    fn open(key: &SharedSocket) -> Result<OpenSocket, SendError> {
        match key {
            SharedSocket::Icmp { v6 } => IcmpProber::new(*v6).map(OpenSocket::Icmp),
            SharedSocket::Udp { v6, request } => {
                let opened = UdpProber::new(*v6, request.clone()).map(OpenSocket::Udp);
                opened.map_err(|error| errors::send_error(&error))
            }
        }
    }

    fn fd(&self) -> Option<RawFd> {
        match self {
            OpenSocket::Icmp(icmp) => Some(icmp.socket().fd()),
            OpenSocket::Udp(udp) => Some(udp.socket().fd()),
            OpenSocket::Tcp(_) => None,
        }
    }

    fn send(&mut self, probe: ProbeId, to: SocketAddr) -> Result<(), SendError> {
        match self {
            OpenSocket::Icmp(icmp) => icmp.send(probe, to),
            OpenSocket::Udp(udp) => udp.send(probe, to),
            OpenSocket::Tcp(_) => Ok(()),
        }
    }
}

impl Probers {
    /// Probers without sockets. Sockets are opened on demand and registered under [`TOKENS`] tokens from `first_token` on.
    #[must_use]
    pub fn new(registry: Registry, first_token: Token) -> Probers {
        Probers {
            registry,
            first_token: first_token.0,
            slots: Slab::new(),
            shared: HashMap::new(),
            connections: HashMap::new(),
            closed: HashMap::new(),
            unread: BTreeSet::new(),
        }
    }

    /// The reserved tokens.
    #[must_use]
    pub fn tokens(&self) -> Range<usize> {
        self.first_token..self.first_token + TOKENS
    }

    /// Sends a probe. Its result, if any, becomes a [`ProbeReply`], unless [`cancel`](Self::cancel) is called first.
    ///
    /// # Errors
    /// If it could not be sent; then no reply follows.
    pub fn send(&mut self, probe: ProbeId, target: &ProbeTarget, now: Duration) -> Result<(), SendError> {
        let path = match &target.settings.protocol {
            ProbeProtocol::Tcp { .. } => None,
            ProbeProtocol::Http { path, .. } => Some(&**path),
            ProbeProtocol::Icmp | ProbeProtocol::UdpEcho { .. } | ProbeProtocol::Udp { .. } => {
                return self.shared_socket(target, now)?.map_or(Ok(()), |slot| slot.send(probe, target.address));
            }
        };
        let mut connection = TcpProbe::connect(probe, target.address, path)?;
        let entry = self.slots.vacant_entry();
        let token = Token(self.first_token + entry.key());
        self.registry
            .register(&mut connection.stream, token, Interest::READABLE | Interest::WRITABLE)
            .map_err(|error| errors::send_error(&error))?;
        self.connections.insert(probe, entry.key());
        entry.insert(OpenSocket::Tcp(connection));
        Ok(())
    }

    /// Forgets a probe.
    pub fn cancel(&mut self, probe: ProbeId, target: &ProbeTarget) {
        let Some(key) = SharedSocket::of(target) else {
            if let Some(&index) = self.connections.get(&probe) {
                self.close(index);
            }
            return;
        };
        match self.shared.get(&key).and_then(|&index| self.slots.get_mut(index)) {
            Some(OpenSocket::Icmp(icmp)) => icmp.cancel(probe, target.address),
            Some(OpenSocket::Udp(udp)) => udp.cancel(probe, target.address),
            Some(OpenSocket::Tcp(_)) | None => {}
        }
    }

    /// Closes the shared sockets that none of these targets needs.
    pub fn close_unneeded<'a>(&mut self, targets: impl Iterator<Item = &'a ProbeTarget>) {
        let needed: HashSet<SharedSocket> = targets.filter_map(SharedSocket::of).collect();
        let idle: Vec<SharedSocket> = self.shared.keys().filter(|key| !needed.contains(key)).cloned().collect();
        for key in idle {
            if let Some(index) = self.shared.remove(&key) {
                self.close(index);
            }
        }
        self.closed.retain(|key, _| needed.contains(key));
    }

    /// Reads the socket of a token. Ignores other tokens and those of closed sockets.
    pub fn on_event(&mut self, token: Token, replies: &mut Vec<ProbeReply>) {
        if let Some(index) = token.0.checked_sub(self.first_token) {
            self.read(index, replies);
        }
    }

    /// Reads all sockets, with or without an event.
    pub fn read_all(&mut self, replies: &mut Vec<ProbeReply>) {
        let all: Vec<usize> = self.slots.iter().map(|(index, _)| index).collect();
        for index in all {
            self.read(index, replies);
        }
    }

    /// Continues reading sockets that had too much data for one call.
    pub fn read_unread(&mut self, replies: &mut Vec<ProbeReply>) {
        for index in std::mem::take(&mut self.unread) {
            self.read(index, replies);
        }
    }

    /// True if [`read_unread`](Self::read_unread) must be called soon. No event announces that data.
    #[must_use]
    pub fn has_unread(&self) -> bool {
        !self.unread.is_empty()
    }

    /// The number of open sockets.
    #[must_use]
    pub fn open_sockets(&self) -> usize {
        self.slots.len()
    }

    fn read(&mut self, index: usize, replies: &mut Vec<ProbeReply>) {
        let more = match self.slots.get_mut(index) {
            Some(OpenSocket::Icmp(icmp)) => icmp.receive(replies),
            Some(OpenSocket::Udp(udp)) => udp.receive(replies),
            Some(OpenSocket::Tcp(connection)) => {
                if let Some(outcome) = connection.advance() {
                    let verdict =
                        outcome.map_or_else(ProbeVerdict::Failed, |()| ProbeVerdict::Answered { exact: true });
                    replies.push(ProbeReply { probe: connection.probe, verdict });
                    self.close(index);
                }
                false
            }
            None => false,
        };
        if more {
            self.unread.insert(index);
        }
    }

    /// The shared socket of the target's probes, opened on demand.
    fn shared_socket(&mut self, target: &ProbeTarget, now: Duration) -> Result<Option<&mut OpenSocket>, SendError> {
        let Some(key) = SharedSocket::of(target) else { return Ok(None) };
        if let Some(&index) = self.shared.get(&key) {
            return Ok(self.slots.get_mut(index));
        }
        if let Some((error, tried)) = self.closed.get(&key)
            && now < *tried + REOPEN
        {
            return Err(error.clone());
        }
        let entry = self.slots.vacant_entry();
        let token = Token(self.first_token + entry.key());
        let opened = OpenSocket::open(&key).and_then(|slot| {
            let registered =
                slot.fd().map_or(Ok(()), |fd| self.registry.register(&mut SourceFd(&fd), token, Interest::READABLE));
            registered.map(|()| slot).map_err(|error| errors::send_error(&error))
        });
        match opened {
            Ok(slot) => {
                self.closed.remove(&key);
                self.shared.insert(key, entry.key());
                Ok(Some(entry.insert(slot)))
            }
            Err(error) => {
                self.closed.insert(key, (error.clone(), now));
                Err(error)
            }
        }
    }

    fn close(&mut self, index: usize) {
        self.unread.remove(&index);
        match self.slots.try_remove(index) {
            Some(OpenSocket::Tcp(mut connection)) => {
                self.connections.remove(&connection.probe);
                // Closing the socket deregisters it anyway.
                let _ = self.registry.deregister(&mut connection.stream);
            }
            Some(slot) => {
                if let Some(fd) = slot.fd() {
                    let _ = self.registry.deregister(&mut SourceFd(&fd));
                }
            }
            None => {}
        }
    }
}
