//! A TCX program on an interface (Linux 6.6).
//!
//! It is held by a BPF link: the kernel detaches the program when the link's last descriptor is closed, so a daemon
//! that dies leaves nothing behind. The link is bound to its interface and ignores a new one with the same index.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libbpf_rs::libbpf_sys;

use crate::config::TcxOrder;

/// The program's place in an interface's TCX list. Dropping it detaches the program, unless the link is pinned.
#[derive(Debug)]
pub(super) struct TcxLink {
    link: OwnedFd,
    interface: u32,
}

impl TcxLink {
    /// Attaches the program to the interface with this index. A list takes a program only once.
    pub(super) fn new(program: BorrowedFd<'_>, interface: u32, order: TcxOrder) -> io::Result<TcxLink> {
        let index = i32::try_from(interface).map_err(io::Error::other)?;
        let opts = libbpf_sys::bpf_link_create_opts {
            sz: size_of::<libbpf_sys::bpf_link_create_opts>() as libbpf_sys::size_t,
            // Without another program as reference: before or after all of them.
            flags: match order {
                TcxOrder::First => libbpf_sys::BPF_F_BEFORE,
                TcxOrder::Last => libbpf_sys::BPF_F_AFTER,
            },
            ..Default::default()
        };
        // SAFETY: takes numbers, and the options, which live across the call.
        let fd = unsafe {
            libbpf_sys::bpf_link_create(program.as_raw_fd(), index, libbpf_sys::BPF_TCX_INGRESS, &raw const opts)
        };
        if fd < 0 {
            return Err(io::Error::from_raw_os_error(-fd));
        }
        // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
        Ok(TcxLink { link: unsafe { OwnedFd::from_raw_fd(fd) }, interface })
    }

    /// True while the program is in the list: nothing has detached it, and the interface exists.
    pub(super) fn in_place(&self) -> bool {
        let mut info = libbpf_sys::bpf_link_info::default();
        let mut length = size_of::<libbpf_sys::bpf_link_info>() as u32;
        // SAFETY: `info` lives across the call and has the length given; it names no buffers to fill.
        let result =
            unsafe { libbpf_sys::bpf_link_get_info_by_fd(self.link.as_raw_fd(), &raw mut info, &raw mut length) };
        // SAFETY: of a TCX link, which this is, the kernel has filled this member; all members are plain numbers.
        result == 0 && unsafe { info.__bindgen_anon_1.tcx.ifindex } == self.interface
    }

    /// The link, for pinning.
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }

    /// Detaches the program, even if the link is pinned.
    pub(super) fn detach(self) -> io::Result<()> {
        // SAFETY: takes a number, touches no memory of ours.
        match unsafe { libbpf_sys::bpf_link_detach(self.link.as_raw_fd()) } {
            0 => Ok(()),
            // The interface is gone, or something else has detached the program.
            errno if errno == -libc::ENOLINK => Ok(()),
            errno => Err(io::Error::from_raw_os_error(-errno)),
        }
    }
}
