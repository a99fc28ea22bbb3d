//! Leaves out downstreams that are the listener itself: its datagrams would loop for ever. Pure.
//!
//! The configuration refuses such addresses in static lists. What a wildcard expands to, and which endpoints a Service
//! has, is known only at run time: a pod with `hostNetwork` has the node's address, and may have the same port.

use std::net::SocketAddr;

use crate::host::HostFacts;
use crate::model::Downstream;

/// True if datagrams to `endpoint` arrive at a listener bound to `bind` on this host.
fn is_self_loop(bind: SocketAddr, endpoint: SocketAddr, facts: &HostFacts) -> bool {
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

/// The downstreams that are not the listener itself.
pub(super) fn without_self_loops<'a>(
    bind: SocketAddr,
    downstreams: &'a [Downstream],
    facts: &'a HostFacts,
) -> impl Iterator<Item = &'a Downstream> {
    downstreams.iter().filter(move |downstream| !is_self_loop(bind, downstream.address, facts))
}

/// A warning for each downstream that is the listener itself.
pub(super) fn warnings(name: &str, bind: SocketAddr, downstreams: &[Downstream], facts: &HostFacts) -> Vec<String> {
    let self_loop = downstreams.iter().filter(|downstream| is_self_loop(bind, downstream.address, facts));
    let warning = |downstream: &Downstream| {
        format!(
            "listener {name:?}: downstream {} is the listener itself and is left out, because its datagrams \
             would loop for ever; give the receiver another port, or the listener an address of its own",
            downstream.address
        )
    };
    self_loop.map(warning).collect()
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
            let self_loop = is_self_loop(bind.parse().unwrap(), endpoint.parse().unwrap(), &facts);
            assert_eq!(self_loop, expected, "{bind} {endpoint}");
        }
    }
}
