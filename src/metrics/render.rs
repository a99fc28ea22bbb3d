//! Renders a [`MetricsSnapshot`] as a page in Prometheus' text format (version 0.0.4).
//!
//! Every page has its own recorder, filled with absolute values and discarded, so nothing remains of a downstream that is
//! gone. The recorder is called directly, because the `metrics` macros would look up a thread-local recorder for each of some
//! thousand values. It does not accept existing histograms; `histogram` writes those.

mod histogram;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use metrics::{Key, KeyName, Label, Level, Metadata, Recorder, SharedString};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusRecorder};

use super::names::{self, Metric, MetricKind};
use super::snapshot::{ListenerSnapshot, MetricsSnapshot};
use crate::discovery::ServiceStatus;
use crate::health::probe_stats::ProbeStats;
use crate::health::settings::ProbeKind;
use crate::version;

/// The page's media type.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Renders the page. Metrics come in the order of [`names::ALL`], series in alphabetic order, so that two pages can be
/// compared line by line.
#[must_use]
pub fn render(snapshot: &MetricsSnapshot) -> String {
    let page = MetricsPage::new();
    for listener in &snapshot.listeners {
        page.listener(listener);
    }
    for checked in &snapshot.health {
        let listener = SharedString::from_shared(Arc::clone(&checked.listener));
        let endpoint = SharedString::from_owned(checked.endpoint.to_string());
        page.gauge(&names::DOWNSTREAM_HEALTH, [listener, endpoint], f64::from(u8::from(checked.healthy)));
    }
    page.health_checks(snapshot);
    page.counter(&names::FRAGMENTS_STRAY, [], snapshot.fragments.strays);
    page.counter(&names::FRAGMENTS_LOST, [], snapshot.fragments.lost);
    for (interface, programs) in &snapshot.programs_ahead {
        let interface = SharedString::from_shared(Arc::clone(interface));
        #[expect(clippy::cast_precision_loss, reason = "an interface has at most some dozen")]
        page.gauge(&names::PROGRAMS_AHEAD, [interface], *programs as f64);
    }
    for service in &snapshot.discovery {
        page.service(service);
    }
    let applies = snapshot.plan_applies;
    page.counter(&names::PLAN_APPLY, [SharedString::const_str("success")], applies.success);
    page.counter(&names::PLAN_APPLY, [SharedString::const_str("error")], applies.error);
    let reloads = snapshot.reloads;
    page.counter(&names::CONFIG_RELOADS, [SharedString::const_str("success")], reloads.success);
    page.counter(&names::CONFIG_RELOADS, [SharedString::const_str("error")], reloads.error);
    page.gauge(&names::CONFIG_LAST_RELOAD, [], f64::from(u8::from(reloads.last_good)));
    page.gauge(&names::CONFIG_LAST_SUCCESS, [], seconds(reloads.last_success));
    let build = [version::PACKAGE, version::REVISION, std::env::consts::ARCH];
    page.gauge(&names::BUILD_INFO, build.map(SharedString::const_str), 1.0);
    page.gauge(&names::START_TIME, [], seconds(snapshot.started));
    let round_trips = histogram::text(
        &names::HEALTH_ROUND_TRIP,
        probed(snapshot).map(|(kind, stats)| (kind.name(), &stats.round_trips)),
    );
    in_order(&(page.recorder.handle().render() + &round_trips))
}

/// Seconds since 1970.
fn seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// The protocols of which probes were sent.
fn probed(snapshot: &MetricsSnapshot) -> impl Iterator<Item = (ProbeKind, &ProbeStats)> {
    let all = ProbeKind::ALL.into_iter().map(|kind| (kind, snapshot.probes.of(kind)));
    all.filter(|(_, stats)| stats.sent() > 0)
}

struct MetricsPage {
    recorder: PrometheusRecorder,
}

impl MetricsPage {
    fn new() -> Self {
        let recorder = PrometheusBuilder::new().build_recorder();
        for metric in names::ALL {
            let (name, help) = (KeyName::from_const_str(metric.name), SharedString::const_str(metric.help));
            match metric.kind {
                MetricKind::Counter => recorder.describe_counter(name, None, help),
                MetricKind::Gauge => recorder.describe_gauge(name, None, help),
                MetricKind::Histogram => {}
            }
        }
        MetricsPage { recorder }
    }

    fn listener(&self, listener: &ListenerSnapshot) {
        let name = || SharedString::from_shared(listener.name.clone());
        for &(mode, counters) in &listener.counters {
            let labels = || [name(), SharedString::const_str(mode.name())];
            self.counter(&names::PACKETS_RECEIVED, labels(), counters.packets_received);
            self.counter(&names::PACKETS_FORWARDED, labels(), counters.packets_forwarded);
            self.counter(&names::PACKETS_PASSED, labels(), counters.packets_passed);
            self.counter(&names::BYTES_RECEIVED, labels(), counters.bytes_received);
            self.counter(&names::BYTES_FORWARDED, labels(), counters.bytes_forwarded);
            for (reason, packets) in counters.dropped.iter() {
                let [listener, mode] = labels();
                let reason = SharedString::const_str(reason.label());
                self.counter(&names::PACKETS_DROPPED, [listener, mode, reason], packets);
            }
            // Only where copies exist; other listeners would get series that stay at zero.
            for (reason, copies) in counters.copies_dropped.iter().filter(|_| listener.replicates) {
                let [listener, mode] = labels();
                let reason = SharedString::const_str(reason.label());
                self.counter(&names::COPIES_DROPPED, [listener, mode, reason], copies);
            }
        }
        for downstream in &listener.downstreams {
            let endpoint = SharedString::from_owned(downstream.endpoint.to_string());
            let labels = || [name(), endpoint.clone()];
            self.counter(&names::DOWNSTREAM_PACKETS, labels(), downstream.counters.packets);
            self.counter(&names::DOWNSTREAM_BYTES, labels(), downstream.counters.bytes);
        }
        #[expect(clippy::cast_precision_loss, reason = "exact up to 2^53 downstreams")]
        self.gauge(&names::DOWNSTREAM_ACTIVE, [name()], listener.active as f64);
        let mode = SharedString::const_str(listener.mode.name());
        let reason = SharedString::from_shared(listener.mode_reason.clone());
        self.gauge(&names::LISTENER_MODE, [name(), mode, reason], 1.0);
    }

    fn health_checks(&self, snapshot: &MetricsSnapshot) {
        for (listener, transitions) in &snapshot.health_transitions {
            for (to, times) in [("unhealthy", transitions.failed), ("healthy", transitions.recovered)] {
                let listener = SharedString::from_shared(Arc::clone(listener));
                self.counter(&names::HEALTH_TRANSITIONS, [listener, SharedString::const_str(to)], times);
            }
        }
        for (kind, stats) in probed(snapshot) {
            for (outcome, probes) in stats.outcomes() {
                let labels = [kind.name(), outcome.label()].map(SharedString::const_str);
                self.counter(&names::HEALTH_PROBES, labels, probes);
            }
        }
    }

    fn service(&self, service: &ServiceStatus) {
        let text = |text: &str| SharedString::from_owned(text.to_owned());
        let labels = || [text(&service.namespace), text(&service.service)];
        self.gauge(&names::DISCOVERY_SYNCED, labels(), f64::from(u8::from(service.synced)));
        self.gauge(&names::DISCOVERY_PORT_MISMATCH, labels(), f64::from(u8::from(service.port_mismatch)));
        if let Some(age) = service.last_event_age {
            self.gauge(&names::DISCOVERY_LAST_EVENT_AGE, labels(), age.as_secs_f64());
        }
        self.counter(&names::DISCOVERY_WATCH_RESTARTS, labels(), service.watch_restarts);
        for &(kind, errors) in &service.errors {
            let [namespace, service] = labels();
            self.counter(&names::DISCOVERY_ERRORS, [namespace, service, SharedString::const_str(kind.label())], errors);
        }
    }

    fn counter<const N: usize>(&self, metric: &'static Metric, labels: [SharedString; N], value: u64) {
        self.recorder.register_counter(&key(metric, labels), &METADATA).absolute(value);
    }

    fn gauge<const N: usize>(&self, metric: &'static Metric, labels: [SharedString; N], value: f64) {
        self.recorder.register_gauge(&key(metric, labels), &METADATA).set(value);
    }
}

static METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, Some(module_path!()));

fn key<const N: usize>(metric: &'static Metric, values: [SharedString; N]) -> Key {
    debug_assert_eq!(metric.labels.len(), N, "{}", metric.name);
    let labels: Vec<Label> = metric
        .labels
        .iter()
        .zip(values)
        .map(|(&name, value)| Label::new(SharedString::const_str(name), value))
        .collect();
    Key::from_parts(KeyName::from_const_str(metric.name), labels)
}

/// Sorts the page. The exporter keeps series in hash maps, so their order differs from page to page. It separates metrics by
/// an empty line, which does not occur within one: line feeds in label values are escaped.
fn in_order(page: &str) -> String {
    let mut metrics: Vec<(usize, &str)> = page
        .split("\n\n")
        .filter_map(|text| {
            let name = text.trim_start().strip_prefix("# HELP ")?.split(' ').next()?;
            Some((names::ALL.iter().position(|metric| metric.name == name)?, text))
        })
        .collect();
    metrics.sort_unstable_by_key(|&(position, _)| position);
    let mut sorted = String::with_capacity(page.len());
    for (position, text) in metrics {
        let (head, mut series): (Vec<&str>, Vec<&str>) =
            text.lines().filter(|line| !line.is_empty()).partition(|line| line.starts_with('#'));
        if names::ALL[position].kind != MetricKind::Histogram {
            series.sort_unstable();
        }
        for line in head.into_iter().chain(series) {
            sorted.push_str(line);
            sorted.push('\n');
        }
    }
    sorted
}

#[cfg(test)]
mod tests;
