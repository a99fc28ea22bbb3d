//! The paths of datagrams: from senders to the listeners, and from this host to the downstreams.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::{DoctorListener, Findings, ingress_links};
use crate::config::ListenerProtocol;
use crate::host::neighbours::NeighbourResolution;
use crate::host::{HostFacts, HostNetwork, Link, NextHop, NextHops, Route};
use crate::model::Downstream;

/// How long a neighbour may take to reply. The kernel sends three requests, one second apart.
const NEIGHBOUR_TIMEOUT: Duration = Duration::from_millis(4_500);
/// How often to check whether all have replied.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

type Resolutions = BTreeMap<NextHop, NeighbourResolution>;

/// Bytes of a datagram's IP and UDP headers.
fn headers(address: IpAddr) -> u32 {
    if address.is_ipv4() { 28 } else { 48 }
}

/// Checks the paths of every listener.
pub(super) fn check(
    host: &mut HostNetwork,
    listeners: &[DoctorListener<'_>],
    senders: &[IpAddr],
    findings: &mut Findings,
) -> Result<()> {
    let addresses = listeners.iter().flat_map(|listener| &listener.downstreams).map(|to| to.address.ip()).collect();
    let facts = host.facts(&addresses)?;
    for listener in listeners {
        judge_routes(listener, &facts, findings);
    }
    let neighbours = resolve_neighbours(host, &NextHops::of(&facts).hops)?;
    judge_neighbours(listeners, &facts, &neighbours, findings);
    for listener in listeners {
        judge_mtu(listener, &facts, findings);
        judge_forwarding(listener, &facts, &read_sysctl, findings);
        judge_source_validation(listener, &facts, &read_sysctl, findings);
        for &sender in senders.iter().filter(|sender| sender.is_ipv4() == listener.config.bind.is_ipv4()) {
            judge_sender(host, listener, &facts, sender, findings)?;
        }
    }
    Ok(())
}

/// A sysctl of IPv4 or IPv6, such as `conf/eth0/rp_filter`.
fn read_sysctl(family: &str, key: &str) -> Option<u32> {
    fs::read_to_string(format!("/proc/sys/net/{family}/{key}")).ok()?.trim().parse().ok()
}

type SysctlReader<'a> = &'a dyn Fn(&str, &str) -> Option<u32>;

fn judge_routes(listener: &DoctorListener<'_>, facts: &HostFacts, findings: &mut Findings) {
    let (name, before) = (&listener.config.name, findings.0.len());
    if listener.downstreams.is_empty() {
        findings.problem(
            "route",
            format!("listener {name:?} has no downstream: all its datagrams are dropped"),
            "check the selector of the Service and the readiness of its pods",
        );
        return;
    }
    let mut to_socket = None;
    for downstream in &listener.downstreams {
        let (who, ip) = (&downstream.name, downstream.address.ip());
        match facts.routes.get(&ip) {
            Some(Route::Unreachable { reason }) => findings.problem(
                "route",
                format!("listener {name:?}: no route to downstream {who} ({ip}): {reason}"),
                format!("add a route, or correct its address; `ip route get {ip}` shows the kernel's choice"),
            ),
            Some(Route::Encapsulated { .. }) => {
                to_socket.get_or_insert(format!("the route to downstream {who} ({ip}) adds an outer header"));
            }
            Some(Route::Local { loopback: true }) => {
                to_socket.get_or_insert(format!("downstream {who} ({ip}) is on the loopback interface"));
            }
            _ => {}
        }
    }
    if let Some(reason) = to_socket.filter(|_| listener.uses_kernel()) {
        findings.warning(
            "route",
            format!(
                "listener {name:?}: all datagrams take the socket path and lose their senders' addresses, because {reason}"
            ),
            "give that downstream an address that the kernel program can reach, or set mode = \"userspace\"",
        );
    }
    let count = listener.downstreams.len();
    findings.ok_unless_found(
        before,
        "route",
        format!("listener {name:?}: there are routes to all {count} downstreams"),
    );
}

/// Makes the kernel resolve each of them, and waits until all are resolved or have failed.
fn resolve_neighbours(host: &mut HostNetwork, hops: &BTreeSet<NextHop>) -> Result<Resolutions> {
    host.resolve_neighbours(hops)?;
    let deadline = Instant::now() + NEIGHBOUR_TIMEOUT;
    loop {
        let resolutions = host.neighbour_resolution(hops)?;
        let waiting = resolutions.values().any(|resolution| *resolution == NeighbourResolution::Pending);
        if !waiting || Instant::now() > deadline {
            return Ok(resolutions);
        }
        thread::sleep(POLL_INTERVAL);
    }
}

fn judge_neighbours(
    listeners: &[DoctorListener<'_>],
    facts: &HostFacts,
    neighbours: &Resolutions,
    findings: &mut Findings,
) {
    let before = findings.0.len();
    let mut silent: BTreeMap<(u32, IpAddr), BTreeSet<&str>> = BTreeMap::new();
    for downstream in listeners.iter().flat_map(|listener| &listener.downstreams) {
        let Some(Route::Via { link, next_hop, .. }) = facts.routes.get(&downstream.address.ip()) else { continue };
        if matches!(
            neighbours.get(&(*link, *next_hop)),
            Some(NeighbourResolution::Failed | NeighbourResolution::Pending)
        ) {
            silent.entry((*link, *next_hop)).or_default().insert(&downstream.name);
        }
    }
    for ((link, hop), whom) in silent {
        let link = facts.link(link).map_or("?", |link| link.name.as_str());
        let whom: Vec<&str> = whom.into_iter().collect();
        findings.problem(
            "neighbour",
            format!("nobody on {link} replies for {hop}, the next hop to {}", whom.join(", ")),
            "check that it is up and that its address is right; the host's route may name the wrong router or interface (`ip route get`)",
        );
    }
    let asked = NextHops::of(facts).hops.len();
    if asked > 0 {
        findings.ok_unless_found(
            before,
            "neighbour",
            format!("all {asked} next hops are resolved or need no resolution"),
        );
    }
}

fn judge_mtu(listener: &DoctorListener<'_>, facts: &HostFacts, findings: &mut Findings) {
    let (name, before) = (&listener.config.name, findings.0.len());
    let Some(entry) = ingress_links(listener, facts).into_iter().max_by_key(|link| link.mtu) else { return };
    let mut narrow: BTreeMap<(u32, u32), (usize, &str, IpAddr)> = BTreeMap::new();
    for downstream in &listener.downstreams {
        let ip = downstream.address.ip();
        if let Some(Route::Via { link, mtu, .. }) = facts.routes.get(&ip)
            && *mtu < entry.mtu
        {
            narrow.entry((*link, *mtu)).or_insert((0, &downstream.name, ip)).0 += 1;
        }
    }
    for ((link, mtu), (count, who, ip)) in narrow {
        let link = facts.link(link).map_or("?", |link| link.name.as_str());
        let others = if count > 1 { format!(" and {} more", count - 1) } else { String::new() };
        let how = if listener.uses_kernel() {
            "longer ones take the socket path, are fragmented and lose their sender's address"
        } else {
            "longer ones are fragmented"
        };
        findings.warning(
            "mtu",
            format!(
                "listener {name:?}: {} receives packets of {} bytes, but {link} takes only {mtu} on the path to {who}{others}: {how}",
                entry.name, entry.mtu
            ),
            format!("give both the same MTU, or keep payloads up to {} bytes", mtu.saturating_sub(headers(ip))),
        );
    }
    findings.ok_unless_found(
        before,
        "mtu",
        format!(
            "listener {name:?}: every egress path takes the packets that {} receives ({} bytes)",
            entry.name, entry.mtu
        ),
    );
}

/// The kernel program does not need the host's forwarding. Replies of receivers that are routed through this host do.
fn judge_forwarding(
    listener: &DoctorListener<'_>,
    facts: &HostFacts,
    sysctl: SysctlReader<'_>,
    findings: &mut Findings,
) {
    if !listener.uses_kernel() {
        return;
    }
    let (name, v6) = (&listener.config.name, listener.config.bind.is_ipv6());
    let family = if v6 { "ipv6" } else { "ipv4" };
    let forwards = |link: &Link| sysctl(family, &format!("conf/{}/forwarding", link.name)) != Some(0);
    let egress = |to: &Downstream| match facts.routes.get(&to.address.ip()) {
        Some(Route::Via { link, .. }) => facts.link(*link),
        _ => None,
    };
    let closed = listener.downstreams.iter().filter_map(egress).find(|link| !forwards(link));
    match closed {
        Some(link) if listener.config.protocol == ListenerProtocol::Dns => findings.warning(
            "forwarding",
            format!(
                "listener {name:?}: net.{family}.conf.{}.forwarding is 0, so this host does not forward replies of \
                 receivers",
                link.name
            ),
            format!("if receivers reply through this host: sysctl -w net.{family}.conf.all.forwarding=1"),
        ),
        Some(_) => findings.ok(
            "forwarding",
            format!("listener {name:?}: works without net.{family}.conf.all.forwarding; setting it to 1 would make forwarding a little faster"),
        ),
        None => findings.ok("forwarding", format!("listener {name:?}: forwarding is on, which is fastest")),
    }
}

/// Strict source validation drops a datagram to a socket if the route to its sender uses another interface. The kernel program
/// runs before it.
fn judge_source_validation(
    listener: &DoctorListener<'_>,
    facts: &HostFacts,
    sysctl: SysctlReader<'_>,
    findings: &mut Findings,
) {
    if listener.config.bind.is_ipv6() {
        return;
    }
    let (name, before) = (&listener.config.name, findings.0.len());
    for link in ingress_links(listener, facts) {
        let elsewhere = facts.default_route_links.first().filter(|_| !facts.default_route_links.contains(&link.index));
        let Some(other) = elsewhere.and_then(|&index| facts.link(index)).filter(|_| strict(link, sysctl)) else {
            continue;
        };
        let what = if listener.uses_kernel() {
            "of those datagrams that take the socket path (fragments, IP options, oversized ones), the host drops, uncounted, \
             the ones"
        } else {
            "the host drops, uncounted, the datagrams"
        };
        findings.warning(
            "rp_filter",
            format!(
                "listener {name:?}: rp_filter is 1 on {}, but the default route uses {}: {what} from senders that are not \
                 routed through {}",
                link.name, other.name, link.name
            ),
            format!(
                "sysctl -w net.ipv4.conf.{}.rp_filter=2; `udp-fanout doctor --sender ADDRESS` checks one sender",
                link.name
            ),
        );
    }
    findings.ok_unless_found(
        before,
        "rp_filter",
        format!("listener {name:?}: source validation accepts its datagrams"),
    );
}

/// Whether a link's source validation is strict (1). The kernel uses the larger of two settings, and 2 means loose.
fn strict(link: &Link, sysctl: SysctlReader<'_>) -> bool {
    let value = |scope: &str| sysctl("ipv4", &format!("conf/{scope}/rp_filter")).unwrap_or(0);
    value("all").max(value(&link.name)) == 1
}

/// Asks the kernel whether it would deliver a datagram of this sender to the listener's socket.
fn judge_sender(
    host: &mut HostNetwork,
    listener: &DoctorListener<'_>,
    facts: &HostFacts,
    sender: IpAddr,
    findings: &mut Findings,
) -> Result<()> {
    let (name, bind) = (&listener.config.name, listener.config.bind.ip());
    for link in ingress_links(listener, facts) {
        let own = facts.addresses.iter().find(|own| own.link == link.index && own.address.is_ipv4() == bind.is_ipv4());
        let destination = if bind.is_unspecified() { own.map(|own| own.address) } else { Some(bind) };
        let Some(destination) = destination else { continue };
        let Err(error) = host.validate_source(sender, link.index, destination)? else {
            findings.ok(
                "sender",
                format!("listener {name:?}: the host accepts datagrams of {sender} that arrive on {}", link.name),
            );
            continue;
        };
        let text = format!(
            "listener {name:?}: the host drops datagrams of {sender} that arrive on {}, uncounted: {error}",
            link.name
        );
        let own = facts.addresses.iter().any(|own| own.address == sender);
        let fix = match error.raw_os_error() {
            _ if own => format!("{sender} is this host's own address; name the address of another sender"),
            // Kernels before 6.14 return EXDEV, later ones EINVAL.
            Some(libc::EXDEV | libc::EINVAL) if strict(link, &read_sysctl) => {
                format!("sysctl -w net.ipv4.conf.{}.rp_filter=2, or route {sender} through it", link.name)
            }
            _ => format!("see `ip route get {destination} from {sender} iif {}`", link.name),
        };
        if listener.uses_kernel() {
            findings.warning("sender", text + " (only those that take the socket path)", fix);
        } else {
            findings.problem("sender", text, fix);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
