//! What benchmarks of forwarding have in common: the network, the generator, the sink, the contenders and the report.
//!
//! - [`bed`]: namespaces in which a contender forwards between a generator and a sink.
//! - [`generator`]: numbered datagrams at a given rate.
//! - [`sink`]: counts what arrives, in a TC program that drops it; duplicates, order and latency on demand.
//! - [`programs`]: compiles and loads BPF programs of benchmarks.
//! - [`contenders`]: who is compared.
//! - [`trial`]: one load on one contender, and the search for the highest rate without loss.
//! - [`costs`]: CPU time at given rates, for a machine that is not idle.
//! - [`suite`]: the comparisons; [`control`]: what else the daemon does.
//! - [`results`], [`report`], [`plots`]: what was found, and how it is shown.

#![allow(dead_code, reason = "every benchmark compiles this module and uses a part of it")]

pub mod bed;
pub mod contenders;
pub mod control;
pub mod costs;
pub mod generator;
pub mod plots;
pub mod programs;
pub mod report;
pub mod results;
pub mod sink;
pub mod suite;
pub mod trial;
