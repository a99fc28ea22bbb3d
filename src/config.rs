//! The validated configuration: what the rest of the program may rely on.
//!
//! ```text
//! text ──► document ──► schema_check ──► file ──────► rules ──► Config ──► render
//!          (lines)      (keys)           (defaults)                        (effective TOML)
//! ```
//!
//! `document` reads TOML or YAML into one tree that knows its lines. `file` holds the serde types of the file; everything
//! that is said about a key stands there, and [`keys`] derives the table of all keys from it. `schema_check` checks the tree
//! against that table; `rules` checks everything else and makes a [`Config`]. No other module sees the types of `file`.
//! Mistakes come back as [`Problems`], one line each.

mod address;
mod document;
mod field_schema;
mod file;
mod health_keys;
pub mod keys;
mod listener_ids;
mod problem;
mod protocol;
mod read;
mod render;
mod rules;
mod schema_check;
#[cfg(test)]
mod tests;
pub mod watch;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use field_schema::field_order;
pub use listener_ids::ListenerIdAllocator;
pub use problem::Problems;
pub use protocol::ListenerProtocol;

use crate::admission::{SenderRateLimit, SourceRules};
use crate::discovery::{self, Locality, ServiceRef, Terminating};
use crate::health::settings::HealthSettings;
use crate::model::{Downstream, ListenerId, Policy};
use crate::names;
use crate::net::Family;

/// Most listeners: the highest `max_listeners`.
pub const MAX_LISTENERS: u32 = 4_096;
/// Most downstreams: the highest `max_downstreams`.
pub const MAX_DOWNSTREAMS: u32 = 1_000_000;
/// Most prefixes in all `sources`: the highest `max_sources`.
pub const MAX_SOURCES: u32 = 1_000_000;
/// The default of `max_headless_secs`, in seconds.
const DEFAULT_MAX_HEADLESS_SECS: u32 = 300;

/// The default of `pin_path`.
pub const PIN_PATH: &str = "/sys/fs/bpf/udp-fanout";

/// The configuration file unless the command line names another.
pub const DEFAULT_CONFIG: &str = "/etc/udp-fanout/config.toml";

/// The default of `status_socket`.
pub const STATUS_SOCKET: &str = "/run/udp-fanout/status.sock";

/// A configuration that has passed every check that can be made without looking at the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Where it was read from.
    pub path: PathBuf,
    /// Read the file again when it changes.
    pub watch: bool,
    /// In the file's order; never empty. A listener's position is its [`ListenerId`], until [`Config::inherit_listener_ids`] gives
    /// it another.
    pub listeners: Vec<ListenerConfig>,
    /// The health checks of listeners without a `health` of their own, if enabled.
    pub health: Option<HealthSettings>,
    /// The HTTP endpoint, if enabled.
    pub metrics: Option<MetricsConfig>,
    /// Sizes of the kernel program's maps.
    pub limits: MapLimits,
    /// The Unix socket on which the daemon answers `udp-fanout status`: an absolute path.
    pub status_socket: PathBuf,
    /// How the TC program is attached to interfaces.
    pub attach: AttachConfig,
    /// What happens to the kernel program without a daemon.
    pub handover: HandoverConfig,
    /// What is probably a mistake: the key, what is odd and the fix, one line each.
    pub warnings: Vec<String>,
}

/// How the TC program is attached to all interfaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize)]
pub struct AttachConfig {
    /// The hook.
    pub hook: AttachHook,
    /// Its place among TCX programs, if it is one.
    pub order: TcxOrder,
}

/// The hook of an interface that the TC program is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AttachHook {
    /// A filter of the `clsact` queueing discipline, as on all kernels. TCX programs run before it.
    #[default]
    Clsact,
    /// The list of TCX programs (Linux 6.6), or an error.
    Tcx,
    /// TCX where the kernel has it, else `clsact`.
    Auto,
}

/// A place in an interface's list of TCX programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TcxOrder {
    /// Before the programs already there.
    #[default]
    First,
    /// After the programs already there.
    Last,
}

/// What happens to the kernel program when the daemon ends, and until the next one starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandoverConfig {
    /// What happens when the daemon ends.
    pub on_exit: OnExit,
    /// The directory of a BPF file system in which it is pinned: an absolute path.
    pub pin_path: PathBuf,
    /// How long it forwards without a daemon; none means without limit.
    pub max_headless: Option<Duration>,
}

impl Default for HandoverConfig {
    fn default() -> HandoverConfig {
        HandoverConfig {
            on_exit: OnExit::Detach,
            pin_path: PathBuf::from(PIN_PATH),
            max_headless: Some(Duration::from_secs(DEFAULT_MAX_HEADLESS_SECS.into())),
        }
    }
}

/// What happens to the kernel program when the daemon ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnExit {
    /// It is detached from the interfaces.
    #[default]
    Detach,
    /// It continues to forward.
    Keep,
}

/// One listener.
#[derive(Debug, Clone, PartialEq)]
pub struct ListenerConfig {
    /// Its number in the kernel's maps and in logs.
    pub id: ListenerId,
    /// Its name, unique in the file.
    pub name: String,
    /// The address and port datagrams are sent to by their senders.
    pub bind: SocketAddr,
    /// Where the TC program is attached.
    pub interfaces: Interfaces,
    /// The datapath asked for.
    pub mode: RequestedMode,
    /// The protocol of its datagrams.
    pub protocol: ListenerProtocol,
    /// How a downstream is chosen.
    pub policy: Policy,
    /// Who may send.
    pub sources: Arc<SourceRules>,
    /// How fast each sender may send, if there is a limit.
    pub rate_limit: Option<SenderRateLimit>,
    /// Where its downstreams come from.
    pub source: DownstreamSource,
    /// How its downstreams are checked, if they are.
    pub health: Option<HealthSettings>,
    /// Settings of its userspace datapath.
    pub settings: UserspaceSettings,
}

/// Which interfaces a listener's traffic arrives on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Interfaces {
    /// Those that carry default routes.
    Auto,
    /// These, at least one.
    Named(Vec<String>),
}

/// The datapath a configuration asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RequestedMode {
    /// `tc_ebpf` where the kernel and our privileges allow, else `userspace`.
    #[default]
    Auto,
    /// The TC program, or an error.
    TcEbpf,
    /// Sockets only.
    Userspace,
}

/// Where a listener's downstreams come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DownstreamSource {
    /// The configuration file; at least one.
    Static(Vec<Downstream>),
    /// The configuration file, and the names in it.
    Names(NamedSource),
    /// The EndpointSlices of Services.
    Kubernetes(KubernetesSource),
}

/// Downstreams, at least one of them given by a DNS name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedSource {
    /// In the order of the round.
    pub entries: Vec<names::DownstreamEntry>,
    /// How long the addresses of a name are used before it is looked up again.
    pub interval: Duration,
}

/// The Services whose endpoints are the downstreams, and which of their endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubernetesSource {
    /// At least one; none twice with the same port.
    pub services: Vec<ServiceRef>,
    /// Which endpoints are preferred by where they run.
    pub locality: Locality,
    /// Whether endpoints that are shutting down are used.
    pub terminating: Terminating,
}

/// Settings of the userspace datapath of one listener: `listeners[].settings`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(transform = field_order::<UserspaceSettings>)]
pub struct UserspaceSettings {
    /// Worker threads, each with its own socket; 0 means one for each CPU.
    #[schemars(range(min = 0, max = 1_024), example = 4)]
    pub workers: u32,
    /// Most messages received or sent in one system call. A message is one datagram, or up to 64 datagrams of one sender that
    /// arrived together.
    #[schemars(range(min = 1, max = 1_024), example = 128)]
    pub batch_size: u32,
    /// Pin each worker to a CPU of its own.
    #[schemars(example = true)]
    pub pin_cpus: bool,
    /// Receive buffer (`SO_RCVBUF`) of each worker's socket, in bytes: how much may wait while a worker is busy.
    // The kernel keeps twice the number in a signed 32-bit one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        range(min = 4_096, max = 1_073_741_823),
        example = 16_777_216,
        extend("x-absent" = "the host's default")
    )]
    pub recv_buf_size: Option<u32>,
    /// Longest datagram forwarded, in bytes of payload. A longer one is dropped and counted as `truncated`.
    #[schemars(range(min = 1, max = 65_507), example = 9000)]
    pub max_packet_size: u32,
    /// Keep the sender's address: receivers see the sender's address and port, as in `tc_ebpf` mode. Needs `CAP_NET_RAW`.
    #[schemars(example = true)]
    pub preserve_source: bool,
}

impl Default for UserspaceSettings {
    fn default() -> UserspaceSettings {
        UserspaceSettings {
            workers: 0,
            batch_size: 64,
            pin_cpus: false,
            recv_buf_size: None,
            max_packet_size: 65_507,
            preserve_source: false,
        }
    }
}

/// The HTTP endpoint for metrics and probes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetricsConfig {
    /// Address and port it listens on.
    pub bind: SocketAddr,
    /// Path of the Prometheus page, starting with `/`.
    pub path: String,
}

/// Sizes of the kernel program's maps; fixed while the daemon runs: `limits`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(transform = field_order::<MapLimits>)]
pub struct MapLimits {
    /// Most listeners.
    #[schemars(range(min = 1, max = MAX_LISTENERS), example = 1024)]
    pub max_listeners: u32,
    /// Most downstreams of all listeners together.
    #[schemars(range(min = 1, max = MAX_DOWNSTREAMS), example = 100_000)]
    pub max_downstreams: u32,
    /// Most prefixes in the `sources` of all listeners together.
    #[schemars(range(min = 1, max = MAX_SOURCES), example = 500_000)]
    pub max_sources: u32,
    /// Most senders whose `rate_limit` is tracked at one time, of all listeners together. When there are more, those silent the
    /// longest start again with a full bucket.
    // With fewer, the kernel's LRU could not tell well which one was silent the longest.
    #[schemars(range(min = 1_024, max = 1_000_000), example = 500_000)]
    pub max_senders: u32,
}

impl Default for MapLimits {
    fn default() -> MapLimits {
        MapLimits { max_listeners: 256, max_downstreams: 16_384, max_sources: 65_536, max_senders: 65_536 }
    }
}

impl Config {
    /// Reads and checks a configuration file: YAML if its name ends in `.yaml` or `.yml`, else TOML. Refuses anything but a
    /// regular file.
    ///
    /// # Errors
    /// [`Problems`]: the file cannot be read, or what is wrong in it. Its `Display` has one line for each problem, with
    /// the file, the line, the key, the value and the fix.
    pub fn load(path: &Path) -> anyhow::Result<Config> {
        let bytes = read::read(path).map_err(|message| Problems::one(path, None, message))?;
        let text = std::str::from_utf8(&bytes).map_err(|error| {
            let line = 1 + bytes[..error.valid_up_to()].iter().filter(|&&byte| byte == b'\n').count();
            Problems::one(path, Some(line), "not UTF-8 text; save the file as UTF-8")
        })?;
        Config::parse(text, path)
    }

    /// Checks a configuration file's text. `path` names the notation, as for [`Config::load`], and is shown in
    /// messages; nothing is read from there.
    ///
    /// # Errors
    /// [`Problems`]: what is wrong in it. Where the notation is broken, the first place; else everything that is wrong
    /// with keys and types; else everything that breaks a rule.
    pub fn parse(text: &str, path: &Path) -> anyhow::Result<Config> {
        Ok(parse(text, path)?)
    }

    /// The `status_socket` of a file that may break rules: `status` must find the daemon even if its file has a mistake. None
    /// if the file does not set it, or cannot be read.
    #[must_use]
    pub fn status_socket_of(path: &Path) -> Option<PathBuf> {
        top_path(path, "status_socket")
    }

    /// The `pin_path` of a file that may break rules.
    #[must_use]
    pub fn pin_path_of(path: &Path) -> Option<PathBuf> {
        top_path(path, "pin_path")
    }

    /// The effective configuration, every default written out, as TOML with the file's keys. Read again, it gives an
    /// equal configuration.
    #[must_use]
    pub fn render(&self) -> String {
        toml::to_string(&render::file(self)).unwrap_or_else(|error| format!("# cannot be shown as TOML: {error}\n"))
    }
}

/// The path that a top-level key of a file gives; none if the key is absent or the file cannot be parsed.
fn top_path(path: &Path, key: &str) -> Option<PathBuf> {
    let text = String::from_utf8(read::read(path).ok()?).ok()?;
    let document = document::Document::read(&text, path).ok()?;
    match document.top(key) {
        Some(document::DocumentValue::Text(value)) => Some(PathBuf::from(value)),
        _ => None,
    }
}

fn parse(text: &str, path: &Path) -> Result<Config, Problems> {
    let document = document::Document::read(text, path)?;
    let mut problems = Problems::new(path);
    schema_check::check(&document, &mut problems);
    if !problems.is_empty() {
        return Err(problems.in_order());
    }
    let file = file::ConfigFile::from_document(&document)
        .map_err(|error| Problems::one(path, None, format!("cannot be understood: {}", error.message())))?;
    rules::apply(file, path, &document, &mut problems).ok_or_else(|| problems.in_order())
}

impl ListenerConfig {
    /// What is to be found out about the names of its downstreams, if they have any.
    #[must_use]
    pub fn names_request(&self) -> Option<names::ResolveRequest> {
        match &self.source {
            DownstreamSource::Static(_) | DownstreamSource::Kubernetes(_) => None,
            DownstreamSource::Names(NamedSource { entries, interval }) => Some(names::ResolveRequest {
                listener: self.id,
                name: self.name.as_str().into(),
                family: Family::of(self.bind.ip()),
                entries: entries.clone(),
                interval: *interval,
            }),
        }
    }

    /// What discovery is to find out for it, if its downstreams come from Kubernetes.
    #[must_use]
    pub fn discovery_request(&self) -> Option<discovery::DiscoveryRequest> {
        match &self.source {
            DownstreamSource::Static(_) | DownstreamSource::Names(_) => None,
            DownstreamSource::Kubernetes(source) => Some(discovery::DiscoveryRequest {
                listener: self.id,
                services: source.services.clone(),
                family: Family::of(self.bind.ip()),
                locality: source.locality,
                terminating: source.terminating,
            }),
        }
    }
}
