//! Health checks on the event loop: probes that are due or answered, and what follows for the controller.

use mio::Token;

use super::Daemon;
use crate::controller::ControllerEvent;

impl Daemon {
    /// A probe's socket is ready.
    pub(super) fn on_health_event(&mut self, token: Token) {
        if self.health.owns(token) {
            self.health.on_event(token, self.started.elapsed());
        }
    }

    /// Sends the probes that are due, and passes changes of health to the controller.
    pub(super) fn run_health_checks(&mut self) {
        self.health.on_timer(self.started.elapsed());
        if let Some(map) = self.health.take_change() {
            self.handle(ControllerEvent::Health(map));
        }
    }

    /// Passes the downstreams to be checked to the health checks; after any change of downstreams.
    pub(super) fn update_health_targets(&mut self) {
        self.health.set_targets(&self.controller.watches(), self.started.elapsed());
    }
}
