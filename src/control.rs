//! The status socket: `udp-fanout status` and `udp-fanout trace` ask a running daemon over it; so can curl.
//!
//! ```text
//! daemon:  event loop ─► server ─► event_loop::status ─► assemble ─► StatusReport      HTTP: protocol
//! command: status_command ─► client ─► two StatusReports ─► rates ─► tables, or JSON
//!
//! daemon:  TC program ─► event_loop::trace ─► throttle ─► server ─► TraceRecord, a line each
//! command: trace_command ─► client ─► lines, or JSON
//! ```
//!
//! The daemon answers on its main thread, between other events, and waits for no client. It keeps no history: rates are the
//! difference of two reports, and cost nothing while nobody asks.

pub mod assemble;
pub mod client;

pub mod protocol;
pub mod rates;
pub mod report;
pub mod server;
pub mod status_command;
pub mod tables;
pub mod throttle;
pub mod trace;
pub mod trace_command;
