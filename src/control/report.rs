//! The daemon's status, as sent over the status socket and printed by `udp-fanout status --json`.
//!
//! The daemon fills in everything but [`Rates`], which the command computes from two reports ([`super::rates`]). Fields are
//! only ever added, so that scripts go on working.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The daemon's status at one moment.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct StatusReport {
    /// The process.
    pub daemon: DaemonReport,
    /// In the configuration's order.
    pub listeners: Vec<ListenerReport>,
    /// The Kubernetes Services that are followed, by namespace and name.
    pub services: Vec<ServiceReport>,
    /// Present problems, a line each.
    pub problems: Vec<String>,
}

/// The daemon's process.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DaemonReport {
    /// Version and revision.
    pub version: String,
    /// Process ID.
    pub pid: u32,
    /// When it started, in seconds since 1970.
    pub started: f64,
    /// Seconds since then, by the monotonic clock.
    pub uptime_secs: f64,
    /// The configuration file.
    pub config: PathBuf,
    /// Plans applied since the start.
    pub plans_applied: u64,
    /// Plans that could not be applied.
    pub plans_refused: u64,
}

/// One listener.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ListenerReport {
    /// Its number, as in the kernel's maps.
    pub id: u32,
    /// Unique.
    pub name: String,
    /// The address and port that senders send to.
    pub bind: String,
    /// Its datapath: `tc_ebpf` or `userspace`.
    pub mode: String,
    /// Why it has that datapath.
    pub mode_reason: String,
    /// Why the kernel program passes everything to the socket, if it does.
    pub socket_only: Option<String>,
    /// The interfaces that the kernel program is attached to for it.
    pub interfaces: Vec<String>,
    /// How a downstream is selected, in the configuration's words.
    pub policy: String,
    /// What it waits for before it serves, if anything.
    pub waits_for: Option<String>,
    /// Datagrams received, each once, by whichever datapath.
    pub received: u64,
    /// Datagrams handed to a downstream.
    pub forwarded: u64,
    /// Datagrams dropped, for any reason.
    pub dropped: u64,
    /// Bytes of UDP payload received, without those that the kernel program dropped.
    pub bytes_received: u64,
    /// Datagrams dropped, by reason; reasons without any are absent.
    pub drops: BTreeMap<String, u64>,
    /// Copies that a replicating listener could not send, by reason; reasons without any are absent.
    pub copies_dropped: BTreeMap<String, u64>,
    /// What each datapath has counted, by its name.
    pub datapaths: BTreeMap<String, DatapathReport>,
    /// Its downstreams, unhealthy ones included.
    pub downstreams: Vec<DownstreamReport>,
    /// Rates since the report before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rates: Option<Rates>,
}

/// What one datapath has counted of one listener's datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DatapathReport {
    /// Datagrams received: the sum of the other three.
    pub received: u64,
    /// Datagrams handed to a downstream.
    pub forwarded: u64,
    /// Datagrams passed to the listener's socket.
    pub passed: u64,
    /// Datagrams dropped.
    pub dropped: u64,
}

/// One downstream of one listener.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DownstreamReport {
    /// From the configuration or from discovery.
    pub name: String,
    /// Where datagrams are sent.
    pub address: SocketAddr,
    /// Configured weight.
    pub weight: u32,
    /// Its share of the listener's datagrams, 0 to 1; with `replicate`, the share that is copied to it.
    pub share: f64,
    /// Seconds for which it has been a downstream of the listener.
    pub age_secs: f64,
    /// Its health; none without health checks.
    pub health: Option<HealthReport>,
    /// The egress interface, `local` or `no route`; none where sockets forward.
    pub way: Option<String>,
    /// Datagrams handed to it since it last became a target.
    pub packets: u64,
    /// Bytes of UDP payload handed to it since then.
    pub bytes: u64,
    /// Rates since the report before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rates: Option<Rates>,
}

/// A downstream's health.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct HealthReport {
    /// `unknown`, `healthy` or `unhealthy`.
    pub state: String,
    /// Seconds for which it has had that state.
    pub for_secs: f64,
    /// Why the last probes failed, if they did.
    pub failure: Option<String>,
    /// Round-trip time of the last probe that was answered, in seconds.
    pub round_trip_secs: Option<f64>,
}

/// One Kubernetes Service that is followed.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ServiceReport {
    /// The Service's namespace.
    pub namespace: String,
    /// The Service's name.
    pub service: String,
    /// All its endpoints are known, and the watch that keeps them current is open.
    pub synced: bool,
    /// Seconds since the API server last sent anything about it.
    pub last_event_secs: Option<f64>,
    /// Failures, by kind; kinds without any are absent.
    pub errors: BTreeMap<String, u64>,
}

/// Rates between two reports, per second.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Rates {
    /// Datagrams received; of a downstream, handed to it.
    pub packets: f64,
    /// Bytes of UDP payload of these datagrams.
    pub bytes: f64,
    /// Datagrams forwarded; of a downstream, the same as `packets`.
    pub forwarded: f64,
    /// Datagrams dropped; always 0 for a downstream.
    pub dropped: f64,
}
