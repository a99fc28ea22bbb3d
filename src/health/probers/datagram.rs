//! UDP probes: one socket for all targets of a family that are asked the same.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;

use socket2::{Domain, Protocol, Socket, Type};

use super::channel::{Channel, Incoming};
use super::errors::Unsent;
use super::{Reply, Verdict};
use crate::health::model::ProbeId;
use crate::health::settings::Bytes;

/// At the start of what is to be echoed: for whoever finds it in an application's log.
const SIGNATURE: &str = "udp-fanout health probe";

/// What is asked, and what counts as an answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Question {
    /// A text with a nonce, which must come back unchanged.
    Echo,
    /// A fixed payload, to which the answer must begin in a certain way. Answers cannot be told apart, so that one counts
    /// for all probes that its sender has not answered yet.
    Fixed {
        /// What is sent.
        payload: Bytes,
        /// How the answer begins.
        expect: Bytes,
    },
}

/// The prober of one family and question.
#[derive(Debug)]
pub struct Datagrams {
    channel: Channel,
    question: Question,
    pending: HashMap<SocketAddr, Vec<Pending>>,
}

#[derive(Debug, Clone, Copy)]
struct Pending {
    probe: ProbeId,
    nonce: u64,
}

impl Datagrams {
    /// The prober of one family and question.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub fn new(v6: bool, question: Question) -> io::Result<Datagrams> {
        let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
        let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
        Ok(Datagrams { channel: Channel::new(socket, v6)?, question, pending: HashMap::new() })
    }

    /// The socket.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Sends a probe.
    pub fn send(&mut self, probe: ProbeId, to: SocketAddr) -> Result<(), Unsent> {
        let nonce = rand::random();
        match &self.question {
            Question::Echo => self.channel.send(text(probe, nonce).as_bytes(), to)?,
            Question::Fixed { payload, .. } => self.channel.send(payload.as_slice(), to)?,
        }
        self.pending.entry(to).or_default().push(Pending { probe, nonce });
        Ok(())
    }

    /// Forgets a probe.
    pub fn cancel(&mut self, probe: ProbeId, to: SocketAddr) {
        take(&mut self.pending, to, probe);
    }

    /// Reads what has come back. True if there may be more.
    pub fn receive(&mut self, replies: &mut Vec<Reply>) -> bool {
        let Datagrams { channel, question, pending } = self;
        channel.receive(|incoming| match incoming {
            Incoming::Datagram { from, bytes } => {
                let asked = pending.get(&from).map(Vec::as_slice).unwrap_or_default();
                let answered = match question {
                    Question::Echo => asked.iter().find(|asked| text(asked.probe, asked.nonce).as_bytes() == bytes),
                    Question::Fixed { expect, .. } => asked.first().filter(|_| bytes.starts_with(expect.as_slice())),
                };
                let Some(&Pending { probe, .. }) = answered else {
                    tracing::debug!(%from, length = bytes.len(), "ignored a datagram that answers no health probe");
                    return;
                };
                let exact = *question == Question::Echo || asked.len() == 1;
                take(pending, from, probe);
                replies.push(Reply { probe, verdict: Verdict::Answered { exact } });
            }
            Incoming::Bounce { to, quoted, failure } => {
                let asked = pending.get(&to).map(Vec::as_slice).unwrap_or_default();
                // Less than the whole may have been returned, even nothing of the payload.
                let returned = |asked: &&Pending| text(asked.probe, asked.nonce).as_bytes().starts_with(quoted);
                let bounced = match question {
                    Question::Echo => asked.iter().find(returned),
                    Question::Fixed { payload, .. } => asked.first().filter(|_| payload.as_slice().starts_with(quoted)),
                };
                let Some(&Pending { probe, .. }) = bounced else { return };
                take(pending, to, probe);
                replies.push(Reply { probe, verdict: Verdict::Failed(failure) });
            }
        })
    }
}

fn take(pending: &mut HashMap<SocketAddr, Vec<Pending>>, at: SocketAddr, probe: ProbeId) {
    if let Some(asked) = pending.get_mut(&at) {
        asked.retain(|asked| asked.probe != probe);
        if asked.is_empty() {
            pending.remove(&at);
        }
    }
}

/// What is to be echoed.
fn text(probe: ProbeId, nonce: u64) -> String {
    format!("{SIGNATURE} {:016x} {nonce:016x}\n", probe.0)
}
