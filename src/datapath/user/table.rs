//! A listener's table in the form its workers read: encoded addresses, and the order of the round.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Result, ensure};

use super::admission::UserAdmission;
use super::counters::DownstreamCells;
use super::mmsg::{AddrPort, RawAddress};
use crate::model::Policy;
use crate::net::Family;
use crate::plan::{ListenerPlan, hash};

/// One listener's table. Never changed, only replaced.
#[derive(Debug)]
pub struct ForwardingTable {
    policy: Policy,
    admission: UserAdmission,
    listener: SocketAddr,
    addresses: Box<[SocketAddr]>,
    encoded: Box<[RawAddress]>,
    round: Arc<[u32]>,
    samples: Box<[u32]>,
    targets: HashMap<AddrPort, u32>,
    /// Datagrams are sent with their sender's address.
    preserve_source: bool,
}

impl ForwardingTable {
    /// The table of a plan whose listener is bound to this address.
    ///
    /// # Errors
    /// When the plan's table has an index that is out of range.
    pub fn new(plan: &ListenerPlan, listener: SocketAddr) -> Result<Self> {
        Self::build(plan, listener, None)
    }

    /// The table that replaces this one; the senders' token buckets keep their state.
    ///
    /// # Errors
    /// As for [`ForwardingTable::new`].
    pub fn next(&self, plan: &ListenerPlan) -> Result<Self> {
        Self::build(plan, self.listener, Some(&self.admission))
    }

    fn build(plan: &ListenerPlan, listener: SocketAddr, before: Option<&UserAdmission>) -> Result<Self> {
        let family = Family::of(listener.ip());
        let addresses: Box<[_]> = plan.targets.iter().map(|target| target.downstream.address).collect();
        for &index in plan.table.iter() {
            let count = addresses.len();
            ensure!((index as usize) < count, "the table names downstream {index}, but there are only {count}");
        }
        Ok(ForwardingTable {
            policy: plan.policy,
            admission: UserAdmission::new(plan, before),
            listener,
            encoded: addresses.iter().map(|&address| RawAddress::new(address, family)).collect(),
            round: Arc::clone(&plan.table),
            samples: plan.targets.iter().map(|target| target.downstream.sample).collect(),
            targets: addresses.iter().map(|address| (address.ip(), address.port())).zip(0..).collect(),
            addresses,
            preserve_source: plan.settings.preserve_source,
        })
    }

    /// True if datagrams would be forwarded differently under the plan.
    pub fn differs_from(&self, plan: &ListenerPlan) -> bool {
        self.policy != plan.policy
            || self.admission.differs_from(plan)
            || *self.round != *plan.table
            || !self.samples.iter().eq(plan.targets.iter().map(|target| &target.downstream.sample))
            || !self.addresses.iter().eq(plan.targets.iter().map(|target| &target.downstream.address))
    }

    /// The address that the listener's sockets are bound to.
    pub fn listener(&self) -> SocketAddr {
        self.listener
    }

    /// Which senders may send, and how fast.
    pub fn admission(&self) -> &UserAdmission {
        &self.admission
    }

    /// True if workers must know each datagram's source and destination address.
    pub fn needs_addresses(&self) -> bool {
        matches!(self.policy, Policy::Hash(_)) || !self.admission.admits_all() || self.preserve_source
    }

    /// How a datagram's slot is selected.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// The downstreams, by index.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// The encoded address of a downstream.
    pub fn encoded(&self, target: u32) -> &RawAddress {
        &self.encoded[target as usize]
    }

    /// Indices of the downstreams in the order of the round. Under [`Policy::Replicate`], each once.
    pub fn round(&self) -> &[u32] {
        &self.round
    }

    /// How many of 2³² − 1 datagrams are copied to a downstream under [`Policy::Replicate`].
    pub fn sample(&self, target: u32) -> u32 {
        self.samples[target as usize]
    }

    /// The index of the downstream with this address.
    pub fn target(&self, endpoint: &AddrPort) -> Option<u32> {
        self.targets.get(endpoint).copied()
    }

    /// The index of the downstream that a hash selects; none if there are no downstreams.
    pub fn target_of_hash(&self, hash: u32) -> Option<u32> {
        let slots = u32::try_from(self.round.len()).ok()?;
        self.round.get(hash::table_slot(hash, slots) as usize).copied()
    }

    /// A cursor at this position of the endless round; none if there are no downstreams.
    pub fn round_from(&self, position: u64) -> Option<RoundCursor<'_>> {
        let length = u64::try_from(self.round.len()).ok().filter(|&length| length > 0)?;
        Some(RoundCursor { round: &self.round, at: usize::try_from(position % length).ok()? })
    }
}

/// A position in the round.
#[derive(Debug)]
pub struct RoundCursor<'a> {
    round: &'a [u32],
    at: usize,
}

impl RoundCursor<'_> {
    /// The index of the next downstream; advances.
    pub fn step(&mut self) -> u32 {
        let target = self.round[self.at];
        self.at += 1;
        if self.at == self.round.len() {
            self.at = 0;
        }
        target
    }
}

/// A table, and one worker's counters for its downstreams, by index.
#[derive(Debug, Clone)]
pub struct WorkerTable {
    /// The table, shared by all workers.
    pub table: Arc<ForwardingTable>,
    /// This worker's counters.
    pub cells: Box<[Arc<DownstreamCells>]>,
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::config::UserspaceSettings;
    use crate::model::{Downstream, ListenerId, Mode};
    use crate::plan::round_robin::interleave;
    use crate::plan::{Delivery, PlanTarget};

    /// A plan for tests, with downstreams of these addresses and weights.
    pub fn plan(bind: SocketAddr, downstreams: &[(SocketAddr, u32)]) -> ListenerPlan {
        let target = |&(address, weight): &(SocketAddr, u32)| PlanTarget {
            downstream: Downstream { name: address.to_string().into(), address, weight, sample: Downstream::ALL },
            delivery: Delivery::Unreachable,
        };
        ListenerPlan {
            id: ListenerId(0),
            name: "test".into(),
            mode: Mode::Userspace,
            bind,
            match_addresses: Vec::new(),
            links: Vec::new(),
            l3_ingress: Vec::new(),
            joins: Vec::new(),
            policy: Policy::RoundRobin,
            sources: Arc::default(),
            meter: None,
            socket_only: None,
            targets: downstreams.iter().map(target).collect(),
            table: interleave(&downstreams.iter().map(|&(_, weight)| weight).collect::<Vec<_>>()).into(),
            settings: UserspaceSettings { workers: 1, ..UserspaceSettings::default() },
        }
    }

    fn address(port: u16) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, 1], port))
    }

    #[test]
    fn a_round_goes_on_from_any_position() {
        let plan = plan(address(514), &[(address(1), 2), (address(2), 1)]);
        let table = ForwardingTable::new(&plan, plan.bind).unwrap();
        assert_eq!(*plan.table, [0, 1, 0]);
        for start in 0..10u64 {
            let mut round = table.round_from(start).unwrap();
            for n in start..start + 7 {
                assert_eq!(round.step(), plan.table[(n % 3) as usize]);
            }
        }
        assert_eq!(table.target(&(address(2).ip(), 2)), Some(1));
        assert_eq!(table.target(&(address(2).ip(), 3)), None);
    }

    #[test]
    fn without_downstreams_there_is_no_round() {
        let table = ForwardingTable::new(&plan(address(514), &[]), address(514)).unwrap();
        assert!(table.round_from(7).is_none());
    }

    #[test]
    fn a_table_that_names_nobody_is_refused() {
        let mut plan = plan(address(514), &[(address(1), 1)]);
        plan.table = [0, 1].into();
        let error = ForwardingTable::new(&plan, plan.bind).unwrap_err().to_string();
        assert_eq!(error, "the table names downstream 1, but there are only 1");
    }

    #[test]
    fn only_what_changes_the_way_of_a_datagram_is_a_difference() {
        let plan = plan(address(514), &[(address(1), 1), (address(2), 1)]);
        let table = ForwardingTable::new(&plan, plan.bind).unwrap();
        let mut renamed = plan.clone();
        Arc::make_mut(&mut renamed.targets)[0].downstream.name = "other".into();
        Arc::make_mut(&mut renamed.targets)[1].delivery = Delivery::Local;
        assert!(!table.differs_from(&renamed));
        let mut moved = plan.clone();
        Arc::make_mut(&mut moved.targets)[0].downstream.address.set_port(9);
        assert!(table.differs_from(&moved));
        let mut sampled = plan.clone();
        Arc::make_mut(&mut sampled.targets)[0].downstream.sample = 7;
        assert!(table.differs_from(&sampled));
        let mut turned = plan.clone();
        Arc::make_mut(&mut turned.table).reverse();
        assert!(table.differs_from(&turned));
    }
}
