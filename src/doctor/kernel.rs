//! Checks that do not depend on the network: privileges, kernel, the program itself, ICMP sockets, socket buffers.

use std::collections::BTreeSet;
use std::fs;

use anyhow::Result;
use caps::Capability;

use super::Findings;
use crate::config::{Config, ListenerConfig, RequestedMode};
use crate::datapath::kernel::KernelDatapath;
use crate::health::probers::{SendError, icmp};
use crate::health::settings::ProbeProtocol;
use crate::host::probe::{HostFeatures, TcUnsupported, tc_ebpf_support};

/// Runs these checks. Returns whether the kernel program can be used.
pub(super) fn check(config: &Config, findings: &mut Findings) -> Result<Result<(), TcUnsupported>> {
    let features = HostFeatures::probe()?;
    let support = if config.listeners.iter().all(|listener| listener.mode == RequestedMode::Userspace) {
        Ok(())
    } else {
        let support = tc_ebpf_support(&features).and_then(|()| load(config));
        judge_support(&features, &support, demanded(config), findings);
        support
    };
    check_icmp(config, findings);
    let allowed = features.effective_caps.contains(&Capability::CAP_NET_ADMIN);
    judge_buffers(config, allowed, number("/proc/sys/net/core/rmem_max"), findings);
    Ok(support)
}

fn demanded(config: &Config) -> bool {
    config.listeners.iter().any(|listener| listener.mode == RequestedMode::TcEbpf)
}

/// Loads the program as the daemon would, with maps of the configured sizes, and unloads it again.
fn load(config: &Config) -> Result<(), TcUnsupported> {
    KernelDatapath::new(&config.limits).map(drop).map_err(|error| TcUnsupported::Kernel(format!("{error:#}")))
}

fn judge_support(
    features: &HostFeatures,
    support: &Result<(), TcUnsupported>,
    demanded: bool,
    findings: &mut Findings,
) {
    let release = &features.kernel_release;
    let (check, reason) = match support {
        Ok(()) => {
            findings.ok("privileges", "this process may load and attach the kernel program");
            findings.ok("kernel", format!("{release} has all features that the kernel program needs, and loads it"));
            return;
        }
        Err(reason @ TcUnsupported::Privilege(_)) => ("privileges", reason),
        Err(reason @ TcUnsupported::Kernel(_)) => ("kernel", reason),
    };
    let text = reason.to_string();
    let (what, fix) = text.split_once(": ").unwrap_or((&text, "grant or install what is missing"));
    if demanded {
        findings.problem(check, what, format!("{fix}, or set mode = \"userspace\""));
    } else {
        findings.warning(check, format!("{what}, so mode = \"auto\" selects userspace"), fix);
    }
}

/// Whether ICMP health checks can be sent.
fn check_icmp(config: &Config, findings: &mut Findings) {
    let pings = |l: &&ListenerConfig| l.health.as_ref().is_some_and(|h| h.probe.protocol == ProbeProtocol::Icmp);
    let families: BTreeSet<bool> = config.listeners.iter().filter(pings).map(|l| l.bind.is_ipv6()).collect();
    for v6 in families {
        let name = if v6 { "IPv6" } else { "IPv4" };
        match icmp::open(v6) {
            Ok((_, access)) => {
                let how = if access == icmp::IcmpSocketKind::Ping { "a ping socket" } else { "a raw socket" };
                findings.ok("ping", format!("ICMP health checks can be sent over {name}, through {how}"));
            }
            Err(SendError::Local(reason)) => {
                let (what, fix) = reason.split_once("; ").unwrap_or((&reason, "set another health.protocol"));
                findings.problem("ping", format!("ICMP health checks cannot be sent over {name}: {what}"), fix);
            }
            Err(SendError::Target(failure)) => {
                let fix = "give this host an address of that IP version, or set another health.protocol";
                findings.problem("ping", format!("ICMP health checks cannot be sent over {name}: {failure}"), fix);
            }
        }
    }
}

/// Whether the configured receive buffers are available. `forced`: this process may exceed `rmem_max`.
fn judge_buffers(config: &Config, forced: bool, rmem_max: Option<u64>, findings: &mut Findings) {
    let Some(most) = rmem_max else { return };
    for listener in &config.listeners {
        let Some(wanted) = listener.settings.recv_buf_size else { continue };
        let name = &listener.name;
        if forced || u64::from(wanted) <= most {
            findings.ok("buffer", format!("listener {name:?}: a receive buffer of {wanted} bytes is available"));
        } else {
            findings.warning(
                "buffer",
                format!(
                    "listener {name:?}: recv_buf_size is {wanted}, but the kernel limits it to {most} (net.core.rmem_max)"
                ),
                format!("sysctl -w net.core.rmem_max={wanted}, or grant CAP_NET_ADMIN, which may exceed it"),
            );
        }
    }
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::Severity;
    use super::*;

    fn config(text: &str) -> Config {
        let text = format!(
            "[[listeners]]\nname = \"a\"\nbind = \"0.0.0.0:1\"\ndownstream = [{{ address = \"10.0.0.1:1\" }}]\n{text}"
        );
        Config::parse(&text, Path::new("c.toml")).unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn a_buffer_beyond_the_limit_needs_a_privilege() {
        let wanting = config("settings = { recv_buf_size = 1000000 }\n");
        for (forced, most, level) in
            [(false, 1_000_000, Severity::Ok), (false, 999_999, Severity::Warning), (true, 1, Severity::Ok)]
        {
            let mut findings = Findings::default();
            judge_buffers(&wanting, forced, Some(most), &mut findings);
            assert_eq!(findings.0.iter().map(|finding| finding.level).collect::<Vec<_>>(), [level]);
        }
        let mut findings = Findings::default();
        judge_buffers(&config(""), false, Some(1), &mut findings);
        assert!(findings.0.is_empty(), "the host's default needs no check");
    }

    #[test]
    fn an_unusable_program_is_a_problem_only_if_it_is_demanded() {
        let features = HostFeatures::probe().unwrap();
        let missing = Err(TcUnsupported::Privilege("CAP_BPF is missing: run as root".into()));
        let judge = |demanded| {
            let mut findings = Findings::default();
            judge_support(&features, &missing, demanded, &mut findings);
            findings.0.remove(0)
        };
        let demanded = judge(true);
        assert_eq!(
            (demanded.level, demanded.check, demanded.text.as_str()),
            (Severity::Problem, "privileges", "CAP_BPF is missing")
        );
        assert_eq!(demanded.fix.as_deref(), Some("run as root, or set mode = \"userspace\""));
        assert_eq!(judge(false).level, Severity::Warning);
    }
}
