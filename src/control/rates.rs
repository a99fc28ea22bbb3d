//! Computes rates from two reports of the same daemon. Pure.

use super::report::{Rates, StatusReport};

/// Adds rates to `now`: the difference to `before`, by the daemon's own clock. Adds none where the two cannot be compared:
/// another process, no time between them, a listener or downstream that `before` does not have.
pub fn add(now: &mut StatusReport, before: &StatusReport) {
    let seconds = now.daemon.uptime_secs - before.daemon.uptime_secs;
    if now.daemon.pid != before.daemon.pid || seconds <= 0.0 {
        return;
    }
    let per_second = |now: u64, before: u64| {
        #[expect(clippy::cast_precision_loss, reason = "a rate need not be exact")]
        let more = now.saturating_sub(before) as f64;
        more / seconds
    };
    for listener in &mut now.listeners {
        let Some(was) = before.listeners.iter().find(|was| was.name == listener.name) else { continue };
        listener.rates = Some(Rates {
            packets: per_second(listener.received, was.received),
            bytes: per_second(listener.bytes_received, was.bytes_received),
            forwarded: per_second(listener.forwarded, was.forwarded),
            dropped: per_second(listener.dropped, was.dropped),
        });
        let before = was.downstreams.iter().map(|downstream| (downstream.address, downstream));
        let before: std::collections::HashMap<_, _> = before.collect();
        for downstream in &mut listener.downstreams {
            let Some(was) = before.get(&downstream.address) else { continue };
            let packets = per_second(downstream.packets, was.packets);
            let bytes = per_second(downstream.bytes, was.bytes);
            downstream.rates = Some(Rates { packets, bytes, forwarded: packets, dropped: 0.0 });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::report::{DaemonReport, DownstreamReport, ListenerReport};

    fn report(uptime_secs: f64, received: u64, packets: &[u64]) -> StatusReport {
        let downstream = |(&packets, port)| DownstreamReport {
            name: "d".into(),
            address: ([10, 0, 0, 1], port).into(),
            weight: 1,
            share: 1.0,
            age_secs: 0.0,
            health: None,
            way: None,
            packets,
            bytes: packets * 100,
            rates: None,
        };
        StatusReport {
            daemon: DaemonReport { pid: 7, uptime_secs, ..Default::default() },
            listeners: vec![ListenerReport {
                name: "a".into(),
                received,
                forwarded: received - 3,
                dropped: 3,
                bytes_received: received * 100,
                downstreams: packets.iter().zip(1..).map(downstream).collect(),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn a_rate_is_the_difference_by_the_daemons_clock() {
        let mut now = report(12.0, 103, &[60, 40, 9]);
        add(&mut now, &report(10.0, 3, &[10, 0]));
        let listener = &now.listeners[0];
        assert_eq!(listener.rates, Some(Rates { packets: 50.0, bytes: 5_000.0, forwarded: 50.0, dropped: 0.0 }));
        let rates: Vec<_> = listener.downstreams.iter().map(|to| to.rates.map(|rates| rates.packets)).collect();
        assert_eq!(rates, [Some(25.0), Some(20.0), None], "the third has just come");
    }

    #[test]
    fn what_cannot_be_compared_has_no_rates() {
        let before = report(10.0, 3, &[1]);
        let mut restarted = report(1.0, 3, &[1]);
        add(&mut restarted, &before);
        let mut other = report(12.0, 3, &[1]);
        other.daemon.pid = 8;
        add(&mut other, &before);
        let mut same = before.clone();
        add(&mut same, &before);
        for report in [restarted, other, same] {
            assert_eq!((report.listeners[0].rates, report.listeners[0].downstreams[0].rates), (None, None));
        }
    }

    #[test]
    fn counts_that_began_again_are_no_negative_rate() {
        let mut now = report(11.0, 103, &[0]);
        add(&mut now, &report(10.0, 3, &[1_000]));
        assert_eq!(now.listeners[0].downstreams[0].rates.map(|rates| rates.packets), Some(0.0));
    }
}
