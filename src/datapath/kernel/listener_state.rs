//! The map `listener_states`: each listener's table, policy and admission, as the program sees them.
//!
//! The map is mapped into memory. Each field is one atomic store; a datagram sees the old or the new value.

use std::mem::{offset_of, size_of};

use anyhow::Result;

use super::abi::policy_number;
use super::maps::MappedArray;
use super::skel::{LoadedProgram, types};
use super::slot_allocator::SlotRange;
use crate::model::{ListenerId, Policy};

/// What a listener's state says about admission. Zeros admit every sender at any rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ListenerAdmission {
    /// Number of its rules in `sources`; 0 for none.
    pub rules: u32,
    /// Number of its token buckets in `buckets`; 0 for none.
    pub meter: u32,
    /// Cost of a datagram, in ticks of the meter's clock.
    pub interval: u64,
    /// Depth of a bucket, in the same ticks.
    pub depth: u64,
    /// The bits of an address that tell senders apart.
    pub sender_mask_be: [u32; 4],
}

/// The mapped map `listener_states`. All methods panic if the listener's id is past the end of the map.
#[derive(Debug)]
pub(super) struct ListenerStates(MappedArray<types::listener_state>);

impl ListenerStates {
    /// # Errors
    /// When the kernel refuses to map it.
    pub(super) fn new(loaded: &LoadedProgram) -> Result<ListenerStates> {
        Ok(ListenerStates(MappedArray::new(&loaded.listener_states)?))
    }

    /// Publishes a listener's table. A datagram sees the old table or the new one, and with the new one everything that
    /// was written before.
    pub(super) fn publish_table(&mut self, id: ListenerId, slots: SlotRange) {
        let table = u64::from(slots.start) << 32 | u64::from(slots.len);
        self.0.store_field(id.0, offset_of!(types::listener_state, table), table);
    }

    /// Sets a listener's policy and the smallest MTU of its egress paths. A datagram may see them with the table before or
    /// after.
    pub(super) fn set_policy(&mut self, id: ListenerId, policy: Policy, min_mtu: u32) {
        self.0.store_field(id.0, offset_of!(types::listener_state, policy), policy_number(policy));
        self.0.store_field(id.0, offset_of!(types::listener_state, min_mtu), min_mtu);
    }

    /// Sets who may send to a listener, and how fast. One store each puts the rules and the buckets in force; the
    /// parameters of a meter are written before its number.
    pub(super) fn set_admission(&mut self, id: ListenerId, admission: &ListenerAdmission) {
        self.0.store_field(id.0, offset_of!(types::listener_state, interval), admission.interval);
        self.0.store_field(id.0, offset_of!(types::listener_state, depth), admission.depth);
        let mask = offset_of!(types::listener_state, sender_mask_be);
        for (word, at) in admission.sender_mask_be.into_iter().zip(0..) {
            self.0.store_field(id.0, mask + at * size_of::<u32>(), word);
        }
        self.0.store_field(id.0, offset_of!(types::listener_state, meter), admission.meter);
        self.0.store_field(id.0, offset_of!(types::listener_state, rules), admission.rules);
    }
}
