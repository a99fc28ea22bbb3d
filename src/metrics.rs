//! Metrics and probes over HTTP.
//!
//! - [`names`]: every metric with its type, help text and labels.
//! - [`render`](mod@render): turns a [`MetricsSnapshot`] into a page in Prometheus' text format. Pure.
//! - [`http`]: the thread that serves that page, and the liveness and readiness probes.
//!
//! The event loop owns the datapaths, so only it can read their counters. At each scrape the HTTP thread asks it for a
//! [`MetricsSnapshot`] (`event_loop::scrape`) and renders it on its own time. So the page is current, and has no series of
//! downstreams that are gone.

pub mod http;
pub mod names;
pub mod render;
mod snapshot;

pub use render::render;
pub use snapshot::{
    DownstreamHealthSnapshot, DownstreamSnapshot, ListenerSnapshot, MetricsSnapshot, PlanApplyCounts, ReloadCounts,
};
