//! Per worker: what recent errors say about each downstream.
//!
//! - Pending losses. An ICMP error arrives after its datagram was counted as forwarded. Counters never decrease, so the
//!   loss stays pending until the next datagram to the same downstream, which is counted under the error's reason
//!   instead. Over time the sums are exact.
//! - Degraded downstreams. After an error, a downstream's datagrams use a separate sending socket for a while (see
//!   `send_queue`).
//! - Unsegmented downstreams. A route may not support segmentation: the device lacks it, or each datagram is longer
//!   than the MTU. Then datagrams to that downstream are sent one by one for a while.

use std::time::{Duration, Instant};

use super::table::ForwardingTable;
use crate::model::DropReason;

/// How long a downstream is degraded after an error. Longer than the three seconds after which the kernel gives up on
/// an unresolved neighbour and reports it.
const DEGRADED_FOR: Duration = Duration::from_secs(10);
/// How long a downstream's datagrams are sent one by one before segmentation is tried again.
const UNSEGMENTED_FOR: Duration = Duration::from_secs(10);

/// The errors of every downstream of a table, by index.
#[derive(Debug)]
pub struct DownstreamErrors {
    targets: Box<[ErrorState]>,
    /// Pending losses of all downstreams.
    pending_losses: u64,
    /// Until when any downstream is degraded or unsegmented.
    active_until: Option<Instant>,
}

#[derive(Debug, Clone, Default)]
struct ErrorState {
    pending_losses: [u32; DropReason::COUNT],
    degraded_until: Option<Instant>,
    /// The longest datagrams that can be segmented, in bytes, and until when this holds.
    unsegmented: Option<(u32, Instant)>,
}

impl DownstreamErrors {
    /// No errors.
    pub fn new(targets: usize) -> Self {
        DownstreamErrors { targets: vec![ErrorState::default(); targets].into(), pending_losses: 0, active_until: None }
    }

    /// The same for a new table: downstreams that are in both tables keep their errors.
    pub fn carried_over(&self, from: &ForwardingTable, to: &ForwardingTable) -> Self {
        let mut carried_over = DownstreamErrors::new(to.addresses().len());
        if self.pending_losses == 0 && self.active_until.is_none() {
            return carried_over;
        }
        for (target, address) in self.targets.iter().zip(from.addresses()) {
            if let Some(index) = to.target(&(address.ip(), address.port())) {
                carried_over.pending_losses += target.pending_losses.iter().map(|&n| u64::from(n)).sum::<u64>();
                let unsegmented_until = target.unsegmented.map(|(_, until)| until);
                carried_over.active_until = carried_over.active_until.max(target.degraded_until).max(unsegmented_until);
                carried_over.targets[index as usize] = target.clone();
            }
        }
        carried_over
    }

    /// Records that this many datagrams were lost although they are counted as forwarded.
    pub fn record_loss(&mut self, target: u32, datagrams: u32, reason: DropReason, now: Instant) {
        let pending_losses = &mut self.targets[target as usize].pending_losses[reason as usize];
        if let Some(more) = pending_losses.checked_add(datagrams) {
            *pending_losses = more;
            self.pending_losses += u64::from(datagrams);
        }
        self.mark_degraded(target, now);
    }

    /// True if any downstream has a pending loss.
    pub fn has_pending_losses(&self) -> bool {
        self.pending_losses > 0
    }

    /// Marks a downstream as degraded.
    pub fn mark_degraded(&mut self, target: u32, now: Instant) {
        let until = Some(now + DEGRADED_FOR);
        self.targets[target as usize].degraded_until = until;
        self.active_until = self.active_until.max(until);
    }

    /// Sends datagrams of more than `most` bytes to this downstream one by one.
    pub fn mark_unsegmented(&mut self, target: u32, most: u32, now: Instant) {
        let until = now + UNSEGMENTED_FOR;
        self.targets[target as usize].unsegmented = Some((most, until));
        self.active_until = self.active_until.max(Some(until));
    }

    /// The longest datagram that can be a segment on the way to this downstream, in bytes.
    pub fn max_segment(&self, target: u32, now: Instant) -> u32 {
        self.targets[target as usize].unsegmented.filter(|&(_, until)| now < until).map_or(u32::MAX, |(most, _)| most)
    }

    /// Takes one pending loss of a downstream, if there is one: the datagram just sent counts as dropped for this
    /// reason.
    pub fn take_pending_loss(&mut self, target: u32) -> Option<DropReason> {
        if self.pending_losses == 0 {
            return None;
        }
        let pending_losses = &mut self.targets[target as usize].pending_losses;
        let reason = DropReason::ALL.into_iter().find(|&reason| pending_losses[reason as usize] > 0)?;
        pending_losses[reason as usize] -= 1;
        self.pending_losses -= 1;
        Some(reason)
    }

    /// True while any downstream is degraded or unsegmented. Otherwise, nothing depends on the time.
    pub fn any_active(&self) -> bool {
        self.active_until.is_some()
    }

    /// Clears the state once the last downstream's time is over.
    pub fn expire(&mut self, now: Instant) {
        if self.active_until.is_some_and(|until| until <= now) {
            self.active_until = None;
        }
    }

    /// True if the downstream is degraded.
    pub fn is_degraded(&self, target: u32, now: Instant) -> bool {
        self.targets[target as usize].degraded_until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::plan;
    use super::*;
    use std::net::SocketAddr;

    #[test]
    fn each_debt_is_paid_once_by_the_downstream_that_has_it() {
        let now = Instant::now();
        let mut errors = DownstreamErrors::new(2);
        assert_eq!(errors.take_pending_loss(1), None);
        errors.record_loss(1, 2, DropReason::Refused, now);
        errors.record_loss(1, 1, DropReason::Unreachable, now);
        assert!(errors.has_pending_losses());
        assert_eq!(errors.take_pending_loss(0), None);
        assert_eq!(errors.take_pending_loss(1), Some(DropReason::Unreachable));
        assert_eq!(errors.take_pending_loss(1), Some(DropReason::Refused));
        assert_eq!(errors.take_pending_loss(1), Some(DropReason::Refused));
        assert_eq!(errors.take_pending_loss(1), None);
        assert!(!errors.has_pending_losses());
    }

    #[test]
    fn datagrams_are_kept_apart_for_a_while_if_they_are_too_long_to_share() {
        let start = Instant::now();
        let mut errors = DownstreamErrors::new(2);
        errors.mark_unsegmented(1, 1400, start);
        assert!(errors.any_active());
        assert_eq!((errors.max_segment(0, start), errors.max_segment(1, start)), (u32::MAX, 1400));
        assert_eq!(errors.max_segment(1, start + UNSEGMENTED_FOR), u32::MAX);
        errors.expire(start + UNSEGMENTED_FOR);
        assert!(!errors.any_active());
    }

    #[test]
    fn trouble_passes() {
        let start = Instant::now();
        let mut errors = DownstreamErrors::new(2);
        assert!(!errors.any_active());
        errors.mark_degraded(0, start);
        let later = start + DEGRADED_FOR / 2;
        errors.mark_degraded(1, later);
        assert!(errors.is_degraded(0, later) && errors.is_degraded(1, later));
        let over = start + DEGRADED_FOR;
        errors.expire(over);
        assert!(!errors.is_degraded(0, over) && errors.is_degraded(1, over) && errors.any_active());
        errors.expire(over + DEGRADED_FOR);
        assert!(!errors.any_active());
    }

    #[test]
    fn a_new_table_keeps_the_errors_of_those_who_stay() {
        let address = |port| SocketAddr::from(([192, 0, 2, 1], port));
        let table = |ports: &[u16]| {
            let downstreams: Vec<_> = ports.iter().map(|&port| (address(port), 1)).collect();
            ForwardingTable::new(&plan(address(514), &downstreams), address(514)).unwrap()
        };
        let now = Instant::now();
        let mut errors = DownstreamErrors::new(3);
        errors.record_loss(0, 1, DropReason::Refused, now);
        errors.record_loss(2, 1, DropReason::Refused, now);
        errors.mark_unsegmented(1, 9, now);
        let mut carried_over = errors.carried_over(&table(&[1, 2, 3]), &table(&[3, 2]));
        assert!(carried_over.is_degraded(0, now) && !carried_over.is_degraded(1, now) && carried_over.any_active());
        assert_eq!((carried_over.max_segment(0, now), carried_over.max_segment(1, now)), (u32::MAX, 9));
        assert_eq!(carried_over.take_pending_loss(0), Some(DropReason::Refused));
        assert_eq!(
            (carried_over.take_pending_loss(0), carried_over.take_pending_loss(1), carried_over.pending_losses),
            (None, None, 0)
        );
    }
}
