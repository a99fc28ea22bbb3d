//! Answers the HTTP thread: a snapshot of all metrics for a scrape, the listeners' readiness for the probes.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::Result;

use super::Daemon;
use crate::controller::NotReady;
use crate::datapath::{Datapath, DatapathCounters};
use crate::discovery::ServiceStatus;
use crate::metrics::http::{
    ListenerReadiness, ListenerServing, MainLoopRequest, ReadinessReport, ReadinessState, ServingReport,
};
use crate::metrics::{DownstreamHealthSnapshot, ListenerSnapshot, MetricsSnapshot};
use crate::model::{ListenerId, Mode};

impl Daemon {
    /// Answers every request that still has a client.
    pub(super) fn answer_http_requests(&mut self) {
        let requests: Vec<MainLoopRequest> = match &self.http {
            Some((_, requests)) => requests.try_iter().filter(|request| !request.abandoned()).collect(),
            None => return,
        };
        for request in requests {
            // Sending fails if the client has left just now.
            match request {
                MainLoopRequest::Scrape(reply) => drop(reply.send(self.metrics_snapshot())),
                MainLoopRequest::Readiness(reply) => drop(reply.send(self.readiness())),
                MainLoopRequest::Serving(reply) => drop(reply.send(self.serving())),
            }
        }
    }

    /// All metrics, as of now.
    pub(super) fn metrics_snapshot(&mut self) -> Result<MetricsSnapshot> {
        let kernel = self.kernel.as_mut().map(Datapath::counters).transpose()?;
        let user = self.user.counters()?;
        let mut readings: Vec<(Mode, &DatapathCounters)> = Vec::with_capacity(2);
        readings.extend(kernel.as_ref().map(|counters| (Mode::TcEbpf, counters)));
        readings.push((Mode::Userspace, &user));
        let listeners = self
            .controller
            .plan()
            .listeners
            .iter()
            .map(|plan| ListenerSnapshot::collect(plan, self.mode_reason(plan.id), &readings))
            .collect();
        let health = self.health.downstreams().filter_map(|checked| {
            let listener = self.listener_name(checked.listener)?;
            Some(DownstreamHealthSnapshot {
                listener,
                endpoint: checked.downstream,
                healthy: checked.status.state.usable(),
            })
        });
        let health = health.collect();
        let transitions = self.health.transitions();
        let transitions = transitions.filter_map(|(id, counted)| Some((self.listener_name(id)?, counted)));
        let health_transitions = transitions.collect();
        let discovery = self.discovery_status();
        Ok(MetricsSnapshot {
            started: self.started_at,
            plan_applies: self.plan_applies,
            reloads: self.reloading.counts,
            listeners,
            fragments: kernel.as_ref().map(|counters| counters.fragments).unwrap_or_default(),
            programs_ahead: self
                .preceding_programs
                .iter()
                .map(|(name, found)| (name.as_str().into(), found.len()))
                .collect(),
            health,
            health_transitions,
            probes: self.health.probe_stats().clone(),
            discovery,
        })
    }

    /// The Services that are followed. A discovery thread that has failed leaves its last status behind; nothing is in sync
    /// then.
    fn discovery_status(&self) -> Vec<ServiceStatus> {
        let Some((discovery, _)) = &self.sources.discovery else { return Vec::new() };
        let mut services = discovery.status().services();
        if !discovery.is_running() {
            services.iter_mut().for_each(|service| service.synced = false);
        }
        services
    }

    fn listener_name(&self, id: ListenerId) -> Option<Arc<str>> {
        self.controller.plan().listeners.iter().find(|plan| plan.id == id).map(|plan| Arc::clone(&plan.name))
    }

    fn mode_reason(&self, id: ListenerId) -> Arc<str> {
        self.controller
            .modes()
            .find(|(listener, _)| listener.id == id)
            .map_or_else(|| "".into(), |(_, choice)| choice.reason.as_str().into())
    }

    fn serving(&self) -> ServingReport {
        let failing: HashMap<&str, &str> = self.health.all_unhealthy().collect();
        let listeners = self.controller.serving().into_iter().map(|(name, serving)| {
            let detail = match (&serving, failing.get(&*name)) {
                (Err(reason), _) => reason.to_string(),
                (Ok(usable), None) => format!("serving, usable downstreams: {usable}"),
                (Ok(_), Some(effect)) => format!("serving, but all downstreams fail their health checks: {effect}"),
            };
            ListenerServing { name: name.into(), serves: serving.is_ok(), detail }
        });
        ServingReport { listeners: listeners.collect() }
    }

    fn readiness(&self) -> ReadinessReport {
        let listeners = self
            .controller
            .readiness()
            .into_iter()
            .map(|(name, state)| ListenerReadiness {
                name: name.into(),
                readiness: match state {
                    Ok(()) => ReadinessState::Ready,
                    Err(NotReady::NoDownstreamSet) => ReadinessState::NoDownstreamSet,
                    Err(NotReady::NotAttached(reason)) => ReadinessState::NotAttached(reason),
                },
            })
            .collect();
        ReadinessReport { listeners }
    }
}
