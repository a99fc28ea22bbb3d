//! Health checks against real sockets: receivers that answer, refuse, keep silent or lie, on loopback and in network
//! namespaces.
//!
//! How long anything takes is not asserted, and no test says that a receiver never fails: on a busy machine an answer may
//! be late. What is waited for is a state that only a working check can reach; a receiver that is never validly answered
//! for can never become healthy, and one that answers must.

mod tcp;
mod udp;
