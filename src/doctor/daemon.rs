//! The report of the running daemon, if one runs.

use super::Findings;
use crate::config::Config;
use crate::control::client::StatusClient;
use crate::control::report::StatusReport;

/// How many seconds an open watch may be silent. The API server sends a bookmark every minute.
const MAX_WATCH_SILENCE: f64 = 300.0;

/// Requests the report from the daemon whose status socket the configuration names.
pub(super) fn check(config: &Config, findings: &mut Findings) -> Option<StatusReport> {
    match StatusClient::connect(&config.status_socket).and_then(|mut client| client.report()) {
        Ok(report) => {
            judge(&report, findings);
            Some(report)
        }
        Err(error) => {
            // No fault: the doctor is also run before the daemon is started.
            findings.ok("daemon", format!("not checked: {error:#}"));
            None
        }
    }
}

fn judge(report: &StatusReport, findings: &mut Findings) {
    let before = findings.0.len();
    for problem in &report.problems {
        findings.problem(
            "daemon",
            format!("the daemon reports: {problem}"),
            "see `udp-fanout status` and the daemon's log",
        );
    }
    for listener in &report.listeners {
        if let Some(reason) = &listener.waits_for {
            let text = format!("listener {:?} is not ready: {reason}", listener.name);
            findings.problem("daemon", text, "see the daemon's log");
        }
    }
    for service in &report.services {
        let name = format!("{}/{}", service.namespace, service.service);
        match service.last_event_secs {
            _ if !service.synced => findings.problem(
                "daemon",
                format!(
                    "the daemon currently does not watch the endpoints of {name} and keeps using the last known ones"
                ),
                "see the lines about kubernetes in the daemon's log",
            ),
            Some(seconds) if seconds > MAX_WATCH_SILENCE => findings.warning(
                "daemon",
                format!("the daemon received the last event about the endpoints of {name} {seconds:.0} seconds ago"),
                "check for a proxy or load balancer between this host and the API server that delays the watch",
            ),
            _ => {}
        }
    }
    let synced = report.services.iter().filter_map(|service| service.last_event_secs).fold(0.0, f64::max);
    let heard = if report.services.is_empty() {
        String::new()
    } else {
        format!(" and has received events about all its Services within the last {synced:.0} seconds")
    };
    let (pid, version) = (report.daemon.pid, &report.daemon.version);
    findings.ok_unless_found(before, "daemon", format!("{version} runs as process {pid}, reports no problem{heard}"));
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;
    use crate::control::report::{ListenerReport, ServiceReport};

    fn levels(report: &StatusReport) -> Vec<(Severity, String)> {
        let mut findings = Findings::default();
        judge(report, &mut findings);
        findings.0.into_iter().map(|finding| (finding.level, finding.text)).collect()
    }

    #[test]
    fn a_daemon_without_problems_is_ok() {
        let service = ServiceReport { synced: true, last_event_secs: Some(12.0), ..Default::default() };
        let found = levels(&StatusReport { services: vec![service], ..Default::default() });
        assert!(found.len() == 1 && found[0].0 == Severity::Ok && found[0].1.contains("last 12 seconds"), "{found:?}");
    }

    #[test]
    fn problems_of_the_daemon_become_findings() {
        let service = |synced, age| ServiceReport {
            namespace: "logs".into(),
            service: "vector".into(),
            synced,
            last_event_secs: Some(age),
            ..Default::default()
        };
        let waiting = ListenerReport { name: "a".into(), waits_for: Some("no set".into()), ..Default::default() };
        let found = levels(&StatusReport {
            problems: vec!["no route".into()],
            listeners: vec![waiting],
            services: vec![service(false, 1.0), service(true, 3_000.0)],
            ..Default::default()
        });
        let levels: Vec<Severity> = found.iter().map(|(level, _)| *level).collect();
        assert_eq!(levels, [Severity::Problem, Severity::Problem, Severity::Problem, Severity::Warning], "{found:?}");
    }
}
