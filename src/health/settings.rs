//! The settings of health checks, their defaults and ranges. Plain values; `config::health_keys` makes them from the
//! file.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The default of `interval_secs`.
pub const INTERVAL_SECS: f64 = 5.0;
/// The default of `timeout_secs`.
pub const TIMEOUT_SECS: f64 = 2.0;
/// The default of `unhealthy_threshold`. One round is enough, because it has several probes.
pub const UNHEALTHY_THRESHOLD: u32 = 1;
/// The default of `healthy_threshold`. A receiver that has just come back often fails again.
pub const HEALTHY_THRESHOLD: u32 = 2;
/// The default of `fail_open`.
pub const FAIL_OPEN: bool = true;
/// The default of `path`.
pub const PATH: &str = "/";

/// Allowed `interval_secs` and `timeout_secs`.
pub const SECONDS: RangeInclusive<f64> = 0.01..=3_600.0;
/// Allowed `slow_start_secs`; 0, the default, means no slow start.
pub const SLOW_START_SECS: RangeInclusive<f64> = 0.0..=3_600.0;
/// Allowed `unhealthy_threshold` and `healthy_threshold`.
pub const THRESHOLDS: RangeInclusive<u32> = 1..=100;
/// The longest `payload` and `expect`, in bytes: fits one packet on any usual path.
pub const MAX_BYTES: usize = 1_200;
/// The longest `path`, in bytes.
pub const MAX_PATH: usize = 1_024;

/// The prefix of a hexadecimal `payload` or `expect`.
const HEX: &str = "hex:";

/// The health checks of one listener's downstreams.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HealthSettings {
    /// Protocol, timing and thresholds.
    pub probe: ProbeSettings,
    /// If every downstream is unhealthy: true sends to all of them, false drops and counts.
    pub fail_open: bool,
    /// The time in which the share of a recovered downstream grows to its full size; zero for at once.
    pub slow_start: Duration,
}

/// How a downstream is probed. Listeners with equal settings share the probes of a common downstream.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct ProbeSettings {
    /// The request, and what counts as a reply.
    pub protocol: ProbeProtocol,
    /// The time between the starts of two rounds of probes.
    pub interval: Duration,
    /// The most time of a round without a reply, retries included; at most `interval`. See
    /// [`PROBES_PER_ROUND`](super::monitor::PROBES_PER_ROUND).
    pub timeout: Duration,
    /// The number of consecutive failed rounds that make a downstream unhealthy, from 1.
    pub unhealthy_threshold: u32,
    /// The number of consecutive answered rounds that make it healthy again, from 1.
    pub healthy_threshold: u32,
}

/// The protocol of a probe. Without `port`, it goes to the downstream's own port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProbeProtocol {
    /// An ICMP echo request; tests the host only.
    Icmp,
    /// A datagram with a nonce that the application must send back unchanged.
    UdpEcho {
        /// The application's port.
        port: Option<u16>,
    },
    /// A datagram that the application must answer.
    Udp {
        /// The application's port.
        port: Option<u16>,
        /// The datagram.
        payload: ProbeBytes,
        /// The first bytes of a valid reply; empty for any reply.
        expect: ProbeBytes,
    },
    /// A TCP connection, closed as soon as it is established.
    Tcp {
        /// The port connected to.
        port: Option<u16>,
    },
    /// An HTTP request, answered with a status from 200 to 399.
    Http {
        /// The port connected to.
        port: Option<u16>,
        /// The path of the request.
        path: Arc<str>,
    },
}

/// The kinds of probe, without their settings.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum ProbeKind {
    /// [`ProbeProtocol::Icmp`]
    #[default]
    Icmp,
    /// [`ProbeProtocol::UdpEcho`]
    UdpEcho,
    /// [`ProbeProtocol::Udp`]
    Udp,
    /// [`ProbeProtocol::Tcp`]
    Tcp,
    /// [`ProbeProtocol::Http`]
    Http,
}

impl ProbeKind {
    /// All kinds, in numeric order.
    pub const ALL: [ProbeKind; 5] =
        [ProbeKind::Icmp, ProbeKind::UdpEcho, ProbeKind::Udp, ProbeKind::Tcp, ProbeKind::Http];

    /// The name in configuration files, log lines and metric labels.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            ProbeKind::Icmp => "icmp",
            ProbeKind::UdpEcho => "udp_echo",
            ProbeKind::Udp => "udp",
            ProbeKind::Tcp => "tcp",
            ProbeKind::Http => "http",
        }
    }

    /// The keys among `port`, `payload`, `expect` and `path` that apply to it.
    #[must_use]
    pub fn keys(self) -> &'static [&'static str] {
        match self {
            ProbeKind::Icmp => &[],
            ProbeKind::UdpEcho | ProbeKind::Tcp => &["port"],
            ProbeKind::Udp => &["port", "payload", "expect"],
            ProbeKind::Http => &["port", "path"],
        }
    }
}

impl fmt::Display for ProbeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl ProbeProtocol {
    /// The kind of probe.
    #[must_use]
    pub fn kind(&self) -> ProbeKind {
        match self {
            ProbeProtocol::Icmp => ProbeKind::Icmp,
            ProbeProtocol::UdpEcho { .. } => ProbeKind::UdpEcho,
            ProbeProtocol::Udp { .. } => ProbeKind::Udp,
            ProbeProtocol::Tcp { .. } => ProbeKind::Tcp,
            ProbeProtocol::Http { .. } => ProbeKind::Http,
        }
    }

    /// The configured port; none for the downstream's own.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        match self {
            ProbeProtocol::Icmp => None,
            ProbeProtocol::UdpEcho { port }
            | ProbeProtocol::Udp { port, .. }
            | ProbeProtocol::Tcp { port }
            | ProbeProtocol::Http { port, .. } => *port,
        }
    }

    /// True if each probe needs a connection, and so a socket of its own.
    #[must_use]
    pub fn connects(&self) -> bool {
        matches!(self, ProbeProtocol::Tcp { .. } | ProbeProtocol::Http { .. })
    }
}

impl Default for ProbeSettings {
    fn default() -> Self {
        ProbeSettings {
            protocol: ProbeProtocol::Icmp,
            interval: Duration::from_secs_f64(INTERVAL_SECS),
            timeout: Duration::from_secs_f64(TIMEOUT_SECS),
            unhealthy_threshold: UNHEALTHY_THRESHOLD,
            healthy_threshold: HEALTHY_THRESHOLD,
        }
    }
}

impl Default for HealthSettings {
    fn default() -> Self {
        HealthSettings { probe: ProbeSettings::default(), fail_open: FAIL_OPEN, slow_start: Duration::ZERO }
    }
}

/// Bytes, written as text or as `hex:` and hexadecimal digits.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ProbeBytes(Arc<[u8]>);

impl ProbeBytes {
    /// Parses text, or pairs of hexadecimal digits after `hex:`; blanks between the digits are ignored.
    ///
    /// # Errors
    /// The mistake and the fix, for the operator: not hexadecimal, or more than [`MAX_BYTES`].
    pub fn read(text: &str) -> Result<ProbeBytes, String> {
        let bytes = match text.strip_prefix(HEX) {
            Some(digits) => from_hex(digits).ok_or_else(|| {
                format!(
                    "{text:?} is not hexadecimal after \"{HEX}\"; write pairs of hexadecimal digits, such as \"{HEX}00ff 7b\""
                )
            })?,
            None => text.as_bytes().to_vec(),
        };
        if bytes.len() > MAX_BYTES {
            return Err(format!("{} bytes are too many; give at most {MAX_BYTES}", bytes.len()));
        }
        Ok(ProbeBytes(bytes.into()))
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }
}

/// The form that [`ProbeBytes::read`] parses; text if it is printable.
impl fmt::Display for ProbeBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match std::str::from_utf8(&self.0) {
            Ok(text) if !text.starts_with(HEX) && !text.chars().any(char::is_control) => f.write_str(text),
            _ => {
                f.write_str(HEX)?;
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }
    }
}

impl fmt::Debug for ProbeBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_string())
    }
}

impl Serialize for ProbeBytes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

fn from_hex(digits: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = digits
        .chars()
        .filter(|c| !c.is_whitespace())
        .map(|c| u8::try_from(c.to_digit(16)?).ok())
        .collect::<Option<_>>()?;
    let (pairs, rest) = digits.as_chunks::<2>();
    rest.is_empty().then(|| pairs.iter().map(|[high, low]| high << 4 | low).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bytes_read_back_what_they_show(bytes in prop::collection::vec(any::<u8>(), 0..40), text in "[ -~]{0,9}") {
            for bytes in [bytes, text.clone().into_bytes(), format!("hex:{text}").into_bytes()] {
                let bytes = ProbeBytes(bytes.into());
                prop_assert_eq!(&ProbeBytes::read(&bytes.to_string()).unwrap(), &bytes);
            }
            if !text.starts_with(HEX) {
                prop_assert_eq!(ProbeBytes::read(&text).unwrap().to_string(), text);
            }
        }
    }
}
