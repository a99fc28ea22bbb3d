//! The filters on an interface's TC ingress, as netlink lists them.
//!
//! The name of a `bpf` filter is read from the filter. Reading it from the program would need `CAP_SYS_ADMIN`.

use anyhow::Result;
use netlink_packet_core::parse_string;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcHandle, TcHeader, TcMessage};

use super::netlink::{NetlinkSocket, after_header, attributes};

const TC_HEADER_LENGTH: usize = 20;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_NAME: u16 = 7;
/// The ingress side of `clsact` (`TC_H_CLSACT` with `TC_H_MIN_INGRESS` of `linux/pkt_sched.h`).
const INGRESS: TcHandle = TcHandle { major: 0xffff, minor: 0xfff2 };

/// A filter of any kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcFilter {
    /// Such as `bpf` or `flower`.
    pub kind: String,
    /// `pref` in `tc filter`. Filters with smaller ones run first.
    pub priority: u32,
    /// Unique within the priority.
    pub handle: u32,
    /// The name of a `bpf` filter, which libbpf makes from the program's: `name:[id]`. Empty if there is none.
    pub name: String,
}

/// The BPF filters on the ingress of the interface with this index, in the network namespace of the calling thread.
///
/// # Errors
/// When netlink fails.
pub fn ingress_bpf_filters(link: u32) -> Result<Vec<TcFilter>> {
    Ok(ingress_filters(link)?.into_iter().filter(|filter| filter.kind == "bpf").collect())
}

/// All filters on the ingress of the interface with this index, in the network namespace of the calling thread.
///
/// # Errors
/// When netlink fails.
pub fn ingress_filters(link: u32) -> Result<Vec<TcFilter>> {
    let mut request = TcMessage::default();
    request.header.index = i32::try_from(link)?;
    request.header.parent = INGRESS;
    let request = RouteNetlinkMessage::GetTrafficFilter(request);
    NetlinkSocket::open()?.dump("TC filters", &request, |payload| read(link, payload))
}

/// Reads the payload of `RTM_NEWTFILTER`. None for filters that are not on this interface's ingress, and for the entry without
/// a handle, which represents a whole priority.
///
/// # Errors
/// When the message is malformed.
pub(super) fn read(link: u32, payload: &[u8]) -> Result<Option<TcFilter>> {
    let header = TcHeader::parse(payload)?;
    if i64::from(header.index) != i64::from(link) || header.parent != INGRESS {
        return Ok(None);
    }
    let handle = u32::from(header.handle.major) << 16 | u32::from(header.handle.minor);
    let mut filter = TcFilter { kind: String::new(), priority: header.info >> 16, handle, name: String::new() };
    for attribute in attributes(after_header(payload, TC_HEADER_LENGTH)?) {
        match attribute? {
            (TCA_KIND, value) => filter.kind = parse_string(value)?,
            (TCA_OPTIONS, options) if filter.kind == "bpf" => {
                for option in attributes(options) {
                    if let (TCA_BPF_NAME, value) = option? {
                        filter.name = parse_string(value)?;
                    }
                }
            }
            _ => {}
        }
    }
    Ok((handle != 0).then_some(filter))
}
