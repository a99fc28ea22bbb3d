//! Real traffic in network namespaces that the tests make. Needs root.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and so do the functions that tests share"
)]

mod bad_input;
mod container;
mod delivery;
mod demo;
mod doctor;
mod faults;
mod fuzz;
mod health;
mod host;
mod icmp_probes;
mod kubernetes;
mod lab;
mod metrics_port;
mod names;
mod policies;
mod probes;
mod real_dns;
mod real_netflow;
mod reload;
mod restart;
mod status;
mod systemd;
mod trace;
mod user_datapath;
