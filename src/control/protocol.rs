//! What is said over the status socket: HTTP/1.1, so that curl can ask as well as `udp-fanout status` and `trace`.
//!
//! | Request | Response |
//! | --- | --- |
//! | `GET /status` | the [`StatusReport`] as JSON |
//! | `GET /alive` | `ok`, and nothing that takes time to gather |
//! | `GET /trace?listener=NAME&source=CIDR&count=N` | JSON lines ([`TraceLine`]), until `count` datagrams were shown or the client closes the connection |
//! | anything else | 4xx, and the reason as text |
//!
//! Fields of the JSON are only ever added, so either side ignores those that it does not know. Daemons before HTTP exchanged
//! JSON lines; both sides recognise the other's first byte, `{`, and say that the versions differ.

use std::fmt::Write as _;

use anyhow::{Context, Result, bail};
use http::StatusCode;
use serde::{Deserialize, Serialize};

use super::report::StatusReport;
use super::trace::{TraceRecord, TraceSubscription};
use crate::version;

/// Longest request, in bytes.
pub const MAX_REQUEST: usize = 4096;
const MAX_HEADERS: usize = 32;
const TEXT: &str = "text/plain; charset=utf-8";

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StatusRequest {
    /// A report of everything, as of now.
    Status,
    /// Any reply: proof that the main loop runs.
    Alive,
    /// The datagrams that the kernel program handles from now on.
    Trace(TraceQuery),
}

/// Which datagrams to trace; without a filter, all of them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TraceQuery {
    /// Only those of the listener of this name.
    pub listener: Option<String>,
    /// Only those from this address or prefix.
    pub source: Option<String>,
    /// End after so many.
    pub count: Option<u64>,
}

/// A complete request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParsedRequest {
    /// What is asked for.
    pub request: StatusRequest,
    /// The request's length in bytes.
    pub length: usize,
    /// The client may send another request on the same connection.
    pub keep_alive: bool,
}

/// Why a request is not answered as asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestError {
    /// The status of the HTTP response. [`StatusCode::UPGRADE_REQUIRED`] marks a client that does not speak HTTP.
    pub code: StatusCode,
    /// For the operator, in one line.
    pub reason: String,
}

/// The response to a request.
#[derive(Debug, Clone, PartialEq)]
pub enum StatusReply {
    /// To [`StatusRequest::Status`].
    Report(Box<StatusReport>),
    /// To [`StatusRequest::Alive`].
    Alive,
    /// To [`StatusRequest::Trace`]: this note, then a line for each datagram that matches.
    Trace(TraceSubscription, String),
    /// The request is not answered.
    Error(RequestError),
}

/// One line of a trace.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TraceLine {
    /// Something about the trace that the operator should know.
    Note {
        /// In one line.
        note: String,
    },
    /// The trace ends, and why.
    Error {
        /// In one line.
        error: String,
    },
    /// What became of a datagram.
    Record(Box<TraceRecord>),
}

impl RequestError {
    /// An error of the client's.
    #[must_use]
    pub fn new(code: StatusCode, reason: impl Into<String>) -> RequestError {
        RequestError { code, reason: reason.into() }
    }
}

impl StatusRequest {
    /// Reads a request; none while it is incomplete.
    ///
    /// # Errors
    /// When it is not one that this daemon answers.
    pub fn parse(bytes: &[u8]) -> Result<Option<ParsedRequest>, RequestError> {
        let bad = |reason: &str| RequestError::new(StatusCode::BAD_REQUEST, reason);
        if bytes.starts_with(b"{") {
            let reason = "this daemon answers HTTP requests, not JSON lines";
            let complete = bytes.contains(&b'\n');
            return if complete { Err(RequestError::new(StatusCode::UPGRADE_REQUIRED, reason)) } else { Ok(None) };
        }
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut parsed = httparse::Request::new(&mut headers);
        let length = match parsed.parse(bytes) {
            Ok(httparse::Status::Complete(length)) => length,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(error) => return Err(bad(&format!("not an HTTP request: {error}; try GET /status"))),
        };
        if parsed.method != Some("GET") {
            return Err(RequestError::new(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered"));
        }
        let request = StatusRequest::from_target(parsed.path.unwrap_or_default())?;
        let closes = parsed.headers.iter().any(|header| {
            header.name.eq_ignore_ascii_case("connection") && header.value.eq_ignore_ascii_case(b"close")
        });
        Ok(Some(ParsedRequest { request, length, keep_alive: parsed.version == Some(1) && !closes }))
    }

    fn from_target(target: &str) -> Result<StatusRequest, RequestError> {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let mut wanted = TraceQuery::default();
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            match (path, &*name) {
                ("/trace", "listener") => wanted.listener = Some(value.into_owned()),
                ("/trace", "source") => wanted.source = Some(value.into_owned()),
                ("/trace", "count") => match value.parse() {
                    Ok(count @ 1..) => wanted.count = Some(count),
                    _ => {
                        let reason = format!("count={value:?} is not a number from 1");
                        return Err(RequestError::new(StatusCode::BAD_REQUEST, reason));
                    }
                },
                ("/trace" | "/status" | "/alive", _) => {
                    let reason = format!("unknown parameter {name:?}; /trace takes listener, source and count");
                    return Err(RequestError::new(StatusCode::BAD_REQUEST, reason));
                }
                _ => {}
            }
        }
        match path {
            "/status" => Ok(StatusRequest::Status),
            "/alive" => Ok(StatusRequest::Alive),
            "/trace" => Ok(StatusRequest::Trace(wanted)),
            _ => Err(RequestError::new(StatusCode::NOT_FOUND, "no such page; there are /status, /alive and /trace")),
        }
    }

    /// The request as it is sent.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let target = match self {
            StatusRequest::Status => "/status".to_owned(),
            StatusRequest::Alive => "/alive".to_owned(),
            StatusRequest::Trace(TraceQuery { listener, source, count }) => {
                let mut query = form_urlencoded::Serializer::new(String::new());
                query.extend_pairs(listener.iter().map(|value| ("listener", value)));
                query.extend_pairs(source.iter().map(|value| ("source", value)));
                query.extend_pairs(count.iter().map(|value| ("count", value.to_string())));
                format!("/trace?{}", query.finish())
            }
        };
        format!("GET {target} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: udp-fanout/{}\r\n\r\n", version::PACKAGE)
            .into()
    }
}

impl StatusReply {
    /// The response as it is sent; of a trace, its beginning. Without `keep_alive` it tells the client that the connection
    /// ends.
    #[must_use]
    pub fn to_bytes(&self, keep_alive: bool) -> Vec<u8> {
        match self {
            StatusReply::Report(report) => {
                response(StatusCode::OK, "application/json", Some(&to_line(report)), keep_alive)
            }
            StatusReply::Alive => response(StatusCode::OK, TEXT, Some(b"ok\n"), keep_alive),
            StatusReply::Trace(_, note) => {
                let mut bytes = response(StatusCode::OK, "application/x-ndjson", None, false);
                bytes.extend(TraceLine::Note { note: note.clone() }.to_line());
                bytes
            }
            StatusReply::Error(RequestError { code: StatusCode::UPGRADE_REQUIRED, reason }) => {
                // Version 1 is what such a client speaks. It names both versions to its operator.
                let old = serde_json::json!({ "version": 2, "daemon": version::PACKAGE, "error": reason });
                to_line(&old)
            }
            StatusReply::Error(RequestError { code, reason }) => {
                response(*code, TEXT, Some(format!("{reason}\n").as_bytes()), false)
            }
        }
    }
}

impl TraceLine {
    /// The line, with its end.
    #[must_use]
    pub fn to_line(&self) -> Vec<u8> {
        to_line(self)
    }

    /// Reads a line.
    ///
    /// # Errors
    /// When it is not a line of a trace.
    pub fn from_line(line: &[u8]) -> Result<TraceLine> {
        serde_json::from_slice(line).context("the daemon has sent a line that this program does not understand")
    }
}

/// The head of a response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResponseHead {
    /// The status code.
    pub code: u16,
    /// The body's length in bytes; none if the body ends with the connection.
    pub length: Option<u64>,
}

impl ResponseHead {
    /// Reads a head up to and including its empty line.
    ///
    /// # Errors
    /// When it does not come from a daemon of this protocol.
    pub fn parse(bytes: &[u8]) -> Result<ResponseHead> {
        if bytes.starts_with(b"{") {
            #[derive(Deserialize)]
            struct JsonLineReply {
                daemon: Option<String>,
            }
            let old: Option<JsonLineReply> = serde_json::from_slice(bytes).ok();
            bail!(
                "the daemon ({}) speaks an older status protocol than this program ({}); run the program that the daemon \
                 was started from",
                old.and_then(|old| old.daemon).as_deref().unwrap_or("unknown version"),
                version::PACKAGE
            );
        }
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut parsed = httparse::Response::new(&mut headers);
        if !parsed.parse(bytes).context("this is not the status socket of udp-fanout")?.is_complete() {
            bail!("the daemon's answer ends in the middle");
        }
        let length = parsed.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
        let length = length.and_then(|header| std::str::from_utf8(header.value).ok()?.parse().ok());
        Ok(ResponseHead { code: parsed.code.unwrap_or_default(), length })
    }
}

fn response(code: StatusCode, content_type: &str, body: Option<&[u8]>, keep_alive: bool) -> Vec<u8> {
    let reason = code.canonical_reason().unwrap_or_default();
    let mut head = format!(
        "HTTP/1.1 {} {reason}\r\nServer: udp-fanout/{}\r\nContent-Type: {content_type}\r\nCache-Control: no-store\r\n",
        code.as_u16(),
        version::PACKAGE
    );
    // Writing to a String cannot fail.
    let _ = body.map(|body| write!(head, "Content-Length: {}\r\n", body.len()));
    if code == StatusCode::METHOD_NOT_ALLOWED {
        head += "Allow: GET\r\n";
    }
    if !keep_alive {
        head += "Connection: close\r\n";
    }
    head += "\r\n";
    let mut bytes = head.into_bytes();
    bytes.extend_from_slice(body.unwrap_or_default());
    bytes
}

fn to_line(value: &impl Serialize) -> Vec<u8> {
    // Only maps whose keys are not strings, and types that refuse, cannot be written as JSON; there are none here.
    let mut bytes = serde_json::to_vec(value).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(bytes: Vec<u8>) -> String {
        String::from_utf8(bytes).unwrap()
    }

    fn trace(listener: Option<&str>, source: Option<&str>, count: Option<u64>) -> StatusRequest {
        let (listener, source) = (listener.map(str::to_owned), source.map(str::to_owned));
        StatusRequest::Trace(TraceQuery { listener, source, count })
    }

    #[test]
    fn requests_are_read_as_they_were_sent() {
        for request in [
            StatusRequest::Status,
            trace(None, None, None),
            trace(Some("a&b = c?"), Some("10.0.0.0/8"), Some(7)),
            trace(Some("ä"), Some("fe80::1"), None),
        ] {
            let bytes = request.to_bytes();
            let length = bytes.len();
            assert_eq!(StatusRequest::parse(&bytes), Ok(Some(ParsedRequest { request, length, keep_alive: true })));
            for end in 0..length {
                assert_eq!(StatusRequest::parse(&bytes[..end]), Ok(None), "{end}");
            }
        }
    }

    #[test]
    fn what_curl_sends_is_understood() {
        let curl = b"GET /trace?source=10.0.0.0/8&count=3 HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n";
        let parsed = StatusRequest::parse(curl).unwrap().unwrap();
        assert_eq!((parsed.request, parsed.keep_alive), (trace(None, Some("10.0.0.0/8"), Some(3)), true));
        for once in ["GET /status HTTP/1.0\r\n\r\n", "GET /status HTTP/1.1\r\nconnection: Close\r\n\r\n"] {
            assert!(!StatusRequest::parse(once.as_bytes()).unwrap().unwrap().keep_alive, "{once}");
        }
    }

    #[test]
    fn other_requests_are_refused_with_the_reason() {
        for (request, code, reason) in [
            ("hello\n", 400, "not an HTTP request"),
            ("POST /status HTTP/1.1\r\n\r\n", 405, "only GET"),
            ("GET / HTTP/1.1\r\n\r\n", 404, "there are /status, /alive and /trace"),
            ("GET /trace?count=0 HTTP/1.1\r\n\r\n", 400, "count=\"0\" is not a number from 1"),
            ("GET /trace?src=x HTTP/1.1\r\n\r\n", 400, "unknown parameter \"src\""),
            ("GET /status?json HTTP/1.1\r\n\r\n", 400, "unknown parameter \"json\""),
        ] {
            let error = StatusRequest::parse(request.as_bytes()).unwrap_err();
            assert_eq!(error.code.as_u16(), code, "{request}");
            assert!(error.reason.contains(reason), "{request}: {}", error.reason);
            let sent = text(StatusReply::Error(error).to_bytes(true));
            assert!(
                sent.starts_with(&format!("HTTP/1.1 {code} ")) && sent.contains("\r\nConnection: close\r\n"),
                "{sent}"
            );
        }
    }

    #[test]
    fn a_client_from_before_http_is_told_that_versions_differ() {
        let line = b"{\"version\":1,\"request\":\"status\"}\n";
        assert_eq!(StatusRequest::parse(&line[..line.len() - 1]), Ok(None));
        let sent = text(StatusReply::Error(StatusRequest::parse(line).unwrap_err()).to_bytes(true));
        assert!(sent.starts_with("{\"daemon\":") || sent.starts_with("{\"version\":2"), "{sent}");
        assert!(sent.contains("\"version\":2") && sent.ends_with("}\n"), "{sent}");
    }

    #[test]
    fn a_daemon_from_before_http_is_recognised() {
        let answer = br#"{"version":1,"daemon":"0.0.9","error":"expected a line such as ..."}"#;
        let error = ResponseHead::parse(answer).unwrap_err().to_string();
        assert!(error.starts_with("the daemon (0.0.9) speaks an older status protocol than this program"), "{error}");
        let other = ResponseHead::parse(b"220 mail ESMTP\r\n").unwrap_err().to_string();
        assert_eq!(other, "this is not the status socket of udp-fanout");
    }

    #[test]
    fn responses_have_a_length_and_traces_end_with_the_connection() {
        let sent = StatusReply::Report(Box::default()).to_bytes(true);
        let end = sent.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap() + 4;
        let head = ResponseHead::parse(&sent[..end]).unwrap();
        assert_eq!(head, ResponseHead { code: 200, length: Some((sent.len() - end) as u64) });
        assert_eq!(serde_json::from_slice::<StatusReport>(&sent[end..]).unwrap(), StatusReport::default());
        assert!(!text(sent).contains("Connection: close"));

        let sent = StatusReply::Trace(TraceSubscription::default(), "tracing".into()).to_bytes(true);
        let end = sent.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap() + 4;
        assert_eq!(ResponseHead::parse(&sent[..end]).unwrap(), ResponseHead { code: 200, length: None });
        assert_eq!(TraceLine::from_line(&sent[end..]).unwrap(), TraceLine::Note { note: "tracing".into() });
    }
}
