//! What the running daemon says of itself, if one runs.

use super::Findings;
use crate::config::Config;
use crate::control::client::StatusClient;
use crate::control::report::StatusReport;

/// How long an open watch may be silent before that is odd, in seconds. The API server sends a bookmark every minute.
const SILENCE: f64 = 300.0;

/// Asks the daemon whose status socket the configuration names.
pub(super) fn ask(config: &Config, findings: &mut Findings) -> Option<StatusReport> {
    match StatusClient::connect(&config.status_socket).and_then(|mut client| client.report()) {
        Ok(report) => {
            judge(&report, findings);
            Some(report)
        }
        Err(error) => {
            // That none runs is no fault: one looks before one starts it, too.
            findings.ok("daemon", format!("not asked: {error:#}"));
            None
        }
    }
}

fn judge(report: &StatusReport, findings: &mut Findings) {
    let before = findings.0.len();
    for problem in &report.problems {
        findings.problem("daemon", format!("it says: {problem}"), "see `udp-fanout status` and its log");
    }
    for listener in &report.listeners {
        if let Some(reason) = &listener.waits_for {
            let text = format!("listener {:?} is not ready: {reason}", listener.name);
            findings.problem("daemon", text, "see its log");
        }
    }
    for service in &report.services {
        let name = format!("{}/{}", service.namespace, service.service);
        match service.last_event_secs {
            _ if !service.synced => findings.problem(
                "daemon",
                format!("it does not follow the endpoints of {name} at the moment: the last known ones stay in use"),
                "its log says why; see the lines about kubernetes",
            ),
            Some(seconds) if seconds > SILENCE => findings.warning(
                "daemon",
                format!("it last heard of the endpoints of {name} {seconds:.0} seconds ago"),
                "a proxy or load balancer between it and the API server may hold back the watch",
            ),
            _ => {}
        }
    }
    let synced = report.services.iter().filter_map(|service| service.last_event_secs).fold(0.0, f64::max);
    let heard = if report.services.is_empty() {
        String::new()
    } else {
        format!(", and heard of all its Services within the last {synced:.0} seconds")
    };
    let (pid, version) = (report.daemon.pid, &report.daemon.version);
    findings.ok_unless_found(before, "daemon", format!("{version} runs as process {pid}, finds nothing wrong{heard}"));
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;
    use crate::control::report::{ListenerReport, ServiceReport};

    fn levels(report: &StatusReport) -> Vec<(Level, String)> {
        let mut findings = Findings::default();
        judge(report, &mut findings);
        findings.0.into_iter().map(|finding| (finding.level, finding.text)).collect()
    }

    #[test]
    fn a_daemon_without_complaints_is_well() {
        let service = ServiceReport { synced: true, last_event_secs: Some(12.0), ..Default::default() };
        let found = levels(&StatusReport { services: vec![service], ..Default::default() });
        assert!(found.len() == 1 && found[0].0 == Level::Ok && found[0].1.contains("last 12 seconds"), "{found:?}");
    }

    #[test]
    fn its_complaints_are_passed_on() {
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
        let levels: Vec<Level> = found.iter().map(|(level, _)| *level).collect();
        assert_eq!(levels, [Level::Problem, Level::Problem, Level::Problem, Level::Warning], "{found:?}");
    }
}
