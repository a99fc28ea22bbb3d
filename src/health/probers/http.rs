//! Builds the HTTP request of a health check and parses the response. Pure.

use std::net::SocketAddr;

use crate::health::model::{ProbeFailure, ProbeFailureKind};
use crate::version;

/// The most bytes of status line and headers.
pub const MAX_HEAD: usize = 16 * 1024;

/// The most headers of a response.
const MAX_HEADERS: usize = 128;

/// The GET request for `path`.
pub fn build_request(host: SocketAddr, path: &str) -> String {
    let version = version::PACKAGE;
    format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: udp-fanout/{version} (health check)\r\nAccept: */*\r\n\
         Connection: close\r\n\r\n"
    )
}

/// The verdict on the bytes received so far; none while the head is incomplete. `ended`: the connection is closed.
pub fn parse_response(mut bytes: &[u8], ended: bool) -> Option<Result<(), ProbeFailure>> {
    let bad = |reason: String| Some(Err(ProbeFailure::new(ProbeFailureKind::BadAnswer, reason)));
    let received = bytes.len();
    loop {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut response = httparse::Response::new(&mut headers);
        let head = match response.parse(bytes) {
            Ok(httparse::Status::Complete(head)) => head,
            Ok(httparse::Status::Partial) if ended && received == 0 => {
                return bad("connection closed without an answer".to_owned());
            }
            Ok(httparse::Status::Partial) if ended => return bad("connection closed amid an answer".to_owned()),
            Ok(httparse::Status::Partial) if received >= MAX_HEAD => {
                return bad(format!("more than {MAX_HEAD} bytes of HTTP headers"));
            }
            Ok(httparse::Status::Partial) => return None,
            Err(error) => return bad(format!("answer is not HTTP: {error}")),
        };
        match response.code {
            // Interim response: the final one follows.
            Some(100..=199) => bytes = &bytes[head..],
            Some(200..=399) => return Some(Ok(())),
            code => return bad(format!("HTTP status {}", code.unwrap_or_default())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reason(bytes: &[u8], ended: bool) -> String {
        parse_response(bytes, ended).unwrap().unwrap_err().to_string()
    }

    #[test]
    fn statuses_up_to_399_are_good() {
        for (status, good) in
            [(200, true), (204, true), (301, true), (399, true), (400, false), (404, false), (503, false)]
        {
            let answer = format!("HTTP/1.1 {status} Whatever\r\nContent-Length: 3\r\n\r\nabc");
            assert_eq!(parse_response(answer.as_bytes(), false).unwrap().is_ok(), good, "{status}");
        }
        assert_eq!(reason(b"HTTP/1.0 503 No\r\n\r\n", false), "HTTP status 503");
        // Interim answers and missing reasons.
        assert_eq!(
            parse_response(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 204\r\n\r\n", false),
            Some(Ok(()))
        );
        assert_eq!(parse_response(b"HTTP/1.1 100 Continue\r\n\r\n", false), None);
    }

    #[test]
    fn an_answer_counts_when_its_head_is_whole() {
        let answer = b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\n";
        for length in 0..answer.len() {
            assert_eq!(parse_response(&answer[..length], false), None, "{length}");
            let closed = if length == 0 { "without an answer" } else { "amid an answer" };
            assert_eq!(reason(&answer[..length], true), format!("connection closed {closed}"));
        }
        assert_eq!(parse_response(answer, true), Some(Ok(())));
    }

    #[test]
    fn what_is_not_http_or_has_no_end_is_bad() {
        assert!(reason(b"220 mail.example ESMTP\r\n", false).starts_with("answer is not HTTP"));
        let endless = [b"HTTP/1.1 200 OK\r\nX: ".to_vec(), vec![b'a'; MAX_HEAD]].concat();
        assert_eq!(reason(&endless, false), "more than 16384 bytes of HTTP headers");
        let many = [b"HTTP/1.1 200 OK\r\n".to_vec(), b"A: b\r\n".repeat(MAX_HEADERS + 1)].concat();
        assert!(reason(&many, false).contains("header"), "{}", reason(&many, false));
    }

    #[test]
    fn the_request_is_http() {
        let request = build_request("[::1]:8080".parse().unwrap(), "/healthz?full=1");
        let mut headers = [httparse::EMPTY_HEADER; 8];
        let mut parsed = httparse::Request::new(&mut headers);
        assert!(parsed.parse(request.as_bytes()).unwrap().is_complete());
        assert_eq!((parsed.method, parsed.path, parsed.version), (Some("GET"), Some("/healthz?full=1"), Some(1)));
        let host = parsed.headers.iter().find(|header| header.name == "Host").unwrap();
        assert_eq!(host.value, b"[::1]:8080");
    }

    proptest! {
        #[test]
        fn nothing_received_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), ended: bool) {
            let _ = parse_response(&bytes, ended);
            let _ = parse_response(&[b"HTTP/1.1 100 Continue\r\n\r\n".to_vec(), bytes].concat(), ended);
        }
    }
}
