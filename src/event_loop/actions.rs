//! Carries out what the controller decides: applies plans, reads the host's facts, sets its timer, logs its warnings.

use std::collections::VecDeque;

use super::Daemon;
use crate::controller::{ControllerAction, ControllerEvent};
use crate::datapath::Datapath;
use crate::error_hints;
use crate::plan::Plan;

impl Daemon {
    /// Passes an event to the controller and carries out its actions, and those that follow from them.
    pub(super) fn handle(&mut self, event: ControllerEvent) {
        self.handle_all([event].into());
    }

    /// As [`Self::handle`], for events that came together. The host's facts, which concern all listeners, are read once,
    /// after the last event.
    pub(super) fn handle_all(&mut self, mut events: VecDeque<ControllerEvent>) {
        let mut routes_wanted = None;
        while let Some(event) = events.pop_front() {
            for action in self.controller.handle(event, self.started.elapsed()) {
                match action {
                    ControllerAction::Warn(text) => tracing::warn!("{}", error_hints::add_open_files_hint(text)),
                    ControllerAction::WakeAt(at) => self.timers.controller = Some(self.started + at),
                    ControllerAction::ReloadFinished(outcome) => self.finish_reload(outcome),
                    ControllerAction::Apply(plan) => {
                        events.push_back(self.apply(&plan));
                        if self.start_failed() {
                            return;
                        }
                    }
                    ControllerAction::ReadHostFacts(addresses) => routes_wanted = Some(addresses),
                }
            }
            if events.is_empty()
                && let Some(addresses) = routes_wanted.take()
            {
                events.extend(self.read_host_facts_or_retry(&addresses).map(ControllerEvent::Host));
            }
        }
    }

    /// Applies a plan to both datapaths. Sockets first: once the TC program is attached, it passes datagrams to them.
    fn apply(&mut self, plan: &Plan) -> ControllerEvent {
        self.defer_links();
        let user = self.user.apply(plan);
        // A start that has failed must not touch any interface. Later, a failure of one datapath must not keep the other
        // from the new plan.
        let kernel = match &mut self.kernel {
            Some(kernel) if user.is_ok() || self.serving => kernel.apply(plan),
            _ => Ok(()),
        };
        match user.and(kernel) {
            Ok(()) => {
                self.plan_applies.success += 1;
                self.apply_error = None;
                self.import_counters();
                ControllerEvent::Applied
            }
            Err(error) => {
                self.plan_applies.error += 1;
                let text = format!("{error:#}");
                self.apply_error = Some(error);
                ControllerEvent::ApplyFailed(text)
            }
        }
    }

    /// True if the first plan could not be applied. The daemon ends with that error and retries nothing.
    fn start_failed(&self) -> bool {
        !self.serving && self.apply_error.is_some()
    }
}
