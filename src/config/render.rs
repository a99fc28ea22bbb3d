//! A [`Config`] as a file again, with every default written out.

use std::time::Duration;

use super::file::{
    ConfigFile, FileDownstream, FileInterfaces, FileKubernetes, FileListener, FileMetrics, FilePolicy, FilePrefixes,
    FileRateLimit, FileService, FileServiceTable, FileSources, RESOLVE_INTERVAL_SECS,
};
use super::rules::sample_to_fraction;
use super::{Config, DownstreamSource, Interfaces, KubernetesSource, ListenerConfig};
use crate::admission::{self, Prefix};
use crate::config::health_keys::HealthKeys;
use crate::discovery::ServiceRef;
use crate::health::settings::HealthSettings;
use crate::model;
use crate::names;

/// The file that says all that the configuration says.
pub(super) fn file(config: &Config) -> ConfigFile {
    let metrics = config.metrics.as_ref().map(|metrics| FileMetrics {
        enabled: true,
        bind: metrics.bind.to_string(),
        path: metrics.path.clone(),
    });
    ConfigFile {
        watch_config: config.watch,
        status_socket: config.status_socket.display().to_string(),
        attach: config.attach.hook,
        tcx_order: config.attach.order,
        on_exit: config.handover.on_exit,
        pin_path: config.handover.pin_path.display().to_string(),
        max_headless_secs: config.handover.max_headless.map_or(0, |most| most.as_secs() as u32),
        listeners: config.listeners.iter().map(|one| listener(one, config)).collect(),
        health: health(config.health.as_ref()),
        metrics: Some(metrics.unwrap_or_else(|| FileMetrics { enabled: false, ..FileMetrics::default() })),
        limits: config.limits.clone(),
    }
}

/// Health checks with every key that means something to their protocol.
fn health(settings: Option<&HealthSettings>) -> HealthKeys {
    match settings {
        Some(settings) => HealthKeys::from(settings),
        None => HealthKeys { enabled: Some(false), ..HealthKeys::from(&HealthSettings::default()) },
    }
}

fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}

/// One Service stands in the table itself; of several, each says all that it is.
fn kubernetes(source: &KubernetesSource) -> FileKubernetes {
    let KubernetesSource { services, locality, terminating } = source;
    let mut table = FileKubernetes {
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
            FileService::Table(FileServiceTable { service, namespace, port: Some(port) })
        };
        table.services = Some(services.iter().map(service).collect());
    }
    table
}

fn listener(listener: &ListenerConfig, config: &Config) -> FileListener {
    let (downstream, kubernetes) = match &listener.source {
        DownstreamSource::Static(downstreams) => {
            let downstream = |d: &model::Downstream| FileDownstream {
                name: Some(d.name.to_string()),
                address: d.address.to_string(),
                weight: d.weight,
                sample: sample_to_fraction(d.sample),
            };
            (Some(downstreams.iter().map(downstream).collect()), None)
        }
        DownstreamSource::Names(source) => {
            let downstream = |entry: &names::DownstreamEntry| FileDownstream {
                name: Some(entry.name.to_string()),
                address: entry.address.to_string(),
                weight: entry.weight,
                sample: sample_to_fraction(entry.sample),
            };
            (Some(source.entries.iter().map(downstream).collect()), None)
        }
        DownstreamSource::Kubernetes(source) => (None, Some(kubernetes(source))),
    };
    let (policy, hash_on) = match listener.policy {
        model::Policy::RoundRobin => (Some(FilePolicy::RoundRobin), None),
        model::Policy::Hash(on) => (Some(FilePolicy::Hash), Some(on)),
        model::Policy::Replicate => (Some(FilePolicy::Replicate), None),
        // Has no name in a file: it is what comes of the protocol alone.
        model::Policy::GelfMessage => (None, None),
    };
    FileListener {
        name: listener.name.clone(),
        bind: listener.bind.to_string(),
        interface: match &listener.interfaces {
            Interfaces::Auto => FileInterfaces::default(),
            Interfaces::Named(names) if names.len() == 1 => FileInterfaces::One(names[0].clone()),
            Interfaces::Named(names) => FileInterfaces::List(names.clone()),
        },
        mode: listener.mode,
        protocol: listener.protocol,
        policy,
        hash_on,
        sources: sources(&listener.sources),
        rate_limit: listener.rate_limit.map(|limit| FileRateLimit {
            packets_per_second: limit.packets_per_second,
            burst: Some(limit.burst),
            ipv4_prefix: limit.ipv4_prefix,
            ipv6_prefix: limit.ipv6_prefix,
        }),
        downstream,
        resolve_interval_secs: match &listener.source {
            DownstreamSource::Names(source) => seconds(source.interval),
            DownstreamSource::Static(_) | DownstreamSource::Kubernetes(_) => RESOLVE_INTERVAL_SECS,
        },
        kubernetes,
        health: (listener.health != config.health).then(|| health(listener.health.as_ref())),
        settings: listener.settings.clone(),
    }
}

/// The prefixes as the file has them; none where everybody may send.
fn sources(sources: &admission::SourceRules) -> Option<FileSources> {
    let texts = |prefixes: &[Prefix]| {
        let texts: Vec<String> = prefixes.iter().map(ToString::to_string).collect();
        (!texts.is_empty()).then_some(FilePrefixes::List(texts))
    };
    (!sources.allows_everyone()).then(|| FileSources { allow: texts(&sources.allow), deny: texts(&sources.deny) })
}
