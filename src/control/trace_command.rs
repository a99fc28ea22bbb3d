//! The command `udp-fanout trace`: prints single datagrams as the daemon reports them.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use super::client::StatusClient;
use super::protocol::{TraceLine, TraceQuery};
use super::trace::TraceRecord;
use crate::admission::Prefix;
use crate::output;

/// Options of the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceOptions {
    /// The daemon's status socket.
    pub socket: PathBuf,
    /// Only this listener's datagrams.
    pub listener: Option<String>,
    /// Only datagrams from this address or prefix.
    pub source: Option<String>,
    /// End after so many datagrams.
    pub count: Option<u64>,
    /// Print JSON, one line per datagram.
    pub json: bool,
}

/// Prints datagrams until `count` is reached or the output's reader has gone.
///
/// # Errors
/// When no daemon answers or it cannot trace that, in one line with the fix; or when it ends.
pub fn run(options: &TraceOptions) -> Result<()> {
    let TraceOptions { listener, source, .. } = options;
    if let Some(source) = source {
        ensure!(
            Prefix::parse(source).is_ok(),
            "{source:?} is neither an address nor a prefix; write for example 10.0.0.2 or 10.0.0.0/8"
        );
    }
    let mut client = StatusClient::connect(&options.socket)?;
    client.trace(TraceQuery { listener: listener.clone(), source: source.clone(), count: options.count })?;
    let mut remaining = options.count;
    while remaining != Some(0) {
        match client.next_line()? {
            TraceLine::Error { error } => bail!("{error}"),
            TraceLine::Note { note } => eprintln!("{note}"),
            TraceLine::Record(record) => {
                if !output::print_while_read(line(&record, options.json)?.as_bytes())? {
                    return Ok(());
                }
                remaining = remaining.map(|remaining| remaining.saturating_sub(1));
            }
        }
    }
    Ok(())
}

fn line(traced: &TraceRecord, json: bool) -> Result<String> {
    if json {
        return Ok(serde_json::to_string(traced).context("cannot write a datagram as JSON")? + "\n");
    }
    Ok(format!("{traced}\n"))
}
