//! Probes that need a connection each: TCP, which must be accepted, and HTTP, which must be answered.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use mio::net::TcpStream;
use socket2::SockRef;

use super::errors::{Unsent, failure, unsent};
use super::http;
use crate::health::model::{Failure, FailureKind, ProbeId};

/// A connection on its way.
#[derive(Debug)]
pub struct Connection {
    /// The probe it is.
    pub probe: ProbeId,
    /// The socket.
    pub stream: TcpStream,
    stage: Stage,
    /// What is left to ask once it stands; none where standing is enough.
    exchange: Option<Exchange>,
}

#[derive(Debug, PartialEq, Eq)]
enum Stage {
    Connecting,
    Connected,
}

#[derive(Debug)]
struct Exchange {
    request: Vec<u8>,
    written: usize,
    answer: Vec<u8>,
}

impl Connection {
    /// Begins to connect; with a path, to ask for that over HTTP.
    pub fn begin(probe: ProbeId, to: SocketAddr, path: Option<&str>) -> Result<Connection, Unsent> {
        let stream = TcpStream::connect(to).map_err(|error| unsent(&error))?;
        if path.is_none() {
            // Close with a reset: nothing was said, and a port in TIME_WAIT for each probe would add up. If this fails, a
            // port is used for a minute longer.
            let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
        }
        let exchange =
            path.map(|path| Exchange { request: http::request(to, path).into_bytes(), written: 0, answer: Vec::new() });
        Ok(Connection { probe, stream, stage: Stage::Connecting, exchange })
    }

    /// Goes on as far as possible without waiting. None if there is nothing to say yet.
    pub fn advance(&mut self) -> Option<Result<(), Failure>> {
        match self.try_advance() {
            Ok(()) => Some(Ok(())),
            Err(Setback::Wait) => None,
            Err(Setback::Failed(failure)) => Some(Err(failure)),
        }
    }

    fn try_advance(&mut self) -> Result<(), Setback> {
        if self.stage == Stage::Connecting {
            if let Some(error) = self.stream.take_error()? {
                return Err(error.into());
            }
            let peer = match self.stream.peer_addr() {
                Err(error) if error.kind() == io::ErrorKind::NotConnected => return Err(Setback::Wait),
                peer => peer?,
            };
            // To a port of this host on which nobody listens, a socket can connect to itself.
            if self.stream.local_addr()? == peer {
                return Err(io::Error::from_raw_os_error(libc::ECONNREFUSED).into());
            }
            self.stage = Stage::Connected;
        }
        let Some(exchange) = &mut self.exchange else { return Ok(()) };
        exchange.advance(&mut self.stream)
    }
}

impl Exchange {
    fn advance(&mut self, stream: &mut TcpStream) -> Result<(), Setback> {
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
            if let Some(verdict) = http::judge(&self.answer, ended) {
                return verdict.map_err(Setback::Failed);
            }
        }
    }
}

/// Why there is no answer.
enum Setback {
    /// Not yet.
    Wait,
    /// There will be none, or a bad one has come.
    Failed(Failure),
}

impl From<io::Error> for Setback {
    fn from(error: io::Error) -> Setback {
        match error.kind() {
            io::ErrorKind::WouldBlock => Setback::Wait,
            io::ErrorKind::NotConnected => {
                Setback::Failed(Failure::new(FailureKind::Refused, "connection closed at once"))
            }
            _ => Setback::Failed(failure(&error)),
        }
    }
}
