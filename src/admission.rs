//! Who may send to a listener, and how fast: rules that both datapaths follow. Pure.
//!
//! [`Sources`] is what the configuration says about addresses. The kernel datapath writes its [`rules`](Sources::rules)
//! into a trie; the userspace datapath searches the [`Ranges`] that come of them. [`Meter`] is a token bucket for each
//! sender in the form both can compute with: `bpf/admission.h` is the other half.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Serialize, Serializer};

/// Addresses that begin with the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    address: IpAddr,
    length: u8,
}

/// Why a text or number is no [`Prefix`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoPrefix {
    /// Not an address with or without `/` and a number.
    Syntax,
    /// The number is larger than the address has bits.
    TooLong,
    /// The address has bits behind the prefix; this is the prefix without them.
    HostBits(Prefix),
}

impl Prefix {
    /// The prefix of this many bits.
    ///
    /// # Errors
    /// When there are not so many bits, or some behind them are set.
    pub fn new(address: IpAddr, length: u8) -> Result<Prefix, NoPrefix> {
        if length > bits(address) {
            return Err(NoPrefix::TooLong);
        }
        let network = mask(address, length);
        let prefix = Prefix { address: network, length };
        if network == address { Ok(prefix) } else { Err(NoPrefix::HostBits(prefix)) }
    }

    /// Reads `10.0.0.0/8`; an address alone is a prefix of one address.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Prefix, NoPrefix> {
        let (address, length) = match text.split_once('/') {
            Some((address, length)) if !length.is_empty() && length.bytes().all(|b| b.is_ascii_digit()) => {
                (address, Some(length.parse().map_err(|_| NoPrefix::TooLong)?))
            }
            Some(_) => return Err(NoPrefix::Syntax),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| NoPrefix::Syntax)?;
        Prefix::new(address, length.unwrap_or(bits(address)))
    }

    /// Its first address.
    #[must_use]
    pub fn address(self) -> IpAddr {
        self.address
    }

    /// How many bits of it count.
    #[must_use]
    pub fn length(self) -> u8 {
        self.length
    }

    /// True if the address begins with it. An IPv4 address never begins with an IPv6 prefix.
    #[must_use]
    pub fn contains(self, address: IpAddr) -> bool {
        address.is_ipv4() == self.address.is_ipv4() && mask(address, self.length) == self.address
    }

    /// The first and the last of its addresses, as numbers.
    fn range(self) -> (u128, u128) {
        let first = number(self.address);
        let free = bits(self.address) - self.length;
        (first, first | u128::MAX.checked_shr(128 - u32::from(free)).unwrap_or(0))
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

impl Serialize for Prefix {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// The address with all but its first `length` bits cleared.
fn mask(address: IpAddr, length: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let kept = u32::MAX.checked_shl(32 - u32::from(length.min(32))).unwrap_or(0);
            Ipv4Addr::from_bits(v4.to_bits() & kept).into()
        }
        IpAddr::V6(v6) => {
            let kept = u128::MAX.checked_shl(128 - u32::from(length.min(128))).unwrap_or(0);
            Ipv6Addr::from_bits(v6.to_bits() & kept).into()
        }
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => v4.to_bits().into(),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

/// What becomes of a sender's datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// They are dropped.
    Deny,
    /// They are forwarded.
    Allow,
}

/// Whose datagrams a listener takes. All prefixes are of the listener's IP version.
///
/// The longest prefix that a sender's address begins with decides; between two of the same length, `deny`. A sender
/// for whom there is none is allowed, unless there is an `allow` for others.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Sources {
    /// Whose datagrams are taken.
    pub allow: Vec<Prefix>,
    /// Whose are dropped.
    pub deny: Vec<Prefix>,
}

impl Sources {
    /// True if everybody may send.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.allow.is_empty() && self.deny.is_empty()
    }

    /// What holds for a sender whom no prefix names.
    #[must_use]
    pub fn others(&self) -> Verdict {
        if self.allow.is_empty() { Verdict::Allow } else { Verdict::Deny }
    }

    /// Every prefix once, with what it says.
    #[must_use]
    pub fn rules(&self) -> BTreeMap<Prefix, Verdict> {
        let allowed = self.allow.iter().map(|&prefix| (prefix, Verdict::Allow));
        let denied = self.deny.iter().map(|&prefix| (prefix, Verdict::Deny));
        allowed.chain(denied).collect()
    }

    /// The rules in the form that is fastest to search.
    #[must_use]
    pub fn ranges(&self) -> Ranges {
        // Wider prefixes first, so that those within them overwrite their part.
        let mut rules: Vec<_> = self.rules().into_iter().collect();
        rules.sort_by_key(|(prefix, _)| prefix.length);
        let mut starts = BTreeMap::from([(0, self.others())]);
        for (prefix, verdict) in rules {
            let (first, last) = prefix.range();
            let behind = starts.range(..=last).next_back().map_or(self.others(), |(_, &verdict)| verdict);
            let covered: Vec<u128> = starts.range(first..=last).map(|(&start, _)| start).collect();
            for start in covered {
                starts.remove(&start);
            }
            starts.insert(first, verdict);
            if let Some(next) = last.checked_add(1) {
                starts.entry(next).or_insert(behind);
            }
        }
        let mut merged: Vec<(u128, Verdict)> = Vec::with_capacity(starts.len());
        for (start, verdict) in starts {
            if merged.last().is_none_or(|&(_, before)| before != verdict) {
                merged.push((start, verdict));
            }
        }
        Ranges(merged.into())
    }
}

/// [`Sources`] as stretches of addresses of one IP version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranges(Box<[(u128, Verdict)]>);

impl Ranges {
    /// What becomes of this sender's datagrams.
    #[must_use]
    pub fn verdict(&self, sender: IpAddr) -> Verdict {
        let number = number(sender);
        let after = self.0.partition_point(|&(start, _)| start <= number);
        // The first stretch starts at 0, so there is always one before.
        after.checked_sub(1).map_or(Verdict::Deny, |at| self.0[at].1)
    }
}

/// How fast each sender may send to a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RateLimit {
    /// Datagrams in a second, over time; from 1.
    pub packets_per_second: u32,
    /// Datagrams at once, after a pause; from 1.
    pub burst: u32,
    /// How many bits of an IPv4 address make a sender.
    pub ipv4_prefix: u8,
    /// How many bits of an IPv6 address do.
    pub ipv6_prefix: u8,
    /// How many senders are kept apart at most: of more, the longest silent one begins anew with a full bucket.
    pub senders: u32,
}

impl RateLimit {
    /// The token bucket of each sender to a listener of this address.
    #[must_use]
    pub fn meter(&self, listener: IpAddr) -> Meter {
        let interval = TICKS_PER_SECOND / u64::from(self.packets_per_second.max(1));
        Meter {
            interval,
            depth: interval.saturating_mul(self.burst.max(1).into()).min(DEEPEST),
            prefix: if listener.is_ipv4() { self.ipv4_prefix } else { self.ipv6_prefix },
            senders: self.senders,
        }
    }
}

/// Ticks of the meters' clock in a second: sixteenths of a nanosecond, so that ten million datagrams a second are
/// still told from a few more. 64 bits of them last for 36 years.
pub const TICKS_PER_SECOND: u64 = 16 * 1_000_000_000;

/// The deepest bucket, in ticks: nine years, to which the time can be added.
const DEEPEST: u64 = (1 << 62) - 1;

/// A token bucket for each sender, as the generic cell rate algorithm of ITU-T I.371 has it: a bucket is the time at which it
/// will be full again, which every datagram moves on by its cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Meter {
    /// What a datagram costs, in ticks.
    pub interval: u64,
    /// What a full bucket holds, in ticks: the costs of a burst.
    pub depth: u64,
    /// How many bits of an address make a sender.
    pub prefix: u8,
    /// How many senders are kept apart at most.
    pub senders: u32,
}

impl Meter {
    /// Who sends, of all those whom this meter keeps apart.
    #[must_use]
    pub fn sender(&self, source: IpAddr) -> IpAddr {
        mask(source, self.prefix)
    }

    /// The bits of an address that make a sender, as an address.
    #[must_use]
    pub fn mask(&self, listener: IpAddr) -> IpAddr {
        let all: IpAddr = match listener {
            IpAddr::V4(_) => Ipv4Addr::BROADCAST.into(),
            IpAddr::V6(_) => Ipv6Addr::from_bits(u128::MAX).into(),
        };
        mask(all, self.prefix)
    }

    /// Takes a datagram's cost from a bucket that is full at the tick `due`. The new such tick, or none if the datagram
    /// must be dropped.
    #[must_use]
    pub fn take(&self, due: u64, now: u64) -> Option<u64> {
        let after = due.max(now).saturating_add(self.interval);
        (after <= now.saturating_add(self.depth)).then_some(after)
    }
}

#[cfg(test)]
mod tests;
