//! Rules about who may send to a listener, and how fast: `sources` and `rate_limit`.

use std::collections::HashMap;
use std::net::SocketAddr;

use super::RuleChecker;
use crate::admission::{Prefix, PrefixError, SenderRateLimit, SourceRules};
use crate::config::document::KeyPath;
use crate::config::file::{FilePrefixes, FileRateLimit, FileSources};
use crate::config::problem::quoted;

const EXAMPLE: &str = "10.0.0.0/8";

/// How many prefixes there are.
pub(super) fn count(sources: &FileSources) -> usize {
    [&sources.allow, &sources.deny].into_iter().flatten().map(|prefixes| prefixes.texts().len()).sum()
}

impl RuleChecker<'_> {
    /// Who may send.
    pub(super) fn sources(
        &mut self,
        at: &KeyPath,
        sources: Option<&FileSources>,
        bind: Option<SocketAddr>,
    ) -> Option<SourceRules> {
        let Some(sources) = sources else { return Some(SourceRules::default()) };
        let allow = self.prefixes(&at.then("allow"), sources.allow.as_ref(), bind);
        let deny = self.prefixes(&at.then("deny"), sources.deny.as_ref(), bind);
        Some(SourceRules { allow: allow?, deny: deny? })
    }

    fn prefixes(
        &mut self,
        at: &KeyPath,
        prefixes: Option<&FilePrefixes>,
        bind: Option<SocketAddr>,
    ) -> Option<Vec<Prefix>> {
        let Some(prefixes) = prefixes else { return Some(Vec::new()) };
        let texts = prefixes.texts();
        if texts.is_empty() {
            self.fault(at, format!("an empty list; name a prefix, for example \"{EXAMPLE}\", or remove the key"));
            return None;
        }
        let mut good: HashMap<Prefix, usize> = HashMap::new();
        let mut list = Vec::with_capacity(texts.len());
        for (index, text) in texts.iter().enumerate() {
            let at = match prefixes {
                FilePrefixes::One(_) => at.clone(),
                FilePrefixes::List(_) => at.then(index),
            };
            let Some(prefix) = self.check(&at, prefix(text, bind)) else { continue };
            if let Some(first) = good.insert(prefix, index) {
                self.fault(&at, format!("{} is already in the list, at index {first}; remove one", quoted(text)));
                continue;
            }
            list.push(prefix);
        }
        (list.len() == texts.len()).then_some(list)
    }
}

/// Converts `rate_limit`; `schema_check` has checked the ranges.
pub(super) fn rate_limit(limit: &FileRateLimit, senders: u32) -> SenderRateLimit {
    SenderRateLimit {
        packets_per_second: limit.packets_per_second,
        burst: limit.burst.unwrap_or(limit.packets_per_second),
        ipv4_prefix: limit.ipv4_prefix,
        ipv6_prefix: limit.ipv6_prefix,
        senders,
    }
}

/// Reads a prefix of the listener's IP version.
fn prefix(text: &str, bind: Option<SocketAddr>) -> Result<Prefix, String> {
    let shown = quoted(text);
    let prefix = Prefix::parse(text).map_err(|error| match error {
        PrefixError::Syntax => format!("{shown} is not an address or prefix; write for example \"{EXAMPLE}\""),
        PrefixError::TooLong => format!("{shown} has too long a prefix; give at most 32 bits for IPv4, 128 for IPv6"),
        PrefixError::HostBits(prefix) => format!("{shown} has bits set beyond its prefix; write \"{prefix}\""),
    })?;
    if let std::net::IpAddr::V6(v6) = prefix.address()
        && let Some(v4) = v6.to_ipv4_mapped()
    {
        return Err(format!("{shown} is an IPv4 address written as IPv6; write \"{v4}\""));
    }
    match bind {
        Some(bind) if bind.is_ipv4() != prefix.address().is_ipv4() => {
            let version = |v4| if v4 { "IPv4" } else { "IPv6" };
            let (here, there) = (version(prefix.address().is_ipv4()), version(bind.is_ipv4()));
            Err(format!(
                "{shown} is {here} but the listener's bind, \"{bind}\", is {there}, so no sender matches it; remove it"
            ))
        }
        _ => Ok(prefix),
    }
}
