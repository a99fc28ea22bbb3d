//! Assembles a status report from what the daemon's parts know. Pure.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::time::Duration;

use super::report::{DatapathReport, DownstreamReport, HealthReport, ListenerReport, ServiceReport};
use crate::config::ListenerConfig;
use crate::controller::{ModeChoice, NotReady};
use crate::discovery::ServiceStatus;
use crate::health;
use crate::host::HostFacts;
use crate::metrics::ListenerSnapshot;
use crate::model::{Downstream, DownstreamCounters, Drops, HashOn, Mode, Policy};
use crate::plan::{Delivery, ListenerPlan};

/// What is known of one listener.
#[derive(Debug)]
pub struct ListenerFacts<'a> {
    /// Its configuration.
    pub config: &'a ListenerConfig,
    /// Its datapath, and why.
    pub choice: &'a ModeChoice,
    /// Its part of the plan in force; none before the first plan.
    pub plan: Option<&'a ListenerPlan>,
    /// What its datapaths have counted.
    pub counted: Option<&'a ListenerSnapshot>,
    /// What it waits for, if anything.
    pub not_ready: Option<&'a NotReady>,
    /// Its downstreams, healthy or not.
    pub downstreams: &'a [Downstream],
    /// Names the interfaces.
    pub host: &'a HostFacts,
}

/// One listener and its downstreams, without their ages and health.
#[must_use]
pub fn listener(facts: &ListenerFacts<'_>) -> ListenerReport {
    let ListenerFacts { config, choice, plan, counted, .. } = *facts;
    let mut report = ListenerReport {
        id: config.id.0,
        name: config.name.clone(),
        bind: config.bind.to_string(),
        mode: choice.mode.name().to_owned(),
        mode_reason: choice.reason.clone(),
        socket_only: plan.and_then(|plan| plan.socket_only.clone()),
        interfaces: plan.iter().flat_map(|plan| &plan.links).map(|link| link.name.clone()).collect(),
        policy: policy(config.policy),
        waits_for: facts.not_ready.map(waits_for),
        downstreams: downstreams(facts),
        ..Default::default()
    };
    for (mode, counters) in counted.iter().flat_map(|counted| &counted.counters) {
        let datapath = DatapathReport {
            received: counters.packets_received,
            forwarded: counters.packets_forwarded,
            passed: counters.packets_passed,
            dropped: counters.dropped.total(),
        };
        // What the kernel program passes up, the socket receives and counts again.
        report.received += datapath.received.saturating_sub(datapath.passed);
        report.forwarded += datapath.forwarded;
        report.dropped += datapath.dropped;
        report.bytes_received += if *mode == Mode::TcEbpf { counters.bytes_forwarded } else { counters.bytes_received };
        add_drops(&mut report.drops, &counters.dropped);
        add_drops(&mut report.copies_dropped, &counters.copies_dropped);
        report.datapaths.insert(mode.name().to_owned(), datapath);
    }
    report
}

/// One downstream's health.
#[must_use]
pub fn health(status: &health::model::TargetStatus, now: Duration) -> HealthReport {
    HealthReport {
        state: status.state.name().to_owned(),
        for_secs: now.saturating_sub(status.since).as_secs_f64(),
        failure: status.failure.as_ref().map(ToString::to_string),
        round_trip_secs: status.round_trip.map(|time| time.as_secs_f64()),
    }
}

/// One Service that discovery follows.
#[must_use]
pub fn service(status: ServiceStatus) -> ServiceReport {
    let errors = status.errors.into_iter().filter(|(_, n)| *n > 0);
    ServiceReport {
        namespace: status.namespace,
        service: status.service,
        synced: status.synced,
        last_event_secs: status.last_event_age.map(|age| age.as_secs_f64()),
        errors: errors.map(|(kind, n)| (kind.label().to_owned(), n)).collect(),
    }
}

fn add_drops(sums: &mut BTreeMap<String, u64>, drops: &Drops) {
    for (reason, packets) in drops.iter().filter(|(_, packets)| *packets > 0) {
        *sums.entry(reason.label().to_owned()).or_default() += packets;
    }
}

fn downstreams(facts: &ListenerFacts<'_>) -> Vec<DownstreamReport> {
    let mut targets: HashMap<SocketAddr, (&Delivery, f64)> = HashMap::new();
    if let Some(plan) = facts.plan {
        for (target, share) in plan.targets.iter().zip(shares(plan)) {
            targets.insert(target.downstream.address, (&target.delivery, share));
        }
    }
    let counted = facts.counted.map_or(&[][..], |counted| &counted.downstreams);
    let counters: HashMap<SocketAddr, DownstreamCounters> =
        counted.iter().map(|downstream| (downstream.endpoint, downstream.counters)).collect();
    let in_kernel = facts.plan.is_some_and(|plan| !plan.links.is_empty() && plan.socket_only.is_none());
    let report = |downstream: &Downstream| {
        let target = targets.get(&downstream.address);
        let counters = counters.get(&downstream.address).copied().unwrap_or_default();
        DownstreamReport {
            name: downstream.name.to_string(),
            address: downstream.address,
            weight: downstream.weight,
            share: target.map_or(0.0, |(_, share)| *share),
            age_secs: 0.0,
            health: None,
            way: target.filter(|_| in_kernel).map(|(delivery, _)| path(delivery, facts.host)),
            packets: counters.packets,
            bytes: counters.bytes,
            rates: None,
        }
    };
    facts.downstreams.iter().map(report).collect()
}

/// Each target's part of the listener's datagrams, 0 to 1, in the plan's order.
fn shares(plan: &ListenerPlan) -> Vec<f64> {
    if plan.policy == Policy::Replicate {
        let sample =
            |target: &crate::plan::PlanTarget| f64::from(target.downstream.sample) / f64::from(Downstream::ALL);
        return plan.targets.iter().map(sample).collect();
    }
    let mut slots = vec![0u32; plan.targets.len()];
    plan.table.iter().for_each(|&index| slots[index as usize] += 1);
    #[expect(clippy::cast_precision_loss, reason = "a table is far shorter than what a float counts exactly")]
    let all = plan.table.len().max(1) as f64;
    slots.into_iter().map(|slots| f64::from(slots) / all).collect()
}

fn path(delivery: &Delivery, host: &HostFacts) -> String {
    match delivery {
        Delivery::Local => "local".to_owned(),
        Delivery::Neighbour { link, .. } | Delivery::L3Device { link, .. } => {
            host.link(*link).map_or_else(|| format!("interface {link}"), |link| link.name.clone())
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

fn waits_for(reason: &NotReady) -> String {
    match reason {
        NotReady::NoDownstreamSet => "no set of downstreams has come yet".to_owned(),
        NotReady::NotAttached(reason) => reason.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::config::UserspaceSettings;
    use crate::model::ListenerId;
    use crate::plan::PlanTarget;

    fn plan(policy: Policy, samples: &[u32], table: &[u32]) -> ListenerPlan {
        let target = |(&sample, port)| PlanTarget {
            downstream: Downstream { name: "d".into(), address: ([10, 0, 0, 1], port).into(), weight: 1, sample },
            delivery: Delivery::Local,
        };
        ListenerPlan {
            id: ListenerId(1),
            name: "syslog".into(),
            mode: Mode::TcEbpf,
            bind: ([0, 0, 0, 0], 514).into(),
            match_addresses: Vec::new(),
            links: Vec::new(),
            l3_ingress: Vec::new(),
            joins: Vec::new(),
            policy,
            sources: Arc::default(),
            meter: None,
            socket_only: None,
            targets: samples.iter().zip(1..).map(target).collect(),
            table: table.into(),
            settings: UserspaceSettings::default(),
        }
    }

    #[test]
    fn a_share_is_the_part_of_the_table_or_of_the_copies() {
        let all = Downstream::ALL;
        assert_eq!(shares(&plan(Policy::RoundRobin, &[all, all], &[0, 1, 0, 0])), [0.75, 0.25]);
        assert_eq!(shares(&plan(Policy::RoundRobin, &[all], &[])), [0.0]);
        assert_eq!(shares(&plan(Policy::Replicate, &[all, 0], &[0, 1])), [1.0, 0.0]);
    }
}
