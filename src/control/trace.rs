//! What is told of single datagrams over the status socket, and to whom.
//!
//! A client that has asked for a trace gets lines until it closes the connection. The kernel program tells of as little as all
//! clients together want (`event_loop::trace`); here each gets what it has asked for.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::admission::Prefix;
use crate::model::ListenerId;

/// What has become of one datagram, or of several of one sender that came in one packet, or of one copy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TraceRecord {
    /// When, in seconds since 1970.
    pub time: f64,
    /// The name of the listener whose it was.
    pub listener: String,
    /// Who has sent it.
    pub source: SocketAddr,
    /// Where to.
    pub destination: SocketAddr,
    /// The interface it came in by.
    pub interface: String,
    /// `forwarded`, `passed` (to the listener's socket, which forwards it), `dropped`, `copied` or `copy_dropped`.
    pub fate: String,
    /// Why it was dropped, if it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The downstream chosen for it, if one was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downstream: Option<SocketAddr>,
    /// Its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The interface it leaves by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub out_interface: Option<String>,
    /// How it is delivered: `local`, `neighbour` (the kernel finds it), `known` (straight to a neighbour that was known), `pod`
    /// (straight into a namespace), `bare` (by a link without addresses of its own).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub way: Option<String>,
    /// How many datagrams.
    pub datagrams: u32,
    /// Their UDP payload.
    pub bytes: u32,
}

/// What one client wants to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TraceSubscription {
    /// Only this listener's datagrams.
    pub listener: Option<ListenerId>,
    /// Only those from these addresses.
    pub source: Option<Prefix>,
}

impl TraceSubscription {
    /// Whether it wants to know of a listener's datagram from this address.
    #[must_use]
    pub fn matches(&self, listener: ListenerId, source: IpAddr) -> bool {
        self.listener.is_none_or(|wanted| wanted == listener)
            && self.source.is_none_or(|prefix| prefix.contains(source))
    }

    /// The narrowest that leaves nothing out of what all of these want; none if there are none.
    #[must_use]
    pub fn covering(all: impl IntoIterator<Item = TraceSubscription>) -> Option<TraceSubscription> {
        all.into_iter().reduce(|one, other| TraceSubscription {
            listener: one.listener.filter(|_| one.listener == other.listener),
            source: one.source.filter(|_| one.source == other.source),
        })
    }
}

/// A line for a terminal.
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

/// The time of day, UTC.
fn clock(time: f64) -> String {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "negative and huge times are no times")]
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
