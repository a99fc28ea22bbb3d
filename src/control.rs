//! The status socket: how `udp-fanout status` and `udp-fanout trace` ask a running daemon what it is doing.
//!
//! ```text
//! daemon:  mio ─► server ─► event_loop::report ─► Report      one line of JSON each way: protocol
//! command: status ─► client ─► two Reports ─► rates ─► table, or JSON
//!
//! daemon:  TC program ─► event_loop::trace ─► server ─► Traced, a line each
//! command: follow ─► client ─► lines, or JSON
//! ```
//!
//! The daemon answers on its main thread, between other things, and never waits for a client. It keeps no history:
//! rates are the difference of two reports, and cost nothing while nobody looks.

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
