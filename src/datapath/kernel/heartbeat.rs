//! The daemon's sign of life, which the program looks at (`bpf/lease.h`): until when it acts without another one.

use std::time::Duration;

use anyhow::{Context, Result};
use libbpf_rs::MapHandle;
use nix::time::{ClockId, clock_gettime};

use super::maps::MappedArray;
use super::skel::types;

/// `HEARTBEAT_FOREVER`.
const FOREVER: u64 = u64::MAX;
/// Longest time between two signs of life.
const MAX_INTERVAL: Duration = Duration::from_secs(5);

/// A program's lease, also that of another daemon's.
#[derive(Debug)]
pub struct Heartbeat(MappedArray<types::heartbeat>);

impl Heartbeat {
    /// The lease in this map.
    ///
    /// # Errors
    /// When the kernel refuses to map it, or it is no lease.
    pub fn new(map: &MapHandle) -> Result<Heartbeat> {
        Ok(Heartbeat(MappedArray::new(map)?))
    }

    /// Lets the program act for so long from now on; none for ever.
    ///
    /// # Errors
    /// When there is no clock.
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

/// How often a lease of this length is renewed: several times before it ends, and not so seldom that it would matter when
/// a daemon dies.
#[must_use]
pub fn renewal_interval(term: Option<Duration>) -> Option<Duration> {
    term.map(|term| (term / 4).min(MAX_INTERVAL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_renewed_well_before_its_end() {
        assert_eq!(renewal_interval(None), None);
        assert_eq!(renewal_interval(Some(Duration::from_secs(1))), Some(Duration::from_millis(250)));
        assert_eq!(renewal_interval(Some(Duration::from_secs(300))), Some(MAX_INTERVAL));
        let header = include_str!("../../../bpf/fanout_abi.h");
        assert!(header.contains("HEARTBEAT_FOREVER 0xffffffffffffffff"));
    }
}
