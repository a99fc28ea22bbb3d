//! Whole packets through the kernel program (`BPF_PROG_TEST_RUN`), against an oracle in plain Rust. Needs root.
//!
//! - `cases`: hand-written packets, compared byte by byte; `fragments`: datagrams in fragments; `destinations`: whose they
//!   are; `looks`: packets that only look like them.
//! - `random`: a million random and mutated packets; `fuzz`: the inputs that are kept for fuzzing.
//! - `events`: what the program reports of single datagrams; `cost`: what the verifier makes of it.

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
mod fragments;
mod fuzz;
mod looks;
mod random;
