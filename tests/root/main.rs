//! Whole packets through the kernel program (`BPF_PROG_TEST_RUN`), against an oracle in plain Rust. Needs root.
//!
//! - `cases`: hand-written packets, compared byte by byte; `fragments`: fragmented datagrams; `destinations`: which
//!   listener gets them; `fast_path`: packets that the fast path must not take.
//! - `random`: a million random and mutated packets; `fuzz`: the saved fuzzing inputs.
//! - `events`: what the program reports of single datagrams; `cost`: the verifier's limits.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and so do the functions that tests share"
)]

mod cases;
mod cost;
mod destinations;
mod events;
mod fast_path;
mod fragments;
mod fuzz;
mod random;
