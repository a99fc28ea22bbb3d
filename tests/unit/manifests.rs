//! The Kubernetes deployment: the plain manifests, the kustomizations and the chart. All of them are valid for the
//! oldest and the newest API, contain configurations that the daemon accepts, agree with each other, and ask for no
//! more than the daemon needs.
//!
//! - `render`: renders them, with the real helm and kubectl.
//! - `valid`: validates them against the published schemas.
//! - `content`: checks their content. `examples`: those for Vector and MetalLB.
//! - `guide`: the commands and names in the deployment guide.

mod content;
mod examples;
mod guide;
pub mod render;
mod valid;
