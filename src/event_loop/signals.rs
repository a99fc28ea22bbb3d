//! SIGHUP reloads the configuration; SIGTERM and SIGINT stop the daemon.

use signal_hook::consts::{SIGHUP, SIGTERM};

use super::Daemon;
use super::reload_reader::ReloadCause;

impl Daemon {
    /// Handles the signals that have arrived. True if one of them stops the daemon.
    pub(super) fn handle_signals(&mut self) -> bool {
        let signals: Vec<i32> = self.signals.pending().collect();
        for signal in signals {
            if signal == SIGHUP {
                self.reload(ReloadCause::Signal);
                continue;
            }
            let name = if signal == SIGTERM { "SIGTERM" } else { "SIGINT" };
            tracing::info!(signal = name, "stopping");
            return true;
        }
        false
    }
}
