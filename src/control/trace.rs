//! Records of traced datagrams, and the subscriptions that decide which client gets which.
//!
//! The kernel program traces the union of what all clients ask for (`event_loop::trace`); each client gets the records that
//! match its own subscription.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::admission::Prefix;
use crate::model::ListenerId;

/// What became of one datagram, of several of one sender that arrived in one packet, or of one copy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TraceRecord {
    /// Seconds since 1970.
    pub time: f64,
    /// The listener's name.
    pub listener: String,
    /// The sender.
    pub source: SocketAddr,
    /// The listener's address that it was sent to.
    pub destination: SocketAddr,
    /// The ingress interface.
    pub interface: String,
    /// `forwarded`, `passed` (to the listener's socket, which forwards it), `dropped`, `copied` or `copy_dropped`.
    pub fate: String,
    /// Why it was dropped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The selected downstream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downstream: Option<SocketAddr>,
    /// The downstream's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The egress interface.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub out_interface: Option<String>,
    /// How it is delivered: `local`, `neighbour` (the kernel resolves it), `known` (to a cached neighbour), `pod` (into a network
    /// namespace), `bare` (by a link without link-layer addresses).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub way: Option<String>,
    /// Number of datagrams.
    pub datagrams: u32,
    /// Bytes of their UDP payload.
    pub bytes: u32,
}

/// The datagrams that a client traces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TraceSubscription {
    /// Only this listener's datagrams.
    pub listener: Option<ListenerId>,
    /// Only datagrams from this prefix.
    pub source: Option<Prefix>,
}

impl TraceSubscription {
    /// Whether it includes a listener's datagram from this address.
    #[must_use]
    pub fn matches(&self, listener: ListenerId, source: IpAddr) -> bool {
        self.listener.is_none_or(|wanted| wanted == listener)
            && self.source.is_none_or(|prefix| prefix.contains(source))
    }

    /// The narrowest subscription that includes all of these; none if there are none.
    #[must_use]
    pub fn covering(all: impl IntoIterator<Item = TraceSubscription>) -> Option<TraceSubscription> {
        all.into_iter().reduce(|one, other| TraceSubscription {
            listener: one.listener.filter(|_| one.listener == other.listener),
            source: one.source.filter(|_| one.source == other.source),
        })
    }
}

/// One line of `udp-fanout trace`.
impl std::fmt::Display for TraceRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {} -> {} ", clock(self.time), self.listener, self.source, self.destination)?;
        match self.fate.as_str() {
            "passed" => f.write_str("left to the socket")?,
            "copy_dropped" => f.write_str("copy dropped")?,
            fate => f.write_str(fate)?,
        }
        if let Some(downstream) = self.downstream {
            write!(f, " -> {downstream}")?;
            if let Some(name) = self.name.as_ref().filter(|name| **name != downstream.to_string()) {
                write!(f, " {name}")?;
            }
        }
        if let Some(reason) = &self.reason {
            write!(f, ": {reason}")?;
        }
        match (&self.out_interface, &self.way) {
            (Some(interface), Some(way)) => write!(f, " by {interface} ({way})")?,
            (None, Some(way)) => write!(f, " ({way})")?,
            _ => {}
        }
        if self.datagrams == 1 {
            write!(f, ", {} bytes", self.bytes)
        } else {
            write!(f, ", {} datagrams of {} bytes together", self.datagrams, self.bytes)
        }
    }
}

/// Time of day, UTC.
fn clock(time: f64) -> String {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "negative and huge times do not occur")]
    let micros = (time * 1e6) as u64;
    let (seconds, micros) = (micros / 1_000_000 % 86_400, micros % 1_000_000);
    format!("{:02}:{:02}:{:02}.{micros:06}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::control) fn record() -> TraceRecord {
        TraceRecord {
            time: 1_700_000_000.25,
            listener: "syslog".into(),
            source: "10.0.0.2:4000".parse().unwrap(),
            destination: "10.0.0.1:514".parse().unwrap(),
            interface: "eth0".into(),
            fate: "forwarded".into(),
            reason: None,
            downstream: Some("10.1.0.2:5514".parse().unwrap()),
            name: Some("receiver-1".into()),
            out_interface: Some("eth1".into()),
            way: Some("known".into()),
            datagrams: 1,
            bytes: 100,
        }
    }

    #[test]
    fn a_line_says_all_that_is_known() {
        let start = "22:13:20.250000 syslog 10.0.0.2:4000 -> 10.0.0.1:514";
        let forwarded = format!("{start} forwarded -> 10.1.0.2:5514 receiver-1 by eth1 (known), 100 bytes");
        assert_eq!(record().to_string(), forwarded);
        let nothing = TraceRecord { downstream: None, name: None, out_interface: None, way: None, ..record() };
        let dropped = TraceRecord {
            fate: "dropped".into(),
            reason: Some("source_denied".into()),
            datagrams: 3,
            ..nothing.clone()
        };
        assert_eq!(dropped.to_string(), format!("{start} dropped: source_denied, 3 datagrams of 100 bytes together"));
        let passed = TraceRecord { fate: "passed".into(), ..nothing };
        assert_eq!(passed.to_string(), format!("{start} left to the socket, 100 bytes"));
    }

    #[test]
    fn all_that_several_want_is_asked_for_and_each_gets_its_own() {
        let one = TraceSubscription { listener: Some(ListenerId(1)), source: Prefix::parse("10.0.0.0/8").ok() };
        let same = TraceSubscription { source: None, ..one };
        let other = TraceSubscription { listener: Some(ListenerId(2)), ..one };
        assert_eq!(TraceSubscription::covering([]), None);
        assert_eq!(TraceSubscription::covering([one]), Some(one));
        assert_eq!(TraceSubscription::covering([one, same]), Some(same));
        assert_eq!(TraceSubscription::covering([one, other]), Some(TraceSubscription { listener: None, ..one }));
        assert_eq!(TraceSubscription::covering([one, same, other]), Some(TraceSubscription::default()));
        assert!(one.matches(ListenerId(1), "10.1.2.3".parse().unwrap()));
        assert!(!one.matches(ListenerId(2), "10.1.2.3".parse().unwrap()));
        assert!(!one.matches(ListenerId(1), "11.1.2.3".parse().unwrap()));
    }
}
