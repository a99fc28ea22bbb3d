//! Kernel features and privileges: whether the TC program can run on this host.
//!
//! [`HostFeatures::probe`] collects them, mostly by trying. [`tc_ebpf_support`] judges them and is pure, so that each missing
//! feature is one row of a test. The controller chooses the mode.

use std::ffi::CStr;
use std::fmt;
use std::fs;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr;

use anyhow::{Context, Result};
use caps::{CapSet, Capability, CapsHashSet};
use libbpf_rs::{MapType, ProgramType, libbpf_sys};
use nix::errno::Errno;

use super::programs;

/// The kernel's own types. CO-RE programs are relocated against them when they are loaded.
const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

/// Features of the kernel, and privileges of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFeatures {
    /// As `uname -r` prints it.
    pub kernel_release: String,
    /// The kernel is built with `PREEMPT_RT`.
    pub real_time: bool,
    /// The effective capabilities of this thread.
    pub effective_caps: CapsHashSet,
    /// The kernel has `CAP_BPF` (Linux 5.8). Older kernels require `CAP_SYS_ADMIN` instead.
    pub knows_cap_bpf: bool,
    /// A seccomp filter is in force.
    pub seccomp_filter: bool,
    /// The process is in the initial user namespace. In another one, its capabilities do not apply to BPF.
    pub initial_user_namespace: bool,
    /// The result of loading an empty TC program.
    pub load: Result<(), Errno>,
    /// TC programs may call `bpf_redirect_neigh` (Linux 5.10). None if no program can be loaded. Without it, the program writes
    /// link-layer addresses itself.
    pub redirect_neigh: Option<bool>,
    /// The kernel has BPF ring buffers (Linux 5.8). None if no program can be loaded.
    pub ring_buffer: Option<bool>,
    /// The kernel has TCX (Linux 6.6). None if no program can be loaded.
    pub tcx: Option<bool>,
    /// The kernel offers its types (BTF) in sysfs.
    pub has_btf: bool,
}

/// Why the TC program cannot run on this host. Its text is one line: what is missing, and how to get it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TcUnsupported {
    /// This process lacks a privilege.
    Privilege(String),
    /// The kernel lacks a feature.
    Kernel(String),
}

impl TcUnsupported {
    /// The error message for a listener with `mode = "tc_ebpf"`. Listeners with `mode = "auto"` log the text alone.
    #[must_use]
    pub fn attach_error(&self) -> String {
        match self {
            TcUnsupported::Privilege(what) => {
                format!("failed to attach TC program: permission denied: {what}, or set mode = \"userspace\"")
            }
            TcUnsupported::Kernel(what) => format!("failed to attach TC program: {what}, or set mode = \"userspace\""),
        }
    }
}

impl fmt::Display for TcUnsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TcUnsupported::Privilege(what) | TcUnsupported::Kernel(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for TcUnsupported {}

/// Whether a host with these features can run the TC program.
///
/// # Errors
/// The first thing that is missing. Privileges come before kernel features, because the latter cannot be probed without them.
pub fn tc_ebpf_support(features: &HostFeatures) -> Result<(), TcUnsupported> {
    if let Some(missing) = missing_capabilities(features) {
        return Err(TcUnsupported::Privilege(format!(
            "{missing} missing: run as root, or grant the capabilities (systemd: AmbientCapabilities=, Kubernetes: \
             securityContext.capabilities.add)"
        )));
    }
    match features.load {
        Ok(()) => {}
        Err(Errno::EPERM | Errno::EACCES) => {
            return Err(TcUnsupported::Privilege(refusal_despite_capabilities(features)));
        }
        Err(errno) => {
            return Err(TcUnsupported::Kernel(format!(
                "kernel {} loads no TC program ({errno}): use a kernel built with CONFIG_BPF_SYSCALL and CONFIG_NET_CLS_BPF",
                features.kernel_release
            )));
        }
    }
    if features.real_time && release(&features.kernel_release) >= DROPPED_SOFTIRQ_LOCK {
        return Err(TcUnsupported::Kernel(format!(
            "kernel {} is a real-time kernel (PREEMPT_RT), on which one packet may interrupt the TC program while it handles \
             another: use a kernel without PREEMPT_RT",
            features.kernel_release
        )));
    }
    if !features.has_btf {
        return Err(TcUnsupported::Kernel(format!(
            "kernel {} has no type information at {KERNEL_BTF}: use a kernel built with CONFIG_DEBUG_INFO_BTF, or mount \
             /sys",
            features.kernel_release
        )));
    }
    Ok(())
}

/// The first release whose real-time kernels may be built without `PREEMPT_RT_NEEDS_BH_LOCK` (Linux 6.18, and 6.12 by a later
/// patch; commit 3253cb49cbad). Without that lock, code that runs with bottom halves disabled can be interrupted by other such
/// code on the same CPU. The TC program relies on the opposite: its scratch memory is per CPU.
const DROPPED_SOFTIRQ_LOCK: (u32, u32) = (6, 12);

/// Major and minor version of a release; 0 for a part that is not a number.
fn release(text: &str) -> (u32, u32) {
    let mut numbers = text.split(|other: char| !other.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// The missing capabilities, as the start of a sentence.
///
/// The program needs `CAP_PERFMON` because it adds a header's length, which varies, to a packet pointer. Without that
/// capability, the verifier rejects this as open to speculative execution.
fn missing_capabilities(features: &HostFeatures) -> Option<String> {
    let has = |capability| features.effective_caps.contains(&capability);
    let mut missing = Vec::new();
    if !has(Capability::CAP_SYS_ADMIN) {
        if !features.knows_cap_bpf {
            missing.push(format!("CAP_SYS_ADMIN (kernel {} does not have CAP_BPF yet)", features.kernel_release));
        } else {
            let needed = [Capability::CAP_BPF, Capability::CAP_PERFMON];
            missing.extend(needed.into_iter().filter(|&capability| !has(capability)).map(|name| name.to_string()));
        }
    }
    if !has(Capability::CAP_NET_ADMIN) {
        missing.push("CAP_NET_ADMIN".to_owned());
    }
    match missing.as_slice() {
        [] => None,
        [one] => Some(format!("{one} is")),
        [others @ .., last] => Some(format!("{} and {last} are", others.join(", "))),
    }
}

fn refusal_despite_capabilities(features: &HostFeatures) -> String {
    let capability = if features.knows_cap_bpf { "CAP_BPF" } else { "CAP_SYS_ADMIN" };
    let (cause, fix) = if !features.initial_user_namespace {
        ("it has no effect inside a user namespace", "run outside of it (not in a rootless container)")
    } else if features.seccomp_filter {
        ("a seccomp filter seems to forbid bpf(2)", "allow it in the seccomp profile")
    } else {
        ("a security module (SELinux, AppArmor) seems to forbid bpf(2)", "allow it in its policy")
    };
    format!("{capability} is granted, but {cause}: {fix}")
}

impl HostFeatures {
    /// Probes this host. Loads a few tiny programs and unloads them again.
    ///
    /// # Errors
    /// When this process's capabilities or the kernel's release cannot be read.
    pub fn probe() -> Result<Self> {
        let effective_caps = caps::read(None, CapSet::Effective).context("cannot read this process's capabilities")?;
        let (load, redirect_neigh, ring_buffer, tcx) = quietly(|| {
            let load = load_empty_program();
            // If no program can be loaded at all, libbpf would report the helper as present.
            let redirect_neigh = load.is_ok().then(|| {
                let helper = libbpf_sys::BPF_FUNC_redirect_neigh;
                ProgramType::SchedCls.is_helper_supported(helper).unwrap_or(false)
            });
            let ring_buffer = load.is_ok().then(|| MapType::RingBuf.is_supported().unwrap_or(false));
            let tcx = load.is_ok().then(programs::has_tcx);
            (load, redirect_neigh, ring_buffer, tcx)
        });
        let kernel = nix::sys::utsname::uname().context("cannot read the kernel's release")?;
        Ok(Self {
            kernel_release: kernel.release().to_string_lossy().into_owned(),
            real_time: kernel.version().to_string_lossy().contains("PREEMPT_RT"),
            effective_caps,
            knows_cap_bpf: knows_cap_bpf(),
            seccomp_filter: fs::read_to_string("/proc/thread-self/status")
                .is_ok_and(|status| has_seccomp_filter(&status)),
            initial_user_namespace: fs::read_to_string("/proc/self/uid_map").map_or(true, |map| is_identity_map(&map)),
            load,
            redirect_neigh,
            ring_buffer,
            tcx,
            has_btf: has_btf(),
        })
    }
}

/// Runs `probe` without libbpf's messages on standard error about each failed load: probing expects failures.
fn quietly<T>(probe: impl FnOnce() -> T) -> T {
    let previous = libbpf_rs::set_print(None);
    let answer = probe();
    libbpf_rs::set_print(previous);
    answer
}

/// Loads a TC program that passes every packet, and unloads it again.
fn load_empty_program() -> Result<(), Errno> {
    const LICENSE: &CStr = c"GPL";
    let instruction = |code: u32| {
        #[expect(clippy::cast_possible_truncation, reason = "operation codes are bytes")]
        let code = code as u8;
        libbpf_sys::bpf_insn { code, ..Default::default() }
    };
    // r0 = 0 (which is TC_ACT_OK); exit
    let instructions = [
        instruction(libbpf_sys::BPF_ALU64 | libbpf_sys::BPF_MOV | libbpf_sys::BPF_K),
        instruction(libbpf_sys::BPF_JMP | libbpf_sys::BPF_EXIT),
    ];
    // SAFETY: the instructions and the licence outlive the call, and the length is right; libbpf accepts null for the name and
    // the options.
    let fd = unsafe {
        libbpf_sys::bpf_prog_load(
            libbpf_sys::BPF_PROG_TYPE_SCHED_CLS,
            ptr::null(),
            LICENSE.as_ptr(),
            instructions.as_ptr(),
            instructions.len() as libbpf_sys::size_t,
            ptr::null_mut(),
        )
    };
    if fd < 0 {
        return Err(Errno::from_raw(-fd));
    }
    // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(())
}

fn knows_cap_bpf() -> bool {
    caps::runtime::procfs_all_supported(None)
        .unwrap_or_else(|_| caps::runtime::thread_all_supported())
        .contains(&Capability::CAP_BPF)
}

fn has_btf() -> bool {
    Path::new(KERNEL_BTF).exists()
}

/// Reads `/proc/…/status`, in which 2 means a filter.
fn has_seccomp_filter(status: &str) -> bool {
    status.lines().any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() == "2"))
}

/// Reads `/proc/…/uid_map`: only the initial user namespace maps all users to themselves.
fn is_identity_map(map: &str) -> bool {
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host with all features. Each test removes some.
    fn capable() -> HostFeatures {
        HostFeatures {
            kernel_release: "6.1.0".into(),
            real_time: false,
            effective_caps: CapsHashSet::from([
                Capability::CAP_BPF,
                Capability::CAP_PERFMON,
                Capability::CAP_NET_ADMIN,
            ]),
            knows_cap_bpf: true,
            seccomp_filter: false,
            initial_user_namespace: true,
            load: Ok(()),
            redirect_neigh: Some(true),
            ring_buffer: Some(true),
            tcx: Some(true),
            has_btf: true,
        }
    }

    fn without(capabilities: &[Capability]) -> HostFeatures {
        let mut host = capable();
        for capability in capabilities {
            assert!(host.effective_caps.remove(capability));
        }
        host.load = Err(Errno::EPERM);
        host.redirect_neigh = None;
        host
    }

    fn old(capabilities: &[Capability]) -> HostFeatures {
        HostFeatures {
            kernel_release: "5.4.0".into(),
            knows_cap_bpf: false,
            effective_caps: capabilities.iter().copied().collect(),
            ..capable()
        }
    }

    #[test]
    fn a_capable_host_is_capable() {
        assert_eq!(tc_ebpf_support(&capable()), Ok(()));
    }

    #[test]
    fn a_kernel_without_the_newer_helpers_is_enough() {
        assert_eq!(tc_ebpf_support(&HostFeatures { redirect_neigh: Some(false), ..capable() }), Ok(()));
    }

    #[test]
    fn root_and_the_capabilities_of_old_kernels_are_enough() {
        let mut root = capable();
        root.effective_caps = caps::all();
        assert_eq!(tc_ebpf_support(&root), Ok(()));
        assert_eq!(tc_ebpf_support(&old(&[Capability::CAP_SYS_ADMIN, Capability::CAP_NET_ADMIN])), Ok(()));
    }

    #[test]
    fn a_real_time_kernel_is_enough_while_it_has_the_bottom_half_lock() {
        let kernel = |release: &str| HostFeatures { kernel_release: release.into(), real_time: true, ..capable() };
        assert_eq!(tc_ebpf_support(&kernel("6.1.0-rt10")), Ok(()));
        for newer in ["6.12.57+deb13-rt-amd64", "7.0"] {
            assert!(tc_ebpf_support(&kernel(newer)).unwrap_err().attach_error().contains("real-time"), "{newer}");
        }
    }

    #[test]
    fn a_lack_of_privilege_names_what_is_missing() {
        use Capability::{CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON};
        let refused = HostFeatures { load: Err(Errno::EPERM), redirect_neigh: None, ..capable() };
        let cases = [
            (without(&[CAP_BPF]), "CAP_BPF is missing"),
            (without(&[CAP_NET_ADMIN]), "CAP_NET_ADMIN is missing"),
            (without(&[CAP_PERFMON]), "CAP_PERFMON is missing"),
            (without(&[CAP_BPF, CAP_NET_ADMIN]), "CAP_BPF and CAP_NET_ADMIN are missing"),
            (without(&[CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN]), "CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN are missing"),
            (old(&[CAP_NET_ADMIN]), "CAP_SYS_ADMIN (kernel 5.4.0 does not have CAP_BPF yet) is missing"),
            // CAP_SYS_ADMIN implies CAP_BPF, but not CAP_NET_ADMIN.
            (old(&[Capability::CAP_SYS_ADMIN]), "CAP_NET_ADMIN is missing"),
            (HostFeatures { initial_user_namespace: false, ..refused.clone() }, "inside a user namespace"),
            (HostFeatures { seccomp_filter: true, ..refused.clone() }, "seccomp"),
            (HostFeatures { load: Err(Errno::EACCES), ..refused }, "security module"),
        ];
        for (host, expected) in cases {
            let reason = tc_ebpf_support(&host).unwrap_err();
            assert!(matches!(reason, TcUnsupported::Privilege(_)), "{reason:?}");
            check_wording(&reason, expected);
            let start = "failed to attach TC program: permission denied: ";
            assert!(reason.attach_error().starts_with(start), "{}", reason.attach_error());
        }
    }

    #[test]
    fn a_lack_in_the_kernel_names_what_is_missing() {
        let cases = [
            (
                HostFeatures { load: Err(Errno::ENOSYS), redirect_neigh: None, ..capable() },
                "loads no TC program (ENOSYS",
            ),
            (HostFeatures { load: Err(Errno::EINVAL), redirect_neigh: None, ..capable() }, "CONFIG_BPF_SYSCALL"),
            (HostFeatures { has_btf: false, ..capable() }, "/sys/kernel/btf/vmlinux"),
        ];
        for (host, expected) in cases {
            let reason = tc_ebpf_support(&host).unwrap_err();
            assert!(matches!(reason, TcUnsupported::Kernel(_)), "{reason:?}");
            check_wording(&reason, expected);
            assert!(reason.to_string().contains("kernel 6.1.0"), "{reason}");
            assert!(reason.attach_error().starts_with("failed to attach TC program: kernel 6.1.0"));
            assert!(!reason.attach_error().contains("permission denied"));
        }
    }

    fn check_wording(reason: &TcUnsupported, expected: &str) {
        let text = reason.to_string();
        assert!(text.contains(expected), "{text}");
        assert!(!text.contains('\n') && !text.contains("  "), "{text}");
        assert!(
            reason.attach_error().ends_with(&format!("{text}, or set mode = \"userspace\"")),
            "{}",
            reason.attach_error()
        );
    }

    #[test]
    fn procfs_is_read_as_the_kernel_writes_it() {
        assert!(has_seccomp_filter("Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t1\n"));
        assert!(!has_seccomp_filter("Name:\tx\nSeccomp:\t0\nSeccomp_filters:\t2\n"));
        assert!(is_identity_map("         0          0 4294967295\n"));
        assert!(!is_identity_map("         0       1000          1\n"));
        assert!(!is_identity_map("0 100000 65536\n"));
    }

    #[test]
    fn probing_works_for_any_user() {
        let features = HostFeatures::probe().unwrap();
        assert!(features.kernel_release.contains('.'));
        assert_eq!(features.redirect_neigh.is_some(), features.load.is_ok());
    }
}
