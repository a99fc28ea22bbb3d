//! What netlink says of the host: reads its facts again when something has changed, and passes them to the controller.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::Daemon;
use crate::controller::{ControllerEvent, RETRY};
use crate::error_hints;
use crate::host::HostFacts;

/// How long after a change the host's facts are read: changes often come in groups.
const SETTLE: Duration = Duration::from_millis(50);

impl Daemon {
    /// Reads netlink's notifications, and schedules [`Self::refresh_host`] if one concerns us.
    pub(super) fn drain_netlink(&mut self) {
        match self.monitor.drain() {
            Ok(false) => {}
            Ok(true) => {
                self.timers.host.get_or_insert_with(|| Instant::now() + SETTLE);
            }
            Err(error) => tracing::error!("{error:#}"),
        }
    }

    /// Passes the host's current facts to the controller.
    pub(super) fn refresh_host(&mut self) {
        if let Some(facts) = self.read_host_facts_or_retry(&self.controller.route_addresses()) {
            self.handle(ControllerEvent::Host(facts));
        }
    }

    /// The host's facts, with the routes to these addresses. A failure is logged, and tried again after [`RETRY`].
    pub(super) fn read_host_facts_or_retry(&mut self, addresses: &BTreeSet<IpAddr>) -> Option<HostFacts> {
        match self.read_host_facts(addresses) {
            Ok(facts) => Some(facts),
            Err(error) => {
                tracing::error!("{}; trying again", error_hints::add_open_files_hint(format!("{error:#}")));
                self.timers.host = Some(Instant::now() + RETRY);
                None
            }
        }
    }

    pub(super) fn read_host_facts(&mut self, addresses: &BTreeSet<IpAddr>) -> Result<HostFacts> {
        let facts = self.host.facts(addresses)?;
        self.monitor.watch(&facts);
        self.log_egress_hooks(self.controller.facts(), &facts);
        self.recheck_health(&facts);
        Ok(facts)
    }

    /// Logs what newly keeps the program from redirecting straight into a network namespace.
    pub(super) fn log_egress_hooks(&self, before: &HostFacts, now: &HostFacts) {
        for (&link, hook) in now.egress_hooks.iter().filter(|(link, hook)| before.egress_hooks.get(link) != Some(hook))
        {
            let interface = now.link(link).map(|link| link.name.as_str());
            tracing::info!(interface, "datagrams into the namespace behind it pass {hook} on their way");
        }
    }

    /// Has downstreams probed at once whose path has changed.
    fn recheck_health(&mut self, facts: &HostFacts) {
        if self.health.next_deadline().is_none() {
            return;
        }
        for address in self.controller.facts().changed_paths(facts) {
            self.health.recheck(address, self.started.elapsed());
        }
    }
}
