//! What the daemon tells about itself over HTTP.
//!
//! - [`names`]: every metric, its type, help text and labels, once.
//! - [`render`](mod@render): a [`MetricsSnapshot`] becomes a page in Prometheus' text format. Pure.
//! - [`http`]: the thread that serves that page, and the liveness and readiness probes.
//!
//! The event loop owns the datapaths, so only it can read their counters. The HTTP thread asks it for a [`MetricsSnapshot`]
//! at each scrape and renders that on its own time: the page is exact for the moment of the scrape, and the series of a
//! downstream that is gone are gone too.

pub mod http;
pub mod names;
pub mod render;
mod snapshot;

pub use render::render;
pub use snapshot::{
    DownstreamHealthSnapshot, DownstreamSnapshot, ListenerSnapshot, MetricsSnapshot, PlanApplyCounts, ReloadCounts,
};
