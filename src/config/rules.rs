//! The rules that turn a file into a [`Config`]: everything that takes several keys, or the inside of a text.
//!
//! `schema_check` has checked types, ranges and choices before. Every rule is tried on every listener; each violation is
//! added to the problems with the key, the value and the fix.

mod admission;
mod downstreams;
mod health;
mod kubernetes;
mod policies;
mod values;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use super::document::{Document, KeyPath};
use super::file::{ConfigFile, FileInterfaces, FileListener, FileMetrics};
use super::problem::{Problems, quoted};
use super::{
    AttachConfig, Config, DownstreamSource, HandoverConfig, Interfaces, ListenerConfig, MapLimits, MetricsConfig,
};
use super::{MAX_DOWNSTREAMS, MAX_LISTENERS, MAX_SOURCES, address};
use crate::config::health_keys::HealthKeys;
use crate::model::ListenerId;
use crate::net::is_link_scoped_multicast;

pub(super) use policies::sample_to_fraction;

const BIND_EXAMPLE: &str = "0.0.0.0:5514";
const METRICS_EXAMPLE: &str = "0.0.0.0:9090";

/// Checks a file and makes it a configuration; none if `problems` has got any.
pub(super) fn apply(file: ConfigFile, path: &Path, document: &Document, problems: &mut Problems) -> Option<Config> {
    let mut rules = RuleChecker { document, problems, warnings: Vec::new(), health: None };
    if !rules.counts(&file) {
        return None;
    }
    let health = rules.health(&file.health);
    let listeners: Vec<Option<ListenerConfig>> = file
        .listeners
        .iter()
        .zip(0..)
        .map(|(listener, id)| rules.listener(listener, ListenerId(id), &file.limits))
        .collect();
    rules.distinct_names(&file);
    rules.distinct_binds(&file);
    let metrics = rules.metrics(file.metrics.as_ref());
    let status_socket = rules.check(&top("status_socket"), values::socket_path(&file.status_socket));
    let pin_path = rules.check(&top("pin_path"), values::pin_path(&file.pin_path));
    let warnings = rules.warnings;
    if !problems.is_empty() {
        return None;
    }
    Some(Config {
        path: path.to_owned(),
        watch: file.watch_config,
        listeners: listeners.into_iter().collect::<Option<_>>()?,
        health,
        metrics,
        limits: file.limits,
        status_socket: status_socket?.into(),
        attach: AttachConfig { hook: file.attach, order: file.tcx_order },
        handover: HandoverConfig {
            on_exit: file.on_exit,
            pin_path: pin_path?.into(),
            max_headless: (file.max_headless_secs > 0).then(|| Duration::from_secs(file.max_headless_secs.into())),
        },
        warnings,
    })
}

struct RuleChecker<'a> {
    document: &'a Document,
    problems: &'a mut Problems,
    warnings: Vec<String>,
    /// The file's own `health`, if there is nothing wrong with it.
    health: Option<HealthKeys>,
}

fn top(key: &str) -> KeyPath {
    KeyPath::default().then(key)
}

fn listener_key(id: ListenerId) -> KeyPath {
    top("listeners").then(id.0 as usize)
}

impl RuleChecker<'_> {
    fn fault(&mut self, key: &KeyPath, message: impl Into<String>) {
        if self.problems.is_full() {
            return;
        }
        self.problems.add(self.document.line(key), Some(key.to_string()), message.into());
    }

    fn warn(&mut self, key: &KeyPath, message: impl AsRef<str>) {
        self.warnings.push(format!("{key}: {}", message.as_ref()));
    }

    /// Passes a value on, or the message about it.
    fn check<T>(&mut self, key: &KeyPath, value: Result<T, String>) -> Option<T> {
        value.map_err(|message| self.fault(key, message)).ok()
    }

    /// Checks the numbers of listeners, downstreams and prefixes. If there are too many, nothing else is checked: some rules
    /// compare all pairs.
    fn counts(&mut self, file: &ConfigFile) -> bool {
        let listeners = file.listeners.len();
        let downstreams: usize = file.listeners.iter().filter_map(|l| l.downstream.as_ref()).map(Vec::len).sum();
        let sources: usize = file.listeners.iter().filter_map(|l| l.sources.as_ref()).map(admission::count).sum();
        let mut fits = true;
        if listeners == 0 {
            let fix = "add one with a name, a bind address and its downstreams (config/reference.toml shows every key)";
            self.fault(&top("listeners"), format!("no listeners; {fix}"));
            fits = false;
        }
        for (key, there, allowed, most) in [
            ("max_listeners", listeners, file.limits.max_listeners, MAX_LISTENERS),
            ("max_downstreams", downstreams, file.limits.max_downstreams, MAX_DOWNSTREAMS),
            ("max_sources", sources, file.limits.max_sources, MAX_SOURCES),
        ] {
            if there > allowed as usize {
                let things = key.trim_start_matches("max_");
                let fix = if there > most as usize {
                    format!("the maximum is {}, so split the file between several hosts", most)
                } else {
                    format!("raise it to {there} or more, or remove {things}")
                };
                self.fault(&top("limits").then(key), format!("{allowed}, but the file has {there} {things}; {fix}"));
                fits = false;
            }
        }
        fits
    }

    fn listener(&mut self, listener: &FileListener, id: ListenerId, limits: &MapLimits) -> Option<ListenerConfig> {
        let at = listener_key(id);
        let name = self.check(&at.then("name"), values::listener_name(&listener.name));
        let bind = self.bind(&at.then("bind"), &listener.bind);
        let interfaces = self.interfaces(&at.then("interface"), &listener.interface);
        if let (Some(bind), Some(interfaces)) = (bind.filter(|bind| bind.ip().is_multicast()), &interfaces) {
            self.group(&at, listener, bind, interfaces);
        }
        let source = self.source(&at, listener, bind);
        let policy = self.policy(&at, listener);
        let health = self.listener_health(id, listener.health.as_ref());
        let sources = self.sources(&at.then("sources"), listener.sources.as_ref(), bind);
        Some(ListenerConfig {
            id,
            name: name?.to_owned(),
            bind: bind?,
            interfaces: interfaces?,
            mode: listener.mode,
            protocol: listener.protocol,
            policy,
            sources: sources?.into(),
            rate_limit: listener.rate_limit.as_ref().map(|limit| admission::rate_limit(limit, limits.max_senders)),
            source: source?,
            health,
            settings: listener.settings.clone(),
        })
    }

    fn bind(&mut self, at: &KeyPath, text: &str) -> Option<SocketAddr> {
        let bind = address::parse(text, BIND_EXAMPLE).and_then(values::bind);
        self.check(at, bind)
    }

    /// Checks what a listener on a multicast group needs.
    fn group(&mut self, at: &KeyPath, listener: &FileListener, bind: SocketAddr, interfaces: &Interfaces) {
        let interface = self.document.notation.assignment("interface", "\"eth0\"");
        match interfaces {
            Interfaces::Auto => self.fault(
                &at.then("bind"),
                format!(
                    "\"{bind}\" is a multicast group, but no interface is named on which to join it; add {interface}"
                ),
            ),
            Interfaces::Named(names) if names.len() > 1 && is_link_scoped_multicast(bind.ip()) => self.fault(
                &at.then("interface"),
                format!(
                    "{} interfaces, but the group \"{bind}\" is a different group on each link; add a listener for each interface",
                    names.len()
                ),
            ),
            Interfaces::Named(_) => {}
        }
        if listener.settings.workers > 1 {
            self.fault(
                &at.then("settings").then("workers"),
                format!(
                    "{} workers, but the socket of each one would get all datagrams of the group \"{bind}\"; remove it",
                    listener.settings.workers
                ),
            );
        }
    }

    fn interfaces(&mut self, at: &KeyPath, interface: &FileInterfaces) -> Option<Interfaces> {
        let names = match interface {
            FileInterfaces::One(name) if name == "auto" => return Some(Interfaces::Auto),
            FileInterfaces::One(name) => {
                let name = self.check(at, values::interface(name))?;
                return Some(Interfaces::Named(vec![name.to_owned()]));
            }
            FileInterfaces::List(names) => names,
        };
        if names.is_empty() {
            self.fault(at, "an empty list; name an interface, or write \"auto\"");
            return None;
        }
        let mut good = Vec::new();
        for (index, name) in names.iter().enumerate() {
            let at = at.then(index);
            if name == "auto" {
                let alone = self.document.notation.assignment("interface", "\"auto\"");
                self.fault(&at, format!("\"auto\" cannot stand in a list; write {alone}, or only names"));
            } else if good.contains(name) {
                self.fault(&at, format!("{} is in the list twice; remove one", quoted(name)));
            } else if let Some(name) = self.check(&at, values::interface(name)) {
                good.push(name.to_owned());
            }
        }
        (good.len() == names.len()).then_some(Interfaces::Named(good))
    }

    fn source(&mut self, at: &KeyPath, listener: &FileListener, bind: Option<SocketAddr>) -> Option<DownstreamSource> {
        match (&listener.downstream, &listener.kubernetes) {
            (Some(_), Some(_)) => {
                let message =
                    format!("{} has both `downstream` and `kubernetes`; remove one of the two", quoted(&listener.name));
                self.fault(&at.then("kubernetes"), message);
                None
            }
            (None, None) => {
                let message = format!("{} has no receivers; add `downstream` or `kubernetes`", quoted(&listener.name));
                self.fault(at, message);
                None
            }
            (Some(downstreams), None) if downstreams.is_empty() => {
                let message = format!("{} has no downstreams; add one with an `address`", quoted(&listener.name));
                self.fault(&at.then("downstream"), message);
                None
            }
            (Some(downstreams), None) => {
                self.downstreams(&at.then("downstream"), downstreams, listener.resolve_interval_secs, bind)
            }
            (None, Some(service)) => self.kubernetes(&at.then("kubernetes"), service).map(DownstreamSource::Kubernetes),
        }
    }

    fn distinct_names(&mut self, file: &ConfigFile) {
        let mut names: HashMap<&str, usize> = HashMap::new();
        for (index, listener) in file.listeners.iter().enumerate() {
            if let Some(first) = names.insert(&listener.name, index) {
                let message =
                    format!("{} is already the name of listeners[{first}]; rename one", quoted(&listener.name));
                self.fault(&top("listeners").then(index).then("name"), message);
            }
        }
    }

    /// Two sockets of one IP version can share a port only if their addresses differ and neither is the wildcard.
    fn distinct_binds(&mut self, file: &ConfigFile) {
        let binds: Vec<Option<SocketAddr>> = file.listeners.iter().map(|l| l.bind.parse().ok()).collect();
        for (index, bind) in binds.iter().enumerate() {
            let Some(bind) = bind.filter(|bind| bind.port() != 0) else { continue };
            let clash = binds[..index].iter().position(|other| {
                other.is_some_and(|other| {
                    let wildcard = bind.ip().is_unspecified() || other.ip().is_unspecified();
                    let same_version = bind.is_ipv4() == other.is_ipv4();
                    bind == other || (same_version && bind.port() == other.port() && wildcard)
                })
            });
            let Some(first) = clash else { continue };
            let other = &file.listeners[first];
            let why = if binds[first] == Some(bind) { "is taken by" } else { "overlaps with" };
            let message = format!(
                "\"{bind}\" {why} listeners[{first}] ({}, \"{}\"); give one another port or address",
                quoted(&other.name),
                other.bind
            );
            self.fault(&top("listeners").then(index).then("bind"), message);
        }
    }

    fn metrics(&mut self, metrics: Option<&FileMetrics>) -> Option<MetricsConfig> {
        let metrics = metrics?;
        let at = top("metrics");
        let bind = address::parse(&metrics.bind, METRICS_EXAMPLE).and_then(|bind| {
            if bind.ip().is_multicast() {
                return Err(format!("{:?} is a multicast group; give an address of this host", metrics.bind));
            }
            Ok(bind)
        });
        let bind = self.check(&at.then("bind"), bind);
        let path = self.check(&at.then("path"), values::metrics_path(&metrics.path));
        metrics.enabled.then_some(MetricsConfig { bind: bind?, path: path?.to_owned() })
    }
}
