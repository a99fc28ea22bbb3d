//! Handover between daemons: finds a program that an earlier daemon has left, replaces it and imports its counters; and
//! renews the heartbeat of our own program.

use std::time::Instant;

use anyhow::Result;
use mio::Registry;

use super::Daemon;
use super::prepare::watch_events;
use crate::config::Config;
use crate::datapath::kernel::{KernelDatapath, attach, handover};

/// Pins a newly loaded program as configured, finds the programs of earlier daemons, and watches its events.
///
/// # Errors
/// When the program cannot be pinned or watched.
pub(super) fn prepare(kernel: &mut KernelDatapath, config: &Config, registry: &Registry) -> Result<()> {
    watch_events(kernel, registry)?;
    let prepared = kernel.prepare(&config.handover)?;
    kernel.configure(&config.handover, prepared);
    kernel.find_stale_pins(&config.handover.pin_path)
}

impl Daemon {
    /// Removes what earlier daemons have left attached and pinned, except on interfaces whose listeners still wait for
    /// their downstreams. Called once the first plan is in force, so that no interface is ever without a program.
    pub(super) fn take_over(&mut self) {
        let pins = &self.config.handover.pin_path;
        attach::remove_stale_filters(&self.controller.unused_links(), pins);
        match &mut self.kernel {
            Some(kernel) => kernel.commit(),
            None => handover::remove_stale_pins(pins),
        }
        self.import_counters();
        self.timers.heartbeat = Some(Instant::now());
    }

    /// Imports the counters of earlier programs that no interface uses any more.
    pub(super) fn import_counters(&mut self) {
        if self.serving
            && let Some(kernel) = &mut self.kernel
            && let Err(error) = kernel.finish_handover()
        {
            tracing::error!("cannot import the counters of an earlier daemon: {error:#}");
        }
    }

    /// Leaves an earlier program in place where listeners still wait for their downstreams: it has those it had.
    pub(super) fn defer_links(&mut self) {
        if let Some(kernel) = &mut self.kernel {
            kernel.defer(self.controller.links_awaiting_downstreams());
        }
    }

    /// Tells the kernel program that the daemon lives; without it the program leaves all packets alone
    /// after `max_headless_secs`.
    pub(super) fn renew_heartbeat(&mut self, now: Instant) {
        if let Some(kernel) = &mut self.kernel {
            kernel.renew_heartbeat();
            self.timers.heartbeat = kernel.heartbeat_interval().map(|interval| now + interval);
        }
    }

    /// Unloads the kernel program; no listener uses it any more.
    pub(super) fn remove_kernel(&mut self) {
        if let Some(kernel) = self.kernel.take()
            && let Err(error) = kernel.remove()
        {
            tracing::error!("{error:#}");
        }
    }
}
