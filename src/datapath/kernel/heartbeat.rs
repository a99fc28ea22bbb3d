//! The heartbeat (`bpf/heartbeat.h`): until when a program acts without being renewed by a daemon.

use std::time::Duration;

use anyhow::{Context, Result};
use libbpf_rs::MapHandle;
use nix::time::{ClockId, clock_gettime};

use super::maps::MappedArray;
use super::skel::types;

/// `HEARTBEAT_FOREVER`.
const FOREVER: u64 = u64::MAX;
/// Longest interval between renewals.
const MAX_INTERVAL: Duration = Duration::from_secs(5);

/// A program's heartbeat, of this daemon's or of an earlier one's.
#[derive(Debug)]
pub struct Heartbeat(MappedArray<types::heartbeat>);

impl Heartbeat {
    /// Maps the heartbeat in this map.
    ///
    /// # Errors
    /// When the kernel refuses, or the map has another layout.
    pub fn new(map: &MapHandle) -> Result<Heartbeat> {
        Ok(Heartbeat(MappedArray::new(map)?))
    }

    /// Lets the program act for `term` from now on; `None` for ever.
    ///
    /// # Errors
    /// When the clock cannot be read.
    pub fn renew(&mut self, term: Option<Duration>) -> Result<()> {
        let deadline = match term {
            None => FOREVER,
            Some(term) => {
                let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("cannot read the clock")?;
                u64::try_from((Duration::from(now) + term).as_nanos()).unwrap_or(FOREVER)
            }
        };
        self.0.write(0, types::heartbeat { deadline });
        Ok(())
    }
}

/// Interval between renewals: several per term, and at most [`MAX_INTERVAL`], so that it hardly matters when within
/// an interval a daemon dies.
#[must_use]
pub fn renewal_interval(term: Option<Duration>) -> Option<Duration> {
    term.map(|term| (term / 4).min(MAX_INTERVAL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heartbeat_is_renewed_well_before_its_deadline() {
        assert_eq!(renewal_interval(None), None);
        assert_eq!(renewal_interval(Some(Duration::from_secs(1))), Some(Duration::from_millis(250)));
        assert_eq!(renewal_interval(Some(Duration::from_secs(300))), Some(MAX_INTERVAL));
        let header = include_str!("../../../bpf/fanout_abi.h");
        assert!(header.contains("HEARTBEAT_FOREVER 0xffffffffffffffff"));
    }
}
