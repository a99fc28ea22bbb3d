//! The constants of `bpf/fanout_abi.h`, under the same names, and assertions on the layout of its structs.
//!
//! The types come from the program's BTF (`skel`); a test compares the constants with the header.

use std::mem::{offset_of, size_of};

use super::skel::types;
use crate::model::{HashOn, Policy};

pub(super) const DROP_REASONS: u32 = 7;
pub(super) const LISTENER_SOCKET_ONLY: u32 = 1;
pub(super) const KEY_LISTENER: u16 = 0;
pub(super) const KEY_ADDRESS: u16 = 1;
pub(super) const KEY_L3_DEVICE: u16 = 2;
pub(super) const CACHE_EMPTY: u16 = 0;
pub(super) const CACHE_SINGLE: u16 = 1;
pub(super) const CACHE_COLLISION: u16 = 2;
pub(super) const LISTENER_CACHE_BITS: u32 = 10;
pub(super) const LISTENER_CACHE_FACTOR: u32 = 0x9e37_79b1;
pub(super) const FRAGMENT_STRAY: u32 = 0;
pub(super) const FRAGMENT_LOST: u32 = 1;
pub(super) const SOURCE_DENIED: u32 = 0;
pub(super) const SOURCE_ALLOWED: u32 = 1;
pub(super) const DELIVER_UNREACHABLE: u8 = 0;
pub(super) const DELIVER_LOCAL: u8 = 1;
pub(super) const DELIVER_NEIGHBOUR: u8 = 2;
pub(super) const DOWNSTREAM_PEER: u32 = 1;
pub(super) const DOWNSTREAM_MACS: u32 = 2;
pub(super) const DOWNSTREAM_L3_DEVICE: u32 = 4;

pub(super) const PINS_VERSION: u32 = 3;
/// The oldest version of pins that this one can read.
pub(super) const OLDEST_PINS_VERSION: u32 = 2;
pub(super) const NAME_LENGTH: usize = 64;
pub(super) const CARRIED_WORDS: usize = 4 + 2 * DROP_REASONS as usize;
pub(super) const CARRIED_LISTENER: u16 = 0;
pub(super) const CARRIED_FOLDED_DOWNSTREAM: u16 = 1;
pub(super) const CARRIED_FRAGMENTS: u16 = 2;
pub(super) const CARRIED_DOWNSTREAM: u16 = 3;
pub(super) const MAX_IMPORTED: usize = 64;

/// The number of a policy, `enum policy`.
pub(super) fn policy_number(policy: Policy) -> u32 {
    match policy {
        Policy::RoundRobin => 0,
        Policy::Hash(HashOn::SourceIp) => 1,
        Policy::Hash(HashOn::Source) => 2,
        Policy::Hash(HashOn::Flow) => 3,
        Policy::GelfMessage => 4,
        Policy::Replicate => 5,
    }
}

// The ABI, asserted on this side too: a header change that moves a field fails the build here.
const _: () = {
    assert!(size_of::<types::listener_key>() == 20);
    assert!(offset_of!(types::listener_key, port_be) == 16);
    assert!(offset_of!(types::listener_key, scope) == 18);
    assert!(size_of::<types::fanout_listener>() == 8);
    assert!(size_of::<types::cached_listener>() == 32);
    assert!(offset_of!(types::cached_listener, port_be) == 16);
    assert!(offset_of!(types::cached_listener, state) == 18);
    assert!(offset_of!(types::cached_listener, listener) == 24);
    assert!(size_of::<types::listener_state>() == 56);
    assert!(offset_of!(types::listener_state, policy) == 8);
    assert!(offset_of!(types::listener_state, min_mtu) == 12);
    assert!(offset_of!(types::listener_state, rules) == 16);
    assert!(offset_of!(types::listener_state, meter) == 20);
    assert!(offset_of!(types::listener_state, interval) == 24);
    assert!(offset_of!(types::listener_state, depth) == 32);
    assert!(offset_of!(types::listener_state, sender_mask_be) == 40);
    assert!(size_of::<types::source_key>() == 24);
    assert!(offset_of!(types::source_key, rules) == 4);
    assert!(offset_of!(types::source_key, addr_be) == 8);
    assert!(size_of::<types::downstream>() == 64);
    assert!(offset_of!(types::downstream, next_hop_be) == 16);
    assert!(offset_of!(types::downstream, port_be) == 32);
    assert!(offset_of!(types::downstream, delivery) == 34);
    assert!(offset_of!(types::downstream, next_hop_family) == 35);
    assert!(offset_of!(types::downstream, ifindex) == 36);
    assert!(offset_of!(types::downstream, mtu) == 40);
    assert!(offset_of!(types::downstream, flags) == 44);
    assert!(offset_of!(types::downstream, sample) == 48);
    assert!(offset_of!(types::downstream, macs) == 52);
    assert!(size_of::<types::next_hop>() == 24);
    assert!(size_of::<types::stats>() == 7 * 8);
    assert!(offset_of!(types::stats, bytes_forwarded) == 5 * 8);
    assert!(offset_of!(types::stats, cursor) == 6 * 8);
    assert!(size_of::<types::downstream_stats>() == 2 * 8 + 24);
    assert!(offset_of!(types::downstream_stats, cached_hop) == 2 * 8);
    assert!(size_of::<types::event>() == 104);
    assert!(offset_of!(types::event, sport_be) == 64);
    assert!(offset_of!(types::event, flags) == 96);
    assert!(size_of::<types::drop_log>() == 2 * 8);
    assert!(size_of::<types::trace_control>() == 48);
    assert!(offset_of!(types::trace_control, mask_be) == 24);
    assert!(offset_of!(types::trace_control, lost) == 40);
    assert!(size_of::<types::heartbeat>() == 8);
    assert!(size_of::<types::link_flags>() == 4);
    assert!(size_of::<types::listener_name>() == NAME_LENGTH);
    assert!(size_of::<types::carried_key>() == 24);
    assert!(offset_of!(types::carried_key, port_be) == 16);
    assert!(offset_of!(types::carried_key, kind) == 18);
    assert!(offset_of!(types::carried_key, listener) == 20);
    assert!(size_of::<types::carried_entry>() == CARRIED_WORDS * 8);
    assert!(size_of::<types::pins_about>() == 24 + MAX_IMPORTED * 4);
    assert!(offset_of!(types::pins_about, netns_device) == 8);
    assert!(offset_of!(types::pins_about, imported) == 24);
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::DropReason;

    const ABI: &str = include_str!("../../../bpf/fanout_abi.h");

    /// The value of an enumerator or macro in the header.
    fn value(name: &str) -> u64 {
        let line = ABI.lines().find(|line| {
            line.split([' ', '\t', '=', ',']).any(|word| word == name) && line.chars().any(char::is_numeric)
        });
        let line = line.unwrap_or_else(|| panic!("{name} is not in fanout_abi.h"));
        let after = &line[line.find(name).unwrap() + name.len()..];
        after.split([' ', '\t', '=', ',']).find_map(|word| word.parse().ok()).unwrap()
    }

    #[test]
    fn the_header_numbers_drop_reasons_like_the_model() {
        for reason in &DropReason::ALL[..DropReason::KERNEL_COUNT] {
            let name = format!("DROP_{}", reason.label().to_uppercase());
            assert_eq!(value(&name), *reason as u64, "{name}");
        }
        assert_eq!(value("DROP_REASONS"), DropReason::KERNEL_COUNT as u64);
        assert_eq!(u64::from(DROP_REASONS), value("DROP_REASONS"));
    }

    #[test]
    fn the_header_numbers_policies_and_deliveries_likewise() {
        for (name, policy) in [
            ("POLICY_ROUND_ROBIN", Policy::RoundRobin),
            ("POLICY_HASH_SOURCE_IP", Policy::Hash(HashOn::SourceIp)),
            ("POLICY_HASH_SOURCE", Policy::Hash(HashOn::Source)),
            ("POLICY_HASH_FLOW", Policy::Hash(HashOn::Flow)),
            ("POLICY_GELF_MESSAGE", Policy::GelfMessage),
            ("POLICY_REPLICATE", Policy::Replicate),
        ] {
            assert_eq!(value(name), u64::from(policy_number(policy)), "{name}");
        }
        for (name, number) in [
            ("DELIVER_UNREACHABLE", DELIVER_UNREACHABLE),
            ("DELIVER_LOCAL", DELIVER_LOCAL),
            ("DELIVER_NEIGHBOUR", DELIVER_NEIGHBOUR),
        ] {
            assert_eq!(value(name), u64::from(number), "{name}");
        }
        for (name, flag) in [
            ("DOWNSTREAM_PEER", DOWNSTREAM_PEER),
            ("DOWNSTREAM_MACS", DOWNSTREAM_MACS),
            ("DOWNSTREAM_L3_DEVICE", DOWNSTREAM_L3_DEVICE),
        ] {
            assert_eq!(value(name), u64::from(flag), "{name}");
        }
        assert_eq!(value("KEY_LISTENER"), u64::from(KEY_LISTENER));
        assert_eq!(value("KEY_ADDRESS"), u64::from(KEY_ADDRESS));
        assert_eq!(value("KEY_L3_DEVICE"), u64::from(KEY_L3_DEVICE));
        assert_eq!(value("FRAGMENT_STRAY"), u64::from(FRAGMENT_STRAY));
        assert_eq!(value("FRAGMENT_LOST"), u64::from(FRAGMENT_LOST));
        assert_eq!(value("SOURCE_DENIED"), u64::from(SOURCE_DENIED));
        assert_eq!(value("SOURCE_ALLOWED"), u64::from(SOURCE_ALLOWED));
        assert_eq!(1_000_000_000 << value("METER_TICKS_SHIFT"), crate::admission::TICKS_PER_SECOND);
        assert_eq!(value("LISTENER_SOCKET_ONLY"), u64::from(LISTENER_SOCKET_ONLY));
        assert_eq!(value("PINS_VERSION"), u64::from(PINS_VERSION));
        assert_eq!(value("NAME_LENGTH"), NAME_LENGTH as u64);
        assert_eq!(value("MAX_IMPORTED"), MAX_IMPORTED as u64);
        assert!(
            ABI.contains("CARRIED_WORDS (4 + 2 * DROP_REASONS)")
                && ABI.contains("HEARTBEAT_FOREVER 0xffffffffffffffff")
        );
        for (name, kind) in [
            ("CARRIED_LISTENER", CARRIED_LISTENER),
            ("CARRIED_FOLDED_DOWNSTREAM", CARRIED_FOLDED_DOWNSTREAM),
            ("CARRIED_FRAGMENTS", CARRIED_FRAGMENTS),
            ("CARRIED_DOWNSTREAM", CARRIED_DOWNSTREAM),
        ] {
            assert_eq!(value(name), u64::from(kind), "{name}");
        }
        assert_eq!(value("MAX_COPIES"), crate::model::MAX_COPIES as u64);
    }
}
