//! Whole packets through the production TC program (`BPF_PROG_TEST_RUN`), against a plain-Rust oracle.
//!
//! Needs root. `cases` asserts hand-written packets byte by byte, `fragments` datagrams that come in several, `destinations`
//! whose they are, `looks` packets that only look like them; `random` feeds a million random and mutated ones; `events` looks at what it tells of single ones, `cost` at what the verifier makes of it all.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

#[path = "kernel/cases.rs"]
mod cases;
#[path = "kernel/cost.rs"]
mod cost;
#[path = "kernel/destinations.rs"]
mod destinations;
#[path = "kernel/events.rs"]
mod events;
#[path = "kernel/fragments.rs"]
mod fragments;
#[path = "kernel/looks.rs"]
mod looks;
#[path = "kernel/oracle.rs"]
mod oracle;
#[path = "kernel/packet.rs"]
mod packet;
#[path = "kernel/pieces.rs"]
mod pieces;
#[path = "kernel/random.rs"]
mod random;
#[path = "kernel/run.rs"]
mod run;
#[path = "kernel/trial.rs"]
mod trial;
