//! Endpoints that are the listener itself: it would be sent its own datagrams. Pure.
//!
//! A static list that says so outright is refused when it is read. What a wildcard stands for, and what a Service's
//! endpoints are, shows only on the host: a pod with `hostNetwork` has the node's address, and the port may be the same.

use std::net::SocketAddr;

use crate::host::HostFacts;
use crate::model::Downstream;

/// True if what is sent to `endpoint` comes back to a listener bound to `bind` on this host.
fn is_itself(bind: SocketAddr, endpoint: SocketAddr, facts: &HostFacts) -> bool {
    if endpoint.port() != bind.port() || endpoint.is_ipv4() != bind.is_ipv4() {
        return false;
    }
    let ip = endpoint.ip();
    if bind.ip().is_unspecified() {
        ip.is_loopback() || facts.addresses.iter().any(|own| own.address == ip)
    } else {
        ip == bind.ip()
    }
}

/// Those of a listener's downstreams that are not the listener itself.
pub(super) fn others<'a>(
    bind: SocketAddr,
    downstreams: &'a [Downstream],
    facts: &'a HostFacts,
) -> impl Iterator<Item = &'a Downstream> {
    downstreams.iter().filter(move |downstream| !is_itself(bind, downstream.address, facts))
}

/// A warning for each downstream that is the listener itself.
pub(super) fn warnings(name: &str, bind: SocketAddr, downstreams: &[Downstream], facts: &HostFacts) -> Vec<String> {
    let itself = downstreams.iter().filter(|downstream| is_itself(bind, downstream.address, facts));
    let warning = |downstream: &Downstream| {
        format!(
            "listener {name:?}: downstream {} is the listener itself and is left out, because it would be sent its own \
             datagrams for ever; give the receiver another port, or the listener an address of its own",
            downstream.address
        )
    };
    itself.map(warning).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::HostAddress;

    #[test]
    fn a_wildcard_is_every_address_of_this_host_and_an_address_only_itself() {
        let own = ["192.0.2.1", "127.0.0.1", "2001:db8::1"];
        let addresses = own.map(|ip| HostAddress { link: 1, address: ip.parse().unwrap() }).to_vec();
        let facts = HostFacts { addresses, ..HostFacts::default() };
        for (bind, endpoint, expected) in [
            ("0.0.0.0:1", "192.0.2.1:1", true),
            ("0.0.0.0:1", "127.8.8.8:1", true),
            ("0.0.0.0:1", "192.0.2.1:2", false),
            ("0.0.0.0:1", "192.0.2.2:1", false),
            ("192.0.2.1:1", "192.0.2.1:1", true),
            ("192.0.2.1:1", "127.0.0.1:1", false),
            ("[::]:1", "[2001:db8::1]:1", true),
            ("[::]:1", "192.0.2.1:1", false),
            ("[2001:db8::1]:1", "[2001:db8::2]:1", false),
        ] {
            let itself = is_itself(bind.parse().unwrap(), endpoint.parse().unwrap(), &facts);
            assert_eq!(itself, expected, "{bind} {endpoint}");
        }
    }
}
