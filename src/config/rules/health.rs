//! Rules about `health`: the top-level table, and those of listeners, whose keys take precedence.
//! [`health_keys`](crate::config::health_keys) checks the keys; this module adds their paths to its errors.

use super::{RuleChecker, listener_key, top};
use crate::config::document::KeyPath;
use crate::config::health_keys::{HealthKeyError, HealthKeys};
use crate::health::settings::HealthSettings;
use crate::model::ListenerId;

impl RuleChecker<'_> {
    /// The settings of the top-level table; none if it does not enable health checks.
    pub(super) fn health(&mut self, keys: &HealthKeys) -> Option<HealthSettings> {
        match keys.settings() {
            Ok(settings) => {
                self.health = Some(keys.clone());
                settings
            }
            Err(faults) => {
                self.health_faults(&top("health"), faults);
                None
            }
        }
    }

    /// The settings of a listener; none if its downstreams are not checked. Call [`health`](Self::health) before.
    pub(super) fn listener_health(&mut self, id: ListenerId, own: Option<&HealthKeys>) -> Option<HealthSettings> {
        // A mistake in the top-level table is reported once, not again for each listener.
        let base = self.health.clone()?;
        match own.map_or_else(|| base.settings(), |own| own.over(&base).settings()) {
            Ok(settings) => {
                if let Some(own) = own.filter(|own| settings.is_none() && own.enabled.is_none()) {
                    self.not_enabled(id, own);
                }
                settings
            }
            Err(faults) => {
                self.health_faults(&listener_key(id).then("health"), faults);
                None
            }
        }
    }

    /// Warns that the keys have no effect.
    fn not_enabled(&mut self, id: ListenerId, own: &HealthKeys) {
        if *own != HealthKeys::default() {
            let fix = self.document.notation.assignment("enabled", "true");
            let at = listener_key(id).then("health");
            self.warn(&at, format!("health checks are not enabled, so nothing is checked; add {fix}"));
        }
    }

    fn health_faults(&mut self, at: &KeyPath, faults: Vec<HealthKeyError>) {
        for fault in faults {
            self.fault(&at.then(fault.key), fault.message);
        }
    }
}
