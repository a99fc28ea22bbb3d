//! The ways of datagrams: in from their senders, out to the downstreams.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::{Findings, Subject, arrives_on};
use crate::config::ListenerProtocol;
use crate::host::neighbours::NeighbourResolution;
use crate::host::{HostFacts, HostNetwork, Link, NextHop, Route};
use crate::model::Downstream;

/// How long a neighbour may take to answer: longer than the kernel asks, three times a second apart.
const PATIENCE: Duration = Duration::from_millis(4_500);
/// How often it is looked whether all have answered.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

type Resolutions = BTreeMap<NextHop, NeighbourResolution>;

/// Bytes of the headers of a datagram in its IP packet, by version.
fn headers(address: IpAddr) -> u32 {
    if address.is_ipv4() { 28 } else { 48 }
}

/// Looks at the ways of every listener.
pub(super) fn look(
    host: &mut HostNetwork,
    subjects: &[Subject<'_>],
    senders: &[IpAddr],
    findings: &mut Findings,
) -> Result<()> {
    let addresses = subjects.iter().flat_map(|subject| &subject.downstreams).map(|to| to.address.ip()).collect();
    let facts = host.facts(&addresses)?;
    for subject in subjects {
        judge_routes(subject, &facts, findings);
    }
    let neighbours = ask_neighbours(host, &next_hops(&facts))?;
    judge_neighbours(subjects, &facts, &neighbours, findings);
    for subject in subjects {
        judge_mtu(subject, &facts, findings);
        judge_forwarding(subject, &facts, &setting, findings);
        judge_source_validation(subject, &facts, &setting, findings);
        for &sender in senders.iter().filter(|sender| sender.is_ipv4() == subject.config.bind.is_ipv4()) {
            judge_sender(host, subject, &facts, sender, findings)?;
        }
    }
    Ok(())
}

/// A kernel setting of IPv4 or IPv6, such as `conf/eth0/rp_filter`.
fn setting(family: &str, key: &str) -> Option<u32> {
    fs::read_to_string(format!("/proc/sys/net/{family}/{key}")).ok()?.trim().parse().ok()
}

type SysctlReader<'a> = &'a dyn Fn(&str, &str) -> Option<u32>;

fn judge_routes(subject: &Subject<'_>, facts: &HostFacts, findings: &mut Findings) {
    let (name, before) = (&subject.config.name, findings.0.len());
    if subject.downstreams.is_empty() {
        findings.problem(
            "route",
            format!("listener {name:?} has no downstream: all its datagrams are dropped"),
            "look at the Service's selector, and at the readiness of its pods",
        );
        return;
    }
    let mut to_socket = None;
    for downstream in &subject.downstreams {
        let (who, ip) = (&downstream.name, downstream.address.ip());
        match facts.routes.get(&ip) {
            Some(Route::Unreachable { reason }) => findings.problem(
                "route",
                format!("listener {name:?}: no route to downstream {who} ({ip}): {reason}"),
                format!("add one, or correct its address; `ip route get {ip}` shows what the kernel does"),
            ),
            Some(Route::Encapsulated { .. }) => {
                to_socket.get_or_insert(format!("the route to downstream {who} ({ip}) encapsulates"));
            }
            Some(Route::Local { loopback: true }) => {
                to_socket.get_or_insert(format!("downstream {who} ({ip}) is on the loopback interface"));
            }
            _ => {}
        }
    }
    if let Some(reason) = to_socket.filter(|_| subject.kernel()) {
        findings.warning(
            "route",
            format!(
                "listener {name:?}: its socket forwards everything, without the senders' addresses, because {reason}"
            ),
            "give that downstream an address that the kernel program can reach, or set mode = \"userspace\"",
        );
    }
    let count = subject.downstreams.len();
    findings.ok_unless_found(
        before,
        "route",
        format!("listener {name:?}: there are routes to all {count} downstreams"),
    );
}

/// The neighbours that datagrams are handed to, with their links.
fn next_hops(facts: &HostFacts) -> BTreeSet<NextHop> {
    let hop = |route: &Route| match route {
        Route::Via { link, next_hop, .. } if facts.link(*link).is_some_and(|link| link.ethernet) => {
            Some((*link, *next_hop))
        }
        _ => None,
    };
    facts.routes.values().filter_map(hop).collect()
}

/// Has the kernel ask for each of them, and waits until all have answered or none will.
fn ask_neighbours(host: &mut HostNetwork, hops: &BTreeSet<NextHop>) -> Result<Resolutions> {
    host.resolve_neighbours(hops)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let resolutions = host.neighbour_resolution(hops)?;
        let waiting = resolutions.values().any(|resolution| *resolution == NeighbourResolution::Pending);
        if !waiting || Instant::now() > deadline {
            return Ok(resolutions);
        }
        thread::sleep(LOOK_AGAIN);
    }
}

fn judge_neighbours(subjects: &[Subject<'_>], facts: &HostFacts, neighbours: &Resolutions, findings: &mut Findings) {
    let before = findings.0.len();
    let mut silent: BTreeMap<(u32, IpAddr), BTreeSet<&str>> = BTreeMap::new();
    for downstream in subjects.iter().flat_map(|subject| &subject.downstreams) {
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
            format!("nobody on {link} answers for {hop}, by which datagrams go to {}", whom.join(", ")),
            "is it up, and is its address right? The host's route may name the wrong router or interface",
        );
    }
    let asked = next_hops(facts).len();
    if asked > 0 {
        findings.ok_unless_found(before, "neighbour", format!("no next hop of {asked} has failed to answer"));
    }
}

fn judge_mtu(subject: &Subject<'_>, facts: &HostFacts, findings: &mut Findings) {
    let (name, before) = (&subject.config.name, findings.0.len());
    let Some(entry) = arrives_on(subject, facts).into_iter().max_by_key(|link| link.mtu) else { return };
    let mut narrow: BTreeMap<(u32, u32), (usize, &str, IpAddr)> = BTreeMap::new();
    for downstream in &subject.downstreams {
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
        let how = if subject.kernel() {
            "longer ones take the socket, are fragmented and lose their sender's address"
        } else {
            "longer ones are fragmented"
        };
        findings.warning(
            "mtu",
            format!(
                "listener {name:?}: {} lets in packets of {} bytes, and {link} takes {mtu} on the way to {who}{others}: {how}",
                entry.name, entry.mtu
            ),
            format!("give both the same MTU, or keep payloads up to {} bytes", mtu.saturating_sub(headers(ip))),
        );
    }
    findings.ok_unless_found(
        before,
        "mtu",
        format!("listener {name:?}: every way out takes what {} lets in ({} bytes)", entry.name, entry.mtu),
    );
}

/// The kernel program does without the host's forwarding. What comes back from receivers, and passes this host, does not.
fn judge_forwarding(subject: &Subject<'_>, facts: &HostFacts, setting: SysctlReader<'_>, findings: &mut Findings) {
    if !subject.kernel() {
        return;
    }
    let (name, v6) = (&subject.config.name, subject.config.bind.is_ipv6());
    let family = if v6 { "ipv6" } else { "ipv4" };
    let forwards = |link: &Link| setting(family, &format!("conf/{}/forwarding", link.name)) != Some(0);
    let way_out = |to: &Downstream| match facts.routes.get(&to.address.ip()) {
        Some(Route::Via { link, .. }) => facts.link(*link),
        _ => None,
    };
    let closed = subject.downstreams.iter().filter_map(way_out).find(|link| !forwards(link));
    match closed {
        Some(link) if subject.config.protocol == ListenerProtocol::Dns => findings.warning(
            "forwarding",
            format!(
                "listener {name:?}: net.{family}.conf.{}.forwarding is 0, so answers of receivers that come back by this \
                 host go no further",
                link.name
            ),
            format!("sysctl -w net.{family}.conf.all.forwarding=1, if receivers answer by way of this host"),
        ),
        Some(_) => findings.ok(
            "forwarding",
            format!("listener {name:?}: works without net.{family}.conf.all.forwarding, which would make it a little faster"),
        ),
        None => findings.ok("forwarding", format!("listener {name:?}: the host forwards, which is the fast way")),
    }
}

/// Strict source validation drops what goes to a socket if the way back to its sender is another interface. The kernel
/// program comes before it.
fn judge_source_validation(
    subject: &Subject<'_>,
    facts: &HostFacts,
    setting: SysctlReader<'_>,
    findings: &mut Findings,
) {
    if subject.config.bind.is_ipv6() {
        return;
    }
    let (name, before) = (&subject.config.name, findings.0.len());
    for link in arrives_on(subject, facts) {
        let elsewhere = facts.default_route_links.first().filter(|_| !facts.default_route_links.contains(&link.index));
        let Some(other) = elsewhere.and_then(|&index| facts.link(index)).filter(|_| strict(link, setting)) else {
            continue;
        };
        let what = if subject.kernel() {
            "of those datagrams that take the listener's socket (fragments, IP options, too long ones), the host drops, \
             uncounted, the ones"
        } else {
            "the host drops, uncounted, the datagrams"
        };
        findings.warning(
            "rp_filter",
            format!(
                "listener {name:?}: rp_filter is 1 on {}, and the default route is by {}: {what} from senders beyond the \
                 networks that are routed by {}",
                link.name, other.name, link.name
            ),
            format!(
                "sysctl -w net.ipv4.conf.{}.rp_filter=2; `udp-fanout doctor --sender ADDRESS` tries one sender",
                link.name
            ),
        );
    }
    findings.ok_unless_found(
        before,
        "rp_filter",
        format!("listener {name:?}: source validation lets its datagrams in"),
    );
}

/// Whether a link's source validation is the strict one. The kernel takes the larger of two numbers, of which 2 is loose.
fn strict(link: &Link, setting: SysctlReader<'_>) -> bool {
    let value = |scope: &str| setting("ipv4", &format!("conf/{scope}/rp_filter")).unwrap_or(0);
    value("all").max(value(&link.name)) == 1
}

/// Asks the kernel whether it would take a datagram of this sender to the listener's socket.
fn judge_sender(
    host: &mut HostNetwork,
    subject: &Subject<'_>,
    facts: &HostFacts,
    sender: IpAddr,
    findings: &mut Findings,
) -> Result<()> {
    let (name, bind) = (&subject.config.name, subject.config.bind.ip());
    for link in arrives_on(subject, facts) {
        let own = facts.addresses.iter().find(|own| own.link == link.index && own.address.is_ipv4() == bind.is_ipv4());
        let destination = if bind.is_unspecified() { own.map(|own| own.address) } else { Some(bind) };
        let Some(destination) = destination else { continue };
        let Err(error) = host.validate_source(sender, link.index, destination)? else {
            findings.ok(
                "sender",
                format!("listener {name:?}: the host takes datagrams of {sender} that come in by {}", link.name),
            );
            continue;
        };
        let text = format!(
            "listener {name:?}: the host drops datagrams of {sender} that come in by {}, uncounted: {error}",
            link.name
        );
        let own = facts.addresses.iter().any(|own| own.address == sender);
        let fix = match error.raw_os_error() {
            _ if own => format!("{sender} is this host's own address, which nobody else may send from"),
            // Kernels before 6.14 say EXDEV, later ones EINVAL.
            Some(libc::EXDEV | libc::EINVAL) if strict(link, &setting) => {
                format!("sysctl -w net.ipv4.conf.{}.rp_filter=2, or route {sender} by it", link.name)
            }
            _ => format!("see `ip route get {destination} from {sender} iif {}`", link.name),
        };
        if subject.kernel() {
            findings.warning("sender", text + " (only those that take the listener's socket)", fix);
        } else {
            findings.problem("sender", text, fix);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
