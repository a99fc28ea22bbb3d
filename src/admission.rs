//! Which senders may send to a listener, and how fast: rules that both datapaths follow. Pure.
//!
//! [`SourceRules`] holds the configured prefixes. The kernel datapath writes its [`rules`](SourceRules::rules) into a
//! trie; the userspace datapath searches [`SourceRanges`]. [`Meter`] is a token bucket per sender in a form that both
//! can compute: `bpf/admission.h` is the kernel's half.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Serialize, Serializer};

/// An address prefix, such as `10.0.0.0/8`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    address: IpAddr,
    length: u8,
}

/// Why a text or number is not a valid [`Prefix`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrefixError {
    /// Not an address with or without `/` and a number.
    Syntax,
    /// The length exceeds the address's bits.
    TooLong,
    /// The address has bits set after the prefix. Holds the prefix without them.
    HostBits(Prefix),
}

impl Prefix {
    /// The prefix of this length in bits.
    ///
    /// # Errors
    /// When the address has fewer bits, or bits set after the prefix.
    pub fn new(address: IpAddr, length: u8) -> Result<Prefix, PrefixError> {
        if length > bits(address) {
            return Err(PrefixError::TooLong);
        }
        let network = mask(address, length);
        let prefix = Prefix { address: network, length };
        if network == address { Ok(prefix) } else { Err(PrefixError::HostBits(prefix)) }
    }

    /// Parses `10.0.0.0/8`; an address alone is a prefix of one address.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn parse(text: &str) -> Result<Prefix, PrefixError> {
        let (address, length) = match text.split_once('/') {
            Some((address, length)) if !length.is_empty() && length.bytes().all(|b| b.is_ascii_digit()) => {
                (address, Some(length.parse().map_err(|_| PrefixError::TooLong)?))
            }
            Some(_) => return Err(PrefixError::Syntax),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| PrefixError::Syntax)?;
        Prefix::new(address, length.unwrap_or(bits(address)))
    }

    /// The network address.
    #[must_use]
    pub fn address(self) -> IpAddr {
        self.address
    }

    /// The prefix length in bits.
    #[must_use]
    pub fn length(self) -> u8 {
        self.length
    }

    /// True if the address is within the prefix. An IPv4 address is never within an IPv6 prefix.
    #[must_use]
    pub fn contains(self, address: IpAddr) -> bool {
        address.is_ipv4() == self.address.is_ipv4() && mask(address, self.length) == self.address
    }

    /// Its first and last address, as numbers.
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

/// What happens to a sender's datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceVerdict {
    /// They are dropped.
    Deny,
    /// They are forwarded.
    Allow,
}

/// Which senders a listener accepts. All prefixes are of the listener's address family.
///
/// The longest matching prefix decides; `deny` wins between two of the same length. A sender without a match is allowed
/// if `allow` is empty and denied otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct SourceRules {
    /// Senders that are allowed.
    pub allow: Vec<Prefix>,
    /// Senders that are denied.
    pub deny: Vec<Prefix>,
}

impl SourceRules {
    /// True if there is no rule, so every sender is allowed.
    #[must_use]
    pub fn allows_everyone(&self) -> bool {
        self.allow.is_empty() && self.deny.is_empty()
    }

    /// The verdict for a sender that no prefix matches.
    #[must_use]
    pub fn default_verdict(&self) -> SourceVerdict {
        if self.allow.is_empty() { SourceVerdict::Allow } else { SourceVerdict::Deny }
    }

    /// Every prefix once, with its verdict.
    #[must_use]
    pub fn rules(&self) -> BTreeMap<Prefix, SourceVerdict> {
        let allowed = self.allow.iter().map(|&prefix| (prefix, SourceVerdict::Allow));
        let denied = self.deny.iter().map(|&prefix| (prefix, SourceVerdict::Deny));
        allowed.chain(denied).collect()
    }

    /// The rules as sorted ranges, for a fast search.
    #[must_use]
    pub fn ranges(&self) -> SourceRanges {
        // Shorter prefixes first, so that longer ones overwrite their part.
        let mut rules: Vec<_> = self.rules().into_iter().collect();
        rules.sort_by_key(|(prefix, _)| prefix.length);
        let mut starts = BTreeMap::from([(0, self.default_verdict())]);
        for (prefix, verdict) in rules {
            let (first, last) = prefix.range();
            let behind = starts.range(..=last).next_back().map_or(self.default_verdict(), |(_, &verdict)| verdict);
            let covered: Vec<u128> = starts.range(first..=last).map(|(&start, _)| start).collect();
            for start in covered {
                starts.remove(&start);
            }
            starts.insert(first, verdict);
            if let Some(next) = last.checked_add(1) {
                starts.entry(next).or_insert(behind);
            }
        }
        let mut merged: Vec<(u128, SourceVerdict)> = Vec::with_capacity(starts.len());
        for (start, verdict) in starts {
            if merged.last().is_none_or(|&(_, before)| before != verdict) {
                merged.push((start, verdict));
            }
        }
        SourceRanges(merged.into())
    }
}

/// [`SourceRules`] as ranges of addresses of one family: the first address of each range, and its verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceRanges(Box<[(u128, SourceVerdict)]>);

impl SourceRanges {
    /// The verdict for a sender.
    #[must_use]
    pub fn verdict(&self, sender: IpAddr) -> SourceVerdict {
        let number = number(sender);
        let after = self.0.partition_point(|&(start, _)| start <= number);
        // The first range starts at 0, so there is always one.
        after.checked_sub(1).map_or(SourceVerdict::Deny, |at| self.0[at].1)
    }
}

/// A configured rate limit, per sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct SenderRateLimit {
    /// Datagrams per second over time; at least 1.
    pub packets_per_second: u32,
    /// Datagrams at once after a pause; at least 1.
    pub burst: u32,
    /// IPv4 addresses with this many bits in common are one sender.
    pub ipv4_prefix: u8,
    /// IPv6 addresses with this many bits in common are one sender.
    pub ipv6_prefix: u8,
    /// The maximum number of senders that have a bucket. Beyond it, a sender takes the place of the longest silent one
    /// and starts with a full bucket.
    pub senders: u32,
}

impl SenderRateLimit {
    /// The token bucket for senders to a listener of this address.
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

/// Ticks of the meter's clock per second: one tick is a sixteenth of a nanosecond, precise enough for ten million
/// datagrams per second. 64 bits of ticks last 36 years.
pub const TICKS_PER_SECOND: u64 = 16 * 1_000_000_000;

/// The maximum depth of a bucket in ticks: nine years, so that adding the time does not overflow.
const DEEPEST: u64 = (1 << 62) - 1;

/// A token bucket per sender, as the generic cell rate algorithm (ITU-T I.371): the bucket's state is the time at which
/// it will be full again; each datagram advances it by its cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Meter {
    /// The cost of a datagram, in ticks.
    pub interval: u64,
    /// The capacity of a bucket in ticks: the cost of a burst.
    pub depth: u64,
    /// Addresses with this many bits in common are one sender.
    pub prefix: u8,
    /// The maximum number of senders that have a bucket.
    pub senders: u32,
}

impl Meter {
    /// The sender that a source address belongs to: the address, masked.
    #[must_use]
    pub fn sender(&self, source: IpAddr) -> IpAddr {
        mask(source, self.prefix)
    }

    /// The netmask of a sender, as an address of the listener's family.
    #[must_use]
    pub fn mask(&self, listener: IpAddr) -> IpAddr {
        let all: IpAddr = match listener {
            IpAddr::V4(_) => Ipv4Addr::BROADCAST.into(),
            IpAddr::V6(_) => Ipv6Addr::from_bits(u128::MAX).into(),
        };
        mask(all, self.prefix)
    }

    /// Takes the cost of one datagram from a bucket that is full at the tick `due`. Returns the new tick, or none if
    /// the datagram must be dropped.
    #[must_use]
    pub fn take(&self, due: u64, now: u64) -> Option<u64> {
        let after = due.max(now).saturating_add(self.interval);
        (after <= now.saturating_add(self.depth)).then_some(after)
    }
}

#[cfg(test)]
mod tests;
