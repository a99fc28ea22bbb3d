//! Which of a listener's sockets receives a datagram: classic BPF programs that need no privilege.
//!
//! By default, the kernel selects a socket of the reuseport group by a hash of addresses and ports, so one sender keeps
//! only one worker busy. Under policies that do not keep a sender's order, datagrams are spread at random instead.

use std::os::fd::AsFd;

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{AttachReusePortCbpf, SetStruct};
use socket2::{SockFilter, Socket};

/// `SO_DETACH_REUSEPORT_BPF` of `asm-generic/socket.h`.
const DETACH_REUSEPORT_BPF: libc::c_int = 68;

/// Detaches the group's program.
#[derive(Clone)]
struct DetachReusePortBpf;

nix::setsockopt_impl!(
    DetachReusePortBpf,
    libc::SOL_SOCKET,
    DETACH_REUSEPORT_BPF,
    libc::c_int,
    SetStruct<'_, libc::c_int>
);

const fn instruction(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

/// Spreads the group's datagrams at random over its first `sockets` sockets.
///
/// # Errors
/// When the kernel refuses the program, or the socket is not in a group.
pub fn spread_randomly(group_member: &impl AsFd, sockets: u32) -> anyhow::Result<()> {
    let random = (libc::SKF_AD_OFF + libc::SKF_AD_RANDOM) as u32;
    let mut program = [
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, random),
        instruction(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, sockets.max(1)),
        instruction(libc::BPF_RET | libc::BPF_A, 0),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    setsockopt(group_member, AttachReusePortCbpf, &program)
        .context("cannot attach the program that spreads datagrams over the workers")
}

/// Restores the kernel's hash of addresses and ports, which keeps each sender on one socket.
///
/// # Errors
/// When the kernel refuses. A missing program or group is not an error.
pub fn hash_by_sender(group_member: &impl AsFd) -> anyhow::Result<()> {
    match setsockopt(group_member, DetachReusePortBpf, &0) {
        Ok(()) | Err(Errno::ENOENT | Errno::EINVAL) => Ok(()),
        Err(errno) => Err(errno).context("cannot detach the program that spreads datagrams over the workers"),
    }
}

/// Makes the kernel drop every datagram that arrives for this socket from now on. Queued datagrams stay.
///
/// # Errors
/// When the kernel refuses the program.
pub fn drop_new_datagrams(socket: &Socket) -> anyhow::Result<()> {
    let program = [SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0)];
    socket.attach_filter(&program).context("cannot attach the filter that drops new datagrams")
}
