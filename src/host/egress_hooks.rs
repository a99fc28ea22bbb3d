//! Egress hooks: TC filters, BPF programs and nftables chains that packets pass when they leave an interface.
//!
//! A packet that is redirected to the interface's peer (`bpf_redirect_peer`) would skip them. So the TC program does that only
//! on interfaces without an egress hook ([`HostFacts::can_redirect_to_peer`](super::HostFacts::can_redirect_to_peer)).

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use anyhow::{Context, Result, bail};
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, parse_string};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcHandle, TcMessage};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

use super::facts::Link;
use super::netlink::{BUFFER_SIZE, NetlinkSocket, REPLY_TIMEOUT, after_header, attributes, raw_messages};
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

/// For those of `links` that have an egress hook, the first one in words, by the link's index. An interface whose hooks cannot
/// be listed counts as having one.
pub(super) fn find(socket: &mut NetlinkSocket, links: &[&Link]) -> BTreeMap<u32, String> {
    if links.is_empty() {
        return BTreeMap::new();
    }
    let chains = egress_chains();
    links.iter().filter_map(|link| Some((link.index, first_hook(socket, link, &chains)?))).collect()
}

fn first_hook(socket: &mut NetlinkSocket, link: &Link, chains: &Result<Vec<NftChain>>) -> Option<String> {
    let unknown = |error: &dyn std::fmt::Display| Some(format!("an unknown egress hook ({error})"));
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
    match egress_filter(socket, link.index) {
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

/// The kind of the first TC filter on an interface's egress.
fn egress_filter(socket: &mut NetlinkSocket, link: u32) -> Result<Option<String>> {
    let mut request = TcMessage::default();
    request.header.index = i32::try_from(link)?;
    request.header.parent = EGRESS;
    // The reply contains only filters on this interface's egress. Shared ones have another index, so the index is not checked.
    let kinds = socket.dump("TC filters", &RouteNetlinkMessage::GetTrafficFilter(request), read_kind)?;
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

/// True if the payload can be read as a filter with a kind, or as an egress chain.
pub(super) fn can_read(payload: &[u8]) -> bool {
    matches!(read_kind(payload), Ok(Some(_))) | matches!(read_chain(payload), Ok(Some(_)))
}

/// An nftables chain on the egress of interfaces.
#[derive(Debug, PartialEq, Eq)]
struct NftChain {
    name: String,
    devices: BTreeSet<String>,
    /// Matches all interfaces whose names begin with one of these.
    prefixes: Vec<String>,
}

impl NftChain {
    fn hooks(&self, device: &str) -> bool {
        self.devices.contains(device) || self.prefixes.iter().any(|prefix| device.starts_with(prefix.as_str()))
    }
}

/// All egress chains. Empty on kernels without nftables.
fn egress_chains() -> Result<Vec<NftChain>> {
    let what = "cannot list the host's nftables chains";
    let mut socket = match Socket::new(NETLINK_NETFILTER) {
        Ok(socket) => socket,
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(Vec::new()),
        Err(error) => return Err(error).context(what),
    };
    socket.bind_auto().context(what)?;
    socket.connect(&SocketAddr::new(0, 0)).context(what)?;
    socket2::SockRef::from(&socket).set_read_timeout(Some(REPLY_TIMEOUT)).context(what)?;
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
            bail!("{what}: a reply was longer than the receive buffer");
        }
        for message in raw_messages(&buffer[..length]) {
            let message = message.context(what)?;
            match message.kind {
                NLMSG_DONE | NLMSG_ERROR => {
                    return match message.error()? {
                        Some(error) if lacks_nftables(&error) => Ok(Vec::new()),
                        Some(error) => Err(error).context(what),
                        None => Ok(chains),
                    };
                }
                _ => chains.extend(read_chain(message.payload).context(what)?),
            }
        }
    }
}

/// The kernel lacks nftables (`EINVAL`), or nftables for this family.
fn lacks_nftables(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EAFNOSUPPORT | libc::ENOENT))
}

/// Reads the payload of `NFT_MSG_NEWCHAIN`. None unless it is an egress chain.
fn read_chain(payload: &[u8]) -> Result<Option<NftChain>> {
    let mut chain = NftChain { name: String::new(), devices: BTreeSet::new(), prefixes: Vec::new() };
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

/// Masks the flag of nested attributes (`NLA_F_NESTED`) out of an attribute's type.
const NESTED_MASK: u16 = 0x3fff;

fn read_devices(devices: &[u8], chain: &mut NftChain) -> Result<()> {
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

    fn chain(hook: u32, hooked: &[DefaultNla]) -> Option<NftChain> {
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
    fn egress_chains_are_told_from_ingress_chains() {
        let device = DefaultNla::new(NFTA_HOOK_DEV, b"pod1\0".to_vec());
        assert_eq!(chain(0, std::slice::from_ref(&device)), None);
        let out = chain(NF_NETDEV_EGRESS, &[device]).unwrap();
        assert!(out.hooks("pod1") && !out.hooks("pod11") && !out.hooks("eth0"));
        assert_eq!(out.name, "limit");
    }

    #[test]
    fn a_chain_can_have_several_devices_and_prefixes_of_their_names() {
        let devices = emitted(&[
            DefaultNla::new(NFTA_DEVICE_NAME, b"pod1\0".to_vec()),
            DefaultNla::new(NFTA_DEVICE_NAME, b"pod2\0".to_vec()),
            DefaultNla::new(NFTA_DEVICE_PREFIX, b"cali\0".to_vec()),
        ]);
        let out = chain(NF_NETDEV_EGRESS, &[DefaultNla::new(NFTA_HOOK_DEVS, devices)]).unwrap();
        assert!(out.hooks("pod1") && out.hooks("pod2") && out.hooks("cali123") && !out.hooks("pod3"));
    }
}
