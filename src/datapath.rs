//! The two datapaths behind one trait.
//!
//! - [`kernel`]: the TC program of `bpf/`, its maps and its attachment.
//! - [`user`]: the listeners' sockets and the worker threads that read them.
//!
//! Both apply the same [`Plan`] value and report the same [`DatapathCounters`], so a test can compare them. The event
//! loop owns both. The kernel datapath is absent on hosts that cannot run it.
//!
//! A datagram reaches the userspace datapath in two cases: its listener has `mode = "userspace"`, or the TC program
//! passed it to the listener's socket (`packets_passed`; see
//! [`ListenerPlan::socket_only`](crate::plan::ListenerPlan::socket_only) for the whole listener and `bpf/` for single
//! datagrams).

pub mod kernel;
pub mod user;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use crate::model::{DownstreamCounters, FragmentCounters, ListenerCounters, ListenerId};
use crate::plan::Plan;

/// One reading of a datapath's counters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DatapathCounters {
    /// Per listener that the datapath serves.
    pub listeners: BTreeMap<ListenerId, ListenerCounters>,
    /// Per downstream of the current plan. The counters of removed downstreams are dropped.
    pub downstreams: BTreeMap<(ListenerId, SocketAddr), DownstreamCounters>,
    /// Of all listeners together. Zero in the userspace datapath: the host's stack reassembles before a socket
    /// receives.
    pub fragments: FragmentCounters,
}

/// Forwards datagrams as a [`Plan`] says.
pub trait Datapath {
    /// Puts the plan in force. Only what differs from the last plan is changed. A listener's table changes atomically:
    /// each datagram is forwarded by the old table or by the new one.
    ///
    /// # Errors
    /// Names the listener and the step that failed. Listeners before it follow the new plan; this listener and those
    /// after it follow the old one. Calling again is safe.
    fn apply(&mut self, plan: &Plan) -> anyhow::Result<()>;

    /// Reads all counters. They never decrease while the listener exists.
    ///
    /// # Errors
    /// When a map cannot be read.
    fn counters(&mut self) -> anyhow::Result<DatapathCounters>;

    /// Stops taking datagrams, finishes those already taken and removes everything that this datapath put on the host.
    ///
    /// # Errors
    /// Names what could not be removed; the rest has been removed.
    fn shutdown(&mut self) -> anyhow::Result<()>;
}
