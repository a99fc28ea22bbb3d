//! The daemon between real senders and receivers: every datagram exactly once, wherever the receiver is, whatever the
//! datagram looks like, and whatever changes meanwhile; and books that agree with what arrived.
//!
//! - `books`: what the daemon has counted, from its metrics and from the kernel's map.
//! - `places`: where receivers can be, in each mode, both families.
//! - `packets`: sizes, fragments, checksums, super-packets. `frames`: what is not a listener's datagram.
//! - `changes`: filters of others, a killed daemon, interfaces and routes that change.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, its helpers too")]

#[path = "netns_delivery/books.rs"]
mod books;
#[path = "netns_delivery/places.rs"]
mod places;
mod support;
