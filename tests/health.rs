//! Health checks against real sockets: receivers that answer, refuse, keep silent or lie, on loopback and in network
//! namespaces.
//!
//! How long anything takes is not asserted, and no test says that a receiver never fails: on a busy machine an answer may
//! be late. What is waited for is a state that only a working check can reach; a receiver that is never validly answered
//! for can never become healthy, and one that answers must.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a panic is how a test fails")]

#[path = "health/bench.rs"]
mod bench;
#[path = "health/icmp.rs"]
mod icmp;
#[path = "health/servers.rs"]
mod servers;
#[path = "health/tcp.rs"]
mod tcp;
#[path = "health/udp.rs"]
mod udp;
