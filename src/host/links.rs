//! The host's network interfaces.

use anyhow::Result;
use netlink_packet_core::{Emitable, parse_u32};
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkFlags, LinkHeader, LinkLayerType, LinkMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::facts::Link;
use super::netlink::{NetlinkSocket, after_header, attributes};

const IFLA_ADDRESS: u16 = 1;
const IFLA_BROADCAST: u16 = 2;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_QDISC: u16 = 6;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_NETKIT_POLICY: u16 = 3;
/// The policy of a netkit device that passes packets no program decides about.
const NETKIT_PASS: u32 = 0;

/// An interface as netlink describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ObservedLink {
    pub(super) link: Link,
    /// A tunnel without a remote address of its own: the route supplies it for each packet.
    pub(super) routed_tunnel: bool,
}

/// All interfaces, ordered by index.
///
/// # Errors
/// When netlink fails.
pub(super) fn list(socket: &mut NetlinkSocket) -> Result<Vec<ObservedLink>> {
    let mut request = LinkMessage::default();
    // Counters would be most of each reply.
    request.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    let mut links = socket.dump("interfaces", &RouteNetlinkMessage::GetLink(request), read)?;
    links.sort_unstable_by_key(|seen| seen.link.index);
    Ok(links)
}

/// Reads the payload of `RTM_NEWLINK` or `RTM_DELLINK`. None if the message does not describe a link: messages about a bridge
/// port have the same types, so a port that leaves its bridge looks like a deleted link; messages about wireless events
/// contain only the index.
///
/// # Errors
/// When the message is malformed.
pub(super) fn read(payload: &[u8]) -> Result<Option<ObservedLink>> {
    let header = LinkHeader::parse(payload)?;
    if header.interface_family != AddressFamily::Unspec {
        return Ok(None);
    }
    let mut link = Link {
        index: header.index,
        up: header.flags.contains(LinkFlags::Up),
        running: header.flags.contains(LinkFlags::Up) && header.flags.contains(LinkFlags::LowerUp),
        ethernet: header.link_layer_type == LinkLayerType::Ether,
        l3_device: is_l3_device(header.link_layer_type),
        l3_ingress: is_l3_ingress(header.link_layer_type),
        loopback: header.flags.contains(LinkFlags::Loopback),
        ..Link::default()
    };
    let tunnel = is_ip_tunnel(header.link_layer_type);
    let mut routed_tunnel = false;
    let (mut other_netns, mut has_qdisc, mut enslaved) = (false, true, false);
    let mut driver = LinkDriver::default();
    for attribute in attributes(after_header(payload, header.buffer_len())?) {
        let (kind, value) = attribute?;
        match kind {
            IFLA_ADDRESS if link.ethernet => link.mac = value.try_into().ok(),
            // A tunnel's broadcast address is its remote address, all zeros if it has none.
            IFLA_BROADCAST => routed_tunnel = tunnel && value.iter().all(|&byte| byte == 0),
            IFLA_IFNAME => link.name = text(value),
            IFLA_MTU => link.mtu = parse_u32(value)?,
            IFLA_QDISC => has_qdisc = text(value) != "noqueue",
            IFLA_MASTER => enslaved = true,
            IFLA_LINK_NETNSID => other_netns = true,
            IFLA_LINKINFO => driver = read_driver(value)?,
            _ => {}
        }
    }
    link.direct_peer = driver.pair && other_netns && link.running && !enslaved && !has_qdisc;
    link.kind = driver.kind;
    Ok((!link.name.is_empty()).then_some(ObservedLink { link, routed_tunnel }))
}

/// A link's driver (`IFLA_LINKINFO`).
#[derive(Default)]
struct LinkDriver {
    kind: Option<String>,
    /// Packets sent on it arrive at its peer.
    pair: bool,
}

fn read_driver(info: &[u8]) -> Result<LinkDriver> {
    let mut kind = None;
    let mut netkit_policy = None;
    for attribute in attributes(info) {
        match attribute? {
            (IFLA_INFO_KIND, value) => kind = Some(text(value)),
            (IFLA_INFO_DATA, value) if kind.as_deref() == Some("netkit") => {
                for attribute in attributes(value) {
                    if let (IFLA_NETKIT_POLICY, value) = attribute? {
                        netkit_policy = Some(parse_u32(value)?);
                    }
                }
            }
            _ => {}
        }
    }
    let pair = match kind.as_deref() {
        Some("veth") => true,
        Some("netkit") => netkit_policy == Some(NETKIT_PASS),
        _ => false,
    };
    Ok(LinkDriver { kind, pair })
}

/// Devices on which the kernel sends packets without a link-layer header (`dev_is_mac_header_xmit` is false).
fn is_l3_device(link_layer: LinkLayerType) -> bool {
    is_ip_tunnel(link_layer) || is_l3_ingress(link_layer)
}

/// Devices without link-layer addresses.
fn is_l3_ingress(link_layer: LinkLayerType) -> bool {
    matches!(link_layer, LinkLayerType::None | LinkLayerType::Rawip)
}

/// IP-in-IP of both versions, and GRE. Their link-layer addresses are IP addresses.
fn is_ip_tunnel(link_layer: LinkLayerType) -> bool {
    matches!(
        link_layer,
        LinkLayerType::Tunnel
            | LinkLayerType::Tunnel6
            | LinkLayerType::Sit
            | LinkLayerType::Ipgre
            | LinkLayerType::Ip6gre
    )
}

/// A string up to its NUL. An interface's name may contain any bytes but `/` and white space, UTF-8 or not.
fn text(value: &[u8]) -> String {
    let end = value.iter().position(|&byte| byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_core::DefaultNla;
    use netlink_packet_route::link::{InfoKind, LinkInfo};

    fn bytes(message: &LinkMessage) -> Vec<u8> {
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        bytes
    }

    fn veth() -> LinkMessage {
        let mut message = LinkMessage::default();
        message.header.index = 4;
        message.header.link_layer_type = LinkLayerType::Ether;
        message.header.flags = LinkFlags::Up | LinkFlags::LowerUp;
        message.attributes = vec![
            LinkAttribute::IfName("eth0".into()),
            LinkAttribute::Mtu(1450),
            LinkAttribute::Address(vec![2, 0, 0, 0, 0, 7]),
            LinkAttribute::Qdisc("noqueue".into()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth)]),
        ];
        message
    }

    #[test]
    fn a_link_is_read_with_its_kind() {
        let expected = Link {
            index: 4,
            name: "eth0".into(),
            kind: Some("veth".into()),
            up: true,
            running: true,
            ethernet: true,
            mac: Some([2, 0, 0, 0, 0, 7]),
            mtu: 1450,
            ..Link::default()
        };
        assert_eq!(read(&bytes(&veth())).unwrap(), Some(ObservedLink { link: expected, routed_tunnel: false }));
    }

    #[test]
    fn pairs_that_lead_into_another_namespace_are_recognised() {
        let leads_into_netns = |kind: &[u8], policy: Option<u32>, netns: Option<i32>| {
            let mut info = vec![DefaultNla::new(IFLA_INFO_KIND, kind.to_vec())];
            let policy = policy.map(|policy| DefaultNla::new(IFLA_NETKIT_POLICY, policy.to_ne_bytes().to_vec()));
            info.extend(policy.map(|policy| DefaultNla::new(IFLA_INFO_DATA, emitted(&[policy]))));
            let mut message = veth();
            message.attributes.pop();
            message.attributes.push(LinkAttribute::Other(DefaultNla::new(IFLA_LINKINFO, emitted(&info))));
            message.attributes.extend(netns.map(LinkAttribute::LinkNetNsId));
            read(&bytes(&message)).unwrap().unwrap().link.direct_peer
        };
        assert!(leads_into_netns(b"veth\0", None, Some(0)));
        assert!(!leads_into_netns(b"veth\0", None, None));
        assert!(!leads_into_netns(b"macvlan\0", None, Some(0)));
        assert!(leads_into_netns(b"netkit\0", Some(NETKIT_PASS), Some(1)));
        assert!(!leads_into_netns(b"netkit\0", Some(2), Some(1)));
        assert!(!leads_into_netns(b"netkit\0", None, Some(1)));
    }

    #[test]
    fn a_qdisc_a_bridge_or_an_end_that_is_down_stands_between_the_ends_of_a_pair() {
        let pair = || {
            let mut message = veth();
            message.attributes.push(LinkAttribute::LinkNetNsId(0));
            message
        };
        let leads = |message: &LinkMessage| read(&bytes(message)).unwrap().unwrap().link.direct_peer;
        assert!(leads(&pair()));
        for flags in [LinkFlags::Up, LinkFlags::LowerUp] {
            let mut one_end_down = pair();
            one_end_down.header.flags = flags;
            assert!(!leads(&one_end_down));
        }
        for attribute in [LinkAttribute::Qdisc("tbf".into()), LinkAttribute::Controller(9)] {
            let mut message = pair();
            message.attributes.push(attribute);
            assert!(!leads(&message));
        }
    }

    fn emitted(attributes: &[DefaultNla]) -> Vec<u8> {
        let mut bytes = vec![0; attributes.buffer_len()];
        attributes.emit(&mut bytes);
        bytes
    }

    #[test]
    fn unknown_attributes_are_ignored() {
        let mut message = veth();
        let expected = read(&bytes(&message)).unwrap();
        // A VF list and an unknown type, both malformed.
        message.attributes.push(LinkAttribute::Other(DefaultNla::new(22, vec![0xff; 7])));
        message.attributes.push(LinkAttribute::Other(DefaultNla::new(999, vec![1])));
        assert_eq!(read(&bytes(&message)).unwrap(), expected);
    }

    #[test]
    fn a_tunnel_without_a_remote_address_is_recognised() {
        let routed = |link_layer, remote: &[u8]| {
            let mut message = veth();
            message.header.link_layer_type = link_layer;
            message.attributes.push(LinkAttribute::Broadcast(remote.to_vec()));
            read(&bytes(&message)).unwrap().unwrap().routed_tunnel
        };
        assert!(routed(LinkLayerType::Tunnel, &[0; 4]));
        assert!(routed(LinkLayerType::Tunnel6, &[0; 16]));
        assert!(!routed(LinkLayerType::Tunnel, &[192, 0, 2, 1]));
        assert!(!routed(LinkLayerType::Ether, &[0xff; 6]));
        assert!(!routed(LinkLayerType::Ether, &[0; 6]));
    }

    #[test]
    fn names_that_are_not_utf8_are_shown_with_replacement_characters() {
        let mut message = veth();
        message.attributes[0] = LinkAttribute::Other(DefaultNla::new(IFLA_IFNAME, b"e\xfft\0".to_vec()));
        assert_eq!(read(&bytes(&message)).unwrap().unwrap().link.name, "e\u{fffd}t");
    }

    #[test]
    fn bridge_port_messages_are_not_about_links() {
        let mut message = veth();
        message.header.interface_family = AddressFamily::Bridge;
        assert_eq!(read(&bytes(&message)).unwrap(), None);
    }

    #[test]
    fn wireless_events_are_not_about_links() {
        let mut message = veth();
        message.attributes = vec![LinkAttribute::Other(DefaultNla::new(11, vec![0; 12]))];
        assert_eq!(read(&bytes(&message)).unwrap(), None);
    }

    #[test]
    fn a_message_cut_short_is_refused() {
        let whole = bytes(&veth());
        assert!(read(&whole[..15]).is_err());
        assert!(read(&whole[..whole.len() - 2]).is_err());
    }
}
