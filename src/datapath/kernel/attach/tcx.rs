//! The program in an interface's list of TCX programs (Linux 6.6).
//!
//! Held by a BPF link: the kernel takes the program off when the link's descriptor is closed, so a daemon that dies
//! leaves nothing behind, and on that interface only, whatever gets its index later.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libbpf_rs::libbpf_sys;

use crate::config::TcxOrder;

/// The program's place in the list of one interface. Dropping it takes the program off.
#[derive(Debug)]
pub(super) struct TcxLink {
    link: OwnedFd,
    interface: u32,
}

impl TcxLink {
    /// Puts the program in the list of the interface with this index. It cannot be there twice.
    pub(super) fn new(program: BorrowedFd<'_>, interface: u32, order: TcxOrder) -> io::Result<TcxLink> {
        let index = i32::try_from(interface).map_err(io::Error::other)?;
        let opts = libbpf_sys::bpf_link_create_opts {
            sz: size_of::<libbpf_sys::bpf_link_create_opts>() as libbpf_sys::size_t,
            // Relative to no other program means to all of them.
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

    /// True while the program is in the list: nobody has taken it off, and the interface still exists.
    pub(super) fn in_place(&self) -> bool {
        let mut info = libbpf_sys::bpf_link_info::default();
        let mut length = size_of::<libbpf_sys::bpf_link_info>() as u32;
        // SAFETY: `info` lives across the call and has the length given; it names no buffers to fill.
        let result =
            unsafe { libbpf_sys::bpf_link_get_info_by_fd(self.link.as_raw_fd(), &raw mut info, &raw mut length) };
        // SAFETY: of a TCX link, which this is, the kernel has filled this member; all members are plain numbers.
        result == 0 && unsafe { info.__bindgen_anon_1.tcx.ifindex } == self.interface
    }

    /// To pin it, so that it outlives this value.
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }

    /// Takes the program off, though the link be pinned.
    pub(super) fn detach(self) -> io::Result<()> {
        // SAFETY: takes a number, touches no memory of ours.
        match unsafe { libbpf_sys::bpf_link_detach(self.link.as_raw_fd()) } {
            0 => Ok(()),
            // The interface has gone, or somebody has taken the program off.
            errno if errno == -libc::ENOLINK => Ok(()),
            errno => Err(io::Error::from_raw_os_error(-errno)),
        }
    }
}
