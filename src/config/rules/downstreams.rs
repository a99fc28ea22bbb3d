//! Rules about a listener's `downstream`: addresses and names are unique, and each address can be that of a receiver.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use super::policies::fraction_to_sample;
use super::{RuleChecker, values};
use crate::config::document::KeyPath;
use crate::config::file::FileDownstream;
use crate::config::problem::quoted;
use crate::config::{DownstreamSource, NamedSource, address};
use crate::model::Downstream;
use crate::names::{DownstreamAddress, DownstreamEntry};

const EXAMPLE: &str = "10.0.1.10:5514";

impl RuleChecker<'_> {
    /// The listener's downstreams as a source: static if all are known by address.
    pub(super) fn downstreams(
        &mut self,
        at: &KeyPath,
        downstreams: &[FileDownstream],
        resolve_interval_secs: f64,
        bind: Option<SocketAddr>,
    ) -> Option<DownstreamSource> {
        let entries = self.entries(at, downstreams, bind)?;
        let fixed = |entry: &DownstreamEntry| match entry.address {
            DownstreamAddress::Ip(address) => {
                let DownstreamEntry { name, weight, sample, .. } = entry.clone();
                Some(Downstream { name, address, weight, sample })
            }
            DownstreamAddress::Name { .. } => None,
        };
        Some(match entries.iter().map(fixed).collect() {
            Some(downstreams) => DownstreamSource::Static(downstreams),
            // `schema_check` has checked the range, which every Duration can hold.
            None => DownstreamSource::Names(NamedSource {
                entries,
                interval: Duration::try_from_secs_f64(resolve_interval_secs).unwrap_or_default(),
            }),
        })
    }

    fn entries(
        &mut self,
        at: &KeyPath,
        downstreams: &[FileDownstream],
        bind: Option<SocketAddr>,
    ) -> Option<Vec<DownstreamEntry>> {
        let mut names: HashMap<String, usize> = HashMap::new();
        let mut addresses: HashMap<DownstreamAddress, usize> = HashMap::new();
        let mut good = Vec::with_capacity(downstreams.len());
        for (index, downstream) in downstreams.iter().enumerate() {
            let at = at.then(index);
            let address = address::parse_or_name(&downstream.address, EXAMPLE).and_then(|address| match address {
                DownstreamAddress::Ip(ip) => values::downstream(ip, bind).map(|()| address),
                DownstreamAddress::Name { .. } => Ok(address),
            });
            let Some(address) = self.check(&at.then("address"), address) else { continue };
            if let Some(first) = addresses.insert(address.clone(), index) {
                let message =
                    format!("\"{address}\" is already downstream[{first}]; remove one, or give it a `weight`");
                self.fault(&at.then("address"), message);
                continue;
            }
            let name = match &downstream.name {
                Some(name) => self.check(&at.then("name"), values::downstream_name(name)).map(str::to_owned),
                None => Some(address.to_string()),
            };
            let Some(name) = name else { continue };
            if let Some(first) = names.insert(name.clone(), index) {
                let message = format!("{} is already the name of downstream[{first}]; rename one", quoted(&name));
                self.fault(&at.then("name"), message);
                continue;
            }
            let sample = fraction_to_sample(downstream.sample);
            good.push(DownstreamEntry { name: name.into(), address, weight: downstream.weight, sample });
        }
        (good.len() == downstreams.len()).then_some(good)
    }
}
