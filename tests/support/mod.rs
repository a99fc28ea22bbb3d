//! The network laboratory: namespaces, the daemon inside one of them, traffic through it, and the reckoning.
//!
//! Shared by the `netns_*` tests (`mod support;`) and by `make demo` (`examples/demo.rs`). Everything happens in
//! network namespaces made here, under names no one else uses; the host's own network is never touched.
//!
//! - [`netns`]: one namespace; run code or commands inside it.
//! - [`tun`]: a link between two of them that carries IP packets without frames.
//! - [`lab`]: a sender, a gateway and receivers in every place a receiver can be.
//! - [`pins`]: where what outlives a daemon is kept.
//! - [`daemon`]: the daemon's process and its configuration.
//! - [`traffic`]: numbered datagrams from senders to collectors, in a closed loop.
//! - [`report`]: what was lost, duplicated, reordered; pure.
//! - [`scrape`]: the daemon's HTTP pages.
//! - [`sockets`]: what a namespace's sockets hold and have counted, and waiting for it.
//! - [`cleanup`]: leaves nothing behind, whatever happens.

#![allow(dead_code, unused_imports, reason = "every test binary compiles this module and uses a part of it")]

pub mod cleanup;
pub mod daemon;
pub mod lab;
pub mod netns;
pub mod pins;
pub mod report;
pub mod scrape;
pub mod sockets;
pub mod traffic;
pub mod tun;

pub use daemon::{Daemon, DaemonConfig, ListenerSpec, Surroundings};
pub use lab::{Lab, LabBuilder, Place};
pub use netns::Namespace;
pub use pins::Pins;
pub use report::{Expect, Report};
pub use scrape::Metrics;
pub use traffic::{Collectors, Sender};
