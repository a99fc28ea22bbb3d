//! Probes with a connection each: TCP, which succeeds when connected, and HTTP, which needs a response.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use mio::net::TcpStream;
use socket2::SockRef;

use super::errors::{SendError, probe_failure, send_error};
use super::http;
use crate::health::model::{ProbeFailure, ProbeFailureKind, ProbeId};

/// A TCP or HTTP probe.
#[derive(Debug)]
pub struct TcpProbe {
    /// The number of the probe.
    pub probe: ProbeId,
    /// The non-blocking socket.
    pub stream: TcpStream,
    stage: ConnectStage,
    /// The HTTP request and response; none for a TCP probe.
    exchange: Option<HttpExchange>,
}

#[derive(Debug, PartialEq, Eq)]
enum ConnectStage {
    Connecting,
    Connected,
}

#[derive(Debug)]
struct HttpExchange {
    request: Vec<u8>,
    written: usize,
    answer: Vec<u8>,
}

impl TcpProbe {
    /// Starts to connect. With a path, an HTTP request for it follows.
    pub fn connect(probe: ProbeId, to: SocketAddr, path: Option<&str>) -> Result<TcpProbe, SendError> {
        let stream = TcpStream::connect(to).map_err(|error| send_error(&error))?;
        if path.is_none() {
            // Close with a reset, so that no port stays in TIME_WAIT per probe. If this fails, the port is used for a minute
            // longer.
            let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
        }
        let exchange = path.map(|path| HttpExchange {
            request: http::build_request(to, path).into_bytes(),
            written: 0,
            answer: Vec::new(),
        });
        Ok(TcpProbe { probe, stream, stage: ConnectStage::Connecting, exchange })
    }

    /// Continues as far as possible without blocking. None while there is no result.
    pub fn advance(&mut self) -> Option<Result<(), ProbeFailure>> {
        match self.try_advance() {
            Ok(()) => Some(Ok(())),
            Err(NoResult::Pending) => None,
            Err(NoResult::Failed(failure)) => Some(Err(failure)),
        }
    }

    fn try_advance(&mut self) -> Result<(), NoResult> {
        if self.stage == ConnectStage::Connecting {
            if let Some(error) = self.stream.take_error()? {
                return Err(error.into());
            }
            let peer = match self.stream.peer_addr() {
                Err(error) if error.kind() == io::ErrorKind::NotConnected => return Err(NoResult::Pending),
                peer => peer?,
            };
            // On loopback, a socket can connect to itself if the port has no listener.
            if self.stream.local_addr()? == peer {
                return Err(io::Error::from_raw_os_error(libc::ECONNREFUSED).into());
            }
            self.stage = ConnectStage::Connected;
        }
        let Some(exchange) = &mut self.exchange else { return Ok(()) };
        exchange.advance(&mut self.stream)
    }
}

impl HttpExchange {
    fn advance(&mut self, stream: &mut TcpStream) -> Result<(), NoResult> {
        while self.written < self.request.len() {
            match stream.write(&self.request[self.written..]) {
                Ok(0) => return Err(io::Error::from_raw_os_error(libc::ECONNRESET).into()),
                Ok(written) => self.written += written,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        let mut buffer = [0; 4096];
        loop {
            let ended = match stream.read(&mut buffer) {
                Ok(0) => true,
                Ok(read) => {
                    self.answer.extend_from_slice(&buffer[..read]);
                    false
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            if let Some(verdict) = http::parse_response(&self.answer, ended) {
                return verdict.map_err(NoResult::Failed);
            }
        }
    }
}

/// Why there is no success.
enum NoResult {
    /// The socket is not ready.
    Pending,
    /// The probe has failed.
    Failed(ProbeFailure),
}

impl From<io::Error> for NoResult {
    fn from(error: io::Error) -> NoResult {
        match error.kind() {
            io::ErrorKind::WouldBlock => NoResult::Pending,
            io::ErrorKind::NotConnected => {
                NoResult::Failed(ProbeFailure::new(ProbeFailureKind::Refused, "connection closed at once"))
            }
            _ => NoResult::Failed(probe_failure(&error)),
        }
    }
}
