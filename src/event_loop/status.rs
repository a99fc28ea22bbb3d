//! `udp-fanout status`: gathers what the controller, the datapaths, the health checks and discovery know.
//! [`crate::control::assemble`] makes a report of it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Result;
use http::StatusCode;

use super::Daemon;
use crate::control::assemble::{self, ListenerFacts};
use crate::control::protocol::{RequestError, StatusReply, StatusRequest};
use crate::control::report::{DaemonReport, HealthReport, ServiceReport, StatusReport};
use crate::model::ListenerId;
use crate::version;

impl Daemon {
    pub(super) fn answer_status_request(&mut self, request: &StatusRequest) -> StatusReply {
        match request {
            StatusRequest::Status => match self.status_report() {
                Ok(report) => StatusReply::Report(Box::new(report)),
                Err(error) => {
                    StatusReply::Error(RequestError::new(StatusCode::SERVICE_UNAVAILABLE, format!("{error:#}")))
                }
            },
            StatusRequest::Alive => StatusReply::Alive,
            StatusRequest::Trace(query) => self.start_trace(query),
        }
    }

    fn status_report(&mut self) -> Result<StatusReport> {
        let snapshot = self.metrics_snapshot()?;
        let now = self.started.elapsed();
        let health = self.health_reports(now);
        let not_ready: HashMap<String, _> =
            self.controller.readiness().into_iter().filter_map(|(name, state)| Some((name, state.err()?))).collect();
        let sets: HashMap<ListenerId, _> = self.controller.downstream_sets().collect();
        let listeners = self.controller.modes().map(|(config, choice)| {
            let facts = ListenerFacts {
                config,
                choice,
                plan: self.controller.plan().listeners.iter().find(|plan| plan.id == config.id).map(Arc::as_ref),
                counted: snapshot.listeners.iter().find(|counted| *counted.name == *config.name),
                not_ready: not_ready.get(&config.name),
                downstreams: sets.get(&config.id).copied().flatten().map_or(&[], |set| set.downstreams.as_slice()),
                host: self.controller.facts(),
            };
            let mut report = assemble::listener(&facts);
            for downstream in &mut report.downstreams {
                let since = self.controller.first_seen(config.id, downstream.address);
                downstream.age_secs = now.saturating_sub(since).as_secs_f64();
                downstream.health = health.get(&(config.id, downstream.address)).cloned();
            }
            report
        });
        let listeners = listeners.collect();
        let daemon = DaemonReport {
            version: version::long().to_owned(),
            pid: std::process::id(),
            started: self.started_at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
            uptime_secs: now.as_secs_f64(),
            config: self.config.path.clone(),
            plans_applied: self.plan_applies.success,
            plans_refused: self.plan_applies.error,
        };
        Ok(StatusReport { daemon, listeners, services: self.service_reports(), problems: self.problems() })
    }

    fn health_reports(&self, now: Duration) -> HashMap<(ListenerId, SocketAddr), HealthReport> {
        let checked = self.health.downstreams();
        checked.map(|checked| ((checked.listener, checked.downstream), assemble::health(checked.status, now))).collect()
    }

    fn service_reports(&self) -> Vec<ServiceReport> {
        let Some((discovery, _)) = &self.sources.discovery else { return Vec::new() };
        discovery.status().services().into_iter().map(assemble::service).collect()
    }

    /// Present problems, a line each.
    pub(super) fn problems(&self) -> Vec<String> {
        let rejected = self.reloading.rejection.iter().map(|(_, reason)| {
            format!("the configuration file has changed and cannot be put in force: {}", reason.replace('\n', "; "))
        });
        let not_applied = self.apply_error.iter().map(|error| format!("the last change is not in force: {error:#}"));
        let warnings = self.controller.active_warnings().map(str::to_owned);
        let unprobed = self
            .health
            .local_errors()
            .map(|(kind, reason)| format!("health checks ({}) cannot be made: {reason}", kind.name()));
        let all_unhealthy = self
            .health
            .all_unhealthy()
            .map(|(name, effect)| format!("listener {name:?}: all downstreams fail their health checks: {effect}"));
        let discovery = self.sources.discovery.iter().flat_map(|(discovery, _)| discovery.status().problems());
        let discovery = discovery.map(|(id, text)| {
            let listener = self.config.listeners.iter().find(|listener| listener.id == id);
            listener.map_or_else(|| text.clone(), |listener| format!("listener {:?}: {text}", listener.name))
        });
        rejected
            .chain(not_applied)
            .chain(warnings)
            .chain(self.preceding_program_warnings())
            .chain(unprobed)
            .chain(all_unhealthy)
            .chain(discovery)
            .collect()
    }
}
