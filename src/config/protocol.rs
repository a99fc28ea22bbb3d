//! The protocol of a listener's datagrams, and what it means for the choice of receivers.
//!
//! What each protocol requires. NetFlow v9 and IPFIX describe their records in templates, which an exporter sends now and
//! then and each receiver needs. sFlow numbers an agent's datagrams, and receivers count a gap as a loss. A StatsD gauge or
//! set is a running value, so one receiver must see every update. A long GELF message comes in chunks, which one receiver
//! must reassemble. Syslog messages and DNS queries are independent of each other.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::model::{HashOn, Policy};

/// `listeners[].protocol`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ListenerProtocol {
    /// Unknown; each datagram is independent.
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

/// Why a policy does not suit a protocol, worded to follow the policy's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PolicyConflict {
    /// Refused: the protocol's own policy does the same and more.
    Error(&'static str),
    /// Loses data, except with certain senders or receivers, which the configuration does not show.
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
                "separates NetFlow v9 and IPFIX records from their templates, unless exporters use v5 or receivers share templates",
            ),
            (ListenerProtocol::Sflow, Policy::RoundRobin) => PolicyConflict::Warning(
                "leaves each receiver gaps in the sequence numbers, which it counts as losses unless it ignores them",
            ),
            (ListenerProtocol::Statsd, Policy::RoundRobin) => PolicyConflict::Warning(
                "splits a sender's gauges and sets between receivers, which makes them wrong, unless it sends counters only",
            ),
            (ListenerProtocol::Gelf, Policy::RoundRobin) => {
                PolicyConflict::Error("sends the chunks of a message to different receivers")
            }
            (ListenerProtocol::Dns, Policy::Replicate) => {
                PolicyConflict::Warning("makes every receiver answer every query, unless all but one stay silent")
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
            ListenerProtocol::Sflow => Some("leaves gaps in the sequence numbers, which the receiver counts as losses"),
            ListenerProtocol::Statsd => Some("leaves out updates of counters, gauges and sets, which makes them wrong"),
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
