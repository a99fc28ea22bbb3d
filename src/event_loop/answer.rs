//! Answers what the HTTP thread asks.

use std::sync::Arc;

use anyhow::Result;

use super::Daemon;
use crate::controller::NotReady;
use crate::datapath::{Counters, Datapath};
use crate::discovery::ServiceStatus;
use crate::metrics::http::{Health, ListenerHealth, Readiness, Request};
use crate::metrics::{HealthSnapshot, ListenerSnapshot, Snapshot};
use crate::model::{ListenerId, Mode};

impl Daemon {
    /// Answers all that has been asked. A client that has gone away in the meantime costs nothing.
    pub(super) fn answer_requests(&mut self) {
        let requests: Vec<Request> = match &self.http {
            Some((_, requests)) => requests.try_iter().filter(|request| !request.abandoned()).collect(),
            None => return,
        };
        for request in requests {
            // Sending fails if the client left just now, which is no concern of ours.
            match request {
                Request::Scrape(reply) => drop(reply.send(self.snapshot())),
                Request::Health(reply) => drop(reply.send(self.health())),
            }
        }
    }

    pub(super) fn snapshot(&mut self) -> Result<Snapshot> {
        let kernel = self.kernel.as_mut().map(Datapath::counters).transpose()?;
        let user = self.user.counters()?;
        let mut readings: Vec<(Mode, &Counters)> = Vec::with_capacity(2);
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
            Some(HealthSnapshot { listener, endpoint: checked.downstream, healthy: checked.status.state.usable() })
        });
        let health = health.collect();
        let transitions = self.health.transitions();
        let transitions = transitions.filter_map(|(id, counted)| Some((self.listener_name(id)?, counted)));
        let health_transitions = transitions.collect();
        let discovery = self.discovery_status();
        Ok(Snapshot {
            started: self.started_at,
            plan_applies: self.plan_applies,
            reloads: self.reloading.record,
            listeners,
            fragments: kernel.as_ref().map(|counters| counters.fragments).unwrap_or_default(),
            programs_ahead: self.ahead.iter().map(|(name, ahead)| (name.as_str().into(), ahead.len())).collect(),
            health,
            health_transitions,
            probes: self.health.probe_stats().clone(),
            discovery,
        })
    }

    /// A thread that has failed has left its last word behind, which no longer holds.
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

    fn health(&self) -> Health {
        let listeners = self
            .controller
            .readiness()
            .into_iter()
            .map(|(name, state)| ListenerHealth {
                name: name.into(),
                readiness: match state {
                    Ok(()) => Readiness::Ready,
                    Err(NotReady::NoDownstreamSet) => Readiness::NoDownstreamSet,
                    Err(NotReady::NotAttached(reason)) => Readiness::NotAttached(reason),
                },
            })
            .collect();
        Health { listeners }
    }
}
