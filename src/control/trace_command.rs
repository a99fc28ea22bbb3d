//! The command `udp-fanout trace`: asks for single datagrams and prints them as they come.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use super::client::StatusClient;
use super::protocol::{StatusRequest, StatusResponse};
use super::trace::TraceRecord;
use crate::admission::Prefix;
use crate::output;

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceOptions {
    /// The daemon's status socket.
    pub socket: PathBuf,
    /// Only this listener's datagrams.
    pub listener: Option<String>,
    /// Only those from these addresses.
    pub source: Option<String>,
    /// End after so many lines.
    pub count: Option<u64>,
    /// JSON, a line for each.
    pub json: bool,
}

/// Prints what becomes of datagrams until there have been as many as were asked for, or nobody reads on.
///
/// # Errors
/// When there is no daemon to ask, when it cannot trace that, in one line with the fix; or when it ends.
pub fn run(options: &TraceOptions) -> Result<()> {
    let TraceOptions { listener, source, .. } = options;
    if let Some(source) = source {
        ensure!(
            Prefix::parse(source).is_ok(),
            "{source:?} is neither an address nor a prefix; write for example 10.0.0.2 or 10.0.0.0/8"
        );
    }
    let mut client = StatusClient::connect(&options.socket)?;
    let request = StatusRequest::Trace { listener: listener.clone(), source: source.clone() };
    let mut response = client.ask(&request)?;
    client.wait_for_ever()?;
    let mut left = options.count;
    loop {
        match response {
            StatusResponse::Error(reason) => bail!("{reason}"),
            StatusResponse::Report(_) => bail!("the daemon has answered something else than was asked"),
            StatusResponse::Note(text) => eprintln!("{text}"),
            StatusResponse::Traced(traced) => {
                if !output::print_while_read(line(&traced, options.json)?.as_bytes())? {
                    return Ok(());
                }
                left = left.map(|left| left.saturating_sub(1));
            }
        }
        if left == Some(0) {
            return Ok(());
        }
        response = client.next_answer()?;
    }
}

fn line(traced: &TraceRecord, json: bool) -> Result<String> {
    if json {
        return Ok(serde_json::to_string(traced).context("cannot write a datagram as JSON")? + "\n");
    }
    Ok(format!("{traced}\n"))
}
