//! The network laboratory: network namespaces, the daemon in one of them, traffic through it, and a report on the traffic.
//!
//! The `netns_*` tests, the benchmarks, `make soak` and `make demo` use it. Everything happens in network namespaces
//! with unique names that this crate creates; the host's own network is not changed. Needs root.
//!
//! - [`netns`]: one namespace; runs code or commands inside it.
//! - [`tun`]: a link between two namespaces that carries IP packets without Ethernet headers.
//! - [`topology`]: a sender, a gateway, and receivers at every supported place.
//! - [`daemon`]: the daemon's process and its configuration.
//! - [`old_kernel`]: simulates an old kernel for the daemon.
//! - [`pins`]: a directory of the BPF file system for the maps and programs that outlive a daemon.
//! - [`traffic`]: numbered datagrams from senders to collectors, in a closed loop.
//! - [`report`]: counts lost, duplicated and reordered datagrams; pure.
//! - [`scrape`]: the daemon's HTTP pages.
//! - [`servers`]: receivers that answer, refuse or stay silent, each on its own thread.
//! - [`sockets`]: queue lengths and counters of a namespace's sockets.
//! - [`cleanup`]: removes everything, even after a panic, a signal or `SIGKILL`.
//!
//! With the feature `cluster`, only for tests:
//!
//! - `apiserver`: a Kubernetes API server, and `cluster`: objects as the control plane writes them.
//! - `dns_server`: a DNS server with responses set by the test.

#[cfg(feature = "cluster")]
pub mod apiserver;
pub mod cleanup;
#[cfg(feature = "cluster")]
pub mod cluster;
pub mod daemon;
#[cfg(feature = "cluster")]
pub mod dns_server;
pub mod netns;
pub mod netns_thread;
pub mod old_kernel;
pub mod pins;
pub mod report;
pub mod scrape;
pub mod servers;
pub mod sockets;
pub mod topology;
pub mod traffic;
pub mod tun;

pub use daemon::{Daemon, DaemonConfig, ListenerSpec, Surroundings};
pub use netns::Namespace;
pub use netns_thread::{in_new_netns, ip};
pub use old_kernel::old_kernel;
pub use pins::Pins;
pub use report::{Expect, Report};
pub use scrape::Metrics;
pub use topology::{INGRESS, Lab, LabBuilder, Place, Site};
pub use traffic::{Collectors, Sender};
