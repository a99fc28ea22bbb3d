//! BPF programs attached to an interface through the kernel's program lists (TCX since Linux 6.6, netkit), or as XDP.

use std::ffi::CStr;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use libbpf_rs::libbpf_sys;

/// An attachment point with a list of programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Incoming packets, before any TC filter.
    TcxIngress,
    /// Outgoing packets, before any TC filter.
    TcxEgress,
    /// Packets that the host sends into a pod over netkit.
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

/// The kernel's limit for one list (`BPF_MPROG_MAX`).
const MAX_PROGRAMS: usize = 64;

/// The ids of the programs in an interface's list, in the order in which they run, in the network namespace of the calling
/// thread. Empty on kernels without such lists.
///
/// # Errors
/// When the kernel refuses: without `CAP_NET_ADMIN`, or because there is no such interface.
pub fn list(link: u32, hook: Hook) -> io::Result<Vec<u32>> {
    let link = i32::try_from(link).map_err(io::Error::other)?;
    let mut ids = [0u32; MAX_PROGRAMS];
    let mut opts = libbpf_sys::bpf_prog_query_opts {
        sz: size_of::<libbpf_sys::bpf_prog_query_opts>() as libbpf_sys::size_t,
        prog_ids: ids.as_mut_ptr(),
        ..Default::default()
    };
    opts.__bindgen_anon_1.count = MAX_PROGRAMS as u32;
    // SAFETY: the options and their array outlive the call, and the array has `count` entries.
    let result = unsafe { libbpf_sys::bpf_prog_query_opts(link, hook.number(), &raw mut opts) };
    match -result {
        0 => {
            // SAFETY: both members of the union are the same `u32`.
            let count = unsafe { opts.__bindgen_anon_1.count } as usize;
            Ok(ids[..count.min(MAX_PROGRAMS)].to_vec())
        }
        // The kernel does not have this list.
        libc::EINVAL => Ok(Vec::new()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// True if the kernel has TCX. Needs `CAP_NET_ADMIN`; false without it.
#[must_use]
pub fn has_tcx() -> bool {
    let mut opts = libbpf_sys::bpf_prog_query_opts {
        sz: size_of::<libbpf_sys::bpf_prog_query_opts>() as libbpf_sys::size_t,
        ..Default::default()
    };
    /// The index of the loopback interface, the same in every network namespace.
    const LOOPBACK: i32 = 1;
    // SAFETY: the options outlive the call and refer to no buffers.
    unsafe { libbpf_sys::bpf_prog_query_opts(LOOPBACK, Hook::TcxIngress.number(), &raw mut opts) == 0 }
}

/// The id of the XDP program on an interface, if there is one.
#[must_use]
pub fn xdp(link: u32) -> Option<u32> {
    let index = i32::try_from(link).ok()?;
    let mut id = 0;
    // SAFETY: `id` outlives the call, which writes it.
    let found = unsafe { libbpf_sys::bpf_xdp_query_id(index, 0, &raw mut id) } == 0;
    (found && id != 0).then_some(id)
}

/// A program's name and id, or its id alone if the name cannot be read.
#[must_use]
pub fn describe(id: u32) -> String {
    match name(id) {
        Some(name) if !name.is_empty() => format!("{name} (program {id})"),
        _ => format!("program {id}"),
    }
}

/// A program's name, of which the kernel keeps 15 bytes. None without `CAP_SYS_ADMIN`.
#[must_use]
pub fn name(id: u32) -> Option<String> {
    // SAFETY: the call takes a number and accesses no memory of this process.
    let fd = unsafe { libbpf_sys::bpf_prog_get_fd_by_id(id) };
    if fd < 0 {
        return None;
    }
    // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut info = libbpf_sys::bpf_prog_info::default();
    let mut length = size_of::<libbpf_sys::bpf_prog_info>() as u32;
    // SAFETY: `info` outlives the call, has the given length and refers to no buffers.
    let result = unsafe { libbpf_sys::bpf_prog_get_info_by_fd(fd.as_raw_fd(), &raw mut info, &raw mut length) };
    if result != 0 {
        return None;
    }
    let bytes = info.name.map(i8::cast_unsigned);
    CStr::from_bytes_until_nul(&bytes).ok().map(|name| name.to_string_lossy().into_owned())
}
