//! Logs datagrams that the TC program drops: one line per listener, reason and second.
//!
//! The program applies the same limit on each CPU; this combines the CPUs. A line's `more` says how many further datagrams
//! were dropped since the line before. The counters are complete in any case.

use std::collections::HashMap;
use std::time::Duration;

use crate::datapath::kernel::events::{DatagramEvent, DatagramOutcome};
use crate::model::{DropReason, ListenerId};

/// Shortest time between two lines for the same listener and reason.
const INTERVAL: Duration = Duration::from_secs(1);

/// What was logged last, by listener, reason, and whether a single copy was dropped.
#[derive(Debug, Default)]
pub struct DropLog {
    lines: HashMap<(ListenerId, DropReason, bool), LastLine>,
    lost: u64,
}

#[derive(Debug)]
struct LastLine {
    written: Duration,
    /// Datagrams dropped since then and not logged.
    suppressed: u64,
}

impl DropLog {
    /// Counts a drop. If a line is due, the number of drops suppressed since the last one.
    fn count(&mut self, event: &DatagramEvent, reason: DropReason, copy: bool, suppressed: u64) -> Option<u64> {
        let line = self.lines.entry((event.listener, reason, copy));
        let mut due = false;
        let line = line.or_insert_with(|| {
            due = true;
            LastLine { written: event.at, suppressed: 0 }
        });
        line.suppressed += suppressed;
        // Events of different CPUs may arrive out of order.
        if !due && event.at.saturating_sub(line.written) < INTERVAL {
            line.suppressed += u64::from(event.datagrams);
            return None;
        }
        line.written = event.at;
        Some(std::mem::take(&mut line.suppressed))
    }

    /// Logs a dropped datagram, unless a line like it was logged within the last second.
    pub fn log(&mut self, event: &DatagramEvent, listener: &str) {
        let (reason, copy) = match event.outcome {
            DatagramOutcome::Dropped(reason) => (reason, false),
            DatagramOutcome::CopyDropped(reason) => (reason, true),
            DatagramOutcome::Forwarded(_) | DatagramOutcome::Passed | DatagramOutcome::Copied(_) => return,
        };
        let Some(suppressed) = event.logged else { return };
        let Some(more) = self.count(event, reason, copy, suppressed) else { return };
        let downstream = event.downstream.map(tracing::field::display);
        let what = if copy { "a copy of a datagram was dropped" } else { "a datagram was dropped" };
        let (source, destination, reason) = (event.source, event.destination, reason.label());
        if reason == DropReason::NoRoute.label() {
            tracing::warn!(listener, %source, %destination, downstream, reason, more, "FIB lookup failed, {what}");
        } else {
            tracing::warn!(listener, %source, %destination, downstream, reason, more, "{what}");
        }
    }

    /// Warns when further events have been lost; `lost` is the total since the start.
    pub fn log_lost(&mut self, lost: u64) {
        if lost > self.lost {
            tracing::warn!(
                events = lost - self.lost,
                "trace ring buffer full: events were lost; the counters are complete"
            );
            self.lost = lost;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drop_at(millis: u64, suppressed: u64) -> DatagramEvent {
        DatagramEvent {
            at: Duration::from_millis(millis),
            listener: ListenerId(1),
            source: "192.0.2.1:1".parse().unwrap(),
            destination: "192.0.2.2:2".parse().unwrap(),
            downstream: None,
            outcome: DatagramOutcome::Dropped(DropReason::NoRoute),
            link: 2,
            out_link: 0,
            datagrams: 1,
            bytes: 10,
            logged: Some(suppressed),
            traced: false,
        }
    }

    fn count(log: &mut DropLog, millis: u64, suppressed: u64) -> Option<u64> {
        log.count(&drop_at(millis, suppressed), DropReason::NoRoute, false, suppressed)
    }

    #[test]
    fn one_line_a_second_whatever_the_number_of_cpus_and_every_datagram_counted() {
        let mut log = DropLog::default();
        assert_eq!(count(&mut log, 10_000, 0), Some(0));
        assert_eq!(count(&mut log, 10_001, 0), None);
        assert_eq!(count(&mut log, 10_999, 5), None);
        // The two that were not logged, and what they had suppressed themselves.
        assert_eq!(count(&mut log, 11_000, 7), Some(14));
        assert_eq!(count(&mut log, 10_990, 0), None);
        assert_eq!(count(&mut log, 12_000, 0), Some(1));
    }

    #[test]
    fn listeners_reasons_and_copies_are_limited_separately() {
        let mut log = DropLog::default();
        let event = drop_at(1_000, 0);
        let other = DatagramEvent { listener: ListenerId(2), ..event };
        for (event, reason, copy) in [
            (event, DropReason::NoRoute, false),
            (event, DropReason::TtlExpired, false),
            (event, DropReason::NoRoute, true),
            (other, DropReason::NoRoute, false),
        ] {
            assert_eq!(log.count(&event, reason, copy, 0), Some(0));
        }
    }
}
