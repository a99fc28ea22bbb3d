//! The userspace datapath: sockets and worker threads.
