//! DNS names of downstreams: whether they resolve, and to addresses that the listener can use.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::Findings;
use crate::config::{Config, ListenerConfig};
use crate::model::{Downstream, ListenerId};
use crate::names::cache::NameCache;
use crate::names::{DownstreamAddress, DownstreamEntry, ResolveRequest, lookup};
use crate::net::Family;

/// By name: its addresses, or why the lookup failed.
type LookupResults = BTreeMap<Arc<str>, Result<Vec<IpAddr>, String>>;

/// Looks up every name once, as the daemon does at start. Returns the downstreams of listeners with names.
pub(super) fn check(config: &Config, findings: &mut Findings) -> BTreeMap<ListenerId, Vec<Downstream>> {
    let requests: Vec<ResolveRequest> = config.listeners.iter().filter_map(ListenerConfig::names_request).collect();
    let mut names = NameCache::default();
    names.replace_requests(requests.clone(), Duration::ZERO);
    let results = look_up(&names.due(Duration::ZERO));
    for request in &requests {
        judge(request, &results, findings);
    }
    for (name, answer) in results {
        names.handle_lookup_result(&name, answer, Duration::ZERO);
    }
    names.take_updates().into_iter().collect()
}

/// Looks up all names at once, so that a silent resolver costs only one timeout.
fn look_up(hosts: &[Arc<str>]) -> LookupResults {
    thread::scope(|scope| {
        let asked: Vec<_> =
            hosts.iter().map(|host| (host, scope.spawn(|| lookup::resolve_with_system(host)))).collect();
        let answer = |(host, thread): (&Arc<str>, thread::ScopedJoinHandle<'_, _>)| {
            (Arc::clone(host), thread.join().unwrap_or_else(|_| Err("the lookup failed".to_owned())))
        };
        asked.into_iter().map(answer).collect()
    })
}

fn judge(request: &ResolveRequest, results: &LookupResults, findings: &mut Findings) {
    for DownstreamEntry { name, address, .. } in &request.entries {
        let DownstreamAddress::Name { host, .. } = address else { continue };
        let who = format!("listener {}: {name} ({address})", request.name);
        match results.get(host) {
            Some(Ok(found)) => {
                let usable: Vec<String> =
                    found.iter().filter(|ip| Family::of(**ip) == request.family).map(ToString::to_string).collect();
                if usable.is_empty() {
                    let fix = "correct the name, or bind the listener to an address of the other IP version; until then, it keeps looking";
                    findings.problem("names", format!("{who}: no {} address", request.family), fix);
                } else {
                    findings.ok("names", format!("{who}: {}", usable.join(", ")));
                }
            }
            Some(Err(reason)) => {
                let fix = "correct the name or /etc/resolv.conf; the daemon repeats the lookup";
                findings.problem("names", format!("{who} cannot be resolved: {reason}"), fix);
            }
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;

    #[test]
    fn each_name_is_judged_by_the_listeners_own_family() {
        let entry = |host: &str| DownstreamEntry {
            name: "d".into(),
            address: DownstreamAddress::Name { host: host.into(), port: 514 },
            weight: 1,
            sample: Downstream::ALL,
        };
        let request = ResolveRequest {
            listener: ListenerId(0),
            name: "syslog".into(),
            family: Family::V4,
            entries: vec![entry("both"), entry("six"), entry("none")],
            interval: Duration::from_secs(30),
        };
        let addresses = |all: &[&str]| Ok(all.iter().map(|ip| ip.parse().unwrap()).collect());
        let results: LookupResults = [
            ("both".into(), addresses(&["192.0.2.1", "2001:db8::1"])),
            ("six".into(), addresses(&["2001:db8::1"])),
            ("none".into(), Err("Name or service not known".to_owned())),
        ]
        .into();
        let mut findings = Findings::default();
        judge(&request, &results, &mut findings);
        let texts: Vec<_> = findings.0.iter().map(|finding| (finding.level, finding.text.as_str())).collect();
        let expected = [
            (Severity::Ok, "listener syslog: d (both:514): 192.0.2.1"),
            (Severity::Problem, "listener syslog: d (six:514): no IPv4 address"),
            (Severity::Problem, "listener syslog: d (none:514) cannot be resolved: Name or service not known"),
        ];
        assert_eq!(texts, expected);
    }
}
