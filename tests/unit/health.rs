//! Health checks against real sockets: receivers that reply, refuse, time out or send wrong replies, on loopback and in
//! network namespaces.
//!
//! No test asserts durations, or that a receiver never fails: on a busy machine a reply may
//! be late. Tests wait for a state that only a working check can reach: a receiver without valid replies
//! can never become healthy, and one with valid replies must.

mod tcp;
mod udp;
