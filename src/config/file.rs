//! The configuration file as types: the same keys in the same tables, with every default; only types are checked.
//!
//! These types are the one place that says what a key is: its doc comment is its meaning, and its attributes give its
//! type, range, default, example (`example`), the values a text takes (`x-accepts`) and what its absence means
//! (`x-absent`). [`super::keys`] derives everything else from them.
//!
//! Read from a [`Document`] that `schema_check` has accepted; `rules` turns the types into [`super::Config`], and `render`
//! turns that into the types again.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize, Serializer};

use super::document::{Document, DocumentNode, DocumentValue};
use super::field_schema::{field_order, port_schema};
use super::health_keys::HealthKeys;
use super::{
    AttachHook, DEFAULT_MAX_HEADLESS_SECS, ListenerProtocol, MapLimits, OnExit, PIN_PATH, RequestedMode, STATUS_SOCKET,
    TcxOrder, UserspaceSettings,
};
use crate::discovery::{Locality, PortRef, Terminating};
use crate::model;

/// A whole configuration file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(transform = field_order::<ConfigFile>, extend("required" = ["listeners"]))]
pub(super) struct ConfigFile {
    /// The listeners: the addresses that datagrams are sent to, and their receivers. At least one. A listener's position at
    /// the start, from 0, is its `listener_id` in logs.
    pub(super) listeners: Vec<FileListener>,
    /// Health checks of all downstreams of all listeners.
    #[schemars(extend("x-absent" = "no health checks"))]
    pub(super) health: HealthKeys,
    /// The HTTP endpoint for Prometheus, `/healthz`, `/readyz` and `/serving`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-absent" = "no HTTP endpoint"))]
    pub(super) metrics: Option<FileMetrics>,
    /// Sizes of the kernel program's maps. They cost kernel memory and are fixed while the daemon runs.
    #[schemars(extend("x-absent" = "the defaults of its keys"))]
    pub(super) limits: MapLimits,
    /// Read the file again when it changes, as on SIGHUP. See [Changing a running daemon](#changing-a-running-daemon).
    #[schemars(example = false)]
    pub(super) watch_config: bool,
    /// The Unix socket on which the daemon answers `udp-fanout status`. Only the daemon's user and root may open it. Daemons
    /// that share a file system need one each.
    #[schemars(example = &"/run/udp-fanout/edge.sock", extend("x-accepts" = "an absolute path of at most 107 bytes"))]
    pub(super) status_socket: String,
    /// How the kernel program is attached to interfaces. See
    /// [Other programs on the same interface](#other-programs-on-the-same-interface).
    #[schemars(example = AttachHook::Tcx)]
    pub(super) attach: AttachHook,
    /// The program's place among an interface's TCX programs when it is attached as one: before or after those already there.
    #[schemars(example = TcxOrder::Last)]
    pub(super) tcx_order: TcxOrder,
    /// What happens to the kernel program when the daemon ends: it is detached from the interfaces (`detach`), or continues to
    /// forward until the next daemon takes over (`keep`). See
    /// [Restart and upgrade without loss](#restart-and-upgrade-without-loss).
    #[schemars(example = OnExit::Keep)]
    pub(super) on_exit: OnExit,
    /// The directory in which the program and its maps are pinned under `on_exit = "keep"`, and in which the next daemon looks
    /// for them. Daemons in one network namespace need one each.
    #[schemars(
        example = &"/sys/fs/bpf/udp-fanout-edge",
        extend("x-accepts" = "an absolute path in a BPF file system")
    )]
    pub(super) pin_path: String,
    /// Seconds without a daemon after which the kernel program stops forwarding and passes datagrams up the host's stack: its
    /// receivers may be out of date by then. 0 means never.
    #[schemars(range(min = 0, max = 31_536_000), example = 3600)]
    pub(super) max_headless_secs: u32,
}

impl Default for ConfigFile {
    fn default() -> ConfigFile {
        ConfigFile {
            listeners: Vec::new(),
            health: HealthKeys::default(),
            metrics: None,
            limits: MapLimits::default(),
            watch_config: true,
            status_socket: STATUS_SOCKET.to_owned(),
            attach: AttachHook::default(),
            tcx_order: TcxOrder::default(),
            on_exit: OnExit::default(),
            pin_path: PIN_PATH.to_owned(),
            max_headless_secs: DEFAULT_MAX_HEADLESS_SECS,
        }
    }
}

/// One of `listeners`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = field_order::<FileListener>)]
pub(super) struct FileListener {
    /// The listener's name in logs and in the `listener` label of metrics. Unique among listeners.
    #[schemars(example = &"syslog", extend("x-accepts" = "1 to 63 of A-Z a-z 0-9 . _ -"))]
    pub(super) name: String,
    /// The address and port that senders send to. `0.0.0.0` stands for all IPv4 addresses of the host and `[::]` for all its
    /// IPv6 addresses, and only those. A multicast group is joined on each `interface`. Unique among listeners.
    #[schemars(example = &"0.0.0.0:5514", extend("x-accepts" = "IP:port"))]
    pub(super) bind: String,
    /// Where the kernel program is attached: the interfaces on which datagrams arrive. `"auto"` means those that carry a default
    /// route. An interface may be physical, a VLAN device, a bridge, one end of a veth pair, a tun device or WireGuard; IP
    /// tunnels and PPP need `mode = "userspace"`. Userspace mode ignores this key, except for a multicast group, which is joined
    /// on the interfaces named here and needs names.
    #[serde(default)]
    #[schemars(
        example = ["eth0", "eth1"],
        extend("x-accepts" = "an interface name, a list of them, or \"auto\"")
    )]
    pub(super) interface: FileInterfaces,
    /// The datapath: the kernel program (`tc_ebpf`), sockets (`userspace`), or `auto`: the kernel program where the kernel and
    /// the daemon's privileges allow it, else sockets. The log says which one `auto` chose, and why.
    #[serde(default)]
    #[schemars(example = RequestedMode::TcEbpf)]
    pub(super) mode: RequestedMode,
    /// What the datagrams are. It decides the policy if `policy` is absent, and which policies are warned about.
    #[serde(default)]
    #[schemars(example = ListenerProtocol::Netflow)]
    pub(super) protocol: ListenerProtocol,
    /// How a datagram's downstream is chosen: the next one in turn (`round_robin`), always the same one for a sender (`hash`), or
    /// all of them, a copy each (`replicate`, for at most 64 downstreams).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(example = FilePolicy::Hash, extend("x-absent" = "what suits the `protocol`"))]
    pub(super) policy: Option<FilePolicy>,
    /// What identifies a sender under `hash`: its address (`source_ip`), its address and port (`source`), or both addresses and
    /// both ports (`flow`). Only under `hash`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(example = model::HashOn::SourceIp, extend("x-absent" = "`\"source_ip\"` under `hash`"))]
    pub(super) hash_on: Option<model::HashOn>,
    /// Who may send to the listener. Other senders' datagrams are dropped and counted as `source_denied`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-absent" = "everybody may send"))]
    pub(super) sources: Option<FileSources>,
    /// How fast each sender may send. Datagrams above the limit are dropped and counted as `rate_limited`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-absent" = "no limit"))]
    pub(super) rate_limit: Option<FileRateLimit>,
    /// The receivers, where they are known beforehand. Either this or `kubernetes`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-absent" = "`kubernetes` is required"))]
    pub(super) downstream: Option<Vec<FileDownstream>>,
    /// Seconds after which the names of downstreams given by name are looked up again.
    #[serde(default = "default_resolve_interval", serialize_with = "whole_or_fraction")]
    #[schemars(range(min = 1, max = 3_600), example = 5, extend("x-unit" = "seconds"))]
    pub(super) resolve_interval_secs: f64,
    /// The Services whose ready endpoints are the receivers. Either this or `downstream`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-absent" = "`downstream` is required"))]
    pub(super) kubernetes: Option<FileKubernetes>,
    /// Health checks of this listener's downstreams, where they differ from those of all listeners.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-absent" = "as in `health`", "x-absent-keys" = "as in `health`"))]
    pub(super) health: Option<HealthKeys>,
    /// The listener's userspace datapath. In `tc_ebpf` mode it forwards what the kernel program leaves to it.
    #[serde(default)]
    #[schemars(extend("x-absent" = "the defaults of its keys"))]
    pub(super) settings: UserspaceSettings,
}

/// `listeners[].interface`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum FileInterfaces {
    /// A name, or `auto`.
    One(String),
    /// At least one name.
    List(Vec<String>),
}

impl Default for FileInterfaces {
    fn default() -> FileInterfaces {
        FileInterfaces::One("auto".to_owned())
    }
}

/// `listeners[].policy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum FilePolicy {
    /// The next downstream in turn.
    RoundRobin,
    /// The downstream that a hash of the sender selects; see `hash_on`.
    Hash,
    /// All downstreams, a copy each.
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

    /// The policy of the model, with the default `hash_on`.
    pub(super) fn meaning(self) -> model::Policy {
        match self {
            FilePolicy::RoundRobin => model::Policy::RoundRobin,
            FilePolicy::Hash => model::Policy::Hash(model::HashOn::default()),
            FilePolicy::Replicate => model::Policy::Replicate,
        }
    }
}

/// `listeners[].sources`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(transform = field_order::<FileSources>)]
pub(super) struct FileSources {
    /// Addresses whose datagrams are accepted. If it is present, only they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        example = ["10.0.0.0/8", "192.0.2.7"],
        extend("x-accepts" = PREFIXES, "x-absent" = "everybody that `deny` does not name")
    )]
    pub(super) allow: Option<FilePrefixes>,
    /// Addresses whose datagrams are dropped. Where `allow` names a sender too, the longer prefix decides, and `deny` if both
    /// are the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(example = &"10.1.0.0/16", extend("x-accepts" = PREFIXES, "x-absent" = "nobody else"))]
    pub(super) deny: Option<FilePrefixes>,
}

/// The values of `allow` and `deny`.
const PREFIXES: &str = "an address, a prefix such as 10.0.0.0/8, or a list of them";

/// `listeners[].sources.allow` and `deny`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum FilePrefixes {
    /// One prefix.
    One(String),
    /// At least one prefix.
    List(Vec<String>),
}

impl FilePrefixes {
    /// The prefixes as the file writes them.
    pub(super) fn texts(&self) -> &[String] {
        match self {
            FilePrefixes::One(text) => std::slice::from_ref(text),
            FilePrefixes::List(texts) => texts,
        }
    }
}

/// `listeners[].rate_limit`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = field_order::<FileRateLimit>)]
pub(super) struct FileRateLimit {
    /// Datagrams a second that each sender may send, over time.
    #[schemars(range(min = 1, max = 10_000_000), example = 10000)]
    pub(super) packets_per_second: u32,
    /// Datagrams that a sender may send at once after a pause.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        range(min = 1, max = 100_000_000),
        example = 20000,
        extend("x-absent" = "as many as `packets_per_second`")
    )]
    pub(super) burst: Option<u32>,
    /// Bits of an IPv4 address that identify a sender: with 24, a network of 256 addresses is one sender; with 0, all senders
    /// together are.
    #[serde(default = "whole_ipv4")]
    #[schemars(range(min = 0, max = 32), example = 24)]
    pub(super) ipv4_prefix: u8,
    /// The same for IPv6.
    #[serde(default = "network_of_ipv6")]
    #[schemars(range(min = 0, max = 128), example = 56)]
    pub(super) ipv6_prefix: u8,
}

fn whole_ipv4() -> u8 {
    32
}

fn network_of_ipv6() -> u8 {
    64
}

/// One of `listeners[].downstream`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = field_order::<FileDownstream>)]
pub(super) struct FileDownstream {
    /// The downstream's name in logs. Unique within the listener.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        example = &"receiver-1",
        extend(
            "x-accepts" = "1 to 253 printable ASCII characters without blanks, quotes and backslashes",
            "x-absent" = "its address"
        )
    )]
    pub(super) name: Option<String>,
    /// Where datagrams are sent: the address of one host, of the same IP version as the listener's `bind`, or a DNS name. Each
    /// address of that version that a name has is a downstream. Unique within the listener.
    #[schemars(example = &"10.0.1.10:5514", extend("x-accepts" = "IP:port or name:port"))]
    pub(super) address: String,
    /// The downstream's share of the datagrams, relative to the listener's other downstreams. Not under `replicate`.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 65_535), example = 2)]
    pub(super) weight: u32,
    /// The fraction of the datagrams that is copied to the downstream, each chosen at random; 1 means all. Only under
    /// `replicate`.
    #[serde(default = "all", serialize_with = "whole_or_fraction")]
    #[schemars(range(min = 0.000_001, max = 1), example = 0.01)]
    pub(super) sample: f64,
}

/// The default of `resolve_interval_secs`.
pub(super) const RESOLVE_INTERVAL_SECS: f64 = 30.0;

fn default_resolve_interval() -> f64 {
    RESOLVE_INTERVAL_SECS
}

fn one() -> u32 {
    1
}

fn all() -> f64 {
    1.0
}

/// `listeners[].kubernetes`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = field_order::<FileKubernetes>)]
pub(super) struct FileKubernetes {
    /// The namespace of the Services.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        example = &"logging",
        extend("x-accepts" = "a namespace's name", "x-absent" = "the daemon's own namespace")
    )]
    pub(super) namespace: Option<String>,
    /// The Service's name. A headless Service is recommended.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        example = &"vector-aggregators",
        extend("x-accepts" = "a Service's name", "x-absent" = "`services` is required")
    )]
    pub(super) service: Option<String>,
    /// Several Services, whose endpoints together are the receivers. Either this or `service`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        example = ["vector-blue", "vector-green"],
        extend("x-accepts" = "Services' names", "x-absent" = "`service` is required")
    )]
    pub(super) services: Option<Vec<FileService>>,
    /// The UDP port that the receivers listen on: the container's port number, not the Service's; or the name of a port of the
    /// Service, whose number each EndpointSlice gives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        schema_with = "port_schema",
        example = 5514,
        extend("x-accepts" = PORT_NAME, "x-absent" = "each of `services` needs its own")
    )]
    pub(super) port: Option<PortRef>,
    /// Which endpoints are used, by where they run: all (`cluster`), those on the daemon's node and all others only while there
    /// are none (`prefer_node`), only those on the daemon's node (`node`), or those in the daemon's zone and all others only
    /// while there are none (`prefer_zone`).
    #[serde(default)]
    #[schemars(example = Locality::PreferNode)]
    pub(super) locality: Locality,
    /// Whether endpoints that are shutting down and still serve are used: `never`, only while no endpoint is ready (`fallback`),
    /// or like ready ones until they are gone (`until_gone`).
    #[serde(default)]
    #[schemars(example = Terminating::UntilGone)]
    pub(super) terminating: Terminating,
}

/// The texts that `port` takes.
const PORT_NAME: &str = "the name of a Service's port";

/// One of `listeners[].kubernetes.services`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum FileService {
    /// The Service's name alone.
    Name(String),
    /// The name, and what differs from the other Services.
    Table(FileServiceTable),
}

/// One of `listeners[].kubernetes.services` as a table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = field_order::<FileServiceTable>)]
pub(super) struct FileServiceTable {
    /// The Service's name. A headless Service is recommended.
    #[schemars(example = &"vector-aggregators", extend("x-accepts" = "a Service's name"))]
    pub(super) service: String,
    /// The Service's namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        example = &"logging",
        extend("x-accepts" = "a namespace's name", "x-absent" = "that of `kubernetes`")
    )]
    pub(super) namespace: Option<String>,
    /// The port on this Service's endpoints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        schema_with = "port_schema",
        example = &"syslog",
        extend("x-accepts" = PORT_NAME, "x-absent" = "that of `kubernetes`")
    )]
    pub(super) port: Option<PortRef>,
}

impl FileService {
    /// The Service as a table.
    pub(super) fn table(&self) -> FileServiceTable {
        match self {
            FileService::Name(name) => FileServiceTable { service: name.clone(), namespace: None, port: None },
            FileService::Table(table) => table.clone(),
        }
    }
}

/// Writes whole numbers without `.0`.
#[expect(clippy::cast_possible_truncation, reason = "seconds and fractions are far below where an i64 ends")]
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
fn whole_or_fraction<S: Serializer>(number: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    if number.fract() == 0.0 { serializer.serialize_i64(*number as i64) } else { serializer.serialize_f64(*number) }
}

/// `metrics`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(transform = field_order::<FileMetrics>)]
pub(super) struct FileMetrics {
    /// Serve the endpoint. Without the whole `metrics` table it is not served.
    #[schemars(example = false)]
    pub(super) enabled: bool,
    /// The TCP address and port of the endpoint.
    #[schemars(example = &"127.0.0.1:9090", extend("x-accepts" = "IP:port"))]
    pub(super) bind: String,
    /// The path of the Prometheus page. `/healthz`, `/readyz` and `/serving` are reserved for probes.
    #[schemars(example = &"/metrics", extend("x-accepts" = "a path that starts with /"))]
    pub(super) path: String,
}

impl Default for FileMetrics {
    fn default() -> FileMetrics {
        FileMetrics { enabled: true, bind: "0.0.0.0:9090".to_owned(), path: "/metrics".to_owned() }
    }
}

impl ConfigFile {
    /// Converts a document into types.
    ///
    /// # Errors
    /// When the document does not fit the types. `schema_check` refuses such documents before.
    pub(super) fn from_document(document: &Document) -> Result<ConfigFile, toml::de::Error> {
        plain(&document.root).try_into()
    }
}

/// The tree without line numbers. Values that no key takes become text, which such keys do not take either.
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
