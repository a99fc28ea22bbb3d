//! Responses to health checks: HTTP, which the crate `httparse` parses, and ICMP echo replies.

use udp_fanout::testing::health::probers::http::{MAX_HEAD, parse_response};
use udp_fanout::testing::health::probers::icmp::{EchoMessage, without_ip_header};

/// Types of echo messages: requests and replies, of ICMP and of ICMPv6.
const TYPES: [u8; 4] = [8, 0, 128, 129];

/// Parses the bytes as HTTP and as each type of echo message.
pub fn run(bytes: &[u8]) {
    http(bytes);
    for kind in TYPES {
        for message in [bytes, without_ip_header(bytes)] {
            let Some(echo) = EchoMessage::read(kind, message) else { continue };
            assert_eq!(echo.nonce.is_some(), message.len() >= 16);
            assert_eq!(echo.sequence.to_be_bytes(), message[6..8]);
        }
    }
}

/// Parses every prefix of a response: a verdict, once reached, must not change, and must equal that for the whole response.
fn http(bytes: &[u8]) {
    let whole = parse_response(bytes, true);
    assert!(whole.is_some());
    let mut before = None;
    for length in 0..=bytes.len().min(MAX_HEAD - 1) {
        let verdict = parse_response(&bytes[..length], false);
        assert!(before.is_none() || before == verdict, "{before:?}, then {verdict:?} at {length}");
        before = verdict;
    }
    assert!(before.is_none() || bytes.len() >= MAX_HEAD || before == whole, "{before:?}, then {whole:?}");
}
