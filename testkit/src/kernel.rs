//! The kernel program in `BPF_PROG_TEST_RUN`: packets, one run, and an oracle that predicts its outcome.

pub mod oracle;
pub mod packet;
pub mod pieces;
pub mod run;
pub mod trial;
