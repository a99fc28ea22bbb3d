//! Runs every netlink reader of this program on the same bytes, for tests and fuzzing.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use super::facts::Route;
use super::monitor::ChangeDetector;
use super::netlink::raw_messages;
use super::{NextHop, NextHops, addresses, egress_hooks, filters, links, neighbours, routes};

/// The destination that messages are read as routes to.
pub const DESTINATION: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 9, 0, 7));
/// The next hop that is tracked.
pub const TRACKED: NextHop = (3, DESTINATION);

/// The result of all readers for one message.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoded {
    /// Such as `RTM_NEWLINK`.
    pub kind: u16,
    /// Whether the monitor takes it for a change. None if it is malformed.
    pub changed: Option<bool>,
    /// The same for a second copy of it.
    pub changed_again: Option<bool>,
    /// The route to [`DESTINATION`], if the message can be read as one.
    pub route: Option<Route>,
    /// How many readers found in it what they look for.
    pub readers: usize,
}

/// Reads the messages of a datagram, up to the first malformed one.
#[must_use]
pub fn datagram(bytes: &[u8]) -> Vec<Decoded> {
    let next_hops = NextHops { hops: BTreeSet::from([TRACKED]), pod_links: BTreeSet::from([TRACKED.0]) };
    let mut detector = ChangeDetector::for_next_hops(next_hops);
    let mut seen = BTreeMap::new();
    raw_messages(bytes)
        .map_while(Result::ok)
        .map(|message| {
            let payload = message.payload;
            let link = links::read(payload).ok().flatten();
            seen.extend(link.iter().map(|link| (link.link.index, link.clone())));
            let route = routes::read_route(payload, DESTINATION, &seen.iter().map(|(&id, link)| (id, link)).collect());
            let understood = [
                link.is_some(),
                message.error().is_ok(),
                matches!(addresses::read(payload), Ok(Some(_))),
                matches!(neighbours::read(payload), Ok(Some(_))),
                matches!(routes::read_default(payload), Ok(Some(_))),
                route.is_ok(),
                matches!(filters::read(TRACKED.0, payload), Ok(Some(_))),
                egress_hooks::can_read(payload),
            ];
            let readers = understood.into_iter().filter(|&yes| yes).count();
            let (changed, changed_again) = (detector.is_change(&message).ok(), detector.is_change(&message).ok());
            Decoded { kind: message.kind, changed, changed_again, route: route.ok(), readers }
        })
        .collect()
}
