//! The command `udp-fanout status`: asks twice, computes rates, prints.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use super::client::StatusClient;
use super::report::StatusReport;
use super::{rates, tables};
use crate::config::{Config, DEFAULT_CONFIG, STATUS_SOCKET};
use crate::output;

/// Options of the command line.
#[derive(Debug, Clone, PartialEq)]
pub struct StatusOptions {
    /// The daemon's status socket.
    pub socket: PathBuf,
    /// Print JSON, one line per report, instead of tables.
    pub json: bool,
    /// Repeat until interrupted.
    pub watch: bool,
    /// The interval over which rates are measured.
    pub interval: Duration,
}

/// The status socket: the one named, or `status_socket` of the configuration file, or the default. An invalid file counts as
/// one that does not set it, because that is when the daemon's status matters.
#[must_use]
pub fn socket(config: Option<&Path>, socket: Option<PathBuf>) -> PathBuf {
    let of_config = || Config::status_socket_of(config.unwrap_or(Path::new(DEFAULT_CONFIG)));
    socket.or_else(of_config).unwrap_or_else(|| PathBuf::from(STATUS_SOCKET))
}

/// Clears the terminal and moves the cursor to its upper left corner.
const CLEAR: &str = "\u{1b}[H\u{1b}[2J";

/// Prints the status once, or until interrupted or until the output's reader has gone.
///
/// # Errors
/// When no daemon answers, in one line with the fix; or when standard output cannot be written to.
pub fn run(options: &StatusOptions) -> Result<()> {
    let mut client = StatusClient::connect(&options.socket)?;
    let terminal = std::io::stdout().is_terminal();
    let colour = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let mut before = client.report()?;
    loop {
        thread::sleep(options.interval);
        let mut now = client.report()?;
        rates::add(&mut now, &before);
        let mut text = if options.json { json(&now)? } else { tables::render(&now, colour) };
        if options.watch && !options.json {
            text = if terminal { format!("{CLEAR}{text}") } else { format!("{text}\n") };
        }
        let read = output::print_while_read(text.as_bytes())?;
        if !options.watch || !read {
            return Ok(());
        }
        before = now;
    }
}

fn json(report: &StatusReport) -> Result<String> {
    Ok(serde_json::to_string(report).context("cannot write the report as JSON")? + "\n")
}
