//! What a start and a reload prepare alike: the limit of open files, the kernel program, the events they wait for.

use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use mio::unix::SourceFd;
use mio::{Interest, Registry};

use super::KERNEL_EVENTS;
use crate::config::{Config, RequestedMode};
use crate::datapath::kernel::{KernelDatapath, KernelSetup};
use crate::host::probe::{HostFeatures, TcUnsupported, tc_ebpf_support};
use crate::host::{HostMonitor, HostNetwork, NextHopTracking};
use crate::open_files;

/// Raises the limit of open files, and warns if it stays too low. The daemon runs all the same.
pub(super) fn raise_open_files_limit(config: &Config) {
    match open_files::raise(config) {
        Ok(warning) => warning.iter().for_each(|warning| tracing::warn!("{warning}")),
        Err(error) => tracing::warn!("{error:#}"),
    }
}

/// Has the host's facts include the next hops of the downstreams, which the kernel program needs.
pub(super) fn track_next_hops(
    kernel: &KernelDatapath,
    monitor: &mut HostMonitor,
    host: &mut HostNetwork,
) -> Result<()> {
    monitor.track_next_hops()?;
    host.track_next_hops(if kernel.resolves_neighbours() {
        NextHopTracking::ResolvePods
    } else {
        NextHopTracking::ResolveAll
    });
    Ok(())
}

/// Has the event loop wake when the TC program reports an event. Ends with the program.
pub(super) fn watch_events(kernel: &mut KernelDatapath, registry: &Registry) -> Result<()> {
    let Some(descriptor) = kernel.events().descriptor() else { return Ok(()) };
    let mut source = SourceFd(&descriptor.as_raw_fd());
    registry.register(&mut source, KERNEL_EVENTS, Interest::READABLE).context("cannot watch the TC program's events")
}

/// Loads the TC program if any listener may use it; loading it is the test whether it can be used here.
///
/// # Errors
/// When the host cannot be probed at all.
pub(super) fn load_kernel(config: &Config) -> Result<(Option<KernelDatapath>, Result<(), TcUnsupported>)> {
    if config.listeners.iter().all(|listener| listener.mode == RequestedMode::Userspace) {
        return Ok((None, Ok(())));
    }
    let ability = HostFeatures::probe()?;
    if let Err(obstacle) = tc_ebpf_support(&ability) {
        return Ok((None, Err(obstacle)));
    }
    let setup = KernelSetup {
        redirects: ability.redirect_neigh == Some(true),
        ring_buffer: ability.ring_buffer == Some(true),
        tcx: ability.tcx == Some(true),
        ..KernelSetup::new(&config.limits)
    };
    match KernelDatapath::open(&setup) {
        Ok(kernel) => Ok((Some(kernel), Ok(()))),
        Err(error) => Ok((None, Err(TcUnsupported::Kernel(format!("{error:#}"))))),
    }
}
