//! Bytes from the kernel: netlink datagrams, and events from the TC program's ring buffer.

use udp_fanout::testing::datapath::kernel::events::DatagramEvent;
use udp_fanout::testing::host::{Route, decode};

/// `RTM_NEWLINK`, `RTM_NEWADDR` and `RTM_NEWNEIGH` of `linux/rtnetlink.h`: a repeated message is no change.
const STATES: [u16; 3] = [16, 20, 28];

/// Parses the bytes as every kind of netlink message, and as an event.
pub fn run(bytes: &[u8]) {
    for message in decode::datagram(bytes) {
        assert_eq!(message.changed.is_some(), message.changed_again.is_some(), "{message:?}");
        if STATES.contains(&message.kind) {
            assert_ne!(message.changed_again, Some(true), "{message:?}");
        }
        if let Some(Route::Unreachable { reason }) = &message.route {
            assert!(!reason.is_empty());
        }
    }
    if let Some(event) = DatagramEvent::read(bytes) {
        assert!(event.downstream.is_none_or(|to| to.port() != 0), "{event:?}");
    }
}
