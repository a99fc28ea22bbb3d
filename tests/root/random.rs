//! Random and mutated frames: the program and the oracle must agree on the verdict, the whole packet and the counters.

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use udp_fanout_testkit::kernel::differential::{
    DESTINATIONS, DESTINATIONS6, DifferentialTest, SENDERS, SENDERS6, fix_ip_checksum, set_ttl,
};
use udp_fanout_testkit::kernel::oracle::framed;
use udp_fanout_testkit::kernel::packet::{Checksum, Frame, fragmented};
use udp_fanout_testkit::kernel::run::Gso;

/// Cases per run; `ORACLE_CASES` and `ORACLE_SEED` override. A failure prints the seed of its case.
const CASES: u64 = 1_000_000;

/// Seeds that have failed before.
const KEPT: [u64; 0] = [];

/// Where a datagram comes from and goes to.
fn addresses(rng: &mut SmallRng) -> (String, String) {
    let v6 = rng.random_bool(0.3);
    let few = |rng: &mut SmallRng| rng.random_range(0..4);
    let pick = |rng: &mut SmallRng, from: &[&str]| from[rng.random_range(0..from.len())].to_owned();
    if v6 {
        let known = pick(rng, &SENDERS6);
        let any = format!("[2001:db{:x}:5::{:x}:0:0:{:x}]:4", rng.random_range(8..10), few(rng), few(rng));
        (if rng.random() { known } else { any }, pick(rng, &DESTINATIONS6))
    } else {
        let known = pick(rng, &SENDERS);
        let any = format!("10.{}.{}.{}:7", rng.random_range(0..6), few(rng), few(rng));
        (if rng.random() { known } else { any }, pick(rng, &DESTINATIONS))
    }
}

fn frame(rng: &mut SmallRng) -> Vec<u8> {
    let (source, destination) = addresses(rng);
    let length = match rng.random_range(0..10) {
        0 => 0,
        1 => rng.random_range(550..620),
        2 => rng.random_range(1200..1600),
        _ => rng.random_range(0..64),
    };
    let mut frame = datagram(rng, &source, &destination, length);
    frame.ip_checksum = if rng.random_bool(0.05) { Checksum::Wrong } else { Checksum::Right };
    if rng.random_bool(0.05) {
        frame.fragment = rng.random();
    }
    let mut bytes = frame.bytes();
    mutate(rng, &mut bytes);
    without_frame(rng, bytes)
}

/// Removes the Ethernet header from every other packet that a test run passes to the program without one.
fn without_frame(rng: &mut SmallRng, mut frame: Vec<u8>) -> Vec<u8> {
    let least = if frame.get(14).is_some_and(|first| first >> 4 == 6) { 54 } else { 34 };
    if frame.len() >= 14 + least && framed(&frame[14..]).is_some() && rng.random() {
        frame.drain(..14);
    }
    frame
}

fn datagram(rng: &mut SmallRng, source: &str, destination: &str, length: usize) -> Frame {
    let mut payload: Vec<u8> = (0..length).map(|_| rng.random()).collect();
    if rng.random_bool(0.2) && length >= 2 {
        payload[..2].copy_from_slice(&[0x1e, 0x0f]);
    }
    let mut frame = Frame::new(source, destination, &payload);
    if frame.destination.ip().is_multicast() != rng.random_bool(0.03) {
        frame.destination_mac = [1, 0, 0x5e, 1, 2, 3];
    }
    frame.source.set_port(rng.random());
    frame.ttl = if rng.random_bool(0.1) { rng.random_range(0..3) } else { rng.random() };
    frame.udp_checksum = match rng.random_range(0..12) {
        0 => Checksum::Zero,
        1 => Checksum::Wrong,
        _ => Checksum::Right,
    };
    if rng.random_bool(0.05) {
        frame.options = vec![1; 4 * rng.random_range(1..=10)];
    }
    frame
}

/// Fragmented datagrams, some with the same ID, whose fragments are reordered, duplicated, lost or damaged.
fn fragmented_datagrams(rng: &mut SmallRng, number: u32) -> Vec<Vec<u8>> {
    let (source, destination) = addresses(rng);
    let mut frames = Vec::new();
    for _ in 0..rng.random_range(1..=3) {
        let number = if rng.random_bool(0.8) { number } else { number ^ 0x8000 };
        let (length, size) = match rng.random_range(0..4) {
            0 => (rng.random_range(1..100), 8 * rng.random_range(1..12)),
            1 => (rng.random_range(1000..3000), 8 * rng.random_range(60..80)),
            _ => (rng.random_range(1400..6000), 8 * rng.random_range(128..190)),
        };
        let frame = match rng.random_bool(0.8) {
            true => datagram(rng, &source, &destination, length),
            false => {
                let (source, destination) = addresses(rng);
                datagram(rng, &source, &destination, length)
            }
        };
        frames.extend(fragmented(&frame.bytes(), size, number));
    }
    for _ in 0..rng.random_range(0..4) {
        let (a, b) = (rng.random_range(0..frames.len()), rng.random_range(0..frames.len()));
        match rng.random_range(0..3) {
            0 => frames.swap(a, b),
            1 => frames.insert(a, frames[b].clone()),
            _ if frames.len() > 1 => drop(frames.remove(a)),
            _ => {}
        }
    }
    for frame in &mut frames {
        if rng.random_bool(0.05) {
            set_ttl(frame, rng.random_range(0..3));
        }
        if rng.random_bool(0.05) {
            mutate(rng, frame);
        }
    }
    frames.into_iter().map(|frame| without_frame(rng, frame)).collect()
}

/// Sometimes flips bytes, cuts or lengthens the frame; half of the time corrects the IPv4 header checksum afterwards,
/// so that the damage gets past that check.
fn mutate(rng: &mut SmallRng, bytes: &mut Vec<u8>) {
    if rng.random_bool(0.3) {
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..bytes.len().min(80));
            bytes[at] = rng.random();
        }
    }
    if rng.random_bool(0.1) {
        bytes.truncate(rng.random_range(15..=bytes.len()));
    }
    if rng.random_bool(0.1) {
        bytes.extend((0..rng.random_range(1..30)).map(|_| 0u8));
    }
    if rng.random_bool(0.5) && bytes.len() >= 34 && bytes[12..14] == [8, 0] {
        fix_ip_checksum(bytes);
    }
    // A test run refuses frames without a whole network header, so cutting stops there.
    let least = match bytes[12..14] {
        [0x08, 0x00] => 34,
        [0x86, 0xdd] => 54,
        _ => 15,
    };
    bytes.resize(bytes.len().max(least), 0);
}

fn gso(rng: &mut SmallRng) -> Gso {
    if rng.random_bool(0.1) {
        Gso { size: rng.random_range(1..700), segments: rng.random_range(0..4) }
    } else {
        Gso::default()
    }
}

/// Seeds after which the program's fragment map is reset: it holds that many incomplete datagrams, while the
/// oracle's has no limit.
const CHUNK: usize = 50_000;

#[test]
fn root_a_million_random_packets_agree_with_the_oracle() {
    let setting = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().unwrap());
    let seeds: Vec<u64> = match setting("ORACLE_SEED") {
        Some(seed) => vec![seed],
        None => KEPT.into_iter().chain((0..setting("ORACLE_CASES").unwrap_or(CASES)).map(|n| n + BASE)).collect(),
    };
    let mut trial = DifferentialTest::begin();
    seeds.chunks(CHUNK).for_each(|seeds| run(&mut trial, seeds));
}

fn run(trial: &mut DifferentialTest, seeds: &[u64]) {
    for &seed in seeds {
        let mut rng = SmallRng::seed_from_u64(seed);
        let (frames, gso) = match rng.random_bool(0.1) {
            true => (fragmented_datagrams(&mut rng, seed as u32), Gso::default()),
            false => (vec![frame(&mut rng)], gso(&mut rng)),
        };
        for bytes in frames {
            trial.frame(&bytes, gso, &format!("ORACLE_SEED={seed}"));
        }
    }
    trial.audit();
    trial.forget();
}

/// The first seed: an arbitrary fixed number.
const BASE: u64 = 0x0fa0_0000;
