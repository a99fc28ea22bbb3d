//! What a listener carries, and what that means for the choice of receivers.
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
    /// Nothing is known of it: datagrams stand for themselves.
    #[default]
    Raw,
    /// RFC 5426 and what came before.
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
    /// Questions, whose answers go straight back.
    Dns,
}

/// What is to be said about a policy that does not suit a protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PolicyConflict {
    /// Nobody can want it: the protocol's own policy does the same and more.
    Error(&'static str),
    /// It loses something, unless the senders or receivers are of a kind that the configuration does not tell.
    Warning(&'static str),
}

impl ListenerProtocol {
    /// The policy that is right for the protocol whoever sends and receives.
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

    /// What a policy breaks, if it does.
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

    /// What is lost if a receiver gets only some of the datagrams, if more is lost than those.
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
