//! The TC program of `bpf/`: loading, attaching, its maps and counters.
