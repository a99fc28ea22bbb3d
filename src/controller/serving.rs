//! Whether a listener forwards now: whether it is ready and has a usable downstream.

use std::fmt;

use super::{Controller, ListenerState, NotReady};
use crate::model::Mode;
use crate::plan::Delivery;

/// Why a listener forwards nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotServing {
    /// It is not ready; that includes a plan that is not in force.
    NotReady(NotReady),
    /// Its set of downstreams is empty.
    NoDownstreams,
    /// Its downstreams are addresses of the listener itself, which are left out.
    OnlyItself,
    /// All downstreams fail their health checks, and `fail_open` is off.
    AllUnhealthy,
    /// The host has no route to any of its downstreams.
    NoRoute,
}

impl fmt::Display for NotServing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotServing::NotReady(NotReady::NoDownstreamSet) => f.write_str("waiting for its first downstream set"),
            NotServing::NotReady(NotReady::NotAttached(reason)) => write!(f, "not attached: {reason}"),
            NotServing::NoDownstreams => f.write_str("no downstreams found"),
            NotServing::OnlyItself => f.write_str("its only downstream is the listener itself"),
            NotServing::AllUnhealthy => {
                f.write_str("all downstreams fail their health checks, and fail_open = false drops all datagrams")
            }
            NotServing::NoRoute => f.write_str("no route to any downstream"),
        }
    }
}

impl Controller {
    /// Each listener's name, and how many downstreams it can forward to, or why it cannot.
    #[must_use]
    pub fn serving(&self) -> Vec<(String, Result<usize, NotServing>)> {
        let serving = self.readiness().into_iter().zip(&self.listeners).map(|((name, ready), listener)| {
            let usable = ready.map_err(NotServing::NotReady).and_then(|()| self.usable_downstreams(listener));
            (name, usable)
        });
        serving.collect()
    }

    fn usable_downstreams(&self, listener: &ListenerState) -> Result<usize, NotServing> {
        let Some(set) = listener.set.as_ref().filter(|set| !set.downstreams.is_empty()) else {
            return Err(NotServing::NoDownstreams);
        };
        if self.without_self_loops(listener, set).next().is_none() {
            return Err(NotServing::OnlyItself);
        }
        let Some(plan) = self.plan.listeners.iter().find(|plan| plan.id == listener.config.id) else {
            return Err(NotServing::NotReady(NotReady::NotAttached("it is not in the plan in force".to_owned())));
        };
        if plan.targets.is_empty() {
            return Err(NotServing::AllUnhealthy);
        }
        // Only the kernel program's plan has routes; sockets ask the kernel for each datagram.
        let routed = plan.targets.iter().filter(|target| target.delivery != Delivery::Unreachable).count();
        match (plan.mode, routed) {
            (Mode::Userspace, _) => Ok(plan.targets.len()),
            (Mode::TcEbpf, 0) => Err(NotServing::NoRoute),
            (Mode::TcEbpf, routed) => Ok(routed),
        }
    }
}
