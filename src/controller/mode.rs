//! Chooses a listener's datapath and gives the reason. Pure: the facts come from `host`, the support check from
//! `host::probe`.

use anyhow::{Result, anyhow};

use crate::config::{Interfaces, ListenerConfig, RequestedMode};
use crate::host::probe::TcUnsupported;
use crate::host::{HostFacts, Link};
use crate::model::Mode;

/// A chosen mode and the reason, which is logged and exported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModeChoice {
    /// The datapath.
    pub mode: Mode,
    /// The reason, as a clause.
    pub reason: String,
}

/// Chooses a listener's datapath.
///
/// # Errors
/// When the listener has `mode = "tc_ebpf"` and the host cannot do it; the error names the obstacle and the fix.
pub fn choose(
    listener: &ListenerConfig,
    tc_support: &Result<(), TcUnsupported>,
    facts: &HostFacts,
) -> Result<ModeChoice> {
    let interfaces = interfaces_fit(&listener.interfaces, facts);
    let chosen = |mode, reason: &str| Ok(ModeChoice { mode, reason: reason.to_owned() });
    match listener.mode {
        RequestedMode::Userspace => chosen(Mode::Userspace, "configured"),
        RequestedMode::TcEbpf => {
            let name = &listener.name;
            tc_support.as_ref().map_err(|reason| anyhow!("listener {name:?}: {}", reason.attach_error()))?;
            interfaces.map_err(|obstacle| anyhow!("listener {name:?}: {obstacle}"))?;
            chosen(Mode::TcEbpf, "configured")
        }
        RequestedMode::Auto => match tc_support.as_ref().map_err(ToString::to_string).and(interfaces) {
            // Datagrams to a loopback address never arrive through an interface.
            _ if listener.bind.ip().is_loopback() => chosen(Mode::Userspace, "bound to a loopback address"),
            Ok(()) => chosen(Mode::TcEbpf, "supported by this host"),
            Err(obstacle) => chosen(Mode::Userspace, &obstacle),
        },
    }
}

/// Checks that the interfaces of a listener exist.
///
/// # Errors
/// Names the missing interface and the existing ones.
pub fn interfaces_present(interfaces: &Interfaces, facts: &HostFacts) -> Result<(), String> {
    let candidates = || {
        let names: Vec<&str> =
            facts.links.iter().filter(|link| !link.loopback).map(|link| link.name.as_str()).collect();
        if names.is_empty() {
            "this host has only loopback interfaces".to_owned()
        } else {
            format!("this host has {}", names.join(", "))
        }
    };
    match interfaces {
        Interfaces::Auto if facts.default_route_links.is_empty() => Err(format!(
            "no interface carries a default route, so interface = \"auto\" finds none ({}); name one",
            candidates()
        )),
        Interfaces::Auto => Ok(()),
        Interfaces::Named(names) => match names.iter().find(|name| facts.link_named(name).is_none()) {
            Some(missing) => Err(format!("interface not found: {missing} ({})", candidates())),
            None => Ok(()),
        },
    }
}

/// True if the TC program can find the IP header of packets that arrive by this interface.
pub fn can_carry_tc_program(link: &Link) -> bool {
    link.ethernet || link.l3_ingress
}

/// Checks that the TC program can work on the interfaces: they exist, and it can find the IP header there.
fn interfaces_fit(interfaces: &Interfaces, facts: &HostFacts) -> Result<(), String> {
    interfaces_present(interfaces, facts)?;
    let links = match interfaces {
        Interfaces::Auto => facts.default_route_links.iter().filter_map(|&index| facts.link(index)).collect(),
        Interfaces::Named(names) => names.iter().filter_map(|name| facts.link_named(name)).collect::<Vec<_>>(),
    };
    match links.iter().find(|link| !can_carry_tc_program(link)) {
        Some(link) => Err(format!(
            "interface {} carries neither Ethernet frames nor IP packets alone, as tc_ebpf needs; use mode = \"userspace\" for it",
            link.name
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_goes_where_there_are_frames_or_nothing_but_ip_packets() {
        let link = |name: &str, (ethernet, l3_device, l3_ingress)| Link {
            name: name.into(),
            ethernet,
            l3_device,
            l3_ingress,
            ..Link::default()
        };
        let sorts = [("eth0", (true, false, false)), ("wg0", (false, true, true)), ("ipip0", (false, true, false))];
        let facts = HostFacts { links: sorts.map(|(name, sort)| link(name, sort)).into(), ..HostFacts::default() };
        let fit = |names: &[&str]| {
            interfaces_fit(&Interfaces::Named(names.iter().map(|&name| name.into()).collect()), &facts)
        };
        assert_eq!(fit(&["eth0", "wg0"]), Ok(()));
        let refusal = fit(&["eth0", "ipip0"]).unwrap_err();
        assert!(refusal.starts_with("interface ipip0 carries neither Ethernet frames nor"), "{refusal}");
    }
}
