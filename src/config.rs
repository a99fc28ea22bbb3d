//! The validated configuration: what the rest of the program may rely on.
//!
//! Two stages. `file` holds the serde types that mirror the file, with every default and the key's documentation;
//! this module holds what they are turned into once every rule has been checked. No other module sees `file`'s types.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::model::{Downstream, ListenerId, Policy};

/// A configuration that has passed every check that can be made without looking at the host.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Config {
    /// Where it was read from.
    pub path: PathBuf,
    /// In the file's order; never empty. A listener's position is its [`ListenerId`].
    pub listeners: Vec<ListenerConfig>,
    /// Health checks, if enabled.
    pub health: Option<HealthConfig>,
    /// The HTTP endpoint, if enabled.
    pub metrics: Option<MetricsConfig>,
    /// Sizes of the kernel program's maps.
    pub limits: Limits,
}

/// One listener.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ListenerConfig {
    /// Its number.
    pub id: ListenerId,
    /// Its name, unique in the file.
    pub name: String,
    /// The address and port datagrams are sent to by their senders.
    pub bind: SocketAddr,
    /// Where the TC program is attached.
    pub interfaces: Interfaces,
    /// The datapath asked for.
    pub mode: RequestedMode,
    /// How a downstream is chosen.
    pub policy: Policy,
    /// Where its downstreams come from.
    pub source: Source,
    /// Settings of its userspace datapath.
    pub settings: Settings,
}

/// Which interfaces a listener's traffic arrives on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Interfaces {
    /// Those that carry default routes.
    Auto,
    /// These, at least one.
    Named(Vec<String>),
}

/// The datapath a configuration asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The configuration file; at least one.
    Static(Vec<Downstream>),
    /// The EndpointSlices of a Service.
    Kubernetes(KubernetesSource),
}

/// A Service whose endpoints are the downstreams.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct KubernetesSource {
    /// Its namespace; none means the pod's own.
    pub namespace: Option<String>,
    /// Its name.
    pub service: String,
    /// The port to send to on every endpoint.
    pub port: u16,
}

/// Settings of the userspace datapath of one listener.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Settings {
    /// Worker threads, each with its own socket; 0 means one per CPU.
    pub workers: u32,
    /// Datagrams taken from and given to the kernel per system call, 1 to 1024.
    pub batch_size: u32,
    /// Pin worker n to CPU n.
    pub pin_cpus: bool,
    /// `SO_RCVBUF` of each worker's socket, in bytes; none leaves the host's default.
    pub recv_buf_size: Option<u32>,
    /// Longest datagram forwarded, in bytes of UDP payload, 1 to 65,507.
    pub max_packet_size: u32,
}

/// Health checks of downstreams.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HealthConfig {
    /// Time between the starts of two probes of one downstream.
    pub interval: Duration,
    /// How long an answer may take.
    pub timeout: Duration,
    /// What is sent.
    pub protocol: HealthProtocol,
}

/// How a downstream is probed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HealthProtocol {
    /// ICMP echo.
    Icmp,
    /// A UDP datagram that the application sends back unchanged.
    UdpEcho,
}

/// The HTTP endpoint for metrics and probes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MetricsConfig {
    /// Address and port it listens on.
    pub bind: SocketAddr,
    /// Path of the Prometheus page, starting with `/`.
    pub path: String,
}

/// Sizes of the kernel program's maps; fixed while the daemon runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// Most listeners, 1 to 4,096.
    pub max_listeners: u32,
    /// Most downstreams over all listeners, 1 to 1,000,000.
    pub max_downstreams: u32,
}
