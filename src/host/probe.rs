//! What the kernel and our privileges allow: whether the TC program could run here.
//!
//! [`Ability::probe`] gathers facts, mostly by trying; [`tc_ebpf_support`] judges them and is pure, so that every way in
//! which a host can fall short is one row of a test. Which mode follows from that is the controller's decision.

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

/// Where the kernel offers its own types, which CO-RE programs are fitted to when they are loaded.
const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

/// Set to anything, makes this host look like one whose kernel lacks `bpf_redirect_neigh`, ring buffers and TCX, so that tests
/// can show what happens there.
const PRETEND_OLD: &str = "UDP_FANOUT_PRETEND_OLD_KERNEL";

/// What was found out about the kernel and about this process's privileges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ability {
    /// As `uname -r` prints it.
    pub kernel_release: String,
    /// The kernel is a real-time one (`PREEMPT_RT`).
    pub real_time: bool,
    /// The capabilities this thread may use.
    pub effective_caps: CapsHashSet,
    /// The kernel knows `CAP_BPF` (Linux 5.8); before that, `CAP_SYS_ADMIN` stands for it.
    pub knows_cap_bpf: bool,
    /// A seccomp filter is in force.
    pub seccomp_filter: bool,
    /// The process is in the initial user namespace. In another, capabilities don't count for BPF.
    pub initial_user_namespace: bool,
    /// Whether the kernel loaded a TC program that does nothing.
    pub load: Result<(), Errno>,
    /// Whether TC programs may call `bpf_redirect_neigh` (Linux 5.10). None where none can be loaded. Without it, the
    /// program addresses frames itself.
    pub redirect_neigh: Option<bool>,
    /// Whether the kernel has BPF ring buffers (Linux 5.8). None where nothing can be loaded.
    pub ring_buffer: Option<bool>,
    /// Whether the kernel has TCX (Linux 6.6). None where nothing can be loaded.
    pub tcx: Option<bool>,
    /// Kernel types are at hand.
    pub has_btf: bool,
}

/// Why the TC program cannot run here. As text: one line that says what is missing and how to get it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Obstacle {
    /// This process may not.
    Privilege(String),
    /// The kernel cannot.
    Kernel(String),
}

impl Obstacle {
    /// The error message for a listener that demands `tc_ebpf`. The text alone is for one that would rather have it, and
    /// gets by without.
    #[must_use]
    pub fn refusal(&self) -> String {
        match self {
            Obstacle::Privilege(what) => {
                format!("failed to attach TC program: permission denied: {what}, or set mode = \"userspace\"")
            }
            Obstacle::Kernel(what) => format!("failed to attach TC program: {what}, or set mode = \"userspace\""),
        }
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Obstacle::Privilege(what) | Obstacle::Kernel(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for Obstacle {}

/// Whether a host of this ability can run the TC program.
///
/// # Errors
/// The first thing that is missing: privileges before anything the kernel lacks, since without the former the latter
/// cannot be known.
pub fn tc_ebpf_support(ability: &Ability) -> Result<(), Obstacle> {
    if let Some(missing) = missing_capabilities(ability) {
        return Err(Obstacle::Privilege(format!(
            "{missing} missing: run as root, or add what is missing (systemd: AmbientCapabilities=, Kubernetes: \
             securityContext.capabilities.add)"
        )));
    }
    match ability.load {
        Ok(()) => {}
        Err(Errno::EPERM | Errno::EACCES) => {
            return Err(Obstacle::Privilege(refused_in_spite_of_capabilities(ability)));
        }
        Err(errno) => {
            return Err(Obstacle::Kernel(format!(
                "kernel {} loads no TC program ({errno}): it needs CONFIG_BPF_SYSCALL and CONFIG_NET_CLS_BPF",
                ability.kernel_release
            )));
        }
    }
    if ability.real_time && release(&ability.kernel_release) >= DROPPED_SOFTIRQ_LOCK {
        return Err(Obstacle::Kernel(format!(
            "kernel {} is a real-time one (PREEMPT_RT), on which one packet may interrupt the TC program at work on another: \
             use a kernel that is none",
            ability.kernel_release
        )));
    }
    if !ability.has_btf {
        return Err(Obstacle::Kernel(format!(
            "kernel {} does not offer its types at {KERNEL_BTF}: use a kernel built with CONFIG_DEBUG_INFO_BTF (or \
             mount /sys)",
            ability.kernel_release
        )));
    }
    Ok(())
}

/// From here on a real-time kernel may be built without `PREEMPT_RT_NEEDS_BH_LOCK` (Linux 6.18, and 6.12 by a later patch;
/// commit 3253cb49cbad). Without it, what runs with bottom halves disabled no longer has its CPU to itself, on which the
/// program relies: it keeps the packet that it is at work on in memory of the CPU's.
const DROPPED_SOFTIRQ_LOCK: (u32, u32) = (6, 12);

/// The first two numbers of a release, 0 for what is none.
fn release(text: &str) -> (u32, u32) {
    let mut numbers = text.split(|other: char| !other.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// The capabilities that are missing, as the start of a sentence.
///
/// `CAP_PERFMON` is needed because the program adds a header's length, which varies, to a packet pointer. Without it,
/// the verifier takes that for an invitation to speculate.
fn missing_capabilities(ability: &Ability) -> Option<String> {
    let has = |capability| ability.effective_caps.contains(&capability);
    let mut missing = Vec::new();
    if !has(Capability::CAP_SYS_ADMIN) {
        if !ability.knows_cap_bpf {
            missing.push(format!("CAP_SYS_ADMIN (kernel {} does not know CAP_BPF yet)", ability.kernel_release));
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

fn refused_in_spite_of_capabilities(ability: &Ability) -> String {
    let capability = if ability.knows_cap_bpf { "CAP_BPF" } else { "CAP_SYS_ADMIN" };
    let (cause, fix) = if !ability.initial_user_namespace {
        ("it does not count inside a user namespace", "run outside of it (not in a rootless container)")
    } else if ability.seccomp_filter {
        ("a seccomp filter seems to forbid bpf(2)", "allow it in the seccomp profile")
    } else {
        ("a security module (SELinux, AppArmor) seems to forbid bpf(2)", "allow it in its policy")
    };
    format!("{capability} is there, but {cause}: {fix}")
}

impl Ability {
    /// Finds out. Loads two tiny programs to see what happens, and leaves nothing behind.
    ///
    /// # Errors
    /// When the process cannot read its own capabilities.
    pub fn probe() -> Result<Self> {
        let effective_caps = caps::read(None, CapSet::Effective).context("cannot read this process's capabilities")?;
        let current = std::env::var_os(PRETEND_OLD).is_none();
        let (load, redirect_neigh, ring_buffer, tcx) = quietly(|| {
            let load = load_nothing();
            // libbpf takes a refusal to load anything at all for the helper's existence.
            let redirect_neigh = load.is_ok().then(|| {
                let helper = libbpf_sys::BPF_FUNC_redirect_neigh;
                current && ProgramType::SchedCls.is_helper_supported(helper).unwrap_or(false)
            });
            let ring_buffer = load.is_ok().then(|| current && MapType::RingBuf.is_supported().unwrap_or(false));
            let tcx = load.is_ok().then(|| current && programs::has_tcx());
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

/// Runs `probe` with libbpf silenced: it reports every failed load on standard error, and failing is half the point.
fn quietly<T>(probe: impl FnOnce() -> T) -> T {
    let previous = libbpf_rs::set_print(None);
    let answer = probe();
    libbpf_rs::set_print(previous);
    answer
}

/// Loads a TC program that lets every packet pass, and lets go of it again.
fn load_nothing() -> Result<(), Errno> {
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
    // SAFETY: the instructions and the licence are valid for the whole call and as long as stated; libbpf accepts null
    // for a name and for options.
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
    // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
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

/// Reads `/proc/…/status`, in which 2 stands for a filter.
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

    /// A host on which everything is as it should be. Each test takes something away.
    fn capable() -> Ability {
        Ability {
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

    fn without(capabilities: &[Capability]) -> Ability {
        let mut host = capable();
        for capability in capabilities {
            assert!(host.effective_caps.remove(capability));
        }
        host.load = Err(Errno::EPERM);
        host.redirect_neigh = None;
        host
    }

    fn old(capabilities: &[Capability]) -> Ability {
        Ability {
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
    fn a_kernel_without_the_newer_helpers_will_do() {
        assert_eq!(tc_ebpf_support(&Ability { redirect_neigh: Some(false), ..capable() }), Ok(()));
    }

    #[test]
    fn root_and_the_old_kernels_way_will_do_as_well() {
        let mut root = capable();
        root.effective_caps = caps::all();
        assert_eq!(tc_ebpf_support(&root), Ok(()));
        assert_eq!(tc_ebpf_support(&old(&[Capability::CAP_SYS_ADMIN, Capability::CAP_NET_ADMIN])), Ok(()));
    }

    #[test]
    fn a_real_time_kernel_will_do_while_it_keeps_packets_apart() {
        let kernel = |release: &str| Ability { kernel_release: release.into(), real_time: true, ..capable() };
        assert_eq!(tc_ebpf_support(&kernel("6.1.0-rt10")), Ok(()));
        for newer in ["6.12.57+deb13-rt-amd64", "7.0"] {
            assert!(tc_ebpf_support(&kernel(newer)).unwrap_err().refusal().contains("real-time"), "{newer}");
        }
    }

    #[test]
    fn a_lack_of_privilege_names_what_is_missing() {
        use Capability::{CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON};
        let refused = Ability { load: Err(Errno::EPERM), redirect_neigh: None, ..capable() };
        let cases = [
            (without(&[CAP_BPF]), "CAP_BPF is missing"),
            (without(&[CAP_NET_ADMIN]), "CAP_NET_ADMIN is missing"),
            (without(&[CAP_PERFMON]), "CAP_PERFMON is missing"),
            (without(&[CAP_BPF, CAP_NET_ADMIN]), "CAP_BPF and CAP_NET_ADMIN are missing"),
            (without(&[CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN]), "CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN are missing"),
            (old(&[CAP_NET_ADMIN]), "CAP_SYS_ADMIN (kernel 5.4.0 does not know CAP_BPF yet) is missing"),
            // CAP_SYS_ADMIN stands for CAP_BPF, but not for CAP_NET_ADMIN.
            (old(&[Capability::CAP_SYS_ADMIN]), "CAP_NET_ADMIN is missing"),
            (Ability { initial_user_namespace: false, ..refused.clone() }, "inside a user namespace"),
            (Ability { seccomp_filter: true, ..refused.clone() }, "seccomp"),
            (Ability { load: Err(Errno::EACCES), ..refused }, "security module"),
        ];
        for (host, expected) in cases {
            let obstacle = tc_ebpf_support(&host).unwrap_err();
            assert!(matches!(obstacle, Obstacle::Privilege(_)), "{obstacle:?}");
            check_wording(&obstacle, expected);
            let start = "failed to attach TC program: permission denied: ";
            assert!(obstacle.refusal().starts_with(start), "{}", obstacle.refusal());
        }
    }

    #[test]
    fn a_lack_in_the_kernel_names_what_is_missing() {
        let cases = [
            (Ability { load: Err(Errno::ENOSYS), redirect_neigh: None, ..capable() }, "loads no TC program (ENOSYS"),
            (Ability { load: Err(Errno::EINVAL), redirect_neigh: None, ..capable() }, "CONFIG_BPF_SYSCALL"),
            (Ability { has_btf: false, ..capable() }, "/sys/kernel/btf/vmlinux"),
        ];
        for (host, expected) in cases {
            let obstacle = tc_ebpf_support(&host).unwrap_err();
            assert!(matches!(obstacle, Obstacle::Kernel(_)), "{obstacle:?}");
            check_wording(&obstacle, expected);
            assert!(obstacle.to_string().contains("kernel 6.1.0"), "{obstacle}");
            assert!(obstacle.refusal().starts_with("failed to attach TC program: kernel 6.1.0"));
            assert!(!obstacle.refusal().contains("permission denied"));
        }
    }

    fn check_wording(obstacle: &Obstacle, expected: &str) {
        let text = obstacle.to_string();
        assert!(text.contains(expected), "{text}");
        assert!(!text.contains('\n') && !text.contains("  "), "{text}");
        assert!(
            obstacle.refusal().ends_with(&format!("{text}, or set mode = \"userspace\"")),
            "{}",
            obstacle.refusal()
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
    fn probing_works_whoever_runs_it() {
        let ability = Ability::probe().unwrap();
        assert!(ability.kernel_release.contains('.'));
        assert_eq!(ability.redirect_neigh.is_some(), ability.load.is_ok());
    }
}
