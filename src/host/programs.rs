//! BPF programs attached to an interface by way of the kernel's list of them (TCX since Linux 6.6, netkit), or as XDP.

use std::ffi::CStr;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use libbpf_rs::libbpf_sys;

/// A list of programs that an interface can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// What comes in, before any TC filter.
    TcxIngress,
    /// What goes out, before any TC filter.
    TcxEgress,
    /// What the host sends into a pod over netkit.
    NetkitPrimary,
}

impl Hook {
    fn number(self) -> libbpf_sys::bpf_attach_type {
        match self {
            Hook::TcxIngress => libbpf_sys::BPF_TCX_INGRESS,
            Hook::TcxEgress => libbpf_sys::BPF_TCX_EGRESS,
            Hook::NetkitPrimary => libbpf_sys::BPF_NETKIT_PRIMARY,
        }
    }
}

/// The most programs that the kernel takes in one list (`BPF_MPROG_MAX`).
const MOST: usize = 64;

/// The ids of the programs in an interface's list, in the order they run, in the network namespace of the calling thread.
/// None on kernels without such lists.
///
/// # Errors
/// When the kernel refuses: without `CAP_NET_ADMIN`, or because there is no such interface.
pub fn list(link: u32, hook: Hook) -> io::Result<Vec<u32>> {
    let link = i32::try_from(link).map_err(io::Error::other)?;
    let mut ids = [0u32; MOST];
    let mut opts = libbpf_sys::bpf_prog_query_opts {
        sz: size_of::<libbpf_sys::bpf_prog_query_opts>() as libbpf_sys::size_t,
        prog_ids: ids.as_mut_ptr(),
        ..Default::default()
    };
    opts.__bindgen_anon_1.count = MOST as u32;
    // SAFETY: the options live across the call, and their array has as many entries as they say.
    let result = unsafe { libbpf_sys::bpf_prog_query_opts(link, hook.number(), &raw mut opts) };
    match -result {
        0 => {
            // SAFETY: both members of the union are the same number.
            let count = unsafe { opts.__bindgen_anon_1.count } as usize;
            Ok(ids[..count.min(MOST)].to_vec())
        }
        // The kernel does not know this list.
        libc::EINVAL => Ok(Vec::new()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// True if the kernel has lists of TCX programs. Takes `CAP_NET_ADMIN`.
#[must_use]
pub fn has_tcx() -> bool {
    let mut opts = libbpf_sys::bpf_prog_query_opts {
        sz: size_of::<libbpf_sys::bpf_prog_query_opts>() as libbpf_sys::size_t,
        ..Default::default()
    };
    /// The loopback interface, which every network namespace has, under this index.
    const LOOPBACK: i32 = 1;
    // SAFETY: the options live across the call; they name no buffers to fill.
    unsafe { libbpf_sys::bpf_prog_query_opts(LOOPBACK, Hook::TcxIngress.number(), &raw mut opts) == 0 }
}

/// The XDP program on an interface, by id, if there is one.
#[must_use]
pub fn xdp(link: u32) -> Option<u32> {
    let index = i32::try_from(link).ok()?;
    let mut id = 0;
    // SAFETY: `id` is ours and lives across the call, which writes it.
    let found = unsafe { libbpf_sys::bpf_xdp_query_id(index, 0, &raw mut id) } == 0;
    (found && id != 0).then_some(id)
}

/// What to call a program: its name, which takes `CAP_SYS_ADMIN` to find out, or its id.
#[must_use]
pub fn describe(id: u32) -> String {
    match name(id) {
        Some(name) if !name.is_empty() => format!("{name} (program {id})"),
        _ => format!("program {id}"),
    }
}

/// A program's name, as far as the kernel keeps it: 15 bytes. None without `CAP_SYS_ADMIN`.
#[must_use]
pub fn name(id: u32) -> Option<String> {
    // SAFETY: takes a number, touches no memory of ours.
    let fd = unsafe { libbpf_sys::bpf_prog_get_fd_by_id(id) };
    if fd < 0 {
        return None;
    }
    // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut info = libbpf_sys::bpf_prog_info::default();
    let mut length = size_of::<libbpf_sys::bpf_prog_info>() as u32;
    // SAFETY: `info` lives across the call and has the length given; it names no buffers to fill.
    let result = unsafe { libbpf_sys::bpf_prog_get_info_by_fd(fd.as_raw_fd(), &raw mut info, &raw mut length) };
    if result != 0 {
        return None;
    }
    let bytes = info.name.map(i8::cast_unsigned);
    CStr::from_bytes_until_nul(&bytes).ok().map(|name| name.to_string_lossy().into_owned())
}
