//! The kernel program before and after this daemon: looks for one to take over from, keeps ours alive while the daemon
//! is, and takes the other's counts over once nothing needs it any more.

use std::time::Instant;

use anyhow::Result;
use mio::Registry;

use super::{Daemon, take_due, watch_events};
use crate::config::Config;
use crate::datapath::kernel::{KernelDatapath, attach, handover};

/// Has a kernel datapath that is to be used follow the configuration's word on beginnings and ends, and watches it.
///
/// # Errors
/// When the program cannot be pinned or watched.
pub(super) fn begin(kernel: &mut KernelDatapath, config: &Config, registry: &Registry) -> Result<()> {
    watch_events(kernel, registry)?;
    let prepared = kernel.prepare(&config.handover)?;
    kernel.configure(&config.handover, prepared);
    kernel.find_stale_pins(&config.handover.pin_path)
}

impl Daemon {
    /// The start has succeeded: nothing of an earlier daemon is needed any more, but where this one still has to find out
    /// about receivers. Only now, so that there is no moment without either the old filter or what takes its place.
    pub(super) fn succeed_predecessors(&mut self) {
        let pins = &self.config.handover.pin_path;
        attach::remove_stale_filters(&self.controller.unused_links(), pins);
        match &mut self.kernel {
            Some(kernel) => kernel.commit(),
            None => handover::remove_stale_pins(pins),
        }
        self.settle_kernel();
        self.timers.beat = Some(Instant::now());
    }

    /// Takes over what can be taken over by now.
    pub(super) fn settle_kernel(&mut self) {
        if self.serving
            && let Some(kernel) = &mut self.kernel
            && let Err(error) = kernel.finish_handover()
        {
            tracing::error!("cannot take the counters of an earlier daemon over: {error:#}");
        }
    }

    /// Where listeners wait for their receivers, a program that is there has those it had.
    pub(super) fn hold_links(&mut self) {
        if let Some(kernel) = &mut self.kernel {
            kernel.defer(self.controller.links_in_waiting());
        }
    }

    /// Tells the kernel program that there is a daemon, if it is time to.
    pub(super) fn beat(&mut self, now: Instant) {
        if take_due(&mut self.timers.beat, now)
            && let Some(kernel) = &mut self.kernel
        {
            kernel.renew_heartbeat();
            self.timers.beat = kernel.heartbeat_interval().map(|interval| now + interval);
        }
    }

    /// The kernel program is not needed any more.
    pub(super) fn give_kernel_up(&mut self) {
        if let Some(kernel) = self.kernel.take()
            && let Err(error) = kernel.remove()
        {
            tracing::error!("{error:#}");
        }
    }
}
