//! The configuration file as types: the same keys in the same tables, every default applied, nothing checked but types.
//!
//! Read from a [`Document`] that `shape` has found to be in order, checked and turned into [`super::Config`] by
//! `rules`, made from it again by `render`. What each key means to a user is in `keys`; a test holds the two together.

use serde::{Deserialize, Serialize, Serializer};

use super::document::{Document, DocumentNode, DocumentValue};
use super::{
    AttachHook, HEADLESS, ListenerProtocol, MapLimits, OnExit, PIN_PATH, RequestedMode, STATUS_SOCKET, TcxOrder,
    UserspaceSettings,
};
use crate::discovery::{Locality, PortRef, Terminating};
use crate::health::keys::HealthKeys;
use crate::model;

/// A whole file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct ConfigFile {
    /// Whether a change of the file is a reason to read it again; it is by default.
    pub(super) watch_config: bool,
    /// An absolute path; under /run by default.
    pub(super) status_socket: String,
    /// The hook; `clsact` by default.
    pub(super) attach: AttachHook,
    /// The place among TCX programs; first by default.
    pub(super) tcx_order: TcxOrder,
    /// What becomes of the kernel program when the daemon ends; detached by default.
    pub(super) on_exit: OnExit,
    /// An absolute path; under /sys/fs/bpf by default.
    pub(super) pin_path: String,
    /// How long the kernel program goes on without a daemon; 300 by default.
    pub(super) max_headless_secs: u32,
    /// The listeners, in order.
    pub(super) listeners: Vec<FileListener>,
    /// Health checks; disabled by default.
    pub(super) health: HealthKeys,
    /// The HTTP endpoint; absent means disabled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) metrics: Option<FileMetrics>,
    /// Sizes of the kernel program's maps.
    pub(super) limits: MapLimits,
}

impl Default for ConfigFile {
    fn default() -> ConfigFile {
        ConfigFile {
            watch_config: true,
            status_socket: STATUS_SOCKET.to_owned(),
            attach: AttachHook::default(),
            tcx_order: TcxOrder::default(),
            on_exit: OnExit::default(),
            pin_path: PIN_PATH.to_owned(),
            max_headless_secs: HEADLESS,
            listeners: Vec::new(),
            health: HealthKeys::default(),
            metrics: None,
            limits: MapLimits::default(),
        }
    }
}

/// One of `listeners`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileListener {
    /// Unique; no default.
    pub(super) name: String,
    /// `IP:port`; no default.
    pub(super) bind: String,
    /// Where the kernel program is attached; `"auto"` by default.
    #[serde(default)]
    pub(super) interface: FileInterfaces,
    /// The datapath; `auto` by default.
    #[serde(default)]
    pub(super) mode: RequestedMode,
    /// What it carries; raw by default.
    #[serde(default)]
    pub(super) protocol: ListenerProtocol,
    /// How a downstream is chosen; what suits the protocol by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) policy: Option<FilePolicy>,
    /// What is hashed; the source's address by default, and only where the policy is to hash.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) hash_on: Option<model::HashOn>,
    /// Who may send; everybody by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) sources: Option<FileSources>,
    /// How fast each sender may send; as fast as it likes by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) rate_limit: Option<FileRateLimit>,
    /// Receivers known beforehand; this or `kubernetes`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) downstream: Option<Vec<FileDownstream>>,
    /// Seconds for which the addresses of a downstream's name are believed; 30 by default.
    #[serde(default = "resolve_interval_secs", serialize_with = "number")]
    pub(super) resolve_interval_secs: f64,
    /// The Service to follow; this or `downstream`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) kubernetes: Option<FileKubernetes>,
    /// Health checks of its downstreams; what is not there is as in the file's own `health`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) health: Option<HealthKeys>,
    /// The userspace datapath.
    #[serde(default)]
    pub(super) settings: UserspaceSettings,
}

/// `listeners[].interface`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum FileInterfaces {
    /// A name, or `auto`.
    One(String),
    /// Names.
    List(Vec<String>),
}

impl Default for FileInterfaces {
    fn default() -> FileInterfaces {
        FileInterfaces::One("auto".to_owned())
    }
}

/// `listeners[].policy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FilePolicy {
    /// In turn.
    RoundRobin,
    /// By a hash of where a datagram comes from.
    Hash,
    /// To all.
    Replicate,
}

impl FilePolicy {
    /// The name in a file.
    pub(super) fn name(self) -> &'static str {
        match self {
            FilePolicy::RoundRobin => "round_robin",
            FilePolicy::Hash => "hash",
            FilePolicy::Replicate => "replicate",
        }
    }

    /// What it means to the rest of the program, without a `hash_on`.
    pub(super) fn meaning(self) -> model::Policy {
        match self {
            FilePolicy::RoundRobin => model::Policy::RoundRobin,
            FilePolicy::Hash => model::Policy::Hash(model::HashOn::default()),
            FilePolicy::Replicate => model::Policy::Replicate,
        }
    }
}

/// `listeners[].sources`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileSources {
    /// Prefixes whose datagrams are taken; none by default, which means everybody's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) allow: Option<FilePrefixes>,
    /// Prefixes whose datagrams are dropped; none by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) deny: Option<FilePrefixes>,
}

/// `listeners[].sources.allow` and `deny`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum FilePrefixes {
    /// One.
    One(String),
    /// Any number.
    List(Vec<String>),
}

impl FilePrefixes {
    /// Each of them.
    pub(super) fn texts(&self) -> &[String] {
        match self {
            FilePrefixes::One(text) => std::slice::from_ref(text),
            FilePrefixes::List(texts) => texts,
        }
    }
}

/// `listeners[].rate_limit`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileRateLimit {
    /// Over time; no default.
    pub(super) packets_per_second: u32,
    /// At once; a second's worth by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) burst: Option<u32>,
    /// Bits of an IPv4 address that make a sender; 32, all, by default.
    #[serde(default = "whole_ipv4")]
    pub(super) ipv4_prefix: u8,
    /// Bits of an IPv6 address that do; 64, a network, by default.
    #[serde(default = "network_of_ipv6")]
    pub(super) ipv6_prefix: u8,
}

fn whole_ipv4() -> u8 {
    32
}

fn network_of_ipv6() -> u8 {
    64
}

/// One of `listeners[].downstream`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileDownstream {
    /// Unique within the listener; its address by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) name: Option<String>,
    /// `IP:port` or `name:port`, unique within the listener; no default.
    pub(super) address: String,
    /// Share relative to the others; 1 by default.
    #[serde(default = "one")]
    pub(super) weight: u32,
    /// Part of the datagrams copied to it; 1, all, by default.
    #[serde(default = "all", serialize_with = "number")]
    pub(super) sample: f64,
}

/// `resolve_interval_secs` where it is not given.
pub(super) const RESOLVE_INTERVAL_SECS: f64 = 30.0;

fn resolve_interval_secs() -> f64 {
    RESOLVE_INTERVAL_SECS
}

fn one() -> u32 {
    1
}

fn all() -> f64 {
    1.0
}

/// `listeners[].kubernetes`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileKubernetes {
    /// The Services'; the daemon's own by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) namespace: Option<String>,
    /// The Service's name; this or `services`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) service: Option<String>,
    /// The receivers' port; every service must have one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) port: Option<PortRef>,
    /// All endpoints alike by default.
    #[serde(default)]
    pub(super) locality: Locality,
    /// Only where nothing is ready by default.
    #[serde(default)]
    pub(super) terminating: Terminating,
    /// Several Services; this or `service`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) services: Option<Vec<FileService>>,
}

/// One of `listeners[].kubernetes.services`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum FileService {
    /// Only its name.
    Name(String),
    /// Its name and what differs from the other services.
    Table(FileServiceTable),
}

/// One of `listeners[].kubernetes.services` that is written out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileServiceTable {
    /// The Service's name; no default.
    pub(super) service: String,
    /// That of all by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) namespace: Option<String>,
    /// That of all by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) port: Option<PortRef>,
}

impl FileService {
    /// Written out.
    pub(super) fn table(&self) -> FileServiceTable {
        match self {
            FileService::Name(name) => FileServiceTable { service: name.clone(), namespace: None, port: None },
            FileService::Table(table) => table.clone(),
        }
    }
}

/// Whole numbers are written as people write them, without `.0`.
#[expect(clippy::cast_possible_truncation, reason = "seconds and parts are far below where an i64 ends")]
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
fn number<S: Serializer>(number: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    if number.fract() == 0.0 { serializer.serialize_i64(*number as i64) } else { serializer.serialize_f64(*number) }
}

/// `metrics`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileMetrics {
    /// On by default, where the table is there at all.
    pub(super) enabled: bool,
    /// `IP:port` over TCP; all IPv4 addresses, port 9090, by default.
    pub(super) bind: String,
    /// `/metrics` by default.
    pub(super) path: String,
}

impl Default for FileMetrics {
    fn default() -> FileMetrics {
        FileMetrics { enabled: true, bind: "0.0.0.0:9090".to_owned(), path: "/metrics".to_owned() }
    }
}

impl ConfigFile {
    /// Takes a document over into types.
    ///
    /// # Errors
    /// When the document's shape is not the types'. `shape` has refused such a document before.
    pub(super) fn from_document(document: &Document) -> Result<ConfigFile, toml::de::Error> {
        plain(&document.root).try_into()
    }
}

/// The tree without its lines. What no key takes becomes text, which no such key takes either.
fn plain(node: &DocumentNode) -> toml::Value {
    match &node.value {
        DocumentValue::Flag(flag) => toml::Value::Boolean(*flag),
        DocumentValue::Integer(number) => {
            i64::try_from(*number).map_or_else(|_| toml::Value::String(number.to_string()), toml::Value::Integer)
        }
        DocumentValue::Number(number) => toml::Value::Float(*number),
        DocumentValue::Text(text) => toml::Value::String(text.clone()),
        DocumentValue::Date(date) => toml::Value::String(date.clone()),
        DocumentValue::Nothing => toml::Value::String(String::new()),
        DocumentValue::List(items) => toml::Value::Array(items.iter().map(plain).collect()),
        DocumentValue::Table(entries) => {
            toml::Value::Table(entries.iter().map(|(key, node)| (key.clone(), plain(node))).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::config::keys::{self, KeyKind};
    use crate::health::settings::ProbeKind;

    fn every_health_field() -> HealthKeys {
        HealthKeys {
            enabled: Some(true),
            interval_secs: Some(1.0),
            timeout_secs: Some(0.5),
            protocol: Some(ProbeKind::Icmp),
            port: Some(1),
            payload: Some("p".into()),
            expect: Some("e".into()),
            path: Some("/".into()),
            unhealthy_threshold: Some(1),
            healthy_threshold: Some(1),
            fail_open: Some(true),
            slow_start_secs: Some(1.0),
        }
    }

    /// Every field of every type, written out so that a new field does not compile until it is here.
    fn every_field() -> ConfigFile {
        ConfigFile {
            watch_config: true,
            status_socket: "s".into(),
            attach: AttachHook::Clsact,
            tcx_order: TcxOrder::First,
            on_exit: OnExit::Keep,
            pin_path: "p".into(),
            max_headless_secs: 1,
            listeners: vec![FileListener {
                name: "n".into(),
                bind: "b".into(),
                interface: FileInterfaces::default(),
                mode: RequestedMode::Auto,
                protocol: ListenerProtocol::Raw,
                policy: Some(FilePolicy::Hash),
                hash_on: Some(model::HashOn::Flow),
                sources: Some(FileSources {
                    allow: Some(FilePrefixes::One("a".into())),
                    deny: Some(FilePrefixes::List(vec!["d".into()])),
                }),
                rate_limit: Some(FileRateLimit {
                    packets_per_second: 1,
                    burst: Some(1),
                    ipv4_prefix: 1,
                    ipv6_prefix: 1,
                }),
                downstream: Some(vec![FileDownstream {
                    name: Some("n".into()),
                    address: "a".into(),
                    weight: 1,
                    sample: 1.0,
                }]),
                resolve_interval_secs: 1.0,
                kubernetes: Some(FileKubernetes {
                    namespace: Some("n".into()),
                    service: Some("s".into()),
                    port: Some(PortRef::Number(1)),
                    locality: Locality::Node,
                    terminating: Terminating::Never,
                    services: Some(vec![FileService::Table(FileServiceTable {
                        service: "s".into(),
                        namespace: Some("n".into()),
                        port: Some(PortRef::Name("p".into())),
                    })]),
                }),
                health: Some(every_health_field()),
                settings: UserspaceSettings {
                    workers: 1,
                    batch_size: 1,
                    pin_cpus: true,
                    recv_buf_size: Some(1),
                    max_packet_size: 1,
                    preserve_source: true,
                },
            }],
            health: every_health_field(),
            metrics: Some(FileMetrics { enabled: true, bind: "b".into(), path: "p".into() }),
            limits: MapLimits { max_listeners: 1, max_downstreams: 1, max_sources: 1, max_senders: 1_024 },
        }
    }

    fn paths(prefix: &str, value: &toml::Value, out: &mut BTreeSet<String>) {
        match value {
            toml::Value::Table(table) => {
                for (key, value) in table {
                    let path = format!("{prefix}{key}");
                    out.insert(path.clone());
                    let list = if value.as_array().is_some_and(|a| a[0].is_table()) { "[]" } else { "" };
                    paths(&format!("{path}{list}."), value, out);
                }
            }
            toml::Value::Array(items) => items.iter().for_each(|item| paths(prefix, item, out)),
            _ => {}
        }
    }

    #[test]
    fn the_types_and_the_table_of_keys_have_the_same_keys() {
        let mut in_types = BTreeSet::new();
        paths("", &toml::Value::try_from(every_field()).unwrap(), &mut in_types);
        let mut in_table = BTreeSet::new();
        keys::walk(&mut |path, _| assert!(in_table.insert(path.to_owned()), "{path} is there twice"));
        assert_eq!(in_types, in_table);
    }

    #[test]
    fn every_choice_of_the_table_is_one_of_the_types_and_the_other_way_round() {
        fn known<T: for<'de> Deserialize<'de> + Serialize>(choices: &[&str]) {
            for choice in choices {
                let value = toml::Value::String((*choice).to_owned());
                let parsed: T = value.clone().try_into().unwrap_or_else(|e| panic!("{choice}: {e}"));
                assert_eq!(toml::Value::try_from(parsed).unwrap(), value);
            }
            // serde names all variants when it refuses one.
            let refusal = toml::Value::String("no such choice".into()).try_into::<T>().err().unwrap().to_string();
            let expected = refusal.split_once("expected").unwrap().1;
            assert_eq!(expected.matches('`').count(), 2 * choices.len(), "{refusal} but {choices:?}");
        }
        let mut seen = 0;
        keys::walk(&mut |path, key| {
            if let KeyKind::Choice(choices) = key.kind {
                seen += 1;
                match path {
                    "attach" => known::<AttachHook>(choices),
                    "tcx_order" => known::<TcxOrder>(choices),
                    "listeners[].mode" => known::<RequestedMode>(choices),
                    "listeners[].protocol" => known::<ListenerProtocol>(choices),
                    "listeners[].policy" => known::<FilePolicy>(choices),
                    "listeners[].hash_on" => known::<model::HashOn>(choices),
                    "listeners[].kubernetes.locality" => known::<Locality>(choices),
                    "listeners[].kubernetes.terminating" => known::<Terminating>(choices),
                    "health.protocol" | "listeners[].health.protocol" => known::<ProbeKind>(choices),
                    "on_exit" => known::<OnExit>(choices),
                    other => panic!("say here which type `{other}` is"),
                }
            }
        });
        assert_eq!(seen, 11);
    }
}
