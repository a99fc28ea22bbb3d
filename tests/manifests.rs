//! What is deployed to Kubernetes: the plain manifests, the kustomizations and the chart. All of them are valid for the
//! oldest and the newest API, hold configurations that the daemon accepts, say the same, and ask for no more than it
//! needs.
//!
//! - `render`: reads them, by the real helm and kubectl where that takes a program.
//! - `valid`: against the published schemas.
//! - `content`: what they say. `examples`: the ones for Vector and MetalLB.
//! - `guide`: the deployment guide, whose commands and names are real.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, its helpers too")]

#[path = "manifests/content.rs"]
mod content;
#[path = "manifests/examples.rs"]
mod examples;
#[path = "manifests/guide.rs"]
mod guide;
#[path = "manifests/render.rs"]
mod render;
#[path = "manifests/valid.rs"]
mod valid;
