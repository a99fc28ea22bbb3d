//! Since when each downstream has been one of its listener's, for the status report. Pure; decides nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use crate::model::{DownstreamSet, ListenerId};

/// When downstreams joined their listeners, as time since the daemon started. Those of a listener's first set are not
/// stored.
#[derive(Debug, Default)]
pub struct FirstSeen(BTreeMap<ListenerId, BTreeMap<SocketAddr, Duration>>);

impl FirstSeen {
    /// Records a listener's new set, which replaces `before` at the time `now`.
    pub fn record(&mut self, id: ListenerId, before: Option<&DownstreamSet>, set: &DownstreamSet, now: Duration) {
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

    /// When this downstream joined the listener; 0 if it was in the first set.
    #[must_use]
    pub fn at(&self, id: ListenerId, address: SocketAddr) -> Duration {
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
        let mut first_seen = FirstSeen::default();
        let mut step = |before: Option<&[u16]>, after: &[u16], now| {
            first_seen.record(id, before.map(set).as_ref(), &set(after), Duration::from_secs(now));
            after.iter().map(|&port| first_seen.at(id, address(port)).as_secs()).collect::<Vec<_>>()
        };
        assert_eq!(step(None, &[1, 2], 5), [5, 5]);
        assert_eq!(step(Some(&[1, 2]), &[2, 3], 7), [5, 7]);
        assert_eq!(step(Some(&[2, 3]), &[1, 2, 3], 9), [9, 5, 7]);
        // In the first set, so never recorded.
        assert_eq!(step(Some(&[1, 2, 3, 4]), &[4], 11), [0]);
    }
}
