//! The daemon's sign of life, which the program looks at (`bpf/lease.h`): until when it acts without another one.

use std::time::Duration;

use anyhow::{Context, Result};
use libbpf_rs::MapHandle;
use nix::time::{ClockId, clock_gettime};

use super::maps::MappedArray;
use super::skel::types;

/// `LEASE_FOR_EVER`.
const FOR_EVER: u64 = u64::MAX;
/// Longest time between two signs of life.
const LONGEST: Duration = Duration::from_secs(5);

/// A program's lease, also that of another daemon's.
#[derive(Debug)]
pub struct Lease(MappedArray<types::lease>);

impl Lease {
    /// The lease in this map.
    ///
    /// # Errors
    /// When the kernel refuses to map it, or it is no lease.
    pub fn new(map: &MapHandle) -> Result<Lease> {
        Ok(Lease(MappedArray::new(map)?))
    }

    /// Lets the program act for so long from now on; none for ever.
    ///
    /// # Errors
    /// When there is no clock.
    pub fn renew(&mut self, term: Option<Duration>) -> Result<()> {
        let until = match term {
            None => FOR_EVER,
            Some(term) => {
                let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("cannot read the clock")?;
                u64::try_from((Duration::from(now) + term).as_nanos()).unwrap_or(FOR_EVER)
            }
        };
        self.0.write(0, types::lease { until });
        Ok(())
    }
}

/// How often a lease of this length is renewed: several times before it ends, and not so seldom that it would matter when
/// a daemon dies.
#[must_use]
pub fn renewal(term: Option<Duration>) -> Option<Duration> {
    term.map(|term| (term / 4).min(LONGEST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_renewed_well_before_its_end() {
        assert_eq!(renewal(None), None);
        assert_eq!(renewal(Some(Duration::from_secs(1))), Some(Duration::from_millis(250)));
        assert_eq!(renewal(Some(Duration::from_secs(300))), Some(LONGEST));
        let header = include_str!("../../../bpf/fanout_abi.h");
        assert!(header.contains("LEASE_FOR_EVER 0xffffffffffffffff"));
    }
}
