//! Shared parts of the forwarding benchmarks: the network, the generator, the sink, the baselines and the report.
//!
//! - [`cpu`]: pins threads to CPUs and reads CPU time.
//! - [`generator`]: sends numbered datagrams at a given rate.
//! - [`sink`]: counts received datagrams in a TC program that drops them; on request also duplicates, order and latency.
//! - [`programs`]: compiles and loads BPF programs of benchmarks.
//! - [`testbed`]: namespaces in which a program under test forwards between a generator and a sink.
//! - [`baselines`]: the forwarders that are compared, udp-fanout among them.
//! - [`run`]: one load on one forwarder, and the search for the highest rate without loss.
//! - [`costs`]: CPU time at given rates, for a machine that is not idle.
//! - [`suite`]: the comparisons; [`control`]: measures the daemon's other work.
//! - [`results`], [`report`], [`plots`]: the figures, and how they are shown.

#![allow(dead_code, reason = "every benchmark compiles this module and uses a part of it")]

pub mod baselines;
pub mod control;
pub mod costs;
pub mod cpu;
pub mod generator;
pub mod plots;
pub mod programs;
pub mod report;
pub mod results;
pub mod run;
pub mod sink;
pub mod suite;
pub mod testbed;
