//! The daemon with receivers from Kubernetes: real datagrams through real namespaces while an API server that speaks the
//! wire protocol changes its mind, goes away, comes back or refuses.
//!
//! - `cluster`, `apiserver`: the objects and the server. `world`: the two laboratories joined.
//! - `flow`: endpoints change while numbered datagrams flow. `outages`: the API server is away.
//! - `choices`: which endpoints a listener takes. `refusals`: what is not allowed, not there, or cannot work.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, its helpers too")]

#[path = "netns_kubernetes/choices.rs"]
mod choices;
#[path = "netns_kubernetes/flow.rs"]
mod flow;
#[path = "netns_kubernetes/outages.rs"]
mod outages;
#[path = "netns_kubernetes/refusals.rs"]
mod refusals;
#[path = "netns_kubernetes/world.rs"]
mod world;
