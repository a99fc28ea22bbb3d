//! Preceding programs: foreign programs that see an interface's incoming packets before ours does, and may consume them.
//!
//! A packet passes XDP, then the TCX programs in the order of their list, then TC filters in the order of their `pref`.

use anyhow::{Context, Result};

use super::filters::{TcFilter, ingress_filters};
use super::programs::{self, Hook};

/// Where our program is attached, or would be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProgramPosition {
    /// As a TC filter.
    Filter(FilterKey),
    /// In the list of TCX programs.
    Tcx {
        /// Our program's id. Without one, the whole list precedes us.
        program: Option<u32>,
    },
}

/// Identifies our filter on an interface's ingress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FilterKey {
    /// `pref` in `tc filter`.
    pub priority: u32,
    /// Unique within the priority.
    pub handle: u32,
}

/// What packets pass before our position on the interface with this index, in that order, in words such as `the TCX program
/// cil_from_netdev (program 17)`. In the network namespace of the calling thread.
///
/// # Errors
/// When TCX programs or filters cannot be listed.
pub fn list(link: u32, position: ProgramPosition) -> Result<Vec<String>> {
    let xdp = programs::xdp(link);
    let tcx = programs::list(link, Hook::TcxIngress).context("cannot list TCX programs")?;
    let tcx = tcx.into_iter().take_while(|&id| position != ProgramPosition::Tcx { program: Some(id) });
    let mut preceding: Vec<String> =
        xdp.into_iter().map(|id| format!("the XDP program {}", programs::describe(id))).collect();
    preceding.extend(tcx.map(|id| format!("the TCX program {}", programs::describe(id))));
    if let ProgramPosition::Filter(ours) = position {
        preceding.extend(preceding_filters(&ingress_filters(link)?, ours).map(describe));
    }
    Ok(preceding)
}

/// Those of an interface's filters, in the kernel's order, that run before ours, or would run before it if it were attached
/// now: of filters with the same `pref`, the newest runs first.
fn preceding_filters(filters: &[TcFilter], ours: FilterKey) -> impl Iterator<Item = &TcFilter> {
    let FilterKey { priority, handle } = ours;
    let ours = move |filter: &&TcFilter| filter.priority == priority && filter.handle == handle;
    let there = filters.iter().any(|filter| ours(&filter));
    let before = move |filter: &&TcFilter| filter.priority < priority || there && filter.priority == priority;
    filters.iter().take_while(move |filter| !ours(filter)).filter(before)
}

fn describe(filter: &TcFilter) -> String {
    match filter.name.split(":[").next() {
        Some(name) if !name.is_empty() => format!("the filter {name} ({}) at pref {}", filter.kind, filter.priority),
        _ => format!("the filter {} at pref {}", filter.kind, filter.priority),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRIORITY: u32 = 49_152;
    const HANDLE: u32 = 7;

    #[test]
    fn preceding_filters_are_those_listed_before_ours() {
        let filter =
            |priority, handle, name: &str| TcFilter { kind: "bpf".into(), priority, handle, name: name.into() };
        let ours = filter(PRIORITY, HANDLE, "udp_fanout:[9]");
        let (early, late) = (filter(1, 1, "early:[3]"), filter(50_000, 1, ""));
        let (newer, older) = (filter(PRIORITY, 1, "newer:[4]"), filter(PRIORITY, 2, "older:[5]"));
        let preceding = |filters: &[TcFilter]| {
            preceding_filters(filters, FilterKey { priority: PRIORITY, handle: HANDLE })
                .map(describe)
                .collect::<Vec<_>>()
        };
        let expected = ["the filter early (bpf) at pref 1", "the filter newer (bpf) at pref 49152"];
        assert_eq!(preceding(&[early.clone(), newer, ours.clone(), older.clone(), late.clone()]), expected);
        assert_eq!(preceding(&[early, older, late]), expected[..1], "ours will come before those of its pref");
        assert_eq!(preceding(&[ours]), [""; 0]);
    }
}
