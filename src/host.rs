//! Facts about this host: links, addresses, routes, and what the kernel and our privileges allow.
//!
//! Facts only: nothing here decides anything. The event loop collects [`HostFacts`] (at start, and whenever netlink
//! says that something changed) and hands them to the controller, which decides.

pub mod facts;

pub use facts::{Address, HostFacts, Link, Route};
