//! The command's end of the status socket.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use socket2::{Domain, SockAddr, Socket, Type};

use super::protocol::{ResponseHead, StatusRequest, TraceLine, TraceQuery};
use super::report::StatusReport;

/// How long to wait for the daemon, which answers between two turns of its event loop.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The same for a check, which ends before a probe of Kubernetes with `timeoutSeconds: 5` does.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest head of a response, in bytes.
const MAX_HEAD: usize = 8192;

/// A connection to a daemon.
#[derive(Debug)]
pub struct StatusClient {
    stream: BufReader<UnixStream>,
    timeout: Duration,
}

impl StatusClient {
    /// Connects to the daemon that listens on this status socket.
    ///
    /// # Errors
    /// In one line: no daemon listens there, or this user may not connect, and the fix.
    pub fn connect(path: &Path) -> Result<StatusClient> {
        StatusClient::connect_within(path, TIMEOUT)
    }

    /// Checks that the main loop of the daemon at this status socket replies within two seconds.
    ///
    /// # Errors
    /// In one line: what is wrong, and the fix.
    pub fn check(path: &Path) -> Result<()> {
        let mut client = StatusClient::connect_within(path, CHECK_TIMEOUT)?;
        let head = client.ask(&StatusRequest::Alive)?;
        let body = client.read_body(&head)?;
        if head.code != 200 {
            bail!("the daemon refuses: {}", String::from_utf8_lossy(&body).trim_end());
        }
        Ok(())
    }

    /// Connects, with a limit for each step: the kernel lets `connect` wait as well while the daemon accepts nobody.
    fn connect_within(path: &Path, timeout: Duration) -> Result<StatusClient> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).context("cannot create a Unix socket")?;
        socket.set_read_timeout(Some(timeout)).context("cannot set a timeout on the status socket")?;
        socket.set_write_timeout(Some(timeout)).context("cannot set a timeout on the status socket")?;
        let connected = SockAddr::unix(path).and_then(|address| socket.connect(&address));
        connected.map_err(|error| connect_error(&error, path, timeout))?;
        Ok(StatusClient { stream: BufReader::new(OwnedFd::from(socket).into()), timeout })
    }

    /// Asks for a report.
    ///
    /// # Errors
    /// When the daemon does not answer, ends meanwhile, or speaks another protocol.
    pub fn report(&mut self) -> Result<StatusReport> {
        let head = self.ask(&StatusRequest::Status)?;
        let body = self.read_body(&head)?;
        if head.code != 200 {
            bail!("the daemon refuses: {}", String::from_utf8_lossy(&body).trim_end());
        }
        serde_json::from_slice(&body).context("the daemon has sent a report that this program does not understand")
    }

    /// Asks for a trace, whose lines [`next_line`](Self::next_line) reads.
    ///
    /// # Errors
    /// As for [`report`](Self::report); and when the daemon cannot trace that, with its reason.
    pub fn trace(&mut self, query: TraceQuery) -> Result<()> {
        let head = self.ask(&StatusRequest::Trace(query))?;
        if head.code != 200 {
            let body = self.read_body(&head)?;
            bail!("{}", String::from_utf8_lossy(&body).trim_end());
        }
        self.stream.get_ref().set_read_timeout(None).context("cannot wait for the daemon")
    }

    /// Waits for the next line of a trace.
    ///
    /// # Errors
    /// When the daemon ends.
    pub fn next_line(&mut self) -> Result<TraceLine> {
        let mut line = Vec::new();
        match self.stream.read_until(b'\n', &mut line) {
            Ok(_) if line.ends_with(b"\n") => TraceLine::from_line(&line),
            Ok(_) => Err(closed()),
            Err(error) => Err(read_error(error, self.timeout)),
        }
    }

    fn ask(&mut self, request: &StatusRequest) -> Result<ResponseHead> {
        // A daemon that has just closed the connection may have said why, so its answer is read in any case.
        let sent = self.stream.get_mut().write_all(&request.to_bytes());
        let mut head = Vec::new();
        loop {
            let before = head.len();
            let read = self.stream.by_ref().take((MAX_HEAD - before) as u64).read_until(b'\n', &mut head);
            match read {
                Ok(0) => {
                    sent.context("the daemon has closed the connection")?;
                    return Err(closed());
                }
                // Daemons before HTTP answer with one line.
                Ok(_) if head.starts_with(b"{") || matches!(&head[before..], b"\r\n" | b"\n") => {
                    return ResponseHead::parse(&head);
                }
                Ok(_) if head.len() >= MAX_HEAD => bail!("this is not the status socket of udp-fanout"),
                Ok(_) => {}
                Err(error) => return Err(read_error(error, self.timeout)),
            }
        }
    }

    fn read_body(&mut self, head: &ResponseHead) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        let length = head.length.context("the daemon has sent a response without a length")?;
        self.stream.by_ref().take(length).read_to_end(&mut body).map_err(|error| read_error(error, self.timeout))?;
        if (body.len() as u64) < length {
            return Err(closed());
        }
        Ok(body)
    }
}

fn closed() -> anyhow::Error {
    anyhow!("the daemon has closed the connection without an answer; it may be ending: ask again")
}

fn no_answer(timeout: Duration) -> anyhow::Error {
    anyhow!("the daemon has not answered within {timeout:?}; it may be stuck: see its log, or restart it")
}

fn read_error(error: std::io::Error, timeout: Duration) -> anyhow::Error {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => no_answer(timeout),
        _ => anyhow::Error::new(error).context("cannot read the daemon's answer"),
    }
}

fn connect_error(error: &std::io::Error, path: &Path, timeout: Duration) -> anyhow::Error {
    let path = path.display();
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => no_answer(timeout),
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
