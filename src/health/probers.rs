//! The sockets of health checks: probes out, replies in. Non-blocking, on the event loop's own mio registry.
//!
//! - [`icmp`] and `datagram` send everything of a sort through one socket a family, a `channel`;
//! - `connection` opens a socket for each probe; how many at a time is the [monitor](super::monitor)'s business. `http` is
//!   what is said over it.
//! - `errors` tells what says something about a target from what is this host's own trouble.
//!
//! Nothing is decided here: what comes of a probe is a [`ProbeReply`], and what a probe is for, the monitor knows.

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

/// Tokens set aside: one for each socket, which the limit of open files bounds far below this.
pub const TOKENS: usize = 1 << 24;

/// How long after a socket could not be opened the next attempt is made.
const REOPEN: Duration = Duration::from_secs(1);

/// What has come of a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeReply {
    /// Which.
    pub probe: ProbeId,
    /// What.
    pub verdict: ProbeVerdict,
}

/// How a probe was replied to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeVerdict {
    /// With a valid answer.
    Answered {
        /// Certainly to this probe, not to an earlier one of the same target.
        exact: bool,
    },
    /// With a refusal.
    Failed(ProbeFailure),
}

/// All sockets.
#[derive(Debug)]
pub struct Probers {
    registry: Registry,
    first_token: usize,
    slots: Slab<OpenSocket>,
    /// The sockets that probes share.
    shared: HashMap<SharedSocket, usize>,
    connections: HashMap<ProbeId, usize>,
    /// Sockets that could not be opened: why, and when that was tried.
    closed: HashMap<SharedSocket, (SendError, Duration)>,
    /// Slots that had more to read than was read.
    unread: BTreeSet<usize>,
}

#[derive(Debug)]
enum OpenSocket {
    Icmp(IcmpProber),
    Udp(UdpProber),
    Tcp(TcpProbe),
}

/// What the probes that share a socket have in common.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum SharedSocket {
    Icmp { v6: bool },
    Udp { v6: bool, request: UdpRequest },
}

impl SharedSocket {
    /// None for targets whose probes share none.
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
    /// Without sockets; they are opened as they are needed, and watched under tokens from `first_token` on, of which
    /// [`TOKENS`] must be free.
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

    /// The tokens that are ours.
    #[must_use]
    pub fn tokens(&self) -> Range<usize> {
        self.first_token..self.first_token + TOKENS
    }

    /// Sends a probe. What comes of it, if anything does, comes as a [`ProbeReply`], unless [`cancel`](Self::cancel) is called.
    ///
    /// # Errors
    /// When it could not be sent; then there will be no reply.
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

    /// Forgets a probe, if it is still known.
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

    /// Closes the sockets that none of these targets needs.
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

    /// Reads what has come in under a token. A token that is not ours, or of a socket closed since, is no error.
    pub fn on_event(&mut self, token: Token, replies: &mut Vec<ProbeReply>) {
        if let Some(index) = token.0.checked_sub(self.first_token) {
            self.read(index, replies);
        }
    }

    /// Reads what has come in on any socket, whether or not an event has told of it.
    pub fn read_all(&mut self, replies: &mut Vec<ProbeReply>) {
        let all: Vec<usize> = self.slots.iter().map(|(index, _)| index).collect();
        for index in all {
            self.read(index, replies);
        }
    }

    /// Reads what was left unread because there was so much of it.
    pub fn read_unread(&mut self, replies: &mut Vec<ProbeReply>) {
        for index in std::mem::take(&mut self.unread) {
            self.read(index, replies);
        }
    }

    /// True if [`read_unread`](Self::read_unread) is to be called soon; no event will tell.
    #[must_use]
    pub fn has_unread(&self) -> bool {
        !self.unread.is_empty()
    }

    /// Sockets that are open.
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

    /// The socket that the target's probes share with others; opened if need be.
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
                // Closing the socket takes it off the registry anyway.
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
