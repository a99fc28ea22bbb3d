//! UDP probes: one socket for all targets of a family that are outstanding the same.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;

use socket2::{Domain, Protocol, Socket, Type};

use super::errors::SendError;
use super::probe_socket::{ProbeSocket, Received};
use super::{ProbeReply, ProbeVerdict};
use crate::health::model::ProbeId;
use crate::health::settings::ProbeBytes;

/// At the start of what is to be echoed: for whoever finds it in an application's log.
const SIGNATURE: &str = "udp-fanout health probe";

/// What is outstanding, and what counts as an answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum UdpRequest {
    /// A text with a nonce, which must come back unchanged.
    Echo,
    /// A fixed payload, to which the answer must begin in a certain way. Answers cannot be told apart, so that one counts
    /// for all probes that its sender has not answered yet.
    Fixed {
        /// What is sent.
        payload: ProbeBytes,
        /// How the answer begins.
        expect: ProbeBytes,
    },
}

/// The prober of one family and request.
#[derive(Debug)]
pub struct UdpProber {
    socket: ProbeSocket,
    request: UdpRequest,
    pending: HashMap<SocketAddr, Vec<PendingUdp>>,
}

#[derive(Debug, Clone, Copy)]
struct PendingUdp {
    probe: ProbeId,
    nonce: u64,
}

impl UdpProber {
    /// The prober of one family and request.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub fn new(v6: bool, request: UdpRequest) -> io::Result<UdpProber> {
        let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
        let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
        Ok(UdpProber { socket: ProbeSocket::new(socket, v6)?, request, pending: HashMap::new() })
    }

    /// The socket.
    pub fn socket(&self) -> &ProbeSocket {
        &self.socket
    }

    /// Sends a probe.
    pub fn send(&mut self, probe: ProbeId, to: SocketAddr) -> Result<(), SendError> {
        let nonce = rand::random();
        match &self.request {
            UdpRequest::Echo => self.socket.send(echo_text(probe, nonce).as_bytes(), to)?,
            UdpRequest::Fixed { payload, .. } => self.socket.send(payload.as_slice(), to)?,
        }
        self.pending.entry(to).or_default().push(PendingUdp { probe, nonce });
        Ok(())
    }

    /// Forgets a probe.
    pub fn cancel(&mut self, probe: ProbeId, to: SocketAddr) {
        take(&mut self.pending, to, probe);
    }

    /// Reads what has come back. True if there may be more.
    pub fn receive(&mut self, replies: &mut Vec<ProbeReply>) -> bool {
        let UdpProber { socket, request, pending } = self;
        socket.receive(|incoming| match incoming {
            Received::Datagram { from, bytes } => {
                let outstanding = pending.get(&from).map(Vec::as_slice).unwrap_or_default();
                let answered = match request {
                    UdpRequest::Echo => outstanding
                        .iter()
                        .find(|outstanding| echo_text(outstanding.probe, outstanding.nonce).as_bytes() == bytes),
                    UdpRequest::Fixed { expect, .. } => {
                        outstanding.first().filter(|_| bytes.starts_with(expect.as_slice()))
                    }
                };
                let Some(&PendingUdp { probe, .. }) = answered else {
                    tracing::debug!(%from, length = bytes.len(), "ignored a datagram that answers no health probe");
                    return;
                };
                let exact = *request == UdpRequest::Echo || outstanding.len() == 1;
                take(pending, from, probe);
                replies.push(ProbeReply { probe, verdict: ProbeVerdict::Answered { exact } });
            }
            Received::IcmpError { to, quoted, failure } => {
                let outstanding = pending.get(&to).map(Vec::as_slice).unwrap_or_default();
                // Less than the whole may have been returned, even nothing of the payload.
                let returned = |outstanding: &&PendingUdp| {
                    echo_text(outstanding.probe, outstanding.nonce).as_bytes().starts_with(quoted)
                };
                let bounced = match request {
                    UdpRequest::Echo => outstanding.iter().find(returned),
                    UdpRequest::Fixed { payload, .. } => {
                        outstanding.first().filter(|_| payload.as_slice().starts_with(quoted))
                    }
                };
                let Some(&PendingUdp { probe, .. }) = bounced else { return };
                take(pending, to, probe);
                replies.push(ProbeReply { probe, verdict: ProbeVerdict::Failed(failure) });
            }
        })
    }
}

fn take(pending: &mut HashMap<SocketAddr, Vec<PendingUdp>>, at: SocketAddr, probe: ProbeId) {
    if let Some(outstanding) = pending.get_mut(&at) {
        outstanding.retain(|outstanding| outstanding.probe != probe);
        if outstanding.is_empty() {
            pending.remove(&at);
        }
    }
}

/// What is to be echoed.
fn echo_text(probe: ProbeId, nonce: u64) -> String {
    format!("{SIGNATURE} {:016x} {nonce:016x}\n", probe.0)
}
