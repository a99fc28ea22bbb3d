//! Start and end of the daemon. Whatever can fail comes before the first interface is touched.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use anyhow::{Context, Result};
use mio::{Interest, Poll, Waker};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook_mio::v1_0::Signals;

use super::downstream_sources::DownstreamSources;
use super::preceding_programs::PrecedingPrograms;
use super::prepare::{load_kernel, raise_open_files_limit, track_next_hops};
use super::reload::ReloadState;
use super::status_socket::StatusSocket;
use super::trace::TraceState;
use super::{
    CONFIG_FILE, Daemon, DaemonOptions, HEALTH, MAINTENANCE_INTERVAL, NETLINK, SIGNALS, Timers, WAKE, handover,
};
use crate::config::Config;
use crate::controller::Controller;
use crate::datapath::Datapath;
use crate::datapath::user::UserDatapath;
use crate::drop_log::DropLog;
use crate::health::HealthChecks;
use crate::host::{HostFacts, HostMonitor, HostNetwork};
use crate::metrics::PlanApplyCounts;
use crate::metrics::http::{HttpLimits, MetricsListener};
use crate::model::Mode;
use crate::service_manager::ServiceManager;

impl Daemon {
    pub(super) fn start(config: Config, options: DaemonOptions) -> Result<Daemon> {
        raise_open_files_limit(&config);
        let poll = Poll::new().context("cannot create an event queue (epoll)")?;
        // Signals first: one that comes during the start must still end in a clean stop.
        let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("cannot handle signals")?;
        poll.registry().register(&mut signals, SIGNALS, Interest::READABLE).context("cannot watch signals")?;
        let mut monitor = HostMonitor::open()?;
        poll.registry().register(&mut monitor, NETLINK, Interest::READABLE).context("cannot watch netlink")?;
        let mut host = HostNetwork::open()?;
        let DaemonOptions { kubeconfig, status_socket } = options;
        let (status_socket, status_socket_error) = StatusSocket::open(&config, status_socket, poll.registry())?;
        let metrics = config.metrics.as_ref().map(MetricsListener::new).transpose()?;
        let (kernel, tc_support) = load_kernel(&config)?;
        if let Some(kernel) = &kernel {
            // Before the first facts are read, so that no change is missed between the two.
            track_next_hops(kernel, &mut monitor, &mut host)?;
        }
        let facts = host.facts(&BTreeSet::new())?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKE).context("cannot create a waker")?);
        let sources = DownstreamSources::start(&config, kubeconfig, &waker)?;
        let health = HealthChecks::new(poll.registry(), HEALTH)?;
        let controller = Controller::new(config.clone(), &tc_support, facts)?;
        let mut kernel = kernel.filter(|_| controller.modes().any(|(_, choice)| choice.mode == Mode::TcEbpf));
        kernel.as_mut().map(|kernel| handover::prepare(kernel, &config, poll.registry())).transpose()?;

        let (now, started_at) = (Instant::now(), SystemTime::now());
        let mut daemon = Daemon {
            signals,
            host,
            monitor,
            controller,
            user: UserDatapath::new(),
            kernel,
            http: None,
            sources,
            health,
            status_socket,
            plan_applies: PlanApplyCounts::default(),
            preceding_programs: PrecedingPrograms::new(),
            drop_log: DropLog::default(),
            tracing: TraceState::default(),
            reloading: ReloadState::new(&config, poll.registry(), CONFIG_FILE, started_at),
            service_manager: ServiceManager::from_environment(),
            config,
            waker,
            started: now,
            started_at,
            apply_error: None,
            serving: false,
            timers: Timers { maintenance: Some(now + MAINTENANCE_INTERVAL), ..Timers::default() },
            poll,
        };
        daemon.apply_first_plan(metrics, status_socket_error)?;
        Ok(daemon)
    }

    fn apply_first_plan(
        &mut self,
        metrics: Option<MetricsListener>,
        status_socket_error: Option<anyhow::Error>,
    ) -> Result<()> {
        self.log_modes();
        self.log_egress_hooks(&HostFacts::default(), self.controller.facts());
        let facts = self.read_host_facts(&self.controller.route_addresses())?;
        self.handle(crate::controller::ControllerEvent::Host(facts));
        if let Some(error) = self.apply_error.take() {
            return Err(error);
        }
        self.serving = true;
        if let Some(error) = status_socket_error {
            tracing::warn!("{error:#}");
        }
        self.take_over();
        self.check_preceding_programs();
        self.update_health_targets();
        if let Some(metrics) = metrics {
            tracing::info!(address = %metrics.address(), "serving metrics");
            self.http = Some(metrics.serve(Arc::clone(&self.waker), HttpLimits::default())?);
        }
        self.notify_ready();
        Ok(())
    }

    /// Logs the datapath of each listener, and the reason for it.
    pub(super) fn log_modes(&self) {
        for (listener, choice) in self.controller.modes() {
            tracing::info!(listener = listener.name, bind = %listener.bind, mode = %choice.mode, reason = choice.reason, "listener configured");
        }
    }

    /// Takes the program off the interfaces, then lets the sockets forward what they hold.
    pub(super) fn stop(&mut self) -> Result<()> {
        if let Some((server, _)) = self.http.take() {
            server.shutdown();
        }
        if let Some((discovery, _)) = self.sources.discovery.take() {
            discovery.shutdown();
        }
        // Detaching needs a file descriptor. Closing this socket frees one, should none be left.
        self.status_socket.close();
        let kernel = self.kernel.as_mut().map_or(Ok(()), Datapath::shutdown);
        let user = self.user.shutdown();
        kernel.and(user)
    }
}
