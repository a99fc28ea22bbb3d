//! The sockets of health checks: probes out, replies in. Non-blocking, on the event loop's own mio registry.
//!
//! - [`icmp`] and `datagram` send everything of a sort through one socket a family, a `channel`;
//! - `connection` opens a socket for each probe; how many at a time is the [monitor](super::state)'s business. `http` is
//!   what is said over it.
//! - `errors` tells what says something about a target from what is this host's own trouble.
//!
//! Nothing is decided here: what comes of a probe is a [`Reply`], and what a probe is for, the monitor knows.

mod channel;
mod connection;
mod datagram;
mod errors;
pub mod http;
pub mod icmp;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::RawFd;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use slab::Slab;

use self::connection::Connection;
use self::datagram::{Datagrams, Question};
pub use self::errors::Unsent;
use self::icmp::Icmp;
use super::model::{Failure, ProbeId, Target};
use super::settings::Protocol;

/// Tokens set aside: one for each socket, which the limit of open files bounds far below this.
pub const TOKENS: usize = 1 << 24;

/// How long after a socket could not be opened the next attempt is made.
const REOPEN: Duration = Duration::from_secs(1);

/// What has come of a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// Which.
    pub probe: ProbeId,
    /// What.
    pub verdict: Verdict,
}

/// How a probe was replied to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// With a valid answer.
    Answered {
        /// Certainly to this probe, not to an earlier one of the same target.
        exact: bool,
    },
    /// With a refusal.
    Failed(Failure),
}

/// All sockets.
#[derive(Debug)]
pub struct Probers {
    registry: Registry,
    first_token: usize,
    slots: Slab<Slot>,
    /// The sockets that probes share.
    shared: HashMap<Key, usize>,
    connections: HashMap<ProbeId, usize>,
    /// Sockets that could not be opened: why, and when that was tried.
    closed: HashMap<Key, (Unsent, Duration)>,
    /// Slots that had more to read than was read.
    unread: BTreeSet<usize>,
}

#[derive(Debug)]
enum Slot {
    Icmp(Icmp),
    Datagrams(Datagrams),
    Connection(Connection),
}

/// What the probes that share a socket have in common.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Key {
    Icmp { v6: bool },
    Datagrams { v6: bool, question: Question },
}

impl Key {
    /// None for targets whose probes share none.
    fn of(target: &Target) -> Option<Key> {
        let v6 = target.address.is_ipv6();
        match &target.settings.protocol {
            Protocol::Icmp => Some(Key::Icmp { v6 }),
            Protocol::UdpEcho { .. } => Some(Key::Datagrams { v6, question: Question::Echo }),
            Protocol::Udp { payload, expect, .. } => {
                let question = Question::Fixed { payload: payload.clone(), expect: expect.clone() };
                Some(Key::Datagrams { v6, question })
            }
            Protocol::Tcp { .. } | Protocol::Http { .. } => None,
        }
    }
}

impl Slot {
    fn open(key: &Key) -> Result<Slot, Unsent> {
        match key {
            Key::Icmp { v6 } => Icmp::new(*v6).map(Slot::Icmp),
            Key::Datagrams { v6, question } => {
                let opened = Datagrams::new(*v6, question.clone()).map(Slot::Datagrams);
                opened.map_err(|error| errors::unsent(&error))
            }
        }
    }

    fn fd(&self) -> Option<RawFd> {
        match self {
            Slot::Icmp(icmp) => Some(icmp.channel().fd()),
            Slot::Datagrams(datagrams) => Some(datagrams.channel().fd()),
            Slot::Connection(_) => None,
        }
    }

    fn send(&mut self, probe: ProbeId, to: SocketAddr) -> Result<(), Unsent> {
        match self {
            Slot::Icmp(icmp) => icmp.send(probe, to),
            Slot::Datagrams(datagrams) => datagrams.send(probe, to),
            Slot::Connection(_) => Ok(()),
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

    /// Sends a probe. What comes of it, if anything does, comes as a [`Reply`], unless [`cancel`](Self::cancel) is called.
    ///
    /// # Errors
    /// When it could not be sent; then there will be no reply.
    pub fn send(&mut self, probe: ProbeId, target: &Target, now: Duration) -> Result<(), Unsent> {
        let path = match &target.settings.protocol {
            Protocol::Tcp { .. } => None,
            Protocol::Http { path, .. } => Some(&**path),
            Protocol::Icmp | Protocol::UdpEcho { .. } | Protocol::Udp { .. } => {
                return self.shared_slot(target, now)?.map_or(Ok(()), |slot| slot.send(probe, target.address));
            }
        };
        let mut connection = Connection::begin(probe, target.address, path)?;
        let entry = self.slots.vacant_entry();
        let token = Token(self.first_token + entry.key());
        self.registry
            .register(&mut connection.stream, token, Interest::READABLE | Interest::WRITABLE)
            .map_err(|error| errors::unsent(&error))?;
        self.connections.insert(probe, entry.key());
        entry.insert(Slot::Connection(connection));
        Ok(())
    }

    /// Forgets a probe, if it is still known.
    pub fn cancel(&mut self, probe: ProbeId, target: &Target) {
        let Some(key) = Key::of(target) else {
            if let Some(&index) = self.connections.get(&probe) {
                self.close(index);
            }
            return;
        };
        match self.shared.get(&key).and_then(|&index| self.slots.get_mut(index)) {
            Some(Slot::Icmp(icmp)) => icmp.cancel(probe, target.address),
            Some(Slot::Datagrams(datagrams)) => datagrams.cancel(probe, target.address),
            Some(Slot::Connection(_)) | None => {}
        }
    }

    /// Closes the sockets that none of these targets needs.
    pub fn keep<'a>(&mut self, targets: impl Iterator<Item = &'a Target>) {
        let needed: HashSet<Key> = targets.filter_map(Key::of).collect();
        let idle: Vec<Key> = self.shared.keys().filter(|key| !needed.contains(key)).cloned().collect();
        for key in idle {
            if let Some(index) = self.shared.remove(&key) {
                self.close(index);
            }
        }
        self.closed.retain(|key, _| needed.contains(key));
    }

    /// Reads what has come in under a token. A token that is not ours, or of a socket closed since, is no error.
    pub fn on_event(&mut self, token: Token, replies: &mut Vec<Reply>) {
        if let Some(index) = token.0.checked_sub(self.first_token) {
            self.read(index, replies);
        }
    }

    /// Reads what has come in on any socket, whether or not an event has told of it.
    pub fn read_all(&mut self, replies: &mut Vec<Reply>) {
        let all: Vec<usize> = self.slots.iter().map(|(index, _)| index).collect();
        for index in all {
            self.read(index, replies);
        }
    }

    /// Reads what was left unread because there was so much of it.
    pub fn read_rest(&mut self, replies: &mut Vec<Reply>) {
        for index in std::mem::take(&mut self.unread) {
            self.read(index, replies);
        }
    }

    /// True if [`read_rest`](Self::read_rest) is to be called soon; no event will tell.
    #[must_use]
    pub fn has_rest(&self) -> bool {
        !self.unread.is_empty()
    }

    /// Sockets that are open.
    #[must_use]
    pub fn open_sockets(&self) -> usize {
        self.slots.len()
    }

    fn read(&mut self, index: usize, replies: &mut Vec<Reply>) {
        let more = match self.slots.get_mut(index) {
            Some(Slot::Icmp(icmp)) => icmp.receive(replies),
            Some(Slot::Datagrams(datagrams)) => datagrams.receive(replies),
            Some(Slot::Connection(connection)) => {
                if let Some(outcome) = connection.advance() {
                    let verdict = outcome.map_or_else(Verdict::Failed, |()| Verdict::Answered { exact: true });
                    replies.push(Reply { probe: connection.probe, verdict });
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
    fn shared_slot(&mut self, target: &Target, now: Duration) -> Result<Option<&mut Slot>, Unsent> {
        let Some(key) = Key::of(target) else { return Ok(None) };
        if let Some(&index) = self.shared.get(&key) {
            return Ok(self.slots.get_mut(index));
        }
        if let Some((unsent, tried)) = self.closed.get(&key)
            && now < *tried + REOPEN
        {
            return Err(unsent.clone());
        }
        let entry = self.slots.vacant_entry();
        let token = Token(self.first_token + entry.key());
        let opened = Slot::open(&key).and_then(|slot| {
            let registered =
                slot.fd().map_or(Ok(()), |fd| self.registry.register(&mut SourceFd(&fd), token, Interest::READABLE));
            registered.map(|()| slot).map_err(|error| errors::unsent(&error))
        });
        match opened {
            Ok(slot) => {
                self.closed.remove(&key);
                self.shared.insert(key, entry.key());
                Ok(Some(entry.insert(slot)))
            }
            Err(unsent) => {
                self.closed.insert(key, (unsent.clone(), now));
                Err(unsent)
            }
        }
    }

    fn close(&mut self, index: usize) {
        self.unread.remove(&index);
        match self.slots.try_remove(index) {
            Some(Slot::Connection(mut connection)) => {
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
