//! Notices that the host's network has changed: an interface disappears or returns, an address moves, a route changes.
//!
//! It reports only *that* something changed. [`HostNetwork`](super::HostNetwork) then collects all facts again, so nothing
//! depends on having read every message, and a burst that overruns the socket counts as a change.

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

use super::facts::{HostFacts, Mac, NextHop};
use super::netlink::{BUFFER_SIZE, RawMessage, open_socket, raw_messages};
use super::{NextHops, addresses, links, neighbours, routes};

/// Multicast groups that are always joined. Rules and next-hop objects affect routing as much as routes do.
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

/// Multicast groups that are joined to track next hops.
const NEXT_HOP_GROUPS: [(u32, &str); 2] = [(libc::RTNLGRP_NEIGH, "neighbours"), (libc::RTNLGRP_TC, "TC filters")];

const RTM_NEWLINK: u16 = libc::RTM_NEWLINK;
const RTM_DELLINK: u16 = libc::RTM_DELLINK;
const RTM_NEWADDR: u16 = libc::RTM_NEWADDR;
const RTM_DELADDR: u16 = libc::RTM_DELADDR;
const RTM_NEWROUTE: u16 = libc::RTM_NEWROUTE;
const RTM_DELROUTE: u16 = libc::RTM_DELROUTE;
const RTM_NEWNEIGH: u16 = libc::RTM_NEWNEIGH;
const RTM_DELNEIGH: u16 = libc::RTM_DELNEIGH;
/// Queueing disciplines, classes and filters; below, `RTM_NEWCHAIN` to `RTM_GETCHAIN`.
const RTM_TC: RangeInclusive<u16> = libc::RTM_NEWQDISC..=libc::RTM_GETTFILTER;
const RTM_CHAINS: RangeInclusive<u16> = 100..=102;
/// `TCM_IFINDEX_MAGIC_BLOCK`, in place of an interface's index: filters that several interfaces share.
const SHARED_FILTERS: i32 = -1;

/// Requested bytes of receive buffer; `net.core.rmem_max` limits it. Enough for a few hundred messages between two turns of
/// the event loop. With more, the socket overruns, which counts as a change.
const RECEIVE_BUFFER: usize = 1024 * 1024;

/// A subscription to netlink messages about interfaces, addresses and routes. A [`mio::event::Source`].
///
/// Open it before collecting the first facts, so that no change is lost between the two.
pub struct HostMonitor {
    socket: Socket,
    buffer: Vec<u8>,
    detector: ChangeDetector,
}

/// The content of the last message about each interface, address and neighbour, to recognise repetitions: the kernel also
/// announces changes that are not part of [`HostFacts`] (an alias, a wireless event, a renewed address lifetime).
#[derive(Default)]
pub(super) struct ChangeDetector {
    links: BTreeMap<u32, links::ObservedLink>,
    /// By interface and address: whether it is usable.
    addresses: HashMap<(u32, IpAddr), bool>,
    /// The next hops in use. Messages about other neighbours and filters are ignored.
    next_hops: NextHops,
    neighbours: HashMap<NextHop, Option<Mac>>,
}

impl HostMonitor {
    /// Subscribes, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// When the kernel refuses the socket or a subscription.
    pub fn open() -> Result<Self> {
        let socket = open_socket()?;
        socket.set_non_blocking(true).context("cannot make a netlink socket non-blocking")?;
        socket.set_rx_buf_sz(RECEIVE_BUFFER as libc::c_int).context("cannot set a netlink socket's buffer size")?;
        let mut monitor = Self { socket, buffer: vec![0; BUFFER_SIZE], detector: ChangeDetector::default() };
        monitor.subscribe(&GROUPS)?;
        Ok(monitor)
    }

    fn subscribe(&mut self, groups: &[(u32, &str)]) -> Result<()> {
        for &(group, what) in groups {
            match self.socket.add_membership(group) {
                Ok(()) => {}
                // Linux before 5.3 has no next-hop objects. A kernel built without IPv6 lacks those groups.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                Err(error) => return Err(error).with_context(|| format!("cannot watch the host's {what}")),
            }
        }
        Ok(())
    }

    /// Also subscribes to neighbours and TC filters. Of these, only messages about the next hops of the facts given to
    /// [`HostMonitor::watch`] count as changes.
    ///
    /// # Errors
    /// When the kernel refuses a subscription.
    pub fn track_next_hops(&mut self) -> Result<()> {
        self.subscribe(&NEXT_HOP_GROUPS)
    }

    /// Watches the next hops of these facts, the last ones collected.
    pub fn watch(&mut self, facts: &HostFacts) {
        let known = facts.neighbours.iter().map(|known| ((known.link, known.address), Some(known.mac)));
        self.detector.neighbours = known.collect();
        self.detector.next_hops = NextHops::of(facts);
    }

    /// Reads all pending messages. True if the facts may have changed and must be collected again. Does not block.
    ///
    /// # Errors
    /// When the socket can no longer be read.
    pub fn drain(&mut self) -> Result<bool> {
        let mut changed = false;
        let mut lost = false;
        loop {
            // With MSG_TRUNC, the kernel returns the datagram's length even if the buffer is shorter.
            match self.socket.recv(&mut &mut self.buffer[..], libc::MSG_TRUNC) {
                Ok(length) if length > self.buffer.len() => {
                    self.buffer.resize(length.next_power_of_two(), 0);
                    lost = true;
                }
                Ok(length) => {
                    for message in raw_messages(&self.buffer[..length]) {
                        // A malformed message may be about a change.
                        changed |= message.and_then(|message| self.detector.is_change(&message)).unwrap_or(true);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if lost {
                        // The lost messages are newer than the queued ones, so the content of those is outdated.
                        self.detector = ChangeDetector::for_next_hops(std::mem::take(&mut self.detector.next_hops));
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

impl ChangeDetector {
    /// A detector that has seen no message yet.
    pub(super) fn for_next_hops(next_hops: NextHops) -> ChangeDetector {
        ChangeDetector { next_hops, ..ChangeDetector::default() }
    }

    /// True if the message differs from the last one about the same object. Remembers its content.
    ///
    /// # Errors
    /// When the message is malformed.
    pub(super) fn is_change(&mut self, message: &RawMessage<'_>) -> Result<bool> {
        let payload = message.payload;
        Ok(match message.kind {
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
                Some(seen) if self.next_hops.hops.contains(&seen.hop) => {
                    let mac = seen.mac.filter(|_| message.kind == RTM_NEWNEIGH);
                    // An unknown neighbour equals an unresolved one: the facts contain neither.
                    self.neighbours.insert(seen.hop, mac).unwrap_or_default() != mac
                }
                _ => false,
            },
            kind if RTM_TC.contains(&kind) || RTM_CHAINS.contains(&kind) => {
                let index = TcHeader::parse(payload)?.index;
                index == SHARED_FILTERS || u32::try_from(index).is_ok_and(|index| self.next_hops.use_link(index))
            }
            RTM_NEWROUTE | RTM_DELROUTE => !routes::is_cached(payload),
            // Rules, next hops, and message types that future kernels may add to these groups.
            _ => true,
        })
    }
}

impl AsFd for HostMonitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for HostMonitor {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl mio::event::Source for HostMonitor {
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
