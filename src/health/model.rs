//! The nouns of health checks: what is probed, how a probe can end, and what follows for a downstream. Plain values.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::settings::ProbeSettings;

/// What is probed: an address, in one way. Listeners with the same downstream and equal settings have one in common.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    /// Where probes go. Port 0 for ICMP, which has no ports: downstreams on one host are one target.
    pub address: SocketAddr,
    /// How.
    pub settings: Arc<ProbeSettings>,
}

impl Target {
    /// The target that stands for a downstream.
    #[must_use]
    pub fn new(downstream: SocketAddr, settings: &Arc<ProbeSettings>) -> Target {
        let protocol = &settings.protocol;
        let port = match protocol {
            super::settings::Protocol::Icmp => 0,
            _ => protocol.port().unwrap_or(downstream.port()),
        };
        let mut address = plain(downstream);
        address.set_port(port);
        Target { address, settings: Arc::clone(settings) }
    }
}

/// An address as it is compared: IPv4 mapped into IPv6 is IPv4, and nothing is kept of an IPv6 address but what
/// distinguishes it (the scope of a link-local one, and no flow label).
#[must_use]
pub fn plain(address: SocketAddr) -> SocketAddr {
    match (address.ip().to_canonical(), address) {
        (IpAddr::V6(ip), SocketAddr::V6(v6)) => {
            let scope = if ip.is_unicast_link_local() { v6.scope_id() } else { 0 };
            SocketAddrV6::new(ip, address.port(), 0, scope).into()
        }
        (ip, _) => SocketAddr::new(ip, address.port()),
    }
}

/// The number of one probe; never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProbeId(pub u64);

/// Why a probe, or a round of probes, is taken for a sign that the downstream does not work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The sort, for counters.
    pub kind: FailureKind,
    /// In words, for people.
    pub reason: Cow<'static, str>,
}

/// The sorts of [`Failure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FailureKind {
    /// Nothing came back in time.
    NoAnswer,
    /// The host said that nobody is there: a reset connection, a closed port.
    Refused,
    /// The way there is known to be closed: no route, an ICMP unreachable.
    Unreachable,
    /// An answer came that says that it does not work.
    BadAnswer,
}

impl Failure {
    /// A failure of the given sort.
    pub fn new(kind: FailureKind, reason: impl Into<Cow<'static, str>>) -> Failure {
        Failure { kind, reason: reason.into() }
    }

    /// Silence for as long as allowed.
    #[must_use]
    pub fn silence(timeout: Duration) -> Failure {
        Failure::new(FailureKind::NoAnswer, format!("no answer within {timeout:?}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// How a probe ended; each ends once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(usize)]
pub enum Outcome {
    /// A valid answer came.
    Answered = 0,
    /// See [`FailureKind::NoAnswer`].
    NoAnswer = 1,
    /// See [`FailureKind::Refused`].
    Refused = 2,
    /// See [`FailureKind::Unreachable`].
    Unreachable = 3,
    /// See [`FailureKind::BadAnswer`].
    BadAnswer = 4,
    /// This host could not send it, which says nothing about the downstream.
    NotSent = 5,
    /// Not waited for any longer: another probe of the round was answered, or the downstream is gone.
    Abandoned = 6,
}

impl Outcome {
    /// All of them, in the order of their numbers.
    pub const ALL: [Outcome; 7] = [
        Outcome::Answered,
        Outcome::NoAnswer,
        Outcome::Refused,
        Outcome::Unreachable,
        Outcome::BadAnswer,
        Outcome::NotSent,
        Outcome::Abandoned,
    ];

    /// The value of the `result` label in metrics.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Outcome::Answered => "answered",
            Outcome::NoAnswer => "no_answer",
            Outcome::Refused => "refused",
            Outcome::Unreachable => "unreachable",
            Outcome::BadAnswer => "bad_answer",
            Outcome::NotSent => "not_sent",
            Outcome::Abandoned => "abandoned",
        }
    }
}

impl From<FailureKind> for Outcome {
    fn from(kind: FailureKind) -> Outcome {
        match kind {
            FailureKind::NoAnswer => Outcome::NoAnswer,
            FailureKind::Refused => Outcome::Refused,
            FailureKind::Unreachable => Outcome::Unreachable,
            FailureKind::BadAnswer => Outcome::BadAnswer,
        }
    }
}

/// What is known of a downstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Neither answered nor failed yet. Used like a healthy one until proven otherwise.
    Unknown,
    /// It answers.
    Healthy,
    /// It has failed `unhealthy_threshold` rounds in a row, and not answered `healthy_threshold` since.
    Unhealthy,
}

impl State {
    /// The name in status output.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            State::Unknown => "unknown",
            State::Healthy => "healthy",
            State::Unhealthy => "unhealthy",
        }
    }

    /// Whether it is sent to, the rest of its listener's downstreams aside.
    #[must_use]
    pub fn usable(self) -> bool {
        self != State::Unhealthy
    }
}

/// All that there is to say of one target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Its state.
    pub state: State,
    /// Since when, as time since the daemon started.
    pub since: Duration,
    /// True for a healthy one that was unhealthy before.
    pub recovered: bool,
    /// Why the last round that failed did so; none if none has since the last answer.
    pub failure: Option<Failure>,
    /// How long the last answer took; none before the first.
    pub round_trip: Option<Duration>,
}

/// A target has become healthy or unhealthy, or has been found healthy for the first time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Its state before.
    pub from: State,
    /// How long it was in that.
    pub lasted: Duration,
    /// What it is now.
    pub status: Status,
}
