//! The values of one scrape, as the event loop reads them at one moment.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use crate::datapath::DatapathCounters;
use crate::discovery::ServiceStatus;
use crate::health::listeners::Transitions;
use crate::health::probe_stats::ProbeStatsByKind;
use crate::model::{DownstreamCounters, FragmentCounters, ListenerCounters, Mode, Policy};
use crate::plan::ListenerPlan;

/// All values of one scrape.
#[derive(Debug, Clone, PartialEq)]
pub struct MetricsSnapshot {
    /// When the daemon started.
    pub started: SystemTime,
    /// Plans given to the datapaths, by result.
    pub plan_applies: PlanApplyCounts,
    /// Reloads of the configuration, by result.
    pub reloads: ReloadCounts,
    /// In the configuration's order.
    pub listeners: Vec<ListenerSnapshot>,
    /// Fragments that could not follow their datagram.
    pub fragments: FragmentCounters,
    /// For each interface with the TC program, the number of programs and filters that precede it.
    pub programs_ahead: Vec<(Arc<str>, usize)>,
    /// The downstreams that are checked, unhealthy ones included.
    pub health: Vec<DownstreamHealthSnapshot>,
    /// State changes of downstreams, by listener; only with health checks.
    pub health_transitions: Vec<(Arc<str>, Transitions)>,
    /// Health probes of all listeners.
    pub probes: ProbeStatsByKind,
    /// The Services that are followed.
    pub discovery: Vec<ServiceStatus>,
}

/// Health of one downstream of one listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DownstreamHealthSnapshot {
    /// The listener's name.
    pub listener: Arc<str>,
    /// The downstream's address.
    pub endpoint: SocketAddr,
    /// False from its failure until it answers again.
    pub healthy: bool,
}

/// Plans given to the datapaths since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PlanApplyCounts {
    /// Applied by every datapath.
    pub success: u64,
    /// Not applied, at least in part.
    pub error: u64,
}

/// Reloads since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReloadCounts {
    /// Put in force, or unchanged.
    pub success: u64,
    /// Invalid, or could not be put in force; the configuration before stayed.
    pub error: u64,
    /// The file as last read is in force.
    pub last_good: bool,
    /// When a configuration was last put in force, the start included.
    pub last_success: SystemTime,
}

/// One listener in a scrape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerSnapshot {
    /// Unique in a [`MetricsSnapshot`].
    pub name: Arc<str>,
    /// The datapath that carries it.
    pub mode: Mode,
    /// Why it was selected, in a few fixed words: a label, which must not change while the mode stays.
    pub mode_reason: Arc<str>,
    /// Its policy is `replicate`, so there are copies to count.
    pub replicates: bool,
    /// Number of downstreams in its table.
    pub active: usize,
    /// Counters of each datapath that serves it.
    pub counters: Vec<(Mode, ListenerCounters)>,
    /// Its downstreams, each once.
    pub downstreams: Vec<DownstreamSnapshot>,
}

/// One downstream of one listener in a scrape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DownstreamSnapshot {
    /// Its address.
    pub endpoint: SocketAddr,
    /// Datagrams and bytes handed to it, by all datapaths together.
    pub counters: DownstreamCounters,
}

impl ListenerSnapshot {
    /// Combines the datapaths' counters of one listener. Only downstreams in the plan are included.
    #[must_use]
    pub fn collect(plan: &ListenerPlan, mode_reason: Arc<str>, readings: &[(Mode, &DatapathCounters)]) -> Self {
        let of_listener =
            |&(mode, counters): &(Mode, &DatapathCounters)| Some((mode, *counters.listeners.get(&plan.id)?));
        let sum = |endpoint: SocketAddr| {
            let mut sum = DownstreamCounters::default();
            for (_, counters) in readings {
                if let Some(counted) = counters.downstreams.get(&(plan.id, endpoint)) {
                    sum.packets += counted.packets;
                    sum.bytes += counted.bytes;
                }
            }
            sum
        };
        let endpoints = plan.targets.iter().map(|target| target.downstream.address);
        ListenerSnapshot {
            name: Arc::clone(&plan.name),
            mode: plan.mode,
            mode_reason,
            replicates: plan.policy == Policy::Replicate,
            active: plan.targets.len(),
            counters: readings.iter().filter_map(of_listener).collect(),
            downstreams: endpoints.map(|endpoint| DownstreamSnapshot { endpoint, counters: sum(endpoint) }).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::UserspaceSettings;
    use crate::model::{Downstream, ListenerId};
    use crate::plan::{Delivery, PlanTarget};

    fn endpoint(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], 514))
    }

    fn plan(id: u32, endpoints: &[u8]) -> ListenerPlan {
        let target = |&last| PlanTarget {
            downstream: Downstream { name: "d".into(), address: endpoint(last), weight: 1, sample: Downstream::ALL },
            delivery: Delivery::Local,
        };
        ListenerPlan {
            id: ListenerId(id),
            name: "syslog".into(),
            mode: Mode::TcEbpf,
            bind: SocketAddr::from(([0, 0, 0, 0], 514)),
            match_addresses: vec![],
            links: vec![],
            l3_ingress: Vec::new(),
            joins: Vec::new(),
            policy: Policy::RoundRobin,
            sources: Arc::default(),
            meter: None,
            socket_only: None,
            targets: endpoints.iter().map(target).collect(),
            table: (0..).take(endpoints.len()).collect(),
            settings: UserspaceSettings::default(),
        }
    }

    fn reading(id: u32, received: u64, downstreams: &[(u8, u64)]) -> DatapathCounters {
        let counted = ListenerCounters { packets_received: received, ..Default::default() };
        let handed = |&(last, n)| ((ListenerId(id), endpoint(last)), DownstreamCounters { packets: n, bytes: n * 100 });
        DatapathCounters {
            listeners: [(ListenerId(id), counted)].into(),
            downstreams: downstreams.iter().map(handed).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn downstreams_are_summed_and_listeners_kept_apart() {
        let kernel = reading(3, 10, &[(1, 6), (2, 4)]);
        let user = reading(3, 1, &[(2, 1)]);
        let seen = ListenerSnapshot::collect(
            &plan(3, &[2, 1, 9]),
            "configured".into(),
            &[(Mode::TcEbpf, &kernel), (Mode::Userspace, &user)],
        );
        assert_eq!(seen.active, 3);
        let received: Vec<_> = seen.counters.iter().map(|(mode, c)| (*mode, c.packets_received)).collect();
        assert_eq!(received, [(Mode::TcEbpf, 10), (Mode::Userspace, 1)]);
        let handed: Vec<_> =
            seen.downstreams.iter().map(|d| (d.endpoint, d.counters.packets, d.counters.bytes)).collect();
        assert_eq!(handed, [(endpoint(2), 5, 500), (endpoint(1), 6, 600), (endpoint(9), 0, 0)]);
    }

    #[test]
    fn a_datapath_that_does_not_serve_the_listener_adds_nothing() {
        let kernel = reading(0, 10, &[(1, 10)]);
        let user = reading(3, 1, &[(1, 1)]);
        let seen = ListenerSnapshot::collect(
            &plan(3, &[1]),
            "configured".into(),
            &[(Mode::TcEbpf, &kernel), (Mode::Userspace, &user)],
        );
        assert_eq!(seen.counters.len(), 1);
        assert_eq!(seen.counters[0].0, Mode::Userspace);
        assert_eq!(seen.downstreams[0].counters.packets, 1);
    }
}
