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

mod attach;
mod books;
mod changes;
mod filters;
mod foreign;
mod fragments;
mod headerless;
mod listeners;
mod loops;
mod multicast;
mod old_kernel;
mod onbehalf;
mod overlays;
mod packets;
mod places;
mod pods;
mod scale;
mod tables;
mod vlans;
mod wire;
mod wireguard;
