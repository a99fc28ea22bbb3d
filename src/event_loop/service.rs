//! When the service manager is notified; what it is told is in `service_manager`.

use std::time::Instant;

use super::Daemon;
use crate::model::Mode;
use crate::service_manager::{StatusFacts, status_line};

impl Daemon {
    /// The first plan is in force.
    pub(super) fn notify_ready(&mut self) {
        if self.service_manager.is_present() {
            let status = self.status_line();
            self.service_manager.notify_ready(status, Instant::now());
        }
    }

    /// Ends a reload that the manager was told of, unless its plan is still being applied.
    pub(super) fn notify_reload_ended(&mut self) {
        if self.service_manager.is_reloading() && !self.reloading.in_progress() {
            self.notify_ready();
        }
    }

    /// Called from the event loop's timers and nowhere else: a loop that hangs stops the keep-alives.
    pub(super) fn feed_watchdog(&mut self, now: Instant) {
        self.service_manager.feed_watchdog(now);
    }

    pub(super) fn notify_status(&mut self) {
        if self.service_manager.is_present() {
            let status = self.status_line();
            self.service_manager.notify_status(status);
        }
    }

    fn status_line(&self) -> String {
        let count = |mode: Mode| self.controller.modes().filter(|(_, choice)| choice.mode == mode).count();
        let sets = || self.controller.downstream_sets().map(|(_, set)| set);
        status_line(&StatusFacts {
            kernel: count(Mode::TcEbpf),
            sockets: count(Mode::Userspace),
            waiting: sets().filter(Option::is_none).count(),
            downstreams: sets().flatten().map(|set| set.downstreams.len()).sum(),
            unhealthy: self.health.downstreams().filter(|checked| !checked.status.state.usable()).count(),
            problems: self.problems(),
        })
    }
}
