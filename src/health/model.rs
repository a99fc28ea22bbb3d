//! The types of health checks: target, probe outcome, failure, state. Plain values without behaviour.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::settings::ProbeSettings;

/// An address and how it is probed. Listeners with the same downstream and equal settings share one target.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProbeTarget {
    /// The destination of probes. ICMP has no ports, so its port is 0 and all downstreams on a host are one target.
    pub address: SocketAddr,
    /// Protocol, intervals and thresholds.
    pub settings: Arc<ProbeSettings>,
}

impl ProbeTarget {
    /// The target of a downstream.
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

/// The form in which addresses are compared: an IPv4-mapped IPv6 address becomes IPv4; of an IPv6 address the flow label is
/// dropped, and the scope too unless it is link-local.
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

/// The number of a probe, unique for the daemon's lifetime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProbeId(pub u64);

/// Why a probe or a round of probes failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeFailure {
    /// The kind, for counters.
    pub kind: ProbeFailureKind,
    /// The reason, for the log and status.
    pub reason: Cow<'static, str>,
}

/// The kinds of [`ProbeFailure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProbeFailureKind {
    /// No reply within the timeout.
    NoAnswer,
    /// The host refused: a reset connection or a closed port.
    Refused,
    /// The host cannot be reached: no route, or an ICMP unreachable message.
    Unreachable,
    /// The reply is wrong, for example HTTP status 503.
    BadAnswer,
}

impl ProbeFailure {
    /// A failure of the given kind.
    pub fn new(kind: ProbeFailureKind, reason: impl Into<Cow<'static, str>>) -> ProbeFailure {
        ProbeFailure { kind, reason: reason.into() }
    }

    /// No reply within `timeout`.
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

/// How a probe ended. Each probe has exactly one outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(usize)]
pub enum ProbeOutcome {
    /// A valid reply.
    Answered = 0,
    /// See [`ProbeFailureKind::NoAnswer`].
    NoAnswer = 1,
    /// See [`ProbeFailureKind::Refused`].
    Refused = 2,
    /// See [`ProbeFailureKind::Unreachable`].
    Unreachable = 3,
    /// See [`ProbeFailureKind::BadAnswer`].
    BadAnswer = 4,
    /// This host could not send it. Does not count against the downstream.
    NotSent = 5,
    /// No longer needed: another probe of the round was answered, or the target was removed.
    Abandoned = 6,
}

impl ProbeOutcome {
    /// All outcomes, in numeric order.
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

/// The health of a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HealthState {
    /// No round has ended yet. Used like a healthy one.
    Unknown,
    /// It replies.
    Healthy,
    /// It failed `unhealthy_threshold` consecutive rounds, and has not answered `healthy_threshold` consecutive rounds since.
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

    /// True if it gets datagrams, unless `fail_open` overrides that.
    #[must_use]
    pub fn usable(self) -> bool {
        self != HealthState::Unhealthy
    }
}

/// The full status of a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetStatus {
    /// The current state.
    pub state: HealthState,
    /// When that state began, as time since the daemon's start.
    pub since: Duration,
    /// True if it is healthy and was unhealthy before.
    pub recovered: bool,
    /// Why the last round failed; none if no round has failed since the target was last healthy.
    pub failure: Option<ProbeFailure>,
    /// The round-trip time of the last reply; none before the first.
    pub round_trip: Option<Duration>,
}

/// A target's change to another state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateChange {
    /// The previous state.
    pub from: HealthState,
    /// How long that lasted.
    pub lasted: Duration,
    /// The new status.
    pub status: TargetStatus,
}
