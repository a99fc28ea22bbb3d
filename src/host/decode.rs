//! Everything that this program reads in what the kernel says over netlink, each message by every reader there is for it,
//! whoever has asked for it or listens for it. Tests and fuzzing feed it what no kernel says.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use super::facts::Route;
use super::monitor::Memory;
use super::netlink::frames;
use super::{Ways, addresses, filters, guards, links, neighbours, routes};

/// The destination whose route the answers are taken for.
pub const DESTINATION: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 9, 0, 7));
/// The way whose neighbour is followed: an interface and a next hop on it.
pub const FOLLOWED: (u32, IpAddr) = (3, DESTINATION);

/// What was understood of one message.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoded {
    /// The message's type, such as `RTM_NEWLINK`.
    pub kind: u16,
    /// Whether it tells who watches the host something new; none if that cannot be understood.
    pub news: Option<bool>,
    /// The same if it comes a second time.
    pub news_again: Option<bool>,
    /// The route that it is to [`DESTINATION`], if it can be read as one.
    pub route: Option<Route>,
    /// By how many readers it was understood, and was what they look for.
    pub readers: usize,
}

/// Reads the messages of a datagram, up to the first that is malformed.
#[must_use]
pub fn datagram(bytes: &[u8]) -> Vec<Decoded> {
    let ways = Ways { hops: BTreeSet::from([FOLLOWED]), links: BTreeSet::from([FOLLOWED.0]) };
    let mut memory = Memory::following(ways);
    let mut seen = BTreeMap::new();
    frames(bytes)
        .map_while(Result::ok)
        .map(|frame| {
            let payload = frame.payload;
            let link = links::read(payload).ok().flatten();
            seen.extend(link.iter().map(|link| (link.link.index, link.clone())));
            let route = routes::read_route(payload, DESTINATION, &seen.iter().map(|(&id, link)| (id, link)).collect());
            let understood = [
                link.is_some(),
                frame.error().is_ok(),
                matches!(addresses::read(payload), Ok(Some(_))),
                matches!(neighbours::read(payload), Ok(Some(_))),
                matches!(routes::read_default(payload), Ok(Some(_))),
                route.is_ok(),
                matches!(filters::read(FOLLOWED.0, payload), Ok(Some(_))),
                guards::understands(payload),
            ];
            let readers = understood.into_iter().filter(|&yes| yes).count();
            let (news, news_again) = (memory.learn(&frame).ok(), memory.learn(&frame).ok());
            Decoded { kind: frame.kind, news, news_again, route: route.ok(), readers }
        })
        .collect()
}
