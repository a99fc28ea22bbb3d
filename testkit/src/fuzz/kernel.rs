//! Frames through the production TC program, compared with the oracle: verdict, whole packet and counters. Needs root.
//!
//! An input's bytes choose fields, so that most frames pass the first checks, and then damage some of them. The state that an input
//! leaves is cleared before the next one, except for the round-robin cursors.

use std::cell::RefCell;
use std::net::SocketAddr;

use super::bytes::Bytes;
use crate::kernel::differential::{
    DESTINATIONS, DESTINATIONS6, DifferentialTest, SENDERS, SENDERS6, fix_ip_checksum, set_ttl,
};
use crate::kernel::packet::{Checksum, Frame, fragmented};
use crate::kernel::run::Gso;

thread_local! {
    static TEST: RefCell<Option<DifferentialTest>> = const { RefCell::new(None) };
}

/// Runs the frames that the bytes describe.
pub fn run(bytes: &[u8]) {
    let mut bytes = Bytes(bytes);
    TEST.with_borrow_mut(|slot| {
        // Taken out during the run, so that a panic leaves no inconsistent state for the next input.
        let mut test = slot.take().unwrap_or_else(DifferentialTest::begin);
        for _ in 0..8 {
            if bytes.ended() {
                break;
            }
            for (frame, gso) in frames(&mut bytes) {
                test.frame(&frame, gso, "");
            }
        }
        test.audit();
        test.forget();
        *slot = Some(test);
    });
}

/// One frame, or the fragments of one.
fn frames(bytes: &mut Bytes<'_>) -> Vec<(Vec<u8>, Gso)> {
    let shape = bytes.byte();
    if shape == 0xff {
        let count = usize::from(bytes.byte());
        return vec![(whole_headers(bytes.take(count).to_vec()), Gso::default())];
    }
    let frame = datagram(bytes, shape & 1 != 0).bytes();
    let mut parts = if shape & 2 != 0 {
        let size = 8 * (1 + usize::from(bytes.byte()) % 64);
        let parts = fragmented(&frame, size, u32::from(bytes.byte()));
        reordered(parts, bytes, shape & 4 != 0)
    } else {
        vec![frame]
    };
    let gso = match shape & 8 != 0 && parts.len() == 1 {
        true => Gso { size: 1 + u32::from(bytes.word()) % 700, segments: u32::from(bytes.byte()) % 4 },
        false => Gso::default(),
    };
    if shape & 16 != 0 {
        damage(&mut parts, bytes);
    }
    parts.into_iter().map(|frame| (whole_headers(frame), gso)).collect()
}

fn datagram(bytes: &mut Bytes<'_>, v6: bool) -> Frame {
    let (senders, destinations) =
        if v6 { (&SENDERS6[..], &DESTINATIONS6[..]) } else { (&SENDERS[..], &DESTINATIONS[..]) };
    let (sender, destination) = (*bytes.one_of(senders), *bytes.one_of(destinations));
    let times = 1 + usize::from(bytes.byte() & 31);
    let count = usize::from(bytes.byte());
    let mut frame = Frame::new(sender, destination, &bytes.take(count).repeat(times));
    frame.payload.truncate(1_600);
    if bytes.one_in(2) {
        let (a, b, c) = (bytes.byte(), bytes.byte(), bytes.byte());
        let near: SocketAddr = match v6 {
            true => ([0x2001, 0xdb8, 5, 0, 0, 0, u16::from(a), u16::from(b)], u16::from(c)).into(),
            false => ([10, a % 6, b % 4, c % 4], 7).into(),
        };
        frame.source = near;
    }
    if bytes.one_in(2) {
        frame.source.set_port(bytes.word());
    }
    if frame.destination.ip().is_multicast() != bytes.one_in(16) {
        frame.destination_mac = [1, 0, 0x5e, 1, 2, 3];
    }
    if bytes.one_in(4) {
        frame.ttl = bytes.byte();
    }
    let checksum = |bytes: &mut Bytes<'_>| match bytes.byte() {
        255 => Checksum::Wrong,
        254 => Checksum::Zero,
        _ => Checksum::Right,
    };
    (frame.udp_checksum, frame.ip_checksum) = (checksum(bytes), checksum(bytes));
    if bytes.one_in(16) {
        frame.options = vec![1; 4 * (1 + usize::from(bytes.byte()) % 10)];
    }
    if bytes.one_in(16) {
        frame.fragment = bytes.word();
    }
    frame
}

/// Reorders, repeats and removes fragments.
fn reordered(mut parts: Vec<Vec<u8>>, bytes: &mut Bytes<'_>, shuffled: bool) -> Vec<Vec<u8>> {
    parts.truncate(32);
    for _ in 0..if shuffled { bytes.byte() % 4 } else { 0 } {
        let (a, b) = (usize::from(bytes.byte()) % parts.len(), usize::from(bytes.byte()) % parts.len());
        match bytes.byte() % 3 {
            0 => parts.swap(a, b),
            1 => parts.insert(a, parts[b].clone()),
            _ if parts.len() > 1 => drop(parts.remove(a)),
            _ => {}
        }
    }
    parts
}

/// Changes bytes and the length of one frame, and may then recompute its header's checksum.
fn damage(parts: &mut [Vec<u8>], bytes: &mut Bytes<'_>) {
    let which = usize::from(bytes.byte()) % parts.len();
    let frame = &mut parts[which];
    let how = bytes.byte();
    if how & 1 != 0 {
        set_ttl(frame, bytes.byte() % 3);
    }
    for _ in 0..how >> 1 & 3 {
        let at = usize::from(bytes.byte()) % frame.len().min(80);
        frame[at] = bytes.byte();
    }
    if how & 8 != 0 {
        frame.truncate(15 + usize::from(bytes.word()) % frame.len());
    }
    if how & 16 != 0 {
        frame.extend(std::iter::repeat_n(bytes.byte(), usize::from(bytes.byte())));
    }
    if how & 32 != 0 && frame.len() >= 34 && frame[12..14] == [8, 0] {
        fix_ip_checksum(frame);
    }
}

/// Pads a frame to a whole network header, which a test run requires.
fn whole_headers(mut frame: Vec<u8>) -> Vec<u8> {
    frame.resize(frame.len().max(15), 0);
    let least = match frame[12..14] {
        [0x08, 0x00] => 34,
        [0x86, 0xdd] => 54,
        _ => 15,
    };
    frame.resize(frame.len().max(least), 0);
    frame
}
