//! A listener's table in the form its workers read: encoded addresses, and the order of the round.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Result, ensure};

use super::count::DownstreamCells;
use super::gate::Gate;
use super::mmsg::{Endpoint, RawAddress};
use crate::model::Policy;
use crate::net::Family;
use crate::plan::{ListenerPlan, hash};

/// One listener's table; never changed, only replaced.
#[derive(Debug)]
pub struct Table {
    policy: Policy,
    gate: Gate,
    listener: SocketAddr,
    addresses: Box<[SocketAddr]>,
    encoded: Box<[RawAddress]>,
    round: Arc<[u32]>,
    samples: Box<[u32]>,
    targets: HashMap<Endpoint, u32>,
    /// Datagrams leave in their senders' names.
    keeps_senders: bool,
}

impl Table {
    /// The table of a plan whose listener is bound to this address.
    ///
    /// # Errors
    /// When the plan's table names a downstream that is not there.
    pub fn new(plan: &ListenerPlan, listener: SocketAddr) -> Result<Self> {
        Self::build(plan, listener, None)
    }

    /// The table that comes after this one: senders' buckets go on where they stand.
    ///
    /// # Errors
    /// As for [`Table::new`].
    pub fn next(&self, plan: &ListenerPlan) -> Result<Self> {
        Self::build(plan, self.listener, Some(&self.gate))
    }

    fn build(plan: &ListenerPlan, listener: SocketAddr, before: Option<&Gate>) -> Result<Self> {
        let family = Family::of(listener.ip());
        let addresses: Box<[_]> = plan.targets.iter().map(|target| target.downstream.address).collect();
        for &index in plan.table.iter() {
            let count = addresses.len();
            ensure!((index as usize) < count, "the table names downstream {index}, but there are only {count}");
        }
        Ok(Table {
            policy: plan.policy,
            gate: Gate::new(plan, before),
            listener,
            encoded: addresses.iter().map(|&address| RawAddress::new(address, family)).collect(),
            round: Arc::clone(&plan.table),
            samples: plan.targets.iter().map(|target| target.downstream.sample).collect(),
            targets: addresses.iter().map(|address| (address.ip(), address.port())).zip(0..).collect(),
            addresses,
            keeps_senders: plan.settings.preserve_source,
        })
    }

    /// True if datagrams would travel differently under the plan.
    pub fn differs_from(&self, plan: &ListenerPlan) -> bool {
        self.policy != plan.policy
            || self.gate.differs_from(plan)
            || *self.round != *plan.table
            || !self.samples.iter().eq(plan.targets.iter().map(|target| &target.downstream.sample))
            || !self.addresses.iter().eq(plan.targets.iter().map(|target| &target.downstream.address))
    }

    /// The address that the listener's sockets are bound to.
    pub fn listener(&self) -> SocketAddr {
        self.listener
    }

    /// Who may send, and how fast.
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// True if it must be known where datagrams come from, and which of the host's addresses they go to.
    pub fn needs_addresses(&self) -> bool {
        matches!(self.policy, Policy::Hash(_)) || !self.gate.is_open() || self.keeps_senders
    }

    /// How a datagram's place is found.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// The downstreams, in the order of their indices.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// The encoded address of a downstream.
    pub fn encoded(&self, target: u32) -> &RawAddress {
        &self.encoded[target as usize]
    }

    /// The indices of the downstreams in the order of the round. Under [`Policy::Replicate`], each once.
    pub fn round(&self) -> &[u32] {
        &self.round
    }

    /// How many of 2³² − 1 datagrams are copied to a downstream under [`Policy::Replicate`].
    pub fn sample(&self, target: u32) -> u32 {
        self.samples[target as usize]
    }

    /// The index of the downstream with this address.
    pub fn target(&self, endpoint: &Endpoint) -> Option<u32> {
        self.targets.get(endpoint).copied()
    }

    /// The index of the downstream to whose place a hash belongs; none if there are no downstreams.
    pub fn placed(&self, hash: u32) -> Option<u32> {
        let slots = u32::try_from(self.round.len()).ok()?;
        self.round.get(hash::place(hash, slots) as usize).copied()
    }

    /// The downstreams of the datagrams from this position of the endless round on; none if there are no downstreams.
    pub fn round_from(&self, position: u64) -> Option<Round<'_>> {
        let length = u64::try_from(self.round.len()).ok().filter(|&length| length > 0)?;
        Some(Round { round: &self.round, at: usize::try_from(position % length).ok()? })
    }
}

/// A walk along the round.
#[derive(Debug)]
pub struct Round<'a> {
    round: &'a [u32],
    at: usize,
}

impl Round<'_> {
    /// The index of the next downstream.
    pub fn step(&mut self) -> u32 {
        let target = self.round[self.at];
        self.at += 1;
        if self.at == self.round.len() {
            self.at = 0;
        }
        target
    }
}

/// A table, and the cells in which one worker counts for its downstreams, by index.
#[derive(Debug, Clone)]
pub struct WorkerTable {
    /// The table, shared by all workers.
    pub table: Arc<Table>,
    /// This worker's cells.
    pub cells: Box<[Arc<DownstreamCells>]>,
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::config::UserspaceSettings;
    use crate::model::{Downstream, ListenerId, Mode};
    use crate::plan::table::interleave;
    use crate::plan::{Delivery, Target};

    /// A plan for tests, with downstreams of these addresses and weights.
    pub fn plan(bind: SocketAddr, downstreams: &[(SocketAddr, u32)]) -> ListenerPlan {
        let target = |&(address, weight): &(SocketAddr, u32)| Target {
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
            headerless: Vec::new(),
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
        let table = Table::new(&plan, plan.bind).unwrap();
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
        let table = Table::new(&plan(address(514), &[]), address(514)).unwrap();
        assert!(table.round_from(7).is_none());
    }

    #[test]
    fn a_table_that_names_nobody_is_refused() {
        let mut plan = plan(address(514), &[(address(1), 1)]);
        plan.table = [0, 1].into();
        let error = Table::new(&plan, plan.bind).unwrap_err().to_string();
        assert_eq!(error, "the table names downstream 1, but there are only 1");
    }

    #[test]
    fn only_what_changes_the_way_of_a_datagram_is_a_difference() {
        let plan = plan(address(514), &[(address(1), 1), (address(2), 1)]);
        let table = Table::new(&plan, plan.bind).unwrap();
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
