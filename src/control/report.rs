//! What the daemon tells about itself at one moment, as it is sent over the status socket and printed by
//! `udp-fanout status --json`.
//!
//! Plain values. Everything but [`Rates`] is the daemon's word; those are worked out by whoever has two reports
//! ([`super::rates`]). Fields are only ever added, so that scripts go on working.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Everything.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct StatusReport {
    /// The process.
    pub daemon: DaemonReport,
    /// In the configuration's order.
    pub listeners: Vec<ListenerReport>,
    /// The Kubernetes Services that are followed, by namespace and name.
    pub services: Vec<ServiceReport>,
    /// What is wrong at the moment, a line each; empty is good.
    pub problems: Vec<String>,
}

/// The daemon's process.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DaemonReport {
    /// Its version and revision.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// When it started, in seconds since 1970.
    pub started: f64,
    /// Seconds since then, by a clock that only goes forward.
    pub uptime_secs: f64,
    /// Its configuration file.
    pub config: PathBuf,
    /// Changes put in force since the start.
    pub plans_applied: u64,
    /// Changes that could not be.
    pub plans_refused: u64,
}

/// One listener.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ListenerReport {
    /// Its number.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// The address and port senders send to.
    pub bind: String,
    /// The datapath it has: `tc_ebpf` or `userspace`.
    pub mode: String,
    /// Why that one.
    pub mode_reason: String,
    /// Why the kernel program leaves everything to the socket, if it does.
    pub socket_only: Option<String>,
    /// The interfaces that the kernel program is attached to for it.
    pub interfaces: Vec<String>,
    /// How a downstream is chosen, in the configuration's words.
    pub policy: String,
    /// What it still waits for, if anything.
    pub waits_for: Option<String>,
    /// Datagrams that were the listener's, each once, whichever datapath had them.
    pub received: u64,
    /// Datagrams handed to a downstream.
    pub forwarded: u64,
    /// Datagrams dropped, for any reason.
    pub dropped: u64,
    /// Bytes of UDP payload received, but for datagrams that the kernel program dropped.
    pub bytes_received: u64,
    /// Datagrams dropped, by reason; only those that there are.
    pub drops: BTreeMap<String, u64>,
    /// Single copies that a replicating listener could not send, by reason; only those that there are.
    pub copies_dropped: BTreeMap<String, u64>,
    /// What each datapath has counted, by its name.
    pub datapaths: BTreeMap<String, DatapathReport>,
    /// Its downstreams, those left out of the round included.
    pub downstreams: Vec<DownstreamReport>,
    /// Per second, since the report before.
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
    /// Datagrams left to the listener's socket.
    pub passed: u64,
    /// Datagrams dropped.
    pub dropped: u64,
}

/// One downstream of one listener.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DownstreamReport {
    /// Its name.
    pub name: String,
    /// Its address.
    pub address: SocketAddr,
    /// Its weight in the configuration.
    pub weight: u32,
    /// The part of the listener's datagrams that is its, 0 to 1; under `replicate`, the part that is copied to it.
    pub share: f64,
    /// Seconds since it has been one of the listener's downstreams.
    pub age_secs: f64,
    /// What health checks say, if there are any.
    pub health: Option<HealthReport>,
    /// How its datagrams leave: `local`, `eth0`, or why not.
    pub way: Option<String>,
    /// Datagrams handed to it since it last joined the round.
    pub packets: u64,
    /// Bytes of UDP payload handed to it since then.
    pub bytes: u64,
    /// Per second, since the report before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rates: Option<Rates>,
}

/// What health checks say of a downstream.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct HealthReport {
    /// `unknown`, `healthy` or `unhealthy`.
    pub state: String,
    /// Seconds that it has been in that state.
    pub for_secs: f64,
    /// Why the last probes failed, if they did.
    pub failure: Option<String>,
    /// How long the last answer took, in seconds.
    pub round_trip_secs: Option<f64>,
}

/// One Kubernetes Service that is followed.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ServiceReport {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub service: String,
    /// A complete list is held, and the watch that keeps it current is open.
    pub synced: bool,
    /// Seconds since the API server last said anything about it.
    pub last_event_secs: Option<f64>,
    /// Failures, by kind; only those that there are.
    pub errors: BTreeMap<String, u64>,
}

/// Changes per second between two reports.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Rates {
    /// Datagrams received; of a downstream, handed to it.
    pub packets: f64,
    /// Bytes of UDP payload likewise.
    pub bytes: f64,
    /// Datagrams forwarded; of a downstream, the same as `packets`.
    pub forwarded: f64,
    /// Datagrams dropped; always 0 of a downstream.
    pub dropped: f64,
}
