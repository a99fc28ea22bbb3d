//! What is checked every five seconds, because nothing announces it.

use std::time::Instant;

use super::{Daemon, MAINTENANCE_INTERVAL};
use crate::controller::ControllerEvent;
use crate::logging;

impl Daemon {
    pub(super) fn maintain(&mut self, now: Instant) {
        self.timers.maintenance = Some(now + MAINTENANCE_INTERVAL);
        self.sources.check_discovery();
        self.check_preceding_programs();
        self.reloading.maintain();
        self.notify_status();
        log_lost_lines();
        if let Err(error) = self.user.restart_dead_workers() {
            tracing::error!("{error:#}");
        }
        match self.host.maintain(self.controller.facts()) {
            Ok(false) => {}
            Ok(true) => self.timers.host = Some(now),
            Err(error) => tracing::error!("{error:#}"),
        }
        if let Some(kernel) = &mut self.kernel {
            self.drop_log.log_lost(kernel.events().lost());
        }
        if self.kernel.as_ref().is_some_and(|kernel| !kernel.attached_everywhere()) {
            self.handle(ControllerEvent::Disturbed(
                "the TC filter has been removed by another program; attaching it again".into(),
            ));
        }
    }
}

/// Warns of lines that the log itself has lost, once it can be written to again.
fn log_lost_lines() {
    let lines = logging::take_lost_lines();
    if lines > 0 {
        tracing::warn!(lines, "log lines were lost: the disk was full, or the log's reader had gone or was too slow");
    }
}
