//! The key by which the [aggregator](super::aggregator), watches, counters and messages identify a Service.

use std::fmt;
use std::sync::Arc;

/// A Service. One watch serves all listeners that follow it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    /// The namespace, already resolved: a Service without one is in the pod's own.
    pub namespace: Arc<str>,
    /// The Service's name.
    pub service: Arc<str>,
}

impl ServiceKey {
    /// The key for `namespace`/`service`.
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
