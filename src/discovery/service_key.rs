//! The key of a Service: what [aggregator](super::aggregator), watches, counters and messages call it by.

use std::fmt;
use std::sync::Arc;

/// A Service; one watch serves all listeners that want it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    /// Its namespace, never a default.
    pub namespace: Arc<str>,
    /// Its name.
    pub service: Arc<str>,
}

impl ServiceKey {
    /// A Service by its two names.
    #[must_use]
    pub fn new(namespace: &str, service: &str) -> ServiceKey {
        ServiceKey { namespace: namespace.into(), service: service.into() }
    }
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.service)
    }
}
