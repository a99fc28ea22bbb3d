//! Answers what is asked on the status socket: puts together what controller, datapaths, health checks and discovery know.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Result;

use super::Daemon;
use crate::config::ListenerConfig;
use crate::control::protocol::{Request, Response};
use crate::control::report::{
    DaemonReport, DatapathReport, DownstreamReport, HealthReport, ListenerReport, Report, ServiceReport,
};
use crate::control::server::Answer;
use crate::controller::{ModeChoice, NotReady};
use crate::health;
use crate::host::HostFacts;
use crate::metrics::ListenerSnapshot;
use crate::model::{Downstream, DownstreamCounters, Drops, HashOn, ListenerId, Mode, Policy};
use crate::plan::{Delivery, ListenerPlan};
use crate::version;

type Healths = HashMap<(ListenerId, SocketAddr), HealthReport>;

impl Daemon {
    /// Answers one request.
    pub(super) fn respond(&mut self, request: &Request) -> Answer {
        match request {
            Request::Status => match self.report() {
                Ok(report) => Response::Report(Box::new(report)).into(),
                Err(error) => Response::Error(format!("{error:#}")).into(),
            },
            Request::Trace { listener, source } => self.trace(listener.as_deref(), source.as_deref()),
        }
    }

    fn report(&mut self) -> Result<Report> {
        let snapshot = self.snapshot()?;
        let now = self.started.elapsed();
        let healths = self.healths(now);
        let mut waits: HashMap<String, NotReady> = HashMap::new();
        for (name, state) in self.controller.readiness() {
            if let Err(reason) = state {
                waits.insert(name, reason);
            }
        }
        let sets: BTreeMap<ListenerId, _> = self.controller.sets().collect();
        let listeners = self.controller.modes().map(|(config, choice)| {
            let plan = self.controller.plan().listeners.iter().find(|plan| plan.id == config.id);
            let counted = snapshot.listeners.iter().find(|counted| *counted.name == *config.name);
            let mut report = listener(config, choice, plan, counted);
            report.waits_for = waits.get(&config.name).map(in_words);
            let set = sets.get(&config.id).copied().flatten();
            let all = set.map(|set| set.downstreams.as_slice()).unwrap_or_default();
            let counters = counted.map(counters_of).unwrap_or_default();
            report.downstreams = downstreams(all, plan, &counters, self.controller.facts());
            for downstream in &mut report.downstreams {
                let since = self.controller.since(config.id, downstream.address);
                downstream.age_secs = now.saturating_sub(since).as_secs_f64();
                downstream.health = healths.get(&(config.id, downstream.address)).cloned();
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
        Ok(Report { daemon, listeners, services: self.services(), problems: self.problems() })
    }

    fn healths(&self, now: Duration) -> Healths {
        let checked = self.health.downstreams();
        let report = |checked: health::listeners::DownstreamHealth<'_>| {
            let status = checked.status;
            let report = HealthReport {
                state: status.state.name().to_owned(),
                for_secs: now.saturating_sub(status.since).as_secs_f64(),
                failure: status.failure.as_ref().map(ToString::to_string),
                round_trip_secs: status.round_trip.map(|time| time.as_secs_f64()),
            };
            ((checked.listener, checked.downstream), report)
        };
        checked.map(report).collect()
    }

    fn services(&self) -> Vec<ServiceReport> {
        let Some((discovery, _)) = &self.sources.discovery else { return Vec::new() };
        let services = discovery.status().services().into_iter().map(|service| ServiceReport {
            namespace: service.namespace,
            service: service.service,
            synced: service.synced,
            last_event_secs: service.last_event_age.map(|age| age.as_secs_f64()),
            errors: service
                .errors
                .into_iter()
                .filter(|(_, n)| *n > 0)
                .map(|(kind, n)| (kind.label().to_owned(), n))
                .collect(),
        });
        services.collect()
    }

    /// What is wrong at the moment.
    pub(super) fn problems(&self) -> Vec<String> {
        let unread = self.reloading.refusal.iter().map(|(_, reason)| {
            format!("the configuration file was changed, and cannot be followed: {}", reason.replace('\n', "; "))
        });
        let refused = self.failure.iter().map(|error| format!("the last change is not in force: {error:#}"));
        let warnings = self.controller.standing_warnings().map(str::to_owned);
        let troubles = self
            .health
            .local_errors()
            .map(|(kind, reason)| format!("health checks ({}) cannot be made: {reason}", kind.name()));
        let out = self.health.all_unhealthy();
        let out =
            out.map(|(name, fate)| format!("listener {name:?}: all downstreams fail their health checks: {fate}"));
        unread.chain(refused).chain(warnings).chain(self.programs_ahead()).chain(troubles).chain(out).collect()
    }
}

fn listener(
    config: &ListenerConfig,
    choice: &ModeChoice,
    plan: Option<&ListenerPlan>,
    counted: Option<&ListenerSnapshot>,
) -> ListenerReport {
    let mut report = ListenerReport {
        id: config.id.0,
        name: config.name.clone(),
        bind: config.bind.to_string(),
        mode: choice.mode.name().to_owned(),
        mode_reason: choice.reason.clone(),
        socket_only: plan.and_then(|plan| plan.socket_only.clone()),
        interfaces: plan.iter().flat_map(|plan| &plan.links).map(|link| link.name.clone()).collect(),
        policy: policy(config.policy),
        ..Default::default()
    };
    for (mode, counters) in counted.iter().flat_map(|counted| &counted.counters) {
        let of_datapath = DatapathReport {
            received: counters.packets_received,
            forwarded: counters.packets_forwarded,
            passed: counters.packets_passed,
            dropped: counters.dropped.total(),
        };
        // What the kernel program passes up is received once more, by the socket.
        report.received += of_datapath.received.saturating_sub(of_datapath.passed);
        report.forwarded += of_datapath.forwarded;
        report.dropped += of_datapath.dropped;
        report.bytes_received += if *mode == Mode::TcEbpf { counters.bytes_forwarded } else { counters.bytes_received };
        add(&mut report.drops, &counters.dropped);
        add(&mut report.copies_dropped, &counters.copies_dropped);
        report.datapaths.insert(mode.name().to_owned(), of_datapath);
    }
    report
}

fn add(sums: &mut BTreeMap<String, u64>, drops: &Drops) {
    for (reason, packets) in drops.iter().filter(|(_, packets)| *packets > 0) {
        *sums.entry(reason.label().to_owned()).or_default() += packets;
    }
}

fn counters_of(counted: &ListenerSnapshot) -> HashMap<SocketAddr, DownstreamCounters> {
    counted.downstreams.iter().map(|downstream| (downstream.endpoint, downstream.counters)).collect()
}

fn downstreams(
    all: &[Downstream],
    plan: Option<&ListenerPlan>,
    counters: &HashMap<SocketAddr, DownstreamCounters>,
    facts: &HostFacts,
) -> Vec<DownstreamReport> {
    let mut slots: HashMap<SocketAddr, (u32, &Delivery, u32)> = HashMap::new();
    if let Some(plan) = plan {
        let mut counts = vec![0u32; plan.targets.len()];
        plan.table.iter().for_each(|&index| counts[index as usize] += 1);
        for (target, count) in plan.targets.iter().zip(counts) {
            slots.insert(target.downstream.address, (count, &target.delivery, target.downstream.sample));
        }
    }
    let table = plan.map_or(0, |plan| plan.table.len());
    let replicates = plan.is_some_and(|plan| plan.policy == Policy::Replicate);
    let report = |downstream: &Downstream| {
        let place = slots.get(&downstream.address);
        let counted = counters.get(&downstream.address).copied().unwrap_or_default();
        #[expect(clippy::cast_precision_loss, reason = "a table is far shorter than what a float counts exactly")]
        let share = match place {
            None => 0.0,
            Some((_, _, sample)) if replicates => f64::from(*sample) / f64::from(Downstream::ALL),
            Some((count, _, _)) => f64::from(*count) / table.max(1) as f64,
        };
        let kernel = plan.is_some_and(|plan| !plan.links.is_empty() && plan.socket_only.is_none());
        DownstreamReport {
            name: downstream.name.to_string(),
            address: downstream.address,
            weight: downstream.weight,
            share,
            age_secs: 0.0,
            health: None,
            way: place.filter(|_| kernel).map(|(_, delivery, _)| way(delivery, facts)),
            packets: counted.packets,
            bytes: counted.bytes,
            rates: None,
        }
    };
    all.iter().map(report).collect()
}

fn way(delivery: &Delivery, facts: &HostFacts) -> String {
    match delivery {
        Delivery::Local => "local".to_owned(),
        Delivery::Neighbour { link, .. } | Delivery::Bare { link, .. } => {
            facts.link(*link).map_or_else(|| format!("interface {link}"), |link| link.name.clone())
        }
        Delivery::Unreachable => "no route".to_owned(),
    }
}

fn policy(policy: Policy) -> String {
    match policy {
        Policy::RoundRobin => "round_robin".to_owned(),
        Policy::Hash(HashOn::SourceIp) => "hash source_ip".to_owned(),
        Policy::Hash(on) => format!("hash {}", on.name()),
        Policy::GelfMessage => "gelf messages".to_owned(),
        Policy::Replicate => "replicate".to_owned(),
    }
}

fn in_words(reason: &NotReady) -> String {
    match reason {
        NotReady::NoDownstreamSet => "no set of downstreams has come yet".to_owned(),
        NotReady::NotAttached(reason) => reason.clone(),
    }
}
