//! The kernel program in `BPF_PROG_TEST_RUN`: packets, test runs, and an oracle that predicts their outcome.

pub mod differential;
pub mod fragments;
pub mod oracle;
pub mod packet;
pub mod run;
