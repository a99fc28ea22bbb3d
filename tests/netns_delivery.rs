//! The daemon between real senders and receivers: every datagram exactly once, wherever the receiver is, whatever the
//! datagram looks like, and whatever changes meanwhile; and books that agree with what arrived.
//!
//! - `books`: what the daemon has counted, from its metrics and from the kernel's map.
//! - `places`: where receivers can be, in each mode, both families. `onbehalf`: sources kept in user space.
//! - `overlays`: where network plugins put them.
//! - `packets`: sizes, checksums, super-packets. `fragments`: datagrams that come in several. `foreign`: what is not a listener's datagram.
//! - `vlans`: VLAN devices, where the kernel has them. `headerless`: links that carry IP packets without frames.
//!   `wireguard`: such as WireGuard's, where the kernel has it.
//! - `wire`: whole frames, sent and seen. `packet`: how they are made.
//! - `loops`: two hosts that forward to each other. `multicast`: listeners that join a group.
//! - `listeners`: several of them, several interfaces. `filters`: our filter beside others'. `attach`: our TCX program.
//! - `pods`: straight into them, past whoever does not mind.
//! - `tables`: changed under load. `scale`: long ones, and many listeners.
//! - `old_kernel`: without the helpers of 5.10.
//! - `changes`: neighbours, interfaces, addresses and routes that change.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, its helpers too")]

#[path = "netns_delivery/attach.rs"]
mod attach;
#[path = "netns_delivery/books.rs"]
mod books;
#[path = "netns_delivery/changes.rs"]
mod changes;
#[path = "netns_delivery/filters.rs"]
mod filters;
#[path = "netns_delivery/foreign.rs"]
mod foreign;
#[path = "netns_delivery/fragments.rs"]
mod fragments;
#[path = "netns_delivery/headerless.rs"]
mod headerless;
#[path = "netns_delivery/listeners.rs"]
mod listeners;
#[path = "netns_delivery/loops.rs"]
mod loops;
#[path = "netns_delivery/multicast.rs"]
mod multicast;
#[path = "netns_delivery/old_kernel.rs"]
mod old_kernel;
#[path = "netns_delivery/onbehalf.rs"]
mod onbehalf;
#[path = "netns_delivery/overlays.rs"]
mod overlays;
#[path = "kernel/packet.rs"]
#[allow(dead_code, reason = "a part of it is used here")]
mod packet;
#[path = "netns_delivery/packets.rs"]
mod packets;
#[path = "netns_delivery/places.rs"]
mod places;
#[path = "netns_delivery/pods.rs"]
mod pods;
#[path = "netns_delivery/scale.rs"]
mod scale;
#[path = "netns_delivery/tables.rs"]
mod tables;
#[path = "netns_delivery/vlans.rs"]
mod vlans;
#[path = "netns_delivery/wire.rs"]
mod wire;
#[path = "netns_delivery/wireguard.rs"]
mod wireguard;
