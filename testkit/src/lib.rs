//! Code that the tests, the benchmarks and the fuzz targets share and that calls the program's own code. Shared code that does not is in
//! the crate `udp-fanout-lab`.
//!
//! - [`flow`]: numbered datagrams through the userspace datapath, in a closed loop.
//! - [`fuzz`]: the fuzz targets.
//! - [`kernel`]: the kernel program in `BPF_PROG_TEST_RUN`, and an oracle that predicts its results.
//! - [`probing`]: an event loop with health checks on it.
//! - [`watching`]: endpoint discovery under test: its updates, its log, its status.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "only tests use this: it fails by panicking"
)]

pub mod flow;
pub mod fuzz;
pub mod kernel;
pub mod probing;
#[cfg(feature = "cluster")]
pub mod watching;
