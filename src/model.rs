//! The nouns of the program: listener, downstream, drop reason, counters.
//!
//! Plain values without I/O, which every other module uses: [`plan`](crate::plan) compiles them into tables,
//! [`datapath`](crate::datapath) counts with them, [`metrics`](crate::metrics) renders them.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// A listener's number: its position in the configuration file, starting at 0. Logged as `listener_id`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct ListenerId(pub u32);

impl fmt::Display for ListenerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Which datapath carries a listener's traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The TC program in the kernel. It passes some datagrams to the listener's socket, which forwards them.
    TcEbpf,
    /// Only the listener's socket.
    Userspace,
}

impl Mode {
    /// The name in configuration files, log lines and metric labels.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Mode::TcEbpf => "tc_ebpf",
            Mode::Userspace => "userspace",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a listener chooses among its downstreams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// Each datagram goes to the next downstream in turn; weights interleave smoothly.
    #[default]
    RoundRobin,
    /// A hash of the datagram's addresses selects the downstream, so a sender keeps its downstream.
    Hash(HashOn),
    /// Chunks of one GELF message go to the downstream that their message ID selects; unchunked messages go round
    /// robin.
    GelfMessage,
    /// Every datagram goes to every downstream, one copy each.
    Replicate,
}

/// What `hash` hashes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum HashOn {
    /// The sender's address.
    #[default]
    SourceIp,
    /// The sender's address and port.
    Source,
    /// Both addresses and both ports.
    Flow,
}

impl HashOn {
    /// The name in configuration files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            HashOn::SourceIp => "source_ip",
            HashOn::Source => "source",
            HashOn::Flow => "flow",
        }
    }
}

/// The maximum number of copies of one datagram that the TC program makes: `MAX_COPIES` in `bpf/fanout_abi.h`.
pub const MAX_COPIES: usize = 64;

impl Policy {
    /// True if the datagrams of one sender must stay on one worker to keep their order.
    #[must_use]
    pub fn keeps_sender_order(self) -> bool {
        match self {
            Policy::RoundRobin => false,
            Policy::Hash(_) | Policy::GelfMessage | Policy::Replicate => true,
        }
    }
}

/// A receiver of datagrams.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Downstream {
    /// The configured name, or the address if none was given; for logs and tables.
    pub name: Arc<str>,
    /// Where its datagrams are sent.
    pub address: SocketAddr,
    /// Its share relative to the listener's other downstreams; at least 1.
    pub weight: u32,
    /// Under [`Policy::Replicate`]: of 2³² − 1 datagrams, how many are copied to it; [`Downstream::ALL`] for every one.
    pub sample: u32,
}

impl Downstream {
    /// The `sample` of a downstream that gets a copy of every datagram.
    pub const ALL: u32 = u32::MAX;
}

/// All downstreams of one listener at one moment. A later set replaces the earlier one as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct DownstreamSet {
    /// Increases with every set of the same source; an older set never replaces a newer one.
    pub generation: u64,
    /// In the source's order, which is the order of the round.
    pub downstreams: Vec<Downstream>,
}

/// Why a datagram of a listener was not forwarded.
///
/// The TC program counts the first [`DropReason::KERNEL_COUNT`], numbered as in `enum drop_reason` of
/// `bpf/fanout_abi.h`; a test compares the two. Both datapaths may use any of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[repr(u32)]
pub enum DropReason {
    /// The listener has no downstream at the moment.
    NoDownstream = 0,
    /// The TTL was 1 or less, so forwarding would make it 0.
    TtlExpired = 1,
    /// No route to the chosen downstream.
    NoRoute = 2,
    /// The kernel refused to change the packet (out of memory).
    RewriteFailed = 3,
    /// The kernel refused to hand the packet on (no such device, device down).
    RedirectFailed = 4,
    /// The listener's `sources` do not allow the sender.
    SourceDenied = 5,
    /// The sender exceeded its `rate_limit`.
    RateLimited = 6,
    /// Longer than `max_packet_size`.
    Truncated = 7,
    /// The sending socket's buffer was full.
    SendBufferFull = 8,
    /// The downstream's network or host cannot be reached.
    Unreachable = 9,
    /// Nothing listens at the downstream (an ICMP port unreachable came back).
    Refused = 10,
    /// Too long for the path to the downstream, and must not be fragmented.
    TooBig = 11,
    /// The kernel refused to send for another reason; the log has it.
    SendFailed = 12,
    /// The listener's receive buffer was full.
    ReceiveQueueFull = 13,
}

impl DropReason {
    /// Every reason, in numeric order.
    pub const ALL: [DropReason; 14] = [
        DropReason::NoDownstream,
        DropReason::TtlExpired,
        DropReason::NoRoute,
        DropReason::RewriteFailed,
        DropReason::RedirectFailed,
        DropReason::SourceDenied,
        DropReason::RateLimited,
        DropReason::Truncated,
        DropReason::SendBufferFull,
        DropReason::Unreachable,
        DropReason::Refused,
        DropReason::TooBig,
        DropReason::SendFailed,
        DropReason::ReceiveQueueFull,
    ];
    /// How many reasons there are.
    pub const COUNT: usize = Self::ALL.len();
    /// How many of them, from the first on, the TC program counts.
    pub const KERNEL_COUNT: usize = 7;

    /// The value of the `reason` label in metrics and of the `reason` field in logs.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            DropReason::NoDownstream => "no_downstream",
            DropReason::TtlExpired => "ttl_expired",
            DropReason::NoRoute => "no_route",
            DropReason::RewriteFailed => "rewrite_failed",
            DropReason::RedirectFailed => "redirect_failed",
            DropReason::SourceDenied => "source_denied",
            DropReason::RateLimited => "rate_limited",
            DropReason::Truncated => "truncated",
            DropReason::SendBufferFull => "send_buffer_full",
            DropReason::Unreachable => "unreachable",
            DropReason::Refused => "refused",
            DropReason::TooBig => "too_big",
            DropReason::SendFailed => "send_failed",
            DropReason::ReceiveQueueFull => "receive_queue_full",
        }
    }
}

/// Datagrams dropped, one counter for each [`DropReason`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Drops([u64; DropReason::COUNT]);

impl Drops {
    /// Adds `packets` to a reason's count.
    pub fn add(&mut self, reason: DropReason, packets: u64) {
        self.0[reason as usize] += packets;
    }

    /// Datagrams dropped for this reason.
    #[must_use]
    pub fn get(&self, reason: DropReason) -> u64 {
        self.0[reason as usize]
    }

    /// Datagrams dropped for any reason.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Every reason with its count, including zeros.
    pub fn iter(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.iter().map(|&reason| (reason, self.get(reason)))
    }

    /// Adds another set of counters to this one.
    pub fn merge(&mut self, other: &Drops) {
        for (sum, n) in self.0.iter_mut().zip(other.0) {
            *sum += n;
        }
    }
}

/// What one datapath counted for one listener. `received = forwarded + dropped + passed` holds in every reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ListenerCounters {
    /// Datagrams addressed to the listener.
    pub packets_received: u64,
    /// Datagrams handed to a downstream.
    pub packets_forwarded: u64,
    /// Datagrams that the TC program passed to the listener's socket, which counts them again under its own mode.
    pub packets_passed: u64,
    /// Bytes of UDP payload received.
    pub bytes_received: u64,
    /// Bytes of UDP payload handed to downstreams.
    pub bytes_forwarded: u64,
    /// Datagrams dropped, by reason.
    pub dropped: Drops,
    /// Under [`Policy::Replicate`], single copies that failed, by reason. A datagram counts as forwarded if at least
    /// one copy was sent.
    pub copies_dropped: Drops,
}

impl ListenerCounters {
    /// Adds the counters of another datapath or worker.
    pub fn merge(&mut self, other: &ListenerCounters) {
        self.packets_received += other.packets_received;
        self.packets_forwarded += other.packets_forwarded;
        self.packets_passed += other.packets_passed;
        self.bytes_received += other.bytes_received;
        self.bytes_forwarded += other.bytes_forwarded;
        self.dropped.merge(&other.dropped);
        self.copies_dropped.merge(&other.copies_dropped);
    }
}

/// Later fragments that the TC program could not treat like the rest of their datagram. A datagram itself is counted
/// with its first fragment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FragmentCounters {
    /// Sent to a listener's address, but the first fragment is unknown: passed to the stack.
    pub strays: u64,
    /// Part of a datagram that was being forwarded, but could not follow it: dropped.
    pub lost: u64,
}

/// What one datapath sent to one downstream of one listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DownstreamCounters {
    /// Datagrams.
    pub packets: u64,
    /// Bytes of UDP payload.
    pub bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    impl ListenerCounters {
        /// True if every received datagram is accounted for.
        pub fn balanced(&self) -> bool {
            self.packets_received == self.packets_forwarded + self.packets_passed + self.dropped.total()
        }
    }
    use std::collections::HashSet;

    #[test]
    fn reasons_are_numbered_in_order_and_have_distinct_labels() {
        for (i, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, i);
        }
        let labels: HashSet<_> = DropReason::ALL.iter().map(|r| r.label()).collect();
        assert_eq!(labels.len(), DropReason::COUNT);
    }

    #[test]
    fn merged_counters_stay_balanced() {
        let mut dropped = Drops::default();
        dropped.add(DropReason::NoRoute, 2);
        let one = ListenerCounters {
            packets_received: 5,
            packets_forwarded: 2,
            packets_passed: 1,
            dropped,
            ..Default::default()
        };
        assert!(one.balanced());
        let mut sum = one;
        sum.merge(&one);
        assert!(sum.balanced());
        assert_eq!(sum.dropped.get(DropReason::NoRoute), 4);
    }
}
