//! Interfaces: whether they exist and have a carrier, and which foreign programs precede ours on them. Also, whether the
//! listeners' addresses can be bound.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};

use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;

use super::Findings;
use crate::config::{Config, Interfaces, ListenerConfig, RequestedMode, TcxOrder};
use crate::controller::ModeChoice;
use crate::controller::mode::choose as choose_mode;
use crate::datapath::kernel::attach::{self, AttachMode, HANDLE, PRIORITY, PROGRAM_NAME};
use crate::host::filters::{TcFilter, ingress_filters};
use crate::host::preceding_programs::{self, ProgramPosition};
use crate::host::probe::TcUnsupported;
use crate::host::programs::{self, Hook};
use crate::host::{HostFacts, Link};
use crate::model::{ListenerId, Mode};

/// The datapath that each listener would get. A listener that could not run becomes a finding and is left out.
pub(super) fn choose_modes(
    config: &Config,
    tc_support: &Result<(), TcUnsupported>,
    facts: &HostFacts,
    findings: &mut Findings,
) -> BTreeMap<ListenerId, ModeChoice> {
    let mut choices = BTreeMap::new();
    for listener in &config.listeners {
        let name = &listener.name;
        // `kernel::check` has reported what the program lacks. This is about interfaces.
        let support = if listener.mode == RequestedMode::TcEbpf { &Ok(()) } else { tc_support };
        match choose_mode(listener, support, facts) {
            Ok(choice) => {
                let fell_back = listener.mode == RequestedMode::Auto && choice.mode == Mode::Userspace;
                if fell_back && tc_support.is_ok() && !listener.bind.ip().is_loopback() {
                    findings.warning(
                        "interface",
                        format!("listener {name:?}: mode = \"auto\" selects userspace: {}", choice.reason),
                        "correct `interface`, or set mode = \"userspace\" if that is intended",
                    );
                }
                choices.insert(listener.id, choice);
            }
            Err(error) => {
                let fix = "correct `interface`, or set mode = \"userspace\"";
                findings.problem("interface", format!("{error:#}"), fix);
            }
        }
    }
    choices
}

/// Checks the interfaces that the listeners use, and their addresses.
pub(super) fn check(
    config: &Config,
    choices: &BTreeMap<ListenerId, ModeChoice>,
    facts: &HostFacts,
    daemon_runs: bool,
    findings: &mut Findings,
) {
    let running = running();
    let links = attached_links(config, choices, facts);
    if let Err(error) = AttachMode::choose(config.attach, programs::has_tcx())
        && !links.is_empty()
    {
        let text = format!("{error:#}");
        let (what, fix) = text.split_once("; ").unwrap_or((&text, "set attach = \"clsact\""));
        findings.problem("attach", what, fix);
    }
    for link in links {
        judge_link(link, running.as_ref().map(|running| running.contains(&link.name)), findings);
        let looked = preceding_programs::list(link.index, program_position(config, link.index))
            .and_then(|preceding| Ok((preceding, ingress_filters(link.index)?)));
        match looked {
            Ok((preceding, filters)) => judge_programs(link, &filters, &preceding, daemon_runs, findings),
            Err(error) => {
                findings.warning(
                    "filter",
                    format!("{}: {error:#}", link.name),
                    format!("see `bpftool net show dev {0}` and `tc filter show dev {0} ingress`", link.name),
                );
            }
        }
    }
    for listener in &config.listeners {
        let kernel = choices.get(&listener.id).is_some_and(|choice| choice.mode == Mode::TcEbpf);
        let free = if daemon_runs { Ok(()) } else { try_bind(listener.bind) };
        judge_bind(listener, kernel, facts, free, findings);
    }
}

/// The kernel program's position on a link, or where it would be if it were attached now.
fn program_position(config: &Config, link: u32) -> ProgramPosition {
    match AttachMode::choose(config.attach, programs::has_tcx()) {
        Ok(AttachMode::Tcx(order)) => {
            let there = programs::list(link, Hook::TcxIngress).unwrap_or_default();
            let ours = there.iter().find(|&&id| programs::name(id).as_deref() == Some(PROGRAM_NAME));
            let first = if order == TcxOrder::First { there.first() } else { None };
            ProgramPosition::Tcx { program: ours.or(first).copied() }
        }
        _ => attach::FILTER,
    }
}

/// The interfaces that the kernel program would be attached to.
fn attached_links<'a>(
    config: &Config,
    choices: &BTreeMap<ListenerId, ModeChoice>,
    facts: &'a HostFacts,
) -> Vec<&'a Link> {
    let mut indices = BTreeSet::new();
    let kernel = |id| choices.get(id).is_some_and(|choice| choice.mode == Mode::TcEbpf);
    for listener in config.listeners.iter().filter(|listener| kernel(&listener.id)) {
        match &listener.interfaces {
            Interfaces::Auto => indices.extend(&facts.default_route_links),
            Interfaces::Named(names) => {
                indices.extend(names.iter().filter_map(|name| facts.link_named(name)).map(|link| link.index));
            }
        }
    }
    indices.into_iter().filter_map(|index| facts.link(index)).collect()
}

/// Names of the interfaces that are up and have a carrier. None if they cannot be read.
///
/// Not `IFF_RUNNING`, which follows the carrier up to a second later (`net/core/link_watch.c`).
fn running() -> Option<BTreeSet<String>> {
    let running = getifaddrs().ok()?.filter(|seen| seen.flags.contains(InterfaceFlags::IFF_LOWER_UP));
    Some(running.map(|seen| seen.interface_name).collect())
}

fn judge_link(link: &Link, running: Option<bool>, findings: &mut Findings) {
    let name = &link.name;
    if !link.up {
        findings.problem(
            "interface",
            format!("{name} is down: no packets arrive on it"),
            format!("ip link set {name} up"),
        );
    } else if running == Some(false) {
        findings.problem(
            "interface",
            format!("{name} is up, but its other end is not: no packets arrive on it"),
            "check the cable, the switch port or the peer interface",
        );
    } else {
        findings.ok("interface", format!("{name} is up, with an MTU of {} bytes", link.mtu));
    }
}

/// Foreign programs that see a link's packets before ours, and whether our `pref` and handle are free.
fn judge_programs(link: &Link, filters: &[TcFilter], preceding: &[String], daemon_runs: bool, findings: &mut Findings) {
    let (name, before) = (&link.name, findings.0.len());
    for program in preceding {
        findings.warning(
            "filter",
            format!("{name}: {program} sees packets before udp-fanout, and may consume the listeners' datagrams"),
            format!(
                "make it pass them on (TC_ACT_UNSPEC, TC_ACT_PIPE, XDP_PASS), or, unless it is XDP, run before it with attach \
                 = \"tcx\"; `bpftool net show dev {name}` shows the order"
            ),
        );
    }
    for filter in filters {
        let ours = filter.priority == PRIORITY && filter.handle == HANDLE;
        let program = filter.name.split(":[").next().unwrap_or_default();
        let what = if program.is_empty() { filter.kind.clone() } else { format!("{} ({program})", filter.kind) };
        if ours && program != PROGRAM_NAME {
            findings.problem(
                "filter",
                format!("{name}: another program's filter, {what}, has the pref {PRIORITY} and handle {HANDLE:#x} of udp-fanout"),
                format!("if it is not needed: tc filter del dev {name} ingress pref {PRIORITY} handle {HANDLE:#x} bpf"),
            );
        } else if ours && !daemon_runs {
            findings.warning(
                "filter",
                format!("{name}: a stopped daemon has left its filter, which still forwards to its last receivers"),
                format!("start the daemon, or: udp-fanout detach --interface {name}"),
            );
        }
    }
    findings.ok_unless_found(before, "filter", format!("{name}: no other program sees packets before udp-fanout"));
}

/// Binds a socket to a listener's address and closes it again.
fn try_bind(address: SocketAddr) -> Result<(), ErrorKind> {
    UdpSocket::bind(address).map(drop).map_err(|error| error.kind())
}

fn judge_bind(
    listener: &ListenerConfig,
    kernel: bool,
    facts: &HostFacts,
    free: Result<(), ErrorKind>,
    findings: &mut Findings,
) {
    let (name, bind) = (&listener.name, listener.bind);
    let ip = bind.ip();
    let ours = ip.is_unspecified() || ip.is_loopback() || facts.addresses.iter().any(|own| own.address == ip);
    match free {
        Ok(()) if ours => findings.ok("bind", format!("listener {name:?}: {bind} can be bound")),
        Err(ErrorKind::AddrInUse) => findings.problem(
            "bind",
            format!("listener {name:?}: another program has a socket on {bind}"),
            format!("stop it (`ss -ulpn sport = :{}` shows it), or set another port in `bind`", bind.port()),
        ),
        Err(ErrorKind::PermissionDenied) => findings.problem(
            "bind",
            format!("listener {name:?}: this process may not bind {bind}"),
            "run as root, grant CAP_NET_BIND_SERVICE, or set a port from 1024 up in `bind`",
        ),
        _ if kernel => findings.warning(
            "bind",
            format!("listener {name:?}: no interface has {ip}, so datagrams that the kernel program passes to the socket are lost"),
            "correct `bind`, unless a load balancer announces that address and no datagram is fragmented",
        ),
        _ => findings.problem(
            "bind",
            format!("listener {name:?}: {ip} is not an address of this host"),
            "correct `bind`; `ip address` lists the addresses, and 0.0.0.0 or [::] means all of them",
        ),
    }
}

#[cfg(test)]
mod tests;
