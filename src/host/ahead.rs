//! Who sees an interface's incoming packets before our program does, and may take them away.
//!
//! A packet passes XDP, then the list of TCX programs, then TC's filters in the order of their `pref`.

use anyhow::{Context, Result};

use super::filters::{Filter, ingress_filters};
use super::programs::{self, Hook};

/// Where our program is, or would be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A filter.
    Filter(FilterPlace),
    /// In the list of TCX programs.
    Tcx {
        /// Our program's id. Without it, all the list counts as before us.
        program: Option<u32>,
    },
}

/// By what our filter is known among others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FilterPlace {
    /// Its `pref`.
    pub priority: u32,
    /// Its handle.
    pub handle: u32,
}

/// All that is before our place on the interface with this index, in the order in which packets pass, each in words such
/// as `the TCX program cil_from_netdev (program 17)`. In the network namespace of the calling thread.
///
/// # Errors
/// When the kernel does not tell.
pub fn of(link: u32, place: Place) -> Result<Vec<String>> {
    let xdp = programs::xdp(link);
    let tcx = programs::list(link, Hook::TcxIngress).context("cannot list TCX programs")?;
    let tcx = tcx.into_iter().take_while(|&id| place != Place::Tcx { program: Some(id) });
    let mut ahead: Vec<String> =
        xdp.into_iter().map(|id| format!("the XDP program {}", programs::describe(id))).collect();
    ahead.extend(tcx.map(|id| format!("the TCX program {}", programs::describe(id))));
    if let Place::Filter(ours) = place {
        ahead.extend(filters_ahead(&ingress_filters(link)?, ours).map(describe));
    }
    Ok(ahead)
}

/// Those of an interface's filters, as the kernel lists them, that run before ours, or would: with the same `pref`, the
/// newest is the first.
fn filters_ahead(filters: &[Filter], place: FilterPlace) -> impl Iterator<Item = &Filter> {
    let FilterPlace { priority, handle } = place;
    let ours = move |filter: &&Filter| filter.priority == priority && filter.handle == handle;
    let there = filters.iter().any(|filter| ours(&filter));
    let before = move |filter: &&Filter| filter.priority < priority || there && filter.priority == priority;
    filters.iter().take_while(move |filter| !ours(filter)).filter(before)
}

fn describe(filter: &Filter) -> String {
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
    fn filters_ahead_are_those_listed_before_ours() {
        let filter = |priority, handle, name: &str| Filter { kind: "bpf".into(), priority, handle, name: name.into() };
        let ours = filter(PRIORITY, HANDLE, "udp_fanout:[9]");
        let (early, late) = (filter(1, 1, "early:[3]"), filter(50_000, 1, ""));
        let (newer, older) = (filter(PRIORITY, 1, "newer:[4]"), filter(PRIORITY, 2, "older:[5]"));
        let ahead = |filters: &[Filter]| {
            filters_ahead(filters, FilterPlace { priority: PRIORITY, handle: HANDLE }).map(describe).collect::<Vec<_>>()
        };
        let expected = ["the filter early (bpf) at pref 1", "the filter newer (bpf) at pref 49152"];
        assert_eq!(ahead(&[early.clone(), newer, ours.clone(), older.clone(), late.clone()]), expected);
        assert_eq!(ahead(&[early, older, late]), expected[..1], "ours will come before those of its pref");
        assert_eq!(ahead(&[ours]), [""; 0]);
    }
}
