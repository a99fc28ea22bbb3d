//! The filters on an interface's TC ingress, as netlink lists them.
//!
//! A program's name could be had from the program itself, but only with `CAP_SYS_ADMIN`; the name its filter was given
//! costs nothing.

use anyhow::Result;
use netlink_packet_core::parse_string;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcHandle, TcHeader, TcMessage};

use super::netlink::{Connection, after_header, attributes};

const TC_HEADER_LENGTH: usize = 20;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_NAME: u16 = 7;
/// The ingress side of `clsact` (`TC_H_CLSACT` with `TC_H_MIN_INGRESS` of `linux/pkt_sched.h`).
const INGRESS: TcHandle = TcHandle { major: 0xffff, minor: 0xfff2 };

/// A filter of any kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// Its kind, such as `bpf` or `flower`.
    pub kind: String,
    /// Its priority (`pref`); those with smaller ones run first.
    pub priority: u32,
    /// Its handle.
    pub handle: u32,
    /// The name of a `bpf` filter, which libbpf makes from the program's: `name:[id]`. Empty if it has none.
    pub name: String,
}

/// A `bpf` filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BpfFilter {
    /// Its priority (`pref`).
    pub priority: u32,
    /// Its handle.
    pub handle: u32,
    /// The name it was given, which libbpf makes from the program's: `name:[id]`. Empty if it has none.
    pub name: String,
}

/// The BPF filters on the ingress of the interface with this index, in the network namespace of the calling thread.
///
/// # Errors
/// When the kernel cannot be asked.
pub fn ingress_bpf_filters(link: u32) -> Result<Vec<BpfFilter>> {
    let filters = ingress_filters(link)?.into_iter().filter(|filter| filter.kind == "bpf");
    Ok(filters.map(|Filter { priority, handle, name, .. }| BpfFilter { priority, handle, name }).collect())
}

/// All filters on the ingress of the interface with this index, in the network namespace of the calling thread.
///
/// # Errors
/// When the kernel cannot be asked.
pub fn ingress_filters(link: u32) -> Result<Vec<Filter>> {
    let mut request = TcMessage::default();
    request.header.index = i32::try_from(link)?;
    request.header.parent = INGRESS;
    let request = RouteNetlinkMessage::GetTrafficFilter(request);
    Connection::open()?.dump("TC filters", &request, |payload| read(link, payload))
}

/// Reads the payload of `RTM_NEWTFILTER`. None for filters elsewhere than on this interface's ingress, and for the entry that
/// stands for a whole priority and has no handle.
///
/// # Errors
/// When the message is malformed.
pub(super) fn read(link: u32, payload: &[u8]) -> Result<Option<Filter>> {
    let header = TcHeader::parse(payload)?;
    if i64::from(header.index) != i64::from(link) || header.parent != INGRESS {
        return Ok(None);
    }
    let handle = u32::from(header.handle.major) << 16 | u32::from(header.handle.minor);
    let mut filter = Filter { kind: String::new(), priority: header.info >> 16, handle, name: String::new() };
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
