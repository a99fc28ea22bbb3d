//! How long each downstream has been one of its listener's. Pure, for those who want to see it; nothing is decided by it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use crate::model::{DownstreamSet, ListenerId};

/// When the downstreams of listeners came, as times since the daemon started. Those that were there from the start are
/// not kept.
#[derive(Debug, Default)]
pub struct Ages(BTreeMap<ListenerId, BTreeMap<SocketAddr, Duration>>);

impl Ages {
    /// Takes note of a listener's new set at the time `now`, which takes the place of `before`.
    pub fn note(&mut self, id: ListenerId, before: Option<&DownstreamSet>, set: &DownstreamSet, now: Duration) {
        let there: BTreeSet<SocketAddr> =
            before.into_iter().flat_map(|set| &set.downstreams).map(|downstream| downstream.address).collect();
        let old = self.0.remove(&id).unwrap_or_default();
        let came = set.downstreams.iter().filter_map(|downstream| {
            let address = downstream.address;
            let since = if there.contains(&address) { old.get(&address).copied()? } else { now };
            Some((address, since))
        });
        self.0.insert(id, came.collect());
    }

    /// Since when this has been one of the listener's downstreams.
    #[must_use]
    pub fn since(&self, id: ListenerId, address: SocketAddr) -> Duration {
        self.0.get(&id).and_then(|came| came.get(&address)).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Downstream;

    #[test]
    fn a_downstream_is_as_old_as_its_unbroken_presence() {
        let address = |port| SocketAddr::from(([10, 0, 0, 1], port));
        let set = |ports: &[u16]| DownstreamSet {
            generation: 1,
            downstreams: ports
                .iter()
                .map(|&port| Downstream {
                    name: "d".into(),
                    address: address(port),
                    weight: 1,
                    sample: Downstream::ALL,
                })
                .collect(),
        };
        let id = ListenerId(3);
        let mut ages = Ages::default();
        let mut step = |before: Option<&[u16]>, after: &[u16], now| {
            ages.note(id, before.map(set).as_ref(), &set(after), Duration::from_secs(now));
            after.iter().map(|&port| ages.since(id, address(port)).as_secs()).collect::<Vec<_>>()
        };
        assert_eq!(step(None, &[1, 2], 5), [5, 5]);
        assert_eq!(step(Some(&[1, 2]), &[2, 3], 7), [5, 7]);
        assert_eq!(step(Some(&[2, 3]), &[1, 2, 3], 9), [9, 5, 7]);
        // There from the start, so nothing was ever noted of it.
        assert_eq!(step(Some(&[1, 2, 3, 4]), &[4], 11), [0]);
    }
}
