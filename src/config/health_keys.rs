//! The keys of a `health` table, and how they become [`HealthSettings`]. Pure.
//!
//! The top-level table holds for all listeners; the keys of a table in a listener take precedence.

use std::fmt::Write as _;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize, Serializer};

use super::field_schema::field_order;
use crate::health::settings::{
    FAIL_OPEN, HEALTHY_THRESHOLD, HealthSettings, INTERVAL_SECS, MAX_PATH, PATH, ProbeBytes, ProbeKind, ProbeProtocol,
    ProbeSettings, SECONDS, SLOW_START_SECS, THRESHOLDS, TIMEOUT_SECS, UNHEALTHY_THRESHOLD,
};

/// The keys of a `health` table; those not given are none.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(transform = field_order::<HealthKeys>)]
pub(super) struct HealthKeys {
    /// Probe the downstreams, and send nothing to those that do not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(example = true, extend("default" = false))]
    pub(super) enabled: Option<bool>,
    /// Seconds from one round of probes of a downstream to the next.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "number")]
    #[schemars(
        range(min = *SECONDS.start(), max = *SECONDS.end()),
        example = 2.5,
        extend("default" = whole(INTERVAL_SECS), "x-unit" = "seconds")
    )]
    pub(super) interval_secs: Option<f64>,
    /// Seconds without a reply after which a round has failed. At most `interval_secs`. A round has three probes, so that one
    /// lost probe decides nothing.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "number")]
    #[schemars(
        range(min = *SECONDS.start(), max = *SECONDS.end()),
        example = 0.5,
        extend("default" = whole(TIMEOUT_SECS), "x-unit" = "seconds")
    )]
    pub(super) timeout_secs: Option<f64>,
    /// What a probe is: an ICMP echo request (`icmp`); a UDP datagram that the application must return unchanged (`udp_echo`); a
    /// UDP datagram that it must reply to (`udp`); a TCP connection, closed once established (`tcp`); an HTTP request with a
    /// response status from 200 to 399 (`http`).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(example = ProbeKind::Tcp, extend("default" = ProbeKind::default()))]
    pub(super) protocol: Option<ProbeKind>,
    /// The port that probes go to. Not for `icmp`, which has no ports.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65_535), example = 8080, extend("x-absent" = "the downstream's own port"))]
    pub(super) port: Option<u16>,
    /// For `udp`: the payload of a probe, up to 1200 bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        example = &"hex:00ff 7b",
        extend("x-accepts" = "text, or hex: and hexadecimal digits", "x-absent" = "an empty datagram")
    )]
    pub(super) payload: Option<String>,
    /// For `udp`: what a reply must begin with, up to 1200 bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        example = &"pong",
        extend("x-accepts" = "text, or hex: and hexadecimal digits", "x-absent" = "any reply is accepted")
    )]
    pub(super) expect: Option<String>,
    /// For `http`: the path that is requested.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        example = &"/healthz",
        extend("x-accepts" = "a path that starts with /", "x-absent" = "`\"/\"` under `http`")
    )]
    pub(super) path: Option<String>,
    /// Failed rounds in a row after which a downstream gets no more datagrams.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        range(min = *THRESHOLDS.start(), max = *THRESHOLDS.end()),
        example = 2,
        extend("default" = UNHEALTHY_THRESHOLD)
    )]
    pub(super) unhealthy_threshold: Option<u32>,
    /// Successful rounds in a row after which it gets datagrams again.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        range(min = *THRESHOLDS.start(), max = *THRESHOLDS.end()),
        example = 1,
        extend("default" = HEALTHY_THRESHOLD)
    )]
    pub(super) healthy_threshold: Option<u32>,
    /// When all downstreams of a listener fail: continue to send to all of them, with an error in the log (`true`), or drop and
    /// count everything (`false`).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(example = false, extend("default" = FAIL_OPEN))]
    pub(super) fail_open: Option<bool>,
    /// Seconds over which a recovered downstream's share grows to its full size, in ten steps. Not under `replicate`.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "number")]
    #[schemars(
        range(min = *SLOW_START_SECS.start(), max = *SLOW_START_SECS.end()),
        example = 30,
        extend("default" = 0, "x-unit" = "seconds")
    )]
    pub(super) slow_start_secs: Option<f64>,
}

/// A default in whole seconds, as an integer.
#[expect(clippy::cast_possible_truncation, reason = "defaults are whole and small")]
fn whole(seconds: f64) -> i64 {
    seconds as i64
}

/// Writes whole numbers without `.0`.
#[expect(clippy::cast_possible_truncation, reason = "seconds are far below where an i64 ends")]
#[expect(clippy::ref_option, reason = "serde passes fields by reference")]
fn number<S: Serializer>(number: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
    match *number {
        Some(number) if number.fract() == 0.0 => serializer.serialize_i64(number as i64),
        Some(number) => serializer.serialize_f64(number),
        None => serializer.serialize_none(),
    }
}

/// Every setting as a key, except the keys that have no effect with the protocol.
impl From<&HealthSettings> for HealthKeys {
    fn from(settings: &HealthSettings) -> HealthKeys {
        let HealthSettings { probe, fail_open, slow_start } = settings;
        let (payload, expect) = match &probe.protocol {
            ProbeProtocol::Udp { payload, expect, .. } => (Some(payload.to_string()), Some(expect.to_string())),
            _ => (None, None),
        };
        let path = match &probe.protocol {
            ProbeProtocol::Http { path, .. } => Some(path.to_string()),
            _ => None,
        };
        HealthKeys {
            enabled: Some(true),
            interval_secs: Some(probe.interval.as_secs_f64()),
            timeout_secs: Some(probe.timeout.as_secs_f64()),
            protocol: Some(probe.protocol.kind()),
            port: probe.protocol.port(),
            payload,
            expect,
            path,
            unhealthy_threshold: Some(probe.unhealthy_threshold),
            healthy_threshold: Some(probe.healthy_threshold),
            fail_open: Some(*fail_open),
            slow_start_secs: Some(slow_start.as_secs_f64()),
        }
    }
}

/// What is wrong with one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HealthKeyError {
    /// The key.
    pub(super) key: &'static str,
    /// The value, what is wrong with it, and the fix.
    pub(super) message: String,
}

impl HealthKeys {
    /// These keys, and those of `base` that are not given here. Keys of one protocol are not inherited by another.
    #[must_use]
    pub(super) fn over(&self, base: &HealthKeys) -> HealthKeys {
        let same_protocol =
            self.protocol.is_none_or(|protocol| protocol == base.protocol.unwrap_or_default()).then_some(());
        let own = self.clone();
        let of_protocol = |value: Option<String>, other: &Option<String>| value.or(same_protocol.and(other.clone()));
        HealthKeys {
            enabled: own.enabled.or(base.enabled),
            interval_secs: own.interval_secs.or(base.interval_secs),
            timeout_secs: own.timeout_secs.or(base.timeout_secs),
            protocol: own.protocol.or(base.protocol),
            port: own.port.or(same_protocol.and(base.port)),
            payload: of_protocol(own.payload, &base.payload),
            expect: of_protocol(own.expect, &base.expect),
            path: of_protocol(own.path, &base.path),
            unhealthy_threshold: own.unhealthy_threshold.or(base.unhealthy_threshold),
            healthy_threshold: own.healthy_threshold.or(base.healthy_threshold),
            fail_open: own.fail_open.or(base.fail_open),
            slow_start_secs: own.slow_start_secs.or(base.slow_start_secs),
        }
    }

    /// The settings, with defaults for keys that are not given; none if checks are not enabled. The keys are checked even
    /// then, so that a mistake does not first appear when checks are enabled.
    ///
    /// # Errors
    /// Every mistake found.
    pub(super) fn settings(&self) -> Result<Option<HealthSettings>, Vec<HealthKeyError>> {
        let mut errors = HealthKeyErrors::default();
        let interval = errors.seconds("interval_secs", self.interval_secs.unwrap_or(INTERVAL_SECS), SECONDS);
        let timeout = errors.seconds("timeout_secs", self.timeout_secs.unwrap_or(TIMEOUT_SECS), SECONDS);
        if let (Some(interval), Some(timeout)) = (interval, timeout)
            && timeout > interval
        {
            let (timeout, interval) = (timeout.as_secs_f64(), interval.as_secs_f64());
            let message = format!("{timeout} is longer than interval_secs, {interval}; make it at most that");
            errors.add("timeout_secs", message);
        }
        let slow_start = errors.seconds("slow_start_secs", self.slow_start_secs.unwrap_or(0.0), SLOW_START_SECS);
        let unhealthy = self.unhealthy_threshold.unwrap_or(UNHEALTHY_THRESHOLD);
        let unhealthy_threshold = errors.threshold("unhealthy_threshold", unhealthy);
        let healthy = self.healthy_threshold.unwrap_or(HEALTHY_THRESHOLD);
        let healthy_threshold = errors.threshold("healthy_threshold", healthy);
        let protocol = self.protocol(&mut errors);
        let settings = || {
            Some(HealthSettings {
                probe: ProbeSettings {
                    protocol: protocol?,
                    interval: interval?,
                    timeout: timeout?,
                    unhealthy_threshold,
                    healthy_threshold,
                },
                fail_open: self.fail_open.unwrap_or(FAIL_OPEN),
                slow_start: slow_start?,
            })
        };
        let settings = settings().filter(|_| self.enabled.unwrap_or(false));
        if errors.0.is_empty() { Ok(settings) } else { Err(errors.0) }
    }

    fn protocol(&self, errors: &mut HealthKeyErrors) -> Option<ProbeProtocol> {
        let kind = self.protocol.unwrap_or_default();
        let given = [
            ("port", self.port.is_some()),
            ("payload", self.payload.is_some()),
            ("expect", self.expect.is_some()),
            ("path", self.path.is_some()),
        ];
        for (key, _) in given.into_iter().filter(|&(key, given)| given && !kind.keys().contains(&key)) {
            errors.add(key, format!("has no effect with protocol = \"{kind}\"; remove it, or change the protocol"));
        }
        if self.port == Some(0) {
            errors.add("port", "0 is not a port; give 1 to 65535".to_owned());
        }
        let payload = errors.bytes("payload", self.payload.as_deref());
        let expect = errors.bytes("expect", self.expect.as_deref());
        let path = errors.path(self.path.as_deref().unwrap_or(PATH));
        let port = self.port;
        Some(match kind {
            ProbeKind::Icmp => ProbeProtocol::Icmp,
            ProbeKind::UdpEcho => ProbeProtocol::UdpEcho { port },
            ProbeKind::Udp => ProbeProtocol::Udp { port, payload: payload?, expect: expect? },
            ProbeKind::Tcp => ProbeProtocol::Tcp { port },
            ProbeKind::Http => ProbeProtocol::Http { port, path: path? },
        })
    }
}

#[derive(Default)]
struct HealthKeyErrors(Vec<HealthKeyError>);

impl HealthKeyErrors {
    fn add(&mut self, key: &'static str, message: String) {
        self.0.push(HealthKeyError { key, message });
    }

    fn seconds(&mut self, key: &'static str, value: f64, allowed: RangeInclusive<f64>) -> Option<Duration> {
        if allowed.contains(&value) {
            return Duration::try_from_secs_f64(value).ok();
        }
        self.add(key, format!("{value} is out of range; give {} to {} seconds", allowed.start(), allowed.end()));
        None
    }

    fn threshold(&mut self, key: &'static str, value: u32) -> u32 {
        if !THRESHOLDS.contains(&value) {
            let (from, to) = THRESHOLDS.into_inner();
            self.add(key, format!("{value} is out of range; give {from} to {to}"));
        }
        value
    }

    fn bytes(&mut self, key: &'static str, text: Option<&str>) -> Option<ProbeBytes> {
        ProbeBytes::read(text.unwrap_or_default()).map_err(|message| self.add(key, message)).ok()
    }

    /// Checks a path: it must not end the request line or add a header.
    fn path(&mut self, path: &str) -> Option<Arc<str>> {
        let mut wrong = String::new();
        if !path.starts_with('/') {
            wrong.push_str("does not start with \"/\"; give a path such as \"/healthz\"");
        } else if let Some(character) = path.chars().find(|c| !c.is_ascii_graphic()) {
            let _ = write!(wrong, "has the character {character:?}, which must be written as %XX");
        } else if path.len() > MAX_PATH {
            let _ = write!(wrong, "is longer than {MAX_PATH} bytes; shorten it");
        }
        if wrong.is_empty() {
            return Some(path.into());
        }
        self.add("path", format!("{path:?} {wrong}"));
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::settings::MAX_BYTES;

    fn keys(toml: &str) -> HealthKeys {
        toml::from_str(toml).unwrap()
    }

    fn settings(toml: &str) -> HealthSettings {
        keys(&format!("enabled = true\n{toml}")).settings().unwrap().unwrap()
    }

    fn errors(toml: &str) -> Vec<(&'static str, String)> {
        keys(toml).settings().unwrap_err().into_iter().map(|error| (error.key, error.message)).collect()
    }

    #[test]
    fn nothing_given_is_off_and_enabled_alone_is_the_defaults() {
        assert_eq!(keys("").settings(), Ok(None));
        assert_eq!(keys("interval_secs = 9").settings(), Ok(None));
        assert_eq!(settings(""), HealthSettings::default());
        let probe = HealthSettings::default().probe;
        assert_eq!((probe.interval, probe.timeout), (Duration::from_secs(5), Duration::from_secs(2)));
    }

    #[test]
    fn each_protocol_has_its_keys() {
        let protocol = |toml: &str| settings(toml).probe.protocol;
        assert_eq!(protocol("protocol = 'icmp'"), ProbeProtocol::Icmp);
        assert_eq!(protocol("protocol = 'udp_echo'"), ProbeProtocol::UdpEcho { port: None });
        assert_eq!(protocol("protocol = 'tcp'\nport = 8080"), ProbeProtocol::Tcp { port: Some(8080) });
        assert_eq!(protocol("protocol = 'http'"), ProbeProtocol::Http { port: None, path: "/".into() });
        assert_eq!(
            protocol("protocol = 'udp'\npayload = 'hex:00 fF'\nexpect = 'pong'"),
            ProbeProtocol::Udp {
                port: None,
                payload: ProbeBytes::read("hex:00ff").unwrap(),
                expect: ProbeBytes::read("pong").unwrap()
            }
        );
        for kind in ProbeKind::ALL {
            let named: ProbeKind = serde_json::from_value(kind.name().into()).unwrap();
            assert_eq!(named, kind);
            for key in ["port = 7", "payload = 'x'", "expect = 'x'", "path = '/x'"] {
                let name = key.split(' ').next().unwrap();
                let keys = keys(&format!("protocol = '{kind}'\n{key}"));
                assert_eq!(keys.settings().is_ok(), kind.keys().contains(&name), "{kind} {key}");
            }
        }
    }

    #[test]
    fn what_is_wrong_is_said_of_the_key() {
        let cases = [
            ("interval_secs = 0", "interval_secs", "0 is out of range; give 0.01 to 3600 seconds"),
            ("timeout_secs = 3601\ninterval_secs = 3600", "timeout_secs", "3601 is out of range"),
            ("timeout_secs = nan", "timeout_secs", "NaN is out of range"),
            ("timeout_secs = 6", "timeout_secs", "6 is longer than interval_secs, 5; make it at most that"),
            ("slow_start_secs = -1", "slow_start_secs", "-1 is out of range; give 0 to 3600 seconds"),
            ("unhealthy_threshold = 0", "unhealthy_threshold", "0 is out of range; give 1 to 100"),
            ("healthy_threshold = 101", "healthy_threshold", "101 is out of range; give 1 to 100"),
            ("port = 7", "port", "has no effect with protocol = \"icmp\"; remove it, or change the protocol"),
            ("protocol = 'tcp'\nport = 0", "port", "0 is not a port; give 1 to 65535"),
            ("protocol = 'udp'\npayload = 'hex:0'", "payload", "pairs of hexadecimal digits"),
            ("protocol = 'udp'\nexpect = 'hex:é'", "expect", "pairs of hexadecimal digits"),
            ("protocol = 'http'\npath = 'x'", "path", "\"x\" does not start with \"/\""),
            ("protocol = 'http'\npath = \"/a\\r\\nX: y\"", "path", "has the character '\\r'"),
        ];
        for (toml, key, message) in cases {
            let errors = errors(toml);
            assert_eq!(errors.len(), 1, "{toml}: {errors:?}");
            assert_eq!(errors[0].0, key, "{toml}");
            assert!(errors[0].1.contains(message), "{toml}: {errors:?}");
        }
        let long = format!("protocol = 'udp'\npayload = '{}'", "x".repeat(MAX_BYTES + 1));
        assert_eq!(errors(&long)[0].1, "1201 bytes are too many; give at most 1200");
        assert_eq!(errors("interval_secs = 0\nhealthy_threshold = 0").len(), 2);
    }

    #[test]
    fn a_listeners_own_keys_win() {
        let base =
            keys("enabled = true\nprotocol = 'http'\nport = 80\npath = '/x'\ninterval_secs = 9\nfail_open = false");
        let of = |toml: &str| keys(toml).over(&base).settings().unwrap();
        let inherited = of("").unwrap();
        assert_eq!(inherited.probe.protocol, ProbeProtocol::Http { port: Some(80), path: "/x".into() });
        assert!(!inherited.fail_open);
        assert_eq!(of("enabled = false"), None);
        assert_eq!(
            of("path = '/y'").unwrap().probe.protocol,
            ProbeProtocol::Http { port: Some(80), path: "/y".into() }
        );
        let changed = of("protocol = 'tcp'\ntimeout_secs = 0.5").unwrap();
        assert_eq!(changed.probe.protocol, ProbeProtocol::Tcp { port: None });
        assert_eq!(changed.probe.timeout, Duration::from_millis(500));
        assert_eq!(changed.probe.interval, Duration::from_secs(9));
    }
}
