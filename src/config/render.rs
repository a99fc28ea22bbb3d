//! A [`Config`] as a file again, with every default written out.

use std::time::Duration;

use super::file::{
    Downstream, File, Interface, Kubernetes, Limits, Listener, Metrics, Policy, Prefixes, RESOLVE_INTERVAL_SECS,
    RateLimit, Service, ServiceTable, Settings, Sources,
};
use super::rules::part_of;
use super::{Config, Interfaces, KubernetesSource, ListenerConfig, Source};
use crate::admission::{self, Prefix};
use crate::discovery::ServiceRef;
use crate::health::keys::Keys;
use crate::health::settings::HealthSettings;
use crate::model;
use crate::names;

/// The file that says all that the configuration says.
pub(super) fn file(config: &Config) -> File {
    let metrics = config.metrics.as_ref().map(|metrics| Metrics {
        enabled: true,
        bind: metrics.bind.to_string(),
        path: metrics.path.clone(),
    });
    File {
        watch_config: config.watch,
        status_socket: config.status_socket.display().to_string(),
        attach: config.attach.hook,
        tcx_order: config.attach.order,
        on_exit: config.succession.on_exit,
        pin_path: config.succession.pin_path.display().to_string(),
        max_headless_secs: config.succession.max_headless.map_or(0, |most| most.as_secs() as u32),
        listeners: config.listeners.iter().map(|one| listener(one, config)).collect(),
        health: health(config.health.as_ref()),
        metrics: Some(metrics.unwrap_or_else(|| Metrics { enabled: false, ..Metrics::default() })),
        limits: Limits {
            max_listeners: config.limits.max_listeners,
            max_downstreams: config.limits.max_downstreams,
            max_sources: config.limits.max_sources,
            max_senders: config.limits.max_senders,
        },
    }
}

/// Health checks with every key that means something to their protocol.
fn health(settings: Option<&HealthSettings>) -> Keys {
    match settings {
        Some(settings) => Keys::from(settings),
        None => Keys { enabled: Some(false), ..Keys::from(&HealthSettings::default()) },
    }
}

fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}

/// One Service stands in the table itself; of several, each says all that it is.
fn kubernetes(source: &KubernetesSource) -> Kubernetes {
    let KubernetesSource { services, locality, terminating } = source;
    let mut table = Kubernetes {
        namespace: None,
        service: None,
        port: None,
        locality: *locality,
        terminating: *terminating,
        services: None,
    };
    if let [only] = services.as_slice() {
        table.namespace.clone_from(&only.namespace);
        table.service = Some(only.service.clone());
        table.port = Some(only.port.clone());
    } else {
        let service = |service: &ServiceRef| {
            let ServiceRef { namespace, service, port } = service.clone();
            Service::Table(ServiceTable { service, namespace, port: Some(port) })
        };
        table.services = Some(services.iter().map(service).collect());
    }
    table
}

fn listener(listener: &ListenerConfig, config: &Config) -> Listener {
    let (downstream, kubernetes) = match &listener.source {
        Source::Static(downstreams) => {
            let downstream = |d: &model::Downstream| Downstream {
                name: Some(d.name.to_string()),
                address: d.address.to_string(),
                weight: d.weight,
                sample: part_of(d.sample),
            };
            (Some(downstreams.iter().map(downstream).collect()), None)
        }
        Source::Names(source) => {
            let downstream = |entry: &names::Entry| Downstream {
                name: Some(entry.name.to_string()),
                address: entry.address.to_string(),
                weight: entry.weight,
                sample: part_of(entry.sample),
            };
            (Some(source.entries.iter().map(downstream).collect()), None)
        }
        Source::Kubernetes(source) => (None, Some(kubernetes(source))),
    };
    let (policy, hash_on) = match listener.policy {
        model::Policy::RoundRobin => (Some(Policy::RoundRobin), None),
        model::Policy::Hash(on) => (Some(Policy::Hash), Some(on)),
        model::Policy::Replicate => (Some(Policy::Replicate), None),
        // Has no name in a file: it is what comes of the protocol alone.
        model::Policy::GelfMessage => (None, None),
    };
    Listener {
        name: listener.name.clone(),
        bind: listener.bind.to_string(),
        interface: match &listener.interfaces {
            Interfaces::Auto => Interface::default(),
            Interfaces::Named(names) if names.len() == 1 => Interface::One(names[0].clone()),
            Interfaces::Named(names) => Interface::List(names.clone()),
        },
        mode: listener.mode,
        protocol: listener.protocol,
        policy,
        hash_on,
        sources: sources(&listener.sources),
        rate_limit: listener.rate_limit.map(|limit| RateLimit {
            packets_per_second: limit.packets_per_second,
            burst: Some(limit.burst),
            ipv4_prefix: limit.ipv4_prefix,
            ipv6_prefix: limit.ipv6_prefix,
        }),
        downstream,
        resolve_interval_secs: match &listener.source {
            Source::Names(source) => seconds(source.interval),
            Source::Static(_) | Source::Kubernetes(_) => RESOLVE_INTERVAL_SECS,
        },
        kubernetes,
        health: (listener.health != config.health).then(|| health(listener.health.as_ref())),
        settings: Settings::from(&listener.settings),
    }
}

/// The prefixes as the file has them; none where everybody may send.
fn sources(sources: &admission::Sources) -> Option<Sources> {
    let texts = |prefixes: &[Prefix]| {
        let texts: Vec<String> = prefixes.iter().map(ToString::to_string).collect();
        (!texts.is_empty()).then_some(Prefixes::List(texts))
    };
    (!sources.is_open()).then(|| Sources { allow: texts(&sources.allow), deny: texts(&sources.deny) })
}
