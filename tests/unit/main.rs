//! Tests that need neither root nor a network of their own.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and so do the functions that tests share"
)]

mod config_files;
mod controller;
mod daemon;
mod discovery;
mod discovery_histories;
mod discovery_outages;
mod docs;
mod doctor;
mod fuzz;
mod health;
mod house;
mod http;
mod lab;
mod loopback;
mod manifests;
mod monitoring;
mod package;
mod rbac;
mod reload;
mod service;
mod user_datapath;
mod wall_clock;
