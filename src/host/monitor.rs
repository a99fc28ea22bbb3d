//! Notices that the host has changed.
//!
//! Only *that* it has: the facts are then taken anew and whole by [`Host`](super::Host), so that nothing depends on
//! having seen every message, and a burst that overruns the socket is a change like any other.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use anyhow::{Context, Result};
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use netlink_packet_route::tc::TcHeader;
use netlink_sys::Socket;

use super::facts::{HostFacts, Mac};
use super::netlink::{BUFFER_SIZE, Frame, frames, open_socket};
use super::{Ways, addresses, links, neighbours, routes};

/// What is listened to. Rules and next-hop objects change where the kernel sends to as much as routes do.
const GROUPS: [(u32, &str); 8] = [
    (libc::RTNLGRP_LINK, "interfaces"),
    (libc::RTNLGRP_IPV4_IFADDR, "IPv4 addresses"),
    (libc::RTNLGRP_IPV6_IFADDR, "IPv6 addresses"),
    (libc::RTNLGRP_IPV4_ROUTE, "IPv4 routes"),
    (libc::RTNLGRP_IPV6_ROUTE, "IPv6 routes"),
    (libc::RTNLGRP_IPV4_RULE, "IPv4 routing rules"),
    (libc::RTNLGRP_IPV6_RULE, "IPv6 routing rules"),
    (libc::RTNLGRP_NEXTHOP, "next hops"),
];

/// What is listened to besides where ways are followed.
const GROUPS_OF_WAYS: [(u32, &str); 2] = [(libc::RTNLGRP_NEIGH, "neighbours"), (libc::RTNLGRP_TC, "TC filters")];

const RTM_NEWLINK: u16 = libc::RTM_NEWLINK;
const RTM_DELLINK: u16 = libc::RTM_DELLINK;
const RTM_NEWADDR: u16 = libc::RTM_NEWADDR;
const RTM_DELADDR: u16 = libc::RTM_DELADDR;
const RTM_NEWROUTE: u16 = libc::RTM_NEWROUTE;
const RTM_DELROUTE: u16 = libc::RTM_DELROUTE;
const RTM_NEWNEIGH: u16 = libc::RTM_NEWNEIGH;
const RTM_DELNEIGH: u16 = libc::RTM_DELNEIGH;
/// Messages about queueing disciplines, classes and filters, and `RTM_NEWCHAIN` to `RTM_GETCHAIN`.
const RTM_TC: RangeInclusive<u16> = libc::RTM_NEWQDISC..=libc::RTM_GETTFILTER;
const RTM_CHAINS: RangeInclusive<u16> = 100..=102;
/// In the place of an interface's index: filters that several interfaces share (`TCM_IFINDEX_MAGIC_BLOCK`).
const SHARED_FILTERS: i32 = -1;

/// Bytes of receive buffer to ask for; the kernel gives what `net.core.rmem_max` allows. Enough for a few hundred
/// messages between two turns of the event loop, beyond which an overrun tells as much.
const RECEIVE_BUFFER: usize = 1024 * 1024;

/// A subscription to the kernel's messages about interfaces, addresses and routes. A [`mio::event::Source`].
///
/// Open it before the facts are first taken, so that no change falls between the two.
pub struct Monitor {
    socket: Socket,
    buffer: Vec<u8>,
    memory: Memory,
}

/// What the last message about each interface and address said, to recognise one that says the same again: the kernel
/// also speaks up about things that are no facts of ours (an alias, a wireless event, a renewed address lifetime).
#[derive(Default)]
pub(super) struct Memory {
    links: BTreeMap<u32, links::Observed>,
    addresses: HashMap<(u32, IpAddr), bool>,
    /// The ways that are followed: of other neighbours and filters nobody wants to hear.
    ways: Ways,
    neighbours: HashMap<(u32, IpAddr), Option<Mac>>,
}

impl Monitor {
    /// Subscribes, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// When the kernel refuses the socket or a subscription.
    pub fn open() -> Result<Self> {
        let socket = open_socket()?;
        socket.set_non_blocking(true).context("cannot make a netlink socket non-blocking")?;
        socket.set_rx_buf_sz(RECEIVE_BUFFER as libc::c_int).context("cannot set a netlink socket's buffer size")?;
        let mut monitor = Self { socket, buffer: vec![0; BUFFER_SIZE], memory: Memory::default() };
        monitor.subscribe(&GROUPS)?;
        Ok(monitor)
    }

    fn subscribe(&mut self, groups: &[(u32, &str)]) -> Result<()> {
        for &(group, what) in groups {
            match self.socket.add_membership(group) {
                Ok(()) => {}
                // Linux before 5.3 has no next-hop objects, a kernel built without IPv6 none of its groups.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                Err(error) => return Err(error).with_context(|| format!("cannot watch the host's {what}")),
            }
        }
        Ok(())
    }

    /// Listens also to what is said about neighbours and about filters, as far as it concerns the ways given to
    /// [`Monitor::watch`].
    ///
    /// # Errors
    /// When the kernel refuses a subscription.
    pub fn follow_ways(&mut self) -> Result<()> {
        self.subscribe(&GROUPS_OF_WAYS)
    }

    /// Sets the ways about which changes are to be noticed, and what is known of them: those that the facts just taken
    /// are about.
    pub fn watch(&mut self, ways: &Ways, facts: &HostFacts) {
        let known = facts.neighbours.iter().map(|known| ((known.link, known.address), Some(known.mac)));
        self.memory.neighbours = known.collect();
        self.memory.ways.clone_from(ways);
    }

    /// Reads everything pending. True if the host's facts may have changed: then take them anew. Does not block.
    ///
    /// # Errors
    /// When the socket can no longer be read.
    pub fn drain(&mut self) -> Result<bool> {
        let mut changed = false;
        let mut lost = false;
        loop {
            // With MSG_TRUNC the kernel tells the datagram's length even where the buffer is shorter.
            match self.socket.recv(&mut &mut self.buffer[..], libc::MSG_TRUNC) {
                Ok(length) if length > self.buffer.len() => {
                    self.buffer.resize(length.next_power_of_two(), 0);
                    lost = true;
                }
                Ok(length) => {
                    for frame in frames(&self.buffer[..length]) {
                        // A message that cannot be understood may well be about a change.
                        changed |= frame.and_then(|frame| self.memory.learn(&frame)).unwrap_or(true);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if lost {
                        // What was lost is newer than what was still queued, so none of it may be remembered.
                        self.memory = Memory::following(std::mem::take(&mut self.memory.ways));
                    }
                    return Ok(changed || lost);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => lost = true,
                Err(error) => return Err(error).context("cannot read the netlink socket that watches the host"),
            }
        }
    }
}

impl Memory {
    /// Remembers nothing yet, and is to follow these ways.
    pub(super) fn following(ways: Ways) -> Memory {
        Memory { ways, ..Memory::default() }
    }

    /// True if the message says something that the messages before it have not.
    ///
    /// # Errors
    /// When the message is malformed.
    pub(super) fn learn(&mut self, frame: &Frame<'_>) -> Result<bool> {
        let payload = frame.payload;
        Ok(match frame.kind {
            RTM_NEWLINK => match links::read(payload)? {
                Some(seen) => self.links.insert(seen.link.index, seen.clone()).as_ref() != Some(&seen),
                None => false,
            },
            RTM_DELLINK => match links::read(payload)? {
                Some(seen) => {
                    self.links.remove(&seen.link.index);
                    self.addresses.retain(|(link, _), _| *link != seen.link.index);
                    true
                }
                None => false,
            },
            RTM_NEWADDR => match addresses::read(payload)? {
                Some(seen) => {
                    let key = (seen.address.link, seen.address.address);
                    self.addresses.insert(key, seen.usable) != Some(seen.usable)
                }
                None => false,
            },
            RTM_DELADDR => match addresses::read(payload)? {
                Some(seen) => {
                    self.addresses.remove(&(seen.address.link, seen.address.address));
                    true
                }
                None => false,
            },
            RTM_NEWNEIGH | RTM_DELNEIGH => match neighbours::read(payload)? {
                Some(seen) if self.ways.hops.contains(&seen.hop) => {
                    let mac = seen.mac.filter(|_| frame.kind == RTM_NEWNEIGH);
                    // One not heard of is like one not found, which the facts don't have either.
                    self.neighbours.insert(seen.hop, mac).unwrap_or_default() != mac
                }
                _ => false,
            },
            kind if RTM_TC.contains(&kind) || RTM_CHAINS.contains(&kind) => {
                let index = TcHeader::parse(payload)?.index;
                index == SHARED_FILTERS || u32::try_from(index).is_ok_and(|index| self.ways.pass(index))
            }
            RTM_NEWROUTE | RTM_DELROUTE => !routes::is_cached(payload),
            // Rules and next hops, and whatever else the groups may bring one day.
            _ => true,
        })
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Monitor {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl mio::event::Source for Monitor {
    fn register(&mut self, registry: &Registry, token: Token, interests: Interest) -> io::Result<()> {
        SourceFd(&self.as_raw_fd()).register(registry, token, interests)
    }

    fn reregister(&mut self, registry: &Registry, token: Token, interests: Interest) -> io::Result<()> {
        SourceFd(&self.as_raw_fd()).reregister(registry, token, interests)
    }

    fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        SourceFd(&self.as_raw_fd()).deregister(registry)
    }
}
