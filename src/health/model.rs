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
pub struct ProbeTarget {
    /// Where probes go. Port 0 for ICMP, which has no ports: downstreams on one host are one target.
    pub address: SocketAddr,
    /// How.
    pub settings: Arc<ProbeSettings>,
}

impl ProbeTarget {
    /// The target that stands for a downstream.
    #[must_use]
    pub fn new(downstream: SocketAddr, settings: &Arc<ProbeSettings>) -> ProbeTarget {
        let protocol = &settings.protocol;
        let port = match protocol {
            super::settings::ProbeProtocol::Icmp => 0,
            _ => protocol.port().unwrap_or(downstream.port()),
        };
        let mut address = canonical_address(downstream);
        address.set_port(port);
        ProbeTarget { address, settings: Arc::clone(settings) }
    }
}

/// An address as it is compared: IPv4 mapped into IPv6 is IPv4, and nothing is kept of an IPv6 address but what
/// distinguishes it (the scope of a link-local one, and no flow label).
#[must_use]
pub fn canonical_address(address: SocketAddr) -> SocketAddr {
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
pub struct ProbeFailure {
    /// The sort, for counters.
    pub kind: ProbeFailureKind,
    /// In words, for people.
    pub reason: Cow<'static, str>,
}

/// The sorts of [`ProbeFailure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProbeFailureKind {
    /// Nothing came back in time.
    NoAnswer,
    /// The host said that nobody is there: a reset connection, a closed port.
    Refused,
    /// The way there is known to be closed: no route, an ICMP unreachable.
    Unreachable,
    /// An answer came that says that it does not work.
    BadAnswer,
}

impl ProbeFailure {
    /// A failure of the given sort.
    pub fn new(kind: ProbeFailureKind, reason: impl Into<Cow<'static, str>>) -> ProbeFailure {
        ProbeFailure { kind, reason: reason.into() }
    }

    /// Silence for as long as allowed.
    #[must_use]
    pub fn silence(timeout: Duration) -> ProbeFailure {
        ProbeFailure::new(ProbeFailureKind::NoAnswer, format!("no answer within {timeout:?}"))
    }
}

impl fmt::Display for ProbeFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// How a probe ended; each ends once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(usize)]
pub enum ProbeOutcome {
    /// A valid answer came.
    Answered = 0,
    /// See [`ProbeFailureKind::NoAnswer`].
    NoAnswer = 1,
    /// See [`ProbeFailureKind::Refused`].
    Refused = 2,
    /// See [`ProbeFailureKind::Unreachable`].
    Unreachable = 3,
    /// See [`ProbeFailureKind::BadAnswer`].
    BadAnswer = 4,
    /// This host could not send it, which says nothing about the downstream.
    NotSent = 5,
    /// Not waited for any longer: another probe of the round was answered, or the downstream is gone.
    Abandoned = 6,
}

impl ProbeOutcome {
    /// All of them, in the order of their numbers.
    pub const ALL: [ProbeOutcome; 7] = [
        ProbeOutcome::Answered,
        ProbeOutcome::NoAnswer,
        ProbeOutcome::Refused,
        ProbeOutcome::Unreachable,
        ProbeOutcome::BadAnswer,
        ProbeOutcome::NotSent,
        ProbeOutcome::Abandoned,
    ];

    /// The value of the `result` label in metrics.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            ProbeOutcome::Answered => "answered",
            ProbeOutcome::NoAnswer => "no_answer",
            ProbeOutcome::Refused => "refused",
            ProbeOutcome::Unreachable => "unreachable",
            ProbeOutcome::BadAnswer => "bad_answer",
            ProbeOutcome::NotSent => "not_sent",
            ProbeOutcome::Abandoned => "abandoned",
        }
    }
}

impl From<ProbeFailureKind> for ProbeOutcome {
    fn from(kind: ProbeFailureKind) -> ProbeOutcome {
        match kind {
            ProbeFailureKind::NoAnswer => ProbeOutcome::NoAnswer,
            ProbeFailureKind::Refused => ProbeOutcome::Refused,
            ProbeFailureKind::Unreachable => ProbeOutcome::Unreachable,
            ProbeFailureKind::BadAnswer => ProbeOutcome::BadAnswer,
        }
    }
}

/// What is known of a downstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HealthState {
    /// Neither answered nor failed yet. Used like a healthy one until proven otherwise.
    Unknown,
    /// It answers.
    Healthy,
    /// It has failed `unhealthy_threshold` rounds in a row, and not answered `healthy_threshold` since.
    Unhealthy,
}

impl HealthState {
    /// The name in status output.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            HealthState::Unknown => "unknown",
            HealthState::Healthy => "healthy",
            HealthState::Unhealthy => "unhealthy",
        }
    }

    /// Whether it is sent to, the rest of its listener's downstreams aside.
    #[must_use]
    pub fn usable(self) -> bool {
        self != HealthState::Unhealthy
    }
}

/// All that there is to say of one target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetStatus {
    /// Its state.
    pub state: HealthState,
    /// Since when, as time since the daemon started.
    pub since: Duration,
    /// True for a healthy one that was unhealthy before.
    pub recovered: bool,
    /// Why the last round that failed did so; none if none has since the last answer.
    pub failure: Option<ProbeFailure>,
    /// How long the last answer took; none before the first.
    pub round_trip: Option<Duration>,
}

/// A target has become healthy or unhealthy, or has been found healthy for the first time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateChange {
    /// Its state before.
    pub from: HealthState,
    /// How long it was in that.
    pub lasted: Duration,
    /// What it is now.
    pub status: TargetStatus,
}
