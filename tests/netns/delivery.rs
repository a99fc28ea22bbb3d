//! The daemon between real senders and receivers: every datagram exactly once, wherever the receiver is, whatever the
//! datagram looks like, and whatever changes meanwhile. The daemon's counters agree with what arrived.
//!
//! - `counters`: the daemon's counters, from its metrics and from the kernel's map.
//! - `receiver_locations`: where receivers can be, in each mode, both families. `preserve_source`: the socket keeps
//!   sources.
//! - `overlays`: receivers where network plugins put them.
//! - `packets`: sizes, checksums, super-packets. `fragments`: fragmented datagrams. `foreign`: foreign traffic.
//! - `vlans`: VLAN devices, where the kernel has them. `l3_ingress`: links without link-layer headers.
//!   `wireguard`: WireGuard tunnels, where the kernel has them.
//! - `wire`: whole frames, sent and received.
//! - `loops`: two hosts that forward to each other. `multicast`: listeners that join a group.
//! - `listeners`: several listeners and interfaces. `filters`: our filter beside others. `attach`: our TCX program.
//! - `pods`: directly into pods, bypassing links without hooks.
//! - `tables`: changes under load. `scale`: long tables, and many listeners.
//! - `old_kernel`: without the helpers of 5.10.
//! - `changes`: neighbours, interfaces, addresses and routes that change.

mod attach;
mod changes;
mod counters;
mod filters;
mod foreign;
mod fragments;
mod l3_ingress;
mod listeners;
mod loops;
mod multicast;
mod old_kernel;
mod overlays;
mod packets;
mod pods;
mod preserve_source;
mod receiver_locations;
mod scale;
mod tables;
mod vlans;
mod wire;
mod wireguard;
