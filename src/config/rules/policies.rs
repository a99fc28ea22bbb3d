//! Rules about how a listener's downstreams are chosen: `policy`, `protocol`, and keys that belong to one policy.

use super::RuleChecker;
use crate::config::document::KeyPath;
use crate::config::file::{FileDownstream, FileListener, FilePolicy};
use crate::config::protocol::PolicyConflict;
use crate::model::{Downstream, HashOn, MAX_COPIES, Policy};

impl RuleChecker<'_> {
    /// The listener's policy. Keys of other policies are errors; a policy that may not suit the protocol is a warning.
    pub(super) fn policy(&mut self, at: &KeyPath, listener: &FileListener) -> Policy {
        let policy = match (listener.policy.map_or(listener.protocol.policy(), FilePolicy::meaning), listener.hash_on) {
            (Policy::Hash(_), Some(on)) => Policy::Hash(on),
            (policy, on) => {
                self.no_hash_on(at, on);
                policy
            }
        };
        if let Some(written) = listener.policy {
            let (shown, at) = (format!("\"{}\"", written.name()), at.then("policy"));
            match listener.protocol.objection(policy) {
                Some(PolicyConflict::Error(why)) => {
                    self.fault(&at, format!("{shown} {why}; remove `policy` to get the one that suits the protocol"));
                }
                Some(PolicyConflict::Warning(why)) => {
                    self.warn(&at, format!("{shown} {why}; remove `policy` to get the one that suits the protocol"));
                }
                None => {}
            }
        }
        for (index, downstream) in listener.downstream.iter().flatten().enumerate() {
            self.share(&at.then("downstream").then(index), listener, downstream, policy);
        }
        let count = listener.downstream.as_ref().map_or(0, Vec::len);
        if policy == Policy::Replicate && count > MAX_COPIES {
            let message = format!(
                "{count} downstreams, but a replicating listener has at most {MAX_COPIES}; remove some, or name a second udp-fanout that serves the rest"
            );
            self.fault(&at.then("downstream"), message);
        }
        policy
    }

    fn no_hash_on(&mut self, at: &KeyPath, on: Option<HashOn>) {
        if let Some(on) = on {
            let hash = self.document.notation.assignment("policy", "\"hash\"");
            let message = format!("\"{}\" works only with {hash}; add that, or remove hash_on", on.name());
            self.fault(&at.then("hash_on"), message);
        }
    }

    /// Checks a downstream's share of the datagrams: `weight`, or `sample` under `replicate`.
    fn share(&mut self, at: &KeyPath, listener: &FileListener, downstream: &FileDownstream, policy: Policy) {
        let (weight, sample) = (downstream.weight, downstream.sample);
        if policy != Policy::Replicate {
            if fraction_to_sample(sample) != Downstream::ALL {
                let replicate = self.document.notation.assignment("policy", "\"replicate\"");
                let message = format!("{sample} works only with {replicate}; add that, or remove sample");
                self.fault(&at.then("sample"), message);
            }
            return;
        }
        if weight != 1 {
            let message =
                format!("{weight} has no effect under `replicate`, which sends each downstream a copy; remove weight");
            self.fault(&at.then("weight"), message);
        }
        if let Some(loss) = listener.protocol.sampling_loses()
            && fraction_to_sample(sample) != Downstream::ALL
        {
            self.warn(
                &at.then("sample"),
                format!("{} {loss}; remove it to copy everything", sample_to_fraction(fraction_to_sample(sample))),
            );
        }
    }
}

/// A fraction from 0 to 1 in units of 1/[`Downstream::ALL`].
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float becomes the nearest u32")]
pub(in crate::config) fn fraction_to_sample(part: f64) -> u32 {
    (part * f64::from(Downstream::ALL)).round() as u32
}

/// The shortest decimal fraction that `fraction_to_sample` makes this of.
pub(in crate::config) fn sample_to_fraction(sample: u32) -> f64 {
    let exact = f64::from(sample) / f64::from(Downstream::ALL);
    let short = (1..=12).filter_map(|digits| format!("{exact:.digits$}").parse().ok());
    short.into_iter().find(|&part| fraction_to_sample(part) == sample).unwrap_or(exact)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn parts_are_written_as_people_write_them() {
        for part in [1.0, 0.5, 0.1, 0.01, 0.000_001, 0.25, 0.999] {
            assert_eq!(sample_to_fraction(fraction_to_sample(part)), part);
        }
        assert_eq!(fraction_to_sample(1.0), Downstream::ALL);
    }

    proptest! {
        #[test]
        fn every_sample_survives_being_written(sample: u32) {
            prop_assert_eq!(fraction_to_sample(sample_to_fraction(sample)), sample);
        }
    }
}
