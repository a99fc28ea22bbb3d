//! Every metric that the daemon exports: name, type, help text and labels.
//!
//! [`render`](mod@super::render) exports nothing that is not in [`ALL`], and a test compares the documentation's
//! table with it.

/// A metric's type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricKind {
    /// Only grows, until the daemon restarts.
    Counter,
    /// May rise and fall.
    Gauge,
    /// Cumulative counts of observations, by upper bound.
    Histogram,
}

impl MetricKind {
    /// The type's name in the text format's `# TYPE` line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
            MetricKind::Histogram => "histogram",
        }
    }
}

/// One metric.
#[derive(Debug, PartialEq, Eq)]
pub struct Metric {
    /// Full name, with the prefix.
    pub name: &'static str,
    /// Counter, gauge or histogram.
    pub kind: MetricKind,
    /// Help text, in one line.
    pub help: &'static str,
    /// Label names, in the order in which the renderer gets the values.
    pub labels: &'static [&'static str],
}

const fn counter(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Metric {
    Metric { name, kind: MetricKind::Counter, help, labels }
}

const fn gauge(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Metric {
    Metric { name, kind: MetricKind::Gauge, help, labels }
}

const fn histogram(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Metric {
    Metric { name, kind: MetricKind::Histogram, help, labels }
}

/// `udp_fanout_packets_received_total`
pub const PACKETS_RECEIVED: Metric = counter(
    "udp_fanout_packets_received_total",
    &["listener", "mode"],
    "Datagrams that were the listener's. Always the sum of forwarded, dropped and passed.",
);

/// `udp_fanout_packets_forwarded_total`
pub const PACKETS_FORWARDED: Metric =
    counter("udp_fanout_packets_forwarded_total", &["listener", "mode"], "Datagrams handed to a downstream.");

/// `udp_fanout_packets_dropped_total`
pub const PACKETS_DROPPED: Metric =
    counter("udp_fanout_packets_dropped_total", &["listener", "mode", "reason"], "Datagrams not forwarded, by reason.");

/// `udp_fanout_copies_dropped_total`
pub const COPIES_DROPPED: Metric = counter(
    "udp_fanout_copies_dropped_total",
    &["listener", "mode", "reason"],
    "Single copies that a replicating listener could not send, by reason. Other copies of the same datagram may have been sent.",
);

/// `udp_fanout_packets_passed_total`
pub const PACKETS_PASSED: Metric = counter(
    "udp_fanout_packets_passed_total",
    &["listener", "mode"],
    "Datagrams the TC program left to the listener's socket, which counts them again under mode userspace.",
);

/// `udp_fanout_bytes_received_total`
pub const BYTES_RECEIVED: Metric =
    counter("udp_fanout_bytes_received_total", &["listener", "mode"], "Bytes of UDP payload received.");

/// `udp_fanout_bytes_forwarded_total`
pub const BYTES_FORWARDED: Metric =
    counter("udp_fanout_bytes_forwarded_total", &["listener", "mode"], "Bytes of UDP payload handed to downstreams.");

/// `udp_fanout_downstream_active`
pub const DOWNSTREAM_ACTIVE: Metric =
    gauge("udp_fanout_downstream_active", &["listener"], "Downstreams that take part in the listener's round now.");

/// `udp_fanout_downstream_packets_total`
pub const DOWNSTREAM_PACKETS: Metric = counter(
    "udp_fanout_downstream_packets_total",
    &["listener", "endpoint"],
    "Datagrams handed to the downstream, by both datapaths together.",
);

/// `udp_fanout_downstream_bytes_total`
pub const DOWNSTREAM_BYTES: Metric = counter(
    "udp_fanout_downstream_bytes_total",
    &["listener", "endpoint"],
    "Bytes of UDP payload handed to the downstream, by both datapaths together.",
);

/// `udp_fanout_downstream_health`
pub const DOWNSTREAM_HEALTH: Metric = gauge(
    "udp_fanout_downstream_health",
    &["listener", "endpoint"],
    "What health checks say of the downstream: 1 for healthy or not yet known, 0 for unhealthy. Only with health checks.",
);

/// `udp_fanout_downstream_health_transitions_total`
pub const HEALTH_TRANSITIONS: Metric = counter(
    "udp_fanout_downstream_health_transitions_total",
    &["listener", "to"],
    "Times a downstream of the listener has become unhealthy, or healthy again. Only with health checks.",
);

/// `udp_fanout_health_probes_total`
pub const HEALTH_PROBES: Metric = counter(
    "udp_fanout_health_probes_total",
    &["protocol", "result"],
    "Health probes by how they ended. Only of protocols in use.",
);

/// `udp_fanout_health_probe_round_trip_seconds`
pub const HEALTH_ROUND_TRIP: Metric = histogram(
    "udp_fanout_health_probe_round_trip_seconds",
    &["protocol"],
    "Seconds from a health probe to its answer. Only of protocols in use.",
);

/// `udp_fanout_fragments_stray_total`
pub const FRAGMENTS_STRAY: Metric = counter(
    "udp_fanout_fragments_stray_total",
    &[],
    "Fragments at a listener's address that came before the first one of their datagram, or without it. Left to the host's stack.",
);

/// `udp_fanout_fragments_lost_total`
pub const FRAGMENTS_LOST: Metric = counter(
    "udp_fanout_fragments_lost_total",
    &[],
    "Fragments that could not follow the first one of their datagram, which then is forwarded in part.",
);

/// `udp_fanout_listener_mode_info`
pub const LISTENER_MODE: Metric = gauge(
    "udp_fanout_listener_mode_info",
    &["listener", "mode", "reason"],
    "The datapath that carries the listener, and why it was chosen; always 1.",
);

/// `udp_fanout_programs_ahead`
pub const PROGRAMS_AHEAD: Metric = gauge(
    "udp_fanout_programs_ahead",
    &["interface"],
    "XDP and TCX programs and TC filters that see the interface's packets before the TC program, and may take datagrams from it.",
);

/// `udp_fanout_discovery_synced`
pub const DISCOVERY_SYNCED: Metric = gauge(
    "udp_fanout_discovery_synced",
    &["namespace", "service"],
    "1 while all EndpointSlices of the Service are known and the watch that keeps them current is open, else 0.",
);

/// `udp_fanout_discovery_port_mismatch`
pub const DISCOVERY_PORT_MISMATCH: Metric = gauge(
    "udp_fanout_discovery_port_mismatch",
    &["namespace", "service"],
    "1 while a listener sends to a port number that is none of the UDP ports of the Service's endpoints, else 0.",
);

/// `udp_fanout_discovery_last_event_age_seconds`
pub const DISCOVERY_LAST_EVENT_AGE: Metric = gauge(
    "udp_fanout_discovery_last_event_age_seconds",
    &["namespace", "service"],
    "Seconds since the API server last sent anything about the Service, an event or a bookmark. Absent before the first.",
);

/// `udp_fanout_discovery_watch_restarts_total`
pub const DISCOVERY_WATCH_RESTARTS: Metric = counter(
    "udp_fanout_discovery_watch_restarts_total",
    &["namespace", "service"],
    "Watches opened after the first, for whatever reason; a healthy one is renewed every few minutes.",
);

/// `udp_fanout_discovery_errors_total`
pub const DISCOVERY_ERRORS: Metric = counter(
    "udp_fanout_discovery_errors_total",
    &["namespace", "service", "kind"],
    "Failures between the daemon and the API server, by kind.",
);

/// `udp_fanout_plan_apply_total`
pub const PLAN_APPLY: Metric = counter(
    "udp_fanout_plan_apply_total",
    &["result"],
    "Times a changed plan was given to the datapaths, by result: success or error.",
);

/// `udp_fanout_config_reloads_total`
pub const CONFIG_RELOADS: Metric = counter(
    "udp_fanout_config_reloads_total",
    &["result"],
    "Times the configuration was read again, by result: success, or error, which leaves the one before in force.",
);

/// `udp_fanout_config_last_reload_successful`
pub const CONFIG_LAST_RELOAD: Metric = gauge(
    "udp_fanout_config_last_reload_successful",
    &[],
    "1 while the configuration as it was last read is in force, 0 while it was refused.",
);

/// `udp_fanout_config_last_reload_success_timestamp_seconds`
pub const CONFIG_LAST_SUCCESS: Metric = gauge(
    "udp_fanout_config_last_reload_success_timestamp_seconds",
    &[],
    "When a configuration was last put in force, the start included, in seconds since 1970-01-01 UTC.",
);

/// `udp_fanout_build_info`
pub const BUILD_INFO: Metric =
    gauge("udp_fanout_build_info", &["version", "revision", "arch"], "The build that is running; always 1.");

/// `udp_fanout_start_time_seconds`
pub const START_TIME: Metric =
    gauge("udp_fanout_start_time_seconds", &[], "When the daemon started, in seconds since 1970-01-01 UTC.");

/// Every metric, in the order in which the page shows them.
pub const ALL: [&Metric; 29] = [
    &PACKETS_RECEIVED,
    &PACKETS_FORWARDED,
    &PACKETS_DROPPED,
    &COPIES_DROPPED,
    &PACKETS_PASSED,
    &BYTES_RECEIVED,
    &BYTES_FORWARDED,
    &DOWNSTREAM_ACTIVE,
    &DOWNSTREAM_PACKETS,
    &DOWNSTREAM_BYTES,
    &DOWNSTREAM_HEALTH,
    &HEALTH_TRANSITIONS,
    &HEALTH_PROBES,
    &HEALTH_ROUND_TRIP,
    &FRAGMENTS_STRAY,
    &FRAGMENTS_LOST,
    &LISTENER_MODE,
    &PROGRAMS_AHEAD,
    &DISCOVERY_SYNCED,
    &DISCOVERY_PORT_MISMATCH,
    &DISCOVERY_LAST_EVENT_AGE,
    &DISCOVERY_WATCH_RESTARTS,
    &DISCOVERY_ERRORS,
    &PLAN_APPLY,
    &CONFIG_RELOADS,
    &CONFIG_LAST_RELOAD,
    &CONFIG_LAST_SUCCESS,
    &BUILD_INFO,
    &START_TIME,
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn is_name(text: &str) -> bool {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
    }

    #[test]
    fn names_follow_the_conventions_of_prometheus() {
        for metric in ALL {
            assert!(is_name(metric.name) && metric.name.starts_with("udp_fanout_"), "{}", metric.name);
            assert_eq!(metric.name.ends_with("_total"), metric.kind == MetricKind::Counter, "{}", metric.name);
            assert!(metric.help.ends_with('.'), "{}", metric.name);
            assert!(!metric.help.contains(['\n', '\\']), "{}", metric.name);
            assert!(metric.labels.iter().all(|label| is_name(label) && *label != "le"), "{}", metric.name);
        }
    }

    #[test]
    fn names_and_labels_are_distinct() {
        let names: HashSet<_> = ALL.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), ALL.len());
        for metric in ALL {
            let labels: HashSet<_> = metric.labels.iter().collect();
            assert_eq!(labels.len(), metric.labels.len(), "{}", metric.name);
        }
    }

    #[test]
    fn the_names_promised_to_users_exist() {
        for name in [
            "udp_fanout_packets_received_total",
            "udp_fanout_packets_forwarded_total",
            "udp_fanout_packets_dropped_total",
            "udp_fanout_bytes_received_total",
            "udp_fanout_bytes_forwarded_total",
            "udp_fanout_downstream_active",
            "udp_fanout_downstream_packets_total",
            "udp_fanout_downstream_health",
            "udp_fanout_build_info",
        ] {
            assert!(ALL.iter().any(|metric| metric.name == name), "{name}");
        }
    }
}
