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

pub mod admission;
pub mod cli;
pub mod config;
pub mod control;
pub mod controller;
pub mod datapath;
pub mod demo;
pub mod detach;
pub mod discovery;
pub mod doctor;
pub mod drop_log;
pub mod error_hints;
pub mod event_loop;
pub mod health;
pub mod host;
pub mod logging;
pub mod metrics;
pub mod model;
pub mod names;
pub mod net;
pub mod open_files;
pub mod output;
pub mod plan;
pub mod service_manager;
pub mod version;
