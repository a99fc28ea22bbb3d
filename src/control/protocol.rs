//! What is said over the status socket: a request is a line of JSON, and so is the answer to it.
//!
//! ```json
//! {"version":1,"request":"status"}
//! {"version":1,"daemon":"0.1.0","report":{ }}
//! {"version":1,"daemon":"0.1.0","error":"what is wrong, and the fix"}
//!
//! {"version":1,"request":"trace","listener":"syslog","source":"10.0.0.0/8"}
//! {"version":1,"daemon":"0.1.0","note":"tracing"}
//! {"version":1,"daemon":"0.1.0","traced":{ }}
//! ```
//!
//! A trace goes on, line by line, until the client closes the connection or says anything.
//!
//! `version` changes when a field changes its meaning or goes. New fields do not change it: either side ignores what it
//! does not know.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::report::StatusReport;
use super::trace::TraceRecord;
use crate::version;

/// The version of the protocol that this program speaks.
pub const VERSION: u32 = 1;

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum StatusRequest {
    /// A report of everything, as it is now.
    Status,
    /// What becomes of single datagrams, from now on until the client closes the connection.
    Trace {
        /// Only those of the listener of this name.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        listener: Option<String>,
        /// Only those from this address or prefix.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        source: Option<String>,
    },
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StatusResponse {
    /// To [`StatusRequest::Status`].
    Report(Box<StatusReport>),
    /// One of the answers to [`StatusRequest::Trace`].
    Traced(Box<TraceRecord>),
    /// Something about a trace that the operator should know.
    Note(String),
    /// The request makes no sense, or cannot be answered, and the reason.
    Error(String),
}

/// What every line has besides its body.
#[derive(Debug, Serialize, Deserialize)]
struct Line<T> {
    version: u32,
    /// The daemon's own version, in answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    daemon: Option<String>,
    #[serde(flatten)]
    body: T,
}

/// The part of a line that is the same in every version.
#[derive(Debug, Deserialize)]
struct Head {
    version: u32,
    daemon: Option<String>,
}

impl StatusRequest {
    /// The line, with its end.
    #[must_use]
    pub fn to_line(&self) -> Vec<u8> {
        to_line(&Line { version: VERSION, daemon: None, body: self })
    }

    /// Reads a line.
    ///
    /// # Errors
    /// Says what is wrong with it, for the client.
    pub fn from_line(line: &[u8]) -> Result<StatusRequest, String> {
        let head: Head = serde_json::from_slice(line).map_err(|_| {
            format!("expected a line such as {}", String::from_utf8_lossy(&StatusRequest::Status.to_line()).trim())
        })?;
        if head.version != VERSION {
            return Err(format!("this daemon speaks version {VERSION} of the protocol, not {}", head.version));
        }
        let line: Line<StatusRequest> = serde_json::from_slice(line).map_err(|_| {
            "this daemon does not know that request; ask it with a program of its own version".to_owned()
        })?;
        Ok(line.body)
    }
}

impl StatusResponse {
    /// The line, with its end.
    #[must_use]
    pub fn to_line(&self) -> Vec<u8> {
        to_line(&Line { version: VERSION, daemon: Some(version::PACKAGE.to_owned()), body: self })
    }

    /// Reads a line.
    ///
    /// # Errors
    /// When the daemon speaks another version, or none; names both and the fix.
    pub fn from_line(line: &[u8]) -> Result<StatusResponse> {
        let head: Head = serde_json::from_slice(line).context("what answers there is no udp-fanout")?;
        if head.version != VERSION {
            bail!(
                "the daemon ({}) speaks version {} of the status protocol and this program ({}) version {VERSION}; run \
                 the program that the daemon was started from",
                head.daemon.as_deref().unwrap_or("unknown"),
                head.version,
                version::PACKAGE
            );
        }
        let line: Line<StatusResponse> =
            serde_json::from_slice(line).context("the daemon's answer cannot be understood")?;
        Ok(line.body)
    }
}

fn to_line(line: &impl Serialize) -> Vec<u8> {
    // Only maps with keys that are no texts, and types that refuse, cannot be written as JSON.
    let mut bytes = serde_json::to_vec(line).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_answers_are_lines_that_mean_the_same_again() {
        let line = StatusRequest::Status.to_line();
        assert_eq!(line, b"{\"version\":1,\"request\":\"status\"}\n");
        assert_eq!(StatusRequest::from_line(&line), Ok(StatusRequest::Status));
        for response in [StatusResponse::Error("no\nway".into()), StatusResponse::Report(Box::default())] {
            let line = response.to_line();
            assert_eq!(line.iter().filter(|&&byte| byte == b'\n').count(), 1);
            assert_eq!(StatusResponse::from_line(&line).unwrap(), response);
        }
    }

    #[test]
    fn other_versions_are_told_apart_before_anything_else_is_read() {
        let refused = StatusRequest::from_line(br#"{"version":2,"question":42}"#).unwrap_err();
        assert_eq!(refused, "this daemon speaks version 1 of the protocol, not 2");
        let error =
            StatusResponse::from_line(br#"{"version":7,"daemon":"9.0.0","all":"new"}"#).unwrap_err().to_string();
        assert!(error.starts_with("the daemon (9.0.0) speaks version 7 "), "{error}");
    }

    #[test]
    fn nonsense_is_refused_with_a_reason() {
        for line in [&b""[..], b"status", b"{}", b"\xff", b"[1]"] {
            assert!(StatusRequest::from_line(line).unwrap_err().contains(r#"{"version":1,"request":"status"}"#));
        }
        let unknown = StatusRequest::from_line(br#"{"version":1,"request":"dance"}"#).unwrap_err();
        assert!(unknown.contains("does not know"), "{unknown}");
        assert!(StatusResponse::from_line(b"HTTP/1.1 400 Bad StatusRequest").is_err());
    }

    #[test]
    fn fields_that_are_not_known_do_no_harm() {
        let line = br#"{"version":1,"request":"status","colour":"red"}"#;
        assert_eq!(StatusRequest::from_line(line), Ok(StatusRequest::Status));
        let answer = br#"{"version":1,"daemon":"0.9.0","error":"x","since":3}"#;
        assert_eq!(StatusResponse::from_line(answer).unwrap(), StatusResponse::Error("x".into()));
    }
}
