//! The daemon with receivers from Kubernetes: real datagrams through real namespaces while an API server that speaks the
//! wire protocol changes its mind, goes away, comes back or refuses.
//!
//! - `cluster`, `apiserver`: the objects and the server. `world`: the two laboratories joined.
//! - `flow`: endpoints change while numbered datagrams flow. `outages`: the API server is away.
//! - `choices`: which endpoints a listener takes. `refusals`: what is not allowed, not there, or cannot work.
//! - `serving`: what `/serving` says of it.

mod choices;
mod flow;
mod outages;
mod refusals;
mod serving;
mod world;
