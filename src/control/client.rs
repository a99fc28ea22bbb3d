//! The command's end of the status socket.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use super::protocol::{StatusRequest, StatusResponse};
use super::report::StatusReport;

/// How long the daemon may take to answer. It answers between two turns of its loop, so that this is long.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection to a daemon.
#[derive(Debug)]
pub struct StatusClient {
    stream: BufReader<UnixStream>,
}

impl StatusClient {
    /// Connects to the daemon whose status socket this is.
    ///
    /// # Errors
    /// In one line: that none runs, or that this user may not ask it, and the fix.
    pub fn connect(path: &Path) -> Result<StatusClient> {
        let stream = UnixStream::connect(path).map_err(|error| explain(&error, path))?;
        stream.set_read_timeout(Some(PATIENCE)).context("cannot limit how long to wait for the daemon")?;
        stream.set_write_timeout(Some(PATIENCE)).context("cannot limit how long to wait for the daemon")?;
        Ok(StatusClient { stream: BufReader::new(stream) })
    }

    /// Asks for a report.
    ///
    /// # Errors
    /// When the daemon does not answer, ends meanwhile, or speaks another version.
    pub fn report(&mut self) -> Result<StatusReport> {
        match self.ask(&StatusRequest::Status)? {
            StatusResponse::Report(report) => Ok(*report),
            StatusResponse::Error(reason) => bail!("the daemon refuses: {reason}"),
            StatusResponse::Traced(_) | StatusResponse::Note(_) => {
                bail!("the daemon has answered something else than was asked")
            }
        }
    }

    /// Waits as long as it takes for answers from now on.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn wait_for_ever(&mut self) -> Result<()> {
        self.stream.get_ref().set_read_timeout(None).context("cannot wait for the daemon")
    }

    /// The next of several answers.
    ///
    /// # Errors
    /// When the daemon ends, or speaks another version.
    pub fn next_answer(&mut self) -> Result<StatusResponse> {
        self.read(Ok(()))
    }

    /// Asks, and waits for the first answer.
    ///
    /// # Errors
    /// When the daemon does not answer, ends meanwhile, or speaks another version.
    pub fn ask(&mut self, request: &StatusRequest) -> Result<StatusResponse> {
        // A daemon that has just closed the connection may have said why.
        let sent = self.stream.get_mut().write_all(&request.to_line());
        self.read(sent)
    }

    fn read(&mut self, sent: std::io::Result<()>) -> Result<StatusResponse> {
        let mut line = Vec::new();
        match self.stream.read_until(b'\n', &mut line) {
            Ok(_) if line.ends_with(b"\n") => StatusResponse::from_line(&line),
            Ok(_) => {
                sent.context("the daemon has closed the connection")?;
                bail!("the daemon has closed the connection without an answer; it may be ending: ask again");
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                bail!("the daemon has not answered within {PATIENCE:?}; it may be stuck: see its log, or restart it")
            }
            Err(error) => Err(error).context("the daemon's answer cannot be read"),
        }
    }
}

fn explain(error: &std::io::Error, path: &Path) -> anyhow::Error {
    let path = path.display();
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => anyhow!(
            "no udp-fanout answers at {path}: start it (`systemctl start udp-fanout`), or name its configuration with \
             --config or its socket with --socket"
        ),
        ErrorKind::PermissionDenied => {
            anyhow!("cannot ask the udp-fanout at {path}: permission denied; run this as root or as the daemon's user")
        }
        _ => anyhow!("cannot ask the udp-fanout at {path}: {error}; is it the path of a status socket?"),
    }
}
