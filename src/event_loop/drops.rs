//! The log of single datagrams that the TC program drops: the first of each reason for a listener and second.
//!
//! The program keeps to that for each CPU; here the CPUs' are brought together. How many there were in all, the counters
//! tell.

use std::collections::HashMap;
use std::time::Duration;

use crate::datapath::kernel::events::{DatagramEvent, DatagramOutcome};
use crate::model::{DropReason, ListenerId};

/// How long after a line no other of its sort is written.
const INTERVAL: Duration = Duration::from_secs(1);

/// What is remembered of lines: by listener, reason, and whether it was about a single copy.
#[derive(Debug, Default)]
pub(super) struct DropLog {
    lines: HashMap<(ListenerId, DropReason, bool), Line>,
    lost: u64,
}

#[derive(Debug)]
struct Line {
    written: Duration,
    /// Datagrams since then that no line has been written about.
    suppressed: u64,
}

impl DropLog {
    /// Notes a drop. How many like it there have been since the last line, if one is to be written now.
    fn note(&mut self, event: &DatagramEvent, reason: DropReason, copy: bool, suppressed: u64) -> Option<u64> {
        let line = self.lines.entry((event.listener, reason, copy));
        let mut due = false;
        let line = line.or_insert_with(|| {
            due = true;
            Line { written: event.at, suppressed: 0 }
        });
        line.suppressed += suppressed;
        // Events of several CPUs need not come in order.
        if !due && event.at.saturating_sub(line.written) < INTERVAL {
            line.suppressed += u64::from(event.datagrams);
            return None;
        }
        line.written = event.at;
        Some(std::mem::take(&mut line.suppressed))
    }

    /// Writes what is to be written about an event; `name` is its listener's.
    pub(super) fn write(&mut self, event: &DatagramEvent, name: &str) {
        let (reason, copy) = match event.outcome {
            DatagramOutcome::Dropped(reason) => (reason, false),
            DatagramOutcome::CopyDropped(reason) => (reason, true),
            DatagramOutcome::Forwarded(_) | DatagramOutcome::Passed | DatagramOutcome::Copied(_) => return,
        };
        let Some(suppressed) = event.logged else { return };
        let Some(more) = self.note(event, reason, copy, suppressed) else { return };
        let downstream = event.downstream.map(tracing::field::display);
        let what = if copy { "a copy of a datagram was dropped" } else { "a datagram was dropped" };
        let (source, destination, reason) = (event.source, event.destination, reason.label());
        if reason == DropReason::NoRoute.label() {
            tracing::warn!(listener = name, %source, %destination, downstream, reason, more, "FIB lookup failed, {what}");
        } else {
            tracing::warn!(listener = name, %source, %destination, downstream, reason, more, "{what}");
        }
    }

    /// Says so when events have been lost, given how many in all.
    pub(super) fn note_lost(&mut self, lost: u64) {
        if lost > self.lost {
            tracing::warn!(
                events = lost - self.lost,
                "more was told of single datagrams than could be read; the counters are complete"
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

    fn note(log: &mut DropLog, millis: u64, suppressed: u64) -> Option<u64> {
        log.note(&drop_at(millis, suppressed), DropReason::NoRoute, false, suppressed)
    }

    #[test]
    fn one_line_a_second_whatever_the_number_of_cpus_and_every_datagram_counted() {
        let mut log = DropLog::default();
        assert_eq!(note(&mut log, 10_000, 0), Some(0));
        assert_eq!(note(&mut log, 10_001, 0), None);
        assert_eq!(note(&mut log, 10_999, 5), None);
        // The two that were not written about and what they had held back.
        assert_eq!(note(&mut log, 11_000, 7), Some(14));
        assert_eq!(note(&mut log, 10_990, 0), None);
        assert_eq!(note(&mut log, 12_000, 0), Some(1));
    }

    #[test]
    fn reasons_listeners_and_copies_do_not_hold_each_other_back() {
        let mut log = DropLog::default();
        let event = drop_at(1_000, 0);
        let other = DatagramEvent { listener: ListenerId(2), ..event };
        for (event, reason, copy) in [
            (event, DropReason::NoRoute, false),
            (event, DropReason::TtlExpired, false),
            (event, DropReason::NoRoute, true),
            (other, DropReason::NoRoute, false),
        ] {
            assert_eq!(log.note(&event, reason, copy, 0), Some(0));
        }
    }
}
