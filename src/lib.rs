//! udp-fanout: takes UDP datagrams that arrive at a host and hands each to one of several downstream receivers, inside
//! the kernel, keeping the sender's address.
//!
//! ```text
//! config file ──► config::file ──► Config ─────┐
//! EndpointSlices, DNS ──► DownstreamSet ───────┼──► controller ──► Plan ──► Datapath::apply
//! netlink ──► HostFacts ───────────────────────┘    (pure)         (data)   (kernel | user)
//! ```
//!
//! Reading order: [`model`], [`plan`], [`controller`], [`datapath`], then `bpf/fanout.bpf.c` or [`datapath::user`].

mod admission;
mod cli;
mod commands;
mod config;
mod control;
mod controller;
mod datapath;
mod demo;
mod detach;
mod discovery;
mod doctor;
mod drop_log;
mod error_hints;
mod event_loop;
mod health;
mod host;
mod logging;
mod metrics;
mod model;
mod names;
mod net;
mod open_files;
mod output;
mod plan;
mod service_manager;
#[doc(hidden)]
pub mod testing;
mod version;

pub use commands::main;
