//! Health.

pub mod keys;
pub mod model;
pub mod settings;
pub mod share;
pub mod state;
pub mod tally;
