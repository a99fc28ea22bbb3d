//! The keys of `health` tables: the file's own, and that of a listener, whose keys stand in for single ones of it.

use super::{KeyKind, KeySpec, WhenAbsent, key, wide};
use crate::health::settings::{SECONDS, SLOW_START_SECS, THRESHOLDS};

/// The keys of a `health` table, and what the absence of each means, in this order.
#[expect(clippy::too_many_lines, reason = "a table: twelve keys")]
const fn health_keys(absent: [WhenAbsent; 12]) -> [KeySpec; 12] {
    let [enabled, interval, timeout, protocol, port, payload, expect, path, unhealthy, healthy, fail_open, slow_start] =
        absent;
    [
        key(
            "enabled",
            KeyKind::Flag,
            enabled,
            "true",
            "Probe the downstreams, and send nothing to those that do not answer.",
        ),
        key(
            "interval_secs",
            KeyKind::Seconds(SECONDS),
            interval,
            "2.5",
            "Seconds from one round of probes of a downstream to the next.",
        ),
        key(
            "timeout_secs",
            KeyKind::Seconds(SECONDS),
            timeout,
            "0.5",
            "Seconds without an answer after which a round has failed. Not more than `interval_secs`. It has three probes, so that one that is lost decides nothing.",
        ),
        key(
            "protocol",
            KeyKind::Choice(&["icmp", "udp_echo", "udp", "tcp", "http"]),
            protocol,
            "\"tcp\"",
            "What a probe is: an ICMP echo request (`icmp`); a UDP datagram that the application must send back unchanged (`udp_echo`); a UDP datagram that it must answer (`udp`); a TCP connection, closed as soon as it stands (`tcp`); an HTTP request, answered with a status from 200 to 399 (`http`).",
        ),
        key("port", KeyKind::Integer(1..=65_535), port, "8080", "Where probes go. Not for `icmp`, which has no ports."),
        key(
            "payload",
            KeyKind::Text("text, or hex: and hexadecimal digits"),
            payload,
            "\"hex:00ff 7b\"",
            "For `udp`: what is sent; up to 1200 bytes.",
        ),
        key(
            "expect",
            KeyKind::Text("text, or hex: and hexadecimal digits"),
            expect,
            "\"pong\"",
            "For `udp`: what an answer must begin with; up to 1200 bytes.",
        ),
        key("path", KeyKind::Text("a path that starts with /"), path, "\"/healthz\"", "For `http`: what is asked for."),
        key(
            "unhealthy_threshold",
            KeyKind::Integer(wide(THRESHOLDS)),
            unhealthy,
            "2",
            "Failed rounds in a row after which a downstream is left out.",
        ),
        key(
            "healthy_threshold",
            KeyKind::Integer(wide(THRESHOLDS)),
            healthy,
            "1",
            "Answered rounds in a row after which it is back.",
        ),
        key(
            "fail_open",
            KeyKind::Flag,
            fail_open,
            "false",
            "When all downstreams of a listener fail: go on sending to all of them, with an error in the log (`true`), or drop and count everything (`false`).",
        ),
        key(
            "slow_start_secs",
            KeyKind::Seconds(SLOW_START_SECS),
            slow_start,
            "30",
            "Seconds over which the share of a downstream that is back grows to its full size, in ten steps. Not under `replicate`.",
        ),
    ]
}

/// The keys of `health`.
pub static HEALTH: &[KeySpec] = &health_keys([
    WhenAbsent::Default("false"),
    WhenAbsent::Default("5"),
    WhenAbsent::Default("2"),
    WhenAbsent::Default("\"icmp\""),
    WhenAbsent::Means("the downstream's own port"),
    WhenAbsent::Means("an empty datagram"),
    WhenAbsent::Means("any answer will do"),
    WhenAbsent::Means("`\"/\"` under `http`"),
    WhenAbsent::Default("1"),
    WhenAbsent::Default("2"),
    WhenAbsent::Default("true"),
    WhenAbsent::Default("0"),
]);

/// The keys of `listeners[].health`.
pub static LISTENER_HEALTH: &[KeySpec] = &health_keys([const { WhenAbsent::Means("as in `health`") }; 12]);
