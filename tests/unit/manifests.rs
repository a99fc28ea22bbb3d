//! What is deployed to Kubernetes: the plain manifests, the kustomizations and the chart. All of them are valid for the
//! oldest and the newest API, hold configurations that the daemon accepts, say the same, and ask for no more than it
//! needs.
//!
//! - `render`: reads them, by the real helm and kubectl where that takes a program.
//! - `valid`: against the published schemas.
//! - `content`: what they say. `examples`: the ones for Vector and MetalLB.
//! - `guide`: the deployment guide, whose commands and names are real.

mod content;
mod examples;
mod guide;
pub mod render;
mod valid;
