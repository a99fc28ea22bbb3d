//! What fuzzing feeds: a module for each target, whose `run` takes the bytes of an input and panics where something is wrong.
//!
//! `fuzz_targets/` hands them to libFuzzer, and `tests/fuzz.rs` of the project, which includes this file, replays the inputs
//! that are kept in `seeds/` and `regressions/`.

pub mod bytes;
pub mod config;
pub mod health;
pub mod host;
pub mod kernel;
pub mod preserve_source;
pub mod slices;
pub mod status;
pub mod user;
