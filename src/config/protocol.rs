//! The protocol of a listener's datagrams, and what it means for the choice of receivers.
//!
//! The protocols' own rules, in short. NetFlow v9 and IPFIX describe their records in templates, which an exporter sends
//! now and then and a receiver must have seen. sFlow numbers an agent's datagrams, and receivers take a gap for a loss. A
//! StatsD gauge or set is a running value of which one place must see every change. A long GELF message comes in chunks,
//! which only one place can put together. Syslog messages and DNS questions stand for themselves.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::model::{HashOn, Policy};

/// `listeners[].protocol`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ListenerProtocol {
    /// Unknown; each datagram stands for itself.
    #[default]
    Raw,
    /// RFC 5426 and older forms.
    Syslog,
    /// Metrics as text.
    Statsd,
    /// Versions 5 and 9.
    Netflow,
    /// RFC 7011.
    Ipfix,
    /// Version 5.
    Sflow,
    /// Graylog's, over UDP.
    Gelf,
    /// Queries; replies go directly to the client.
    Dns,
}

/// Why a policy does not suit a protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PolicyConflict {
    /// Never useful: the protocol's own policy does the same and more. Refused.
    Error(&'static str),
    /// It loses data, except with certain senders or receivers, which the configuration does not show.
    Warning(&'static str),
}

impl ListenerProtocol {
    /// The policy that suits the protocol with any senders and receivers.
    pub(super) fn policy(self) -> Policy {
        match self {
            ListenerProtocol::Raw | ListenerProtocol::Syslog | ListenerProtocol::Dns => Policy::RoundRobin,
            ListenerProtocol::Statsd
            | ListenerProtocol::Netflow
            | ListenerProtocol::Ipfix
            | ListenerProtocol::Sflow => Policy::Hash(HashOn::SourceIp),
            ListenerProtocol::Gelf => Policy::GelfMessage,
        }
    }

    /// What the policy breaks, if anything.
    pub(super) fn objection(self, policy: Policy) -> Option<PolicyConflict> {
        let objection = match (self, policy) {
            (ListenerProtocol::Netflow | ListenerProtocol::Ipfix, Policy::RoundRobin) => PolicyConflict::Warning(
                "parts NetFlow v9 and IPFIX records from their templates, unless exporters use v5 or receivers share templates",
            ),
            (ListenerProtocol::Sflow, Policy::RoundRobin) => PolicyConflict::Warning(
                "spreads an agent's sequence numbers, whose gaps receivers take for losses, unless they ignore them",
            ),
            (ListenerProtocol::Statsd, Policy::RoundRobin) => PolicyConflict::Warning(
                "spreads a sender's gauges and sets, which then are wrong, unless it sends counters only",
            ),
            (ListenerProtocol::Gelf, Policy::RoundRobin) => PolicyConflict::Error("parts the chunks of a message"),
            (ListenerProtocol::Dns, Policy::Replicate) => {
                PolicyConflict::Warning("has every receiver answer every question, unless all but one stay silent")
            }
            _ => return None,
        };
        Some(objection)
    }

    /// What a receiver of a sample loses beyond the datagrams that it does not get.
    pub(super) fn sampling_loses(self) -> Option<&'static str> {
        match self {
            ListenerProtocol::Netflow | ListenerProtocol::Ipfix => {
                Some("leaves out templates, without which records cannot be read")
            }
            ListenerProtocol::Sflow => Some("leaves gaps in the sequence numbers, which the receiver takes for losses"),
            ListenerProtocol::Statsd => Some("leaves out changes of counters, gauges and sets, which then are wrong"),
            ListenerProtocol::Gelf => Some("leaves out chunks of messages"),
            ListenerProtocol::Raw | ListenerProtocol::Syslog | ListenerProtocol::Dns => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_protocol_objects_to_its_own_policy() {
        use ListenerProtocol::{Dns, Gelf, Ipfix, Netflow, Raw, Sflow, Statsd, Syslog};
        for protocol in [Raw, Syslog, Statsd, Netflow, Ipfix, Sflow, Gelf, Dns] {
            assert_eq!(protocol.objection(protocol.policy()), None, "{protocol:?}");
            assert_eq!(protocol.objection(Policy::Hash(HashOn::Flow)), None, "{protocol:?}");
        }
    }
}
