//! Who looks at packets on their way out of an interface: TC filters, BPF programs, and nftables chains. A packet that
//! is handed to the other end of a pair directly passes none of them, so where there is one, none is.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use anyhow::{Context, Result, bail};
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, parse_string};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcHandle, TcMessage};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

use super::facts::Link;
use super::netlink::{BUFFER_SIZE, Connection, PATIENCE, after_header, attributes, frames};
use super::programs::{self, Hook};

const TC_HEADER_LENGTH: usize = 20;
const TCA_KIND: u16 = 1;
/// The egress side of `clsact` (`TC_H_CLSACT` with `TC_H_MIN_EGRESS` of `linux/pkt_sched.h`).
const EGRESS: TcHandle = TcHandle { major: 0xffff, minor: 0xfff3 };

/// `struct nfgenmsg`.
const NETFILTER_HEADER_LENGTH: usize = 4;
const NFPROTO_NETDEV: u8 = 5;
/// `NFNL_SUBSYS_NFTABLES` and `NFT_MSG_GETCHAIN`.
const GET_CHAIN: u16 = 10 << 8 | 4;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_DEV: u16 = 3;
const NFTA_HOOK_DEVS: u16 = 4;
const NFTA_DEVICE_NAME: u16 = 1;
const NFTA_DEVICE_PREFIX: u16 = 2;
const NF_NETDEV_EGRESS: u32 = 1;

/// Those of `links` that are guarded, by index, and by whom. An interface whose guards cannot be found out counts as
/// guarded.
pub(super) fn find(connection: &mut Connection, links: &[&Link]) -> BTreeMap<u32, String> {
    if links.is_empty() {
        return BTreeMap::new();
    }
    let chains = egress_chains();
    links.iter().filter_map(|link| Some((link.index, guard(connection, link, &chains)?))).collect()
}

fn guard(connection: &mut Connection, link: &Link, chains: &Result<Vec<Chain>>) -> Option<String> {
    let unknown = |error: &dyn std::fmt::Display| Some(format!("an unknown guard ({error})"));
    let hooks: &[Hook] = match link.kind.as_deref() {
        Some("netkit") => &[Hook::TcxEgress, Hook::NetkitPrimary],
        _ => &[Hook::TcxEgress],
    };
    for &hook in hooks {
        match programs::list(link.index, hook) {
            Ok(ids) => {
                if let Some(&id) = ids.first() {
                    return Some(format!("the BPF {}", programs::describe(id)));
                }
            }
            Err(error) => return unknown(&error),
        }
    }
    match egress_filter(connection, link.index) {
        Ok(None) => {}
        Ok(Some(kind)) => return Some(format!("a TC filter ({kind})")),
        Err(error) => return unknown(&error),
    }
    match chains {
        Ok(chains) => {
            let chain = chains.iter().find(|chain| chain.hooks(&link.name))?;
            Some(format!("the nftables chain {}", chain.name))
        }
        Err(error) => unknown(error),
    }
}

/// The kind of the first filter on an interface's way out.
fn egress_filter(connection: &mut Connection, link: u32) -> Result<Option<String>> {
    let mut request = TcMessage::default();
    request.header.index = i32::try_from(link)?;
    request.header.parent = EGRESS;
    // The kernel lists this side of this interface only, and under another index where filters are shared by several.
    let kinds = connection.dump("TC filters", &RouteNetlinkMessage::GetTrafficFilter(request), read_kind)?;
    Ok(kinds.into_iter().next())
}

/// Reads the kind out of the payload of `RTM_NEWTFILTER`.
fn read_kind(payload: &[u8]) -> Result<Option<String>> {
    for attribute in attributes(after_header(payload, TC_HEADER_LENGTH)?) {
        if let (TCA_KIND, value) = attribute? {
            return Ok(Some(parse_string(value)?));
        }
    }
    Ok(None)
}

/// True if the payload can be read as a filter with a kind, or as a chain on a way out.
pub(super) fn understands(payload: &[u8]) -> bool {
    matches!(read_kind(payload), Ok(Some(_))) | matches!(read_chain(payload), Ok(Some(_)))
}

/// An nftables chain that packets pass when they leave an interface.
#[derive(Debug, PartialEq, Eq)]
struct Chain {
    name: String,
    devices: BTreeSet<String>,
    /// It is for all interfaces whose names begin so.
    prefixes: Vec<String>,
}

impl Chain {
    fn hooks(&self, device: &str) -> bool {
        self.devices.contains(device) || self.prefixes.iter().any(|prefix| device.starts_with(prefix.as_str()))
    }
}

/// All chains on ways out. None where the kernel has no nftables.
fn egress_chains() -> Result<Vec<Chain>> {
    let what = "cannot list the host's nftables chains";
    let mut socket = match Socket::new(NETLINK_NETFILTER) {
        Ok(socket) => socket,
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(Vec::new()),
        Err(error) => return Err(error).context(what),
    };
    socket.bind_auto().context(what)?;
    socket.connect(&SocketAddr::new(0, 0)).context(what)?;
    socket2::SockRef::from(&socket).set_read_timeout(Some(PATIENCE)).context(what)?;
    let length = 16 + NETFILTER_HEADER_LENGTH;
    let mut request = u32::try_from(length)?.to_ne_bytes().to_vec();
    request.extend(GET_CHAIN.to_ne_bytes());
    request.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    request.extend([0; 8]);
    request.extend([NFPROTO_NETDEV, 0, 0, 0]);
    socket.send(&request, 0).context(what)?;
    let mut buffer = vec![0; BUFFER_SIZE];
    let mut chains = Vec::new();
    loop {
        let length = socket.recv(&mut &mut buffer[..], libc::MSG_TRUNC).context(what)?;
        if length > buffer.len() {
            bail!("{what}: an answer was longer than the buffer for it");
        }
        for frame in frames(&buffer[..length]) {
            let frame = frame.context(what)?;
            match frame.kind {
                NLMSG_DONE | NLMSG_ERROR => {
                    return match frame.error()? {
                        Some(error) if lacks_nftables(&error) => Ok(Vec::new()),
                        Some(error) => Err(error).context(what),
                        None => Ok(chains),
                    };
                }
                _ => chains.extend(read_chain(frame.payload).context(what)?),
            }
        }
    }
}

/// The subsystem is not there (EINVAL), or not for this family.
fn lacks_nftables(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EAFNOSUPPORT | libc::ENOENT))
}

/// Reads the payload of `NFT_MSG_NEWCHAIN`. None unless packets pass the chain when they leave an interface.
fn read_chain(payload: &[u8]) -> Result<Option<Chain>> {
    let mut chain = Chain { name: String::new(), devices: BTreeSet::new(), prefixes: Vec::new() };
    let mut egress = false;
    for attribute in attributes(after_header(payload, NETFILTER_HEADER_LENGTH)?) {
        match attribute? {
            (NFTA_CHAIN_NAME, value) => chain.name = parse_string(value)?,
            (kind, value) if kind & NESTED_MASK == NFTA_CHAIN_HOOK => {
                for attribute in attributes(value) {
                    match attribute? {
                        (NFTA_HOOK_HOOKNUM, value) => {
                            egress = value.try_into().map(u32::from_be_bytes)? == NF_NETDEV_EGRESS;
                        }
                        (NFTA_HOOK_DEV, value) => drop(chain.devices.insert(parse_string(value)?)),
                        (kind, value) if kind & NESTED_MASK == NFTA_HOOK_DEVS => read_devices(value, &mut chain)?,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Ok(egress.then_some(chain))
}

/// Attribute types without the flag that says that the value is attributes again (`NLA_F_NESTED`).
const NESTED_MASK: u16 = 0x3fff;

fn read_devices(devices: &[u8], chain: &mut Chain) -> Result<()> {
    for attribute in attributes(devices) {
        match attribute? {
            (NFTA_DEVICE_NAME, value) => drop(chain.devices.insert(parse_string(value)?)),
            (NFTA_DEVICE_PREFIX, value) => chain.prefixes.push(parse_string(value)?),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_core::{DefaultNla, Emitable};

    fn emitted(attributes: &[DefaultNla]) -> Vec<u8> {
        let mut bytes = vec![0; attributes.buffer_len()];
        attributes.emit(&mut bytes);
        bytes
    }

    fn chain(hook: u32, hooked: &[DefaultNla]) -> Option<Chain> {
        let mut hook = vec![DefaultNla::new(NFTA_HOOK_HOOKNUM, hook.to_be_bytes().to_vec())];
        hook.extend(hooked.iter().cloned());
        let mut bytes = vec![NFPROTO_NETDEV, 0, 0, 0];
        bytes.extend(emitted(&[
            DefaultNla::new(NFTA_CHAIN_NAME, b"limit\0".to_vec()),
            DefaultNla::new(NFTA_CHAIN_HOOK, emitted(&hook)),
        ]));
        read_chain(&bytes).unwrap()
    }

    #[test]
    fn chains_on_ways_out_are_told_from_those_on_ways_in() {
        let device = DefaultNla::new(NFTA_HOOK_DEV, b"pod1\0".to_vec());
        assert_eq!(chain(0, std::slice::from_ref(&device)), None);
        let out = chain(NF_NETDEV_EGRESS, &[device]).unwrap();
        assert!(out.hooks("pod1") && !out.hooks("pod11") && !out.hooks("eth0"));
        assert_eq!(out.name, "limit");
    }

    #[test]
    fn a_chain_can_have_several_devices_and_whole_families_of_them() {
        let devices = emitted(&[
            DefaultNla::new(NFTA_DEVICE_NAME, b"pod1\0".to_vec()),
            DefaultNla::new(NFTA_DEVICE_NAME, b"pod2\0".to_vec()),
            DefaultNla::new(NFTA_DEVICE_PREFIX, b"cali\0".to_vec()),
        ]);
        let out = chain(NF_NETDEV_EGRESS, &[DefaultNla::new(NFTA_HOOK_DEVS, devices)]).unwrap();
        assert!(out.hooks("pod1") && out.hooks("pod2") && out.hooks("cali123") && !out.hooks("pod3"));
    }
}
