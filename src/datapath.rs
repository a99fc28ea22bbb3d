//! The two datapaths behind one trait.
//!
//! - [`kernel`]: the TC program of `bpf/`, its maps and its attachment.
//! - [`user`]: the listeners' sockets and the worker threads behind them.
//!
//! Both apply the same [`Plan`] and report the same counters, so that a test can compare them. The event loop owns
//! both; the kernel datapath is absent where the host cannot run it.

pub mod kernel;
pub mod user;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use crate::model::{DownstreamCounters, FragmentCounters, ListenerCounters, ListenerId, Mode};
use crate::plan::Plan;

/// A consistent reading of one datapath's counters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// Per listener that the datapath serves.
    pub listeners: BTreeMap<ListenerId, ListenerCounters>,
    /// Per downstream in the current plan; counters of removed downstreams are dropped.
    pub downstreams: BTreeMap<(ListenerId, SocketAddr), DownstreamCounters>,
    /// Of all listeners together. Zeros where the stack reassembles datagrams before the datapath sees them.
    pub fragments: FragmentCounters,
}

/// Forwards datagrams as a [`Plan`] says.
pub trait Datapath {
    /// Value of the `mode` label on this datapath's counters.
    fn mode(&self) -> Mode;

    /// Applies a plan. Only what changed since the last plan is touched. A listener's table changes atomically: each
    /// datagram sees the old table or the new one.
    ///
    /// # Errors
    /// Names the listener and the step that failed. Listeners before it follow the new plan, it and those after it
    /// the old one; calling again is safe.
    fn apply(&mut self, plan: &Plan) -> anyhow::Result<()>;

    /// Reads all counters. They never decrease while the listener exists.
    ///
    /// # Errors
    /// When the kernel refuses to read a map.
    fn counters(&mut self) -> anyhow::Result<Counters>;

    /// Stops receiving, finishes the datagrams already received, removes everything this datapath has put on the
    /// host.
    ///
    /// # Errors
    /// Names what could not be removed; the rest has been.
    fn shutdown(&mut self) -> anyhow::Result<()>;
}
