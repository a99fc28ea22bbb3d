//! The daemon with receivers from Kubernetes: real datagrams through real namespaces while an API server that speaks
//! the real wire protocol sends changes, goes away, comes back or refuses.
//!
//! - `cluster`, `apiserver`: the objects and the server. `kubernetes_lab`: the network lab with an API server.
//! - `flow`: endpoints change while numbered datagrams flow. `outages`: the API server is away.
//! - `choices`: which endpoints a listener uses. `refusals`: forbidden and missing objects, and settings that cannot
//!   work.
//! - `serving`: the page `/serving`.

mod choices;
mod flow;
mod kubernetes_lab;
mod outages;
mod refusals;
mod serving;
