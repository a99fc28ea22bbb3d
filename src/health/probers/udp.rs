//! UDP probes: one socket for all targets of one address family that get the same request.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;

use socket2::{Domain, Protocol, Socket, Type};

use super::errors::SendError;
use super::probe_socket::{ProbeSocket, Received};
use super::{ProbeReply, ProbeVerdict};
use crate::health::model::ProbeId;
use crate::health::settings::ProbeBytes;

/// The first words of an echo request, to identify it in an application's log.
const SIGNATURE: &str = "udp-fanout health probe";

/// The request, and what counts as a reply.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum UdpRequest {
    /// A text with a nonce, which the application returns unchanged.
    Echo,
    /// A fixed payload, and the first bytes of a valid reply. Replies carry no number, so a reply is matched to the oldest
    /// pending probe of its sender.
    Fixed {
        /// The request.
        payload: ProbeBytes,
        /// The first bytes of a valid reply.
        expect: ProbeBytes,
    },
}

/// The prober of one address family and request.
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
    /// Opens the socket of one address family and request.
    ///
    /// # Errors
    /// If the socket cannot be opened.
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

    /// Reads replies and ICMP errors. True if there may be more.
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
                // The ICMP message may return only a part of the payload, or none.
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

/// The text of an echo request.
fn echo_text(probe: ProbeId, nonce: u64) -> String {
    format!("{SIGNATURE} {:016x} {nonce:016x}\n", probe.0)
}
