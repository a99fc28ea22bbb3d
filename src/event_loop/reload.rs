//! Puts a changed configuration in force while the daemon runs: whole, or not at all.
//!
//! ```text
//! SIGHUP, or the file has changed ─► reload_reader ─► take_read_config ─► controller ─► finish_reload ─┬─► commit
//!                                          └──────────── an error ─┴─────────────────────────────────┴─► reject
//! ```
//!
//! What can fail comes first: reading the file, opening the metrics port, loading the TC program, choosing the modes,
//! finding credentials for the cluster, and last the plan itself, which the controller rolls back if a datapath cannot apply
//! it. Everything else changes after that.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use mio::{Interest, Registry, Token};

use super::prepare::{load_kernel, raise_open_files_limit, track_next_hops};
use super::reload_reader::{ConfigReader, ReloadCause};
use super::{CONFIG_FILE, Daemon, handover};
use crate::config::watch::ConfigWatcher;
use crate::config::{Config, DownstreamSource, ListenerConfig, ListenerIdAllocator};
use crate::control::server::StatusServer;
use crate::controller::ControllerEvent;
use crate::datapath::kernel::handover::PreparedPins;
use crate::discovery::{Discovery, DiscoveryUpdate};
use crate::error_hints;
use crate::metrics::ReloadCounts;
use crate::metrics::http::{HttpLimits, MainLoopRequest, MetricsListener, MetricsServer};
use crate::model::Mode;

/// How long after a change the file is read: an editor may write it in several steps.
const SETTLE: Duration = Duration::from_millis(100);

/// The file's watch, the reload in progress, and the outcome of earlier ones.
#[derive(Debug)]
pub(super) struct ReloadState {
    pub(super) counts: ReloadCounts,
    /// Why the last reload was rejected, and when; none if it was not.
    pub(super) rejection: Option<(SystemTime, String)>,
    watch: Option<ConfigWatcher>,
    /// When the file is to be read, if it may have changed.
    pub(super) read_due: Option<Instant>,
    reader: ConfigReader,
    numbers: ListenerIdAllocator,
    pending: Option<PendingReload>,
}

/// A reload whose plan is being applied, and what changes once it is in force.
#[derive(Debug)]
struct PendingReload {
    config: Config,
    http: PartChange<(MetricsServer, Receiver<MainLoopRequest>)>,
    discovery: PartChange<(Discovery, Receiver<DiscoveryUpdate>)>,
    /// The new status socket, if its path has changed.
    status_socket: Option<StatusServer>,
    /// The new pins of the kernel program, if one is loaded already.
    pins: Option<PreparedPins>,
}

/// What happens to a part of the daemon.
#[derive(Debug)]
enum PartChange<T> {
    Keep,
    Stop,
    Replace(T),
}

impl<T> PartChange<T> {
    /// The part as it was, if it goes.
    fn apply_to(self, part: &mut Option<T>) -> Option<T> {
        match self {
            PartChange::Keep => None,
            PartChange::Stop => part.take(),
            PartChange::Replace(new) => part.replace(new),
        }
    }
}

impl ReloadState {
    /// Watches the file if the configuration says so.
    pub(super) fn new(config: &Config, registry: &Registry, token: Token, now: SystemTime) -> ReloadState {
        let mut reloading = ReloadState {
            counts: ReloadCounts { success: 0, error: 0, last_good: true, last_success: now },
            rejection: None,
            watch: None,
            read_due: None,
            reader: ConfigReader::new(Config::load),
            numbers: ListenerIdAllocator::default(),
            pending: None,
        };
        reloading.update_watch(config, registry, token);
        reloading
    }

    /// Starts or stops watching the file, as the configuration says. A failure is logged.
    fn update_watch(&mut self, config: &Config, registry: &Registry, token: Token) {
        if !config.watch {
            self.watch = None;
            self.read_due = None;
            return;
        }
        if self.watch.is_some() {
            return;
        }
        let watch = ConfigWatcher::new(&config.path).and_then(|mut watch| {
            registry.register(&mut watch, token, Interest::READABLE)?;
            Ok(watch)
        });
        match watch {
            Ok(watch) => {
                self.watch = Some(watch);
                // The file may have changed since it was read.
                self.schedule();
            }
            Err(error) => tracing::warn!("{error:#}"),
        }
    }

    /// True while a new configuration is being read or applied. A read that has stalled does not count.
    pub(super) fn in_progress(&self) -> bool {
        self.pending.is_some() || self.reader.in_progress()
    }

    /// When the file is to be read, or its reading is to be reported as stalled.
    pub(super) fn due(&self) -> Option<Instant> {
        self.read_due.into_iter().chain(self.reader.report_due()).min()
    }

    fn schedule(&mut self) {
        self.read_due.get_or_insert_with(|| Instant::now() + SETTLE);
    }

    /// Reads inotify's events, and schedules a reload if the file may have changed.
    pub(super) fn drain_watch(&mut self) {
        if self.watch.as_mut().is_some_and(ConfigWatcher::drain) {
            self.schedule();
        }
    }

    /// Watches the file again if its directory had gone.
    pub(super) fn maintain(&mut self) {
        if self.watch.as_mut().is_some_and(ConfigWatcher::rescan) {
            self.schedule();
        }
    }
}

impl Daemon {
    /// Starts to read the configuration file; [`Self::take_read_config`] follows.
    pub(super) fn reload(&mut self, cause: ReloadCause) {
        if cause == ReloadCause::Signal {
            self.service_manager.notify_reloading();
        }
        if let Err(error) = self.reloading.reader.start(&self.config.path, cause, &self.waker, Instant::now()) {
            self.reject(&error, cause);
        }
        self.notify_reload_ended();
    }

    /// Puts the configuration in force that the reader thread has read, if it has and if that is possible.
    pub(super) fn take_read_config(&mut self) {
        let Some((cause, read)) = self.reloading.reader.take_result() else { return };
        self.check_and_prepare(read, cause);
        if let Some(cause) = self.reloading.reader.take_queued() {
            self.reload(cause);
        }
        self.notify_reload_ended();
    }

    /// Reports a file that cannot be read in time. The reader thread continues to wait for it.
    pub(super) fn report_stalled_read(&mut self, now: Instant) {
        if let Some((cause, error)) = self.reloading.reader.take_stall(&self.config.path, now) {
            self.reject(&error, cause);
            self.notify_reload_ended();
        }
    }

    fn check_and_prepare(&mut self, read: Result<Config>, cause: ReloadCause) {
        let read = read.and_then(|config| {
            config.inherit_listener_ids(&self.config, self.kernel.is_some(), &mut self.reloading.numbers)
        });
        let config = match read {
            Ok(config) => config,
            Err(error) => return self.reject(&error, cause),
        };
        if config == self.config {
            return self.log_unchanged(cause);
        }
        tracing::info!(config = %config.path.display(), cause = cause.name(), "reloading the configuration");
        if cause == ReloadCause::File {
            self.service_manager.notify_reloading();
        }
        for warning in &config.warnings {
            tracing::warn!("{warning}");
        }
        raise_open_files_limit(&config);
        if let Err(error) = self.prepare_reload(config) {
            self.reject(&error, cause);
        }
    }

    fn log_unchanged(&mut self, cause: ReloadCause) {
        if cause == ReloadCause::Signal {
            tracing::info!(config = %self.config.path.display(), "configuration reloaded: nothing in it has changed");
        } else if self.reloading.rejection.is_some() {
            tracing::info!(config = %self.config.path.display(), "the configuration file matches the configuration in force again");
        } else {
            return;
        }
        self.count_success();
    }

    /// Does everything that can fail, and passes the configuration to the controller.
    fn prepare_reload(&mut self, config: Config) -> Result<()> {
        let http = self.http_change(&config)?;
        let (kernel, support) = match self.kernel {
            Some(_) => (None, Ok(())),
            None => load_kernel(&config)?,
        };
        let prepared = self.controller.prepare(config.clone(), &support)?;
        let discovery = self.discovery_change(&config)?;
        let status_socket = self.status_socket.replacement(&self.config, &config, self.poll.registry())?;
        let pins = self.kernel.as_ref().map(|kernel| kernel.prepare(&config.handover)).transpose()?;
        if prepared.wants_kernel()
            && let Some(mut kernel) = kernel
        {
            handover::prepare(&mut kernel, &config, self.poll.registry())?;
            kernel.commit();
            track_next_hops(&kernel, &mut self.monitor, &mut self.host)?;
            self.kernel = Some(kernel);
        }
        self.reloading.pending = Some(PendingReload { config, http, discovery, status_socket, pins });
        self.handle(ControllerEvent::Config(prepared));
        Ok(())
    }

    fn http_change(&self, config: &Config) -> Result<PartChange<(MetricsServer, Receiver<MainLoopRequest>)>> {
        if config.metrics == self.config.metrics {
            return Ok(PartChange::Keep);
        }
        let Some(metrics) = &config.metrics else { return Ok(PartChange::Stop) };
        let same_port =
            self.config.metrics.as_ref().filter(|before| before.bind == metrics.bind).and(self.http.as_ref());
        let bound = match same_port {
            Some((server, _)) => server.with_path(&metrics.path),
            None => MetricsListener::new(metrics)?,
        };
        tracing::info!(address = %bound.address(), "serving metrics");
        Ok(PartChange::Replace(bound.serve(Arc::clone(&self.waker), HttpLimits::default())?))
    }

    fn discovery_change(&self, config: &Config) -> Result<PartChange<(Discovery, Receiver<DiscoveryUpdate>)>> {
        let wanted = config.listeners.iter().any(|listener| matches!(listener.source, DownstreamSource::Kubernetes(_)));
        if wanted && self.sources.can_update_discovery(config)? {
            return Ok(PartChange::Keep);
        }
        let new = self.sources.start_discovery(config, &self.waker)?;
        Ok(new.map_or(PartChange::Stop, PartChange::Replace))
    }

    /// The controller has put the new plan in force, or has gone back to the old one for this reason.
    pub(super) fn finish_reload(&mut self, outcome: Result<(), String>) {
        if !self.controller.modes().any(|(_, choice)| choice.mode == Mode::TcEbpf) {
            self.remove_kernel();
        }
        match (self.reloading.pending.take(), outcome) {
            (Some(pending), Ok(())) => self.commit_reload(pending),
            (Some(_), Err(reason)) => self.reject(&anyhow::Error::msg(reason), ReloadCause::Signal),
            (None, _) => {}
        }
        self.restart_trace();
        self.notify_reload_ended();
    }

    /// The plan is in force. Changes everything else, none of which can fail.
    fn commit_reload(&mut self, pending: PendingReload) {
        let PendingReload { config, http, discovery, status_socket, pins } = pending;
        // Clients of the old endpoint get their answers before it closes.
        self.answer_http_requests();
        if let Some((server, _)) = http.apply_to(&mut self.http) {
            server.shutdown();
        }
        let update_discovery = matches!(discovery, PartChange::Keep);
        if let Some((discovery, _)) = discovery.apply_to(&mut self.sources.discovery) {
            discovery.shutdown();
            self.sources.discovery_failed = false;
        }
        if update_discovery && let Err(error) = self.sources.update_discovery(&config) {
            tracing::error!("{error:#}");
        }
        if let Some(server) = status_socket {
            self.status_socket.replace(server);
        }
        if let (Some(kernel), Some(pins)) = (&mut self.kernel, pins) {
            kernel.configure(&config.handover, pins);
        }
        self.timers.heartbeat = Some(Instant::now());
        self.sources.update_names(&config, self.started.elapsed());
        let old = std::mem::replace(&mut self.config, config);
        self.update_health_targets();
        self.check_preceding_programs();
        self.reloading.update_watch(&self.config, self.poll.registry(), CONFIG_FILE);
        self.count_success();
        // Last, so that everything above holds once these lines are in the log.
        log_changes(&old, &self.config);
        self.log_modes();
    }

    fn count_success(&mut self) {
        let reloading = &mut self.reloading;
        reloading.rejection = None;
        let success = reloading.counts.success + 1;
        reloading.counts =
            ReloadCounts { success, last_good: true, last_success: SystemTime::now(), ..reloading.counts };
    }

    /// Logs why the new configuration is not put in force; the same reason only once while the file goes on changing.
    fn reject(&mut self, error: &anyhow::Error, cause: ReloadCause) {
        let text = error_hints::add_open_files_hint(format!("{error:#}"));
        let known = self.reloading.rejection.as_ref().is_some_and(|(_, known)| *known == text);
        if known && cause == ReloadCause::File {
            return;
        }
        for line in text.lines() {
            tracing::error!("{line}");
        }
        let config = self.config.path.display();
        tracing::error!(%config, "configuration not reloaded: the one in force stays in force unchanged");
        let counts = &mut self.reloading.counts;
        counts.error += 1;
        counts.last_good = false;
        self.reloading.rejection = Some((SystemTime::now(), text));
    }
}

/// Logs which listeners were changed, added or removed.
fn log_changes(old: &Config, new: &Config) {
    let named = |config: &Config, name: &str| config.listeners.iter().find(|other| other.name == name).cloned();
    let mut unchanged = 0;
    for listener in &new.listeners {
        match named(old, &listener.name) {
            Some(before) if before == *listener => unchanged += 1,
            Some(_) => log_listener(listener, "listener changed"),
            None => log_listener(listener, "listener added"),
        }
    }
    for listener in old.listeners.iter().filter(|listener| named(new, &listener.name).is_none()) {
        log_listener(listener, "listener removed");
    }
    let config: &Path = &new.path;
    tracing::info!(config = %config.display(), listeners = new.listeners.len(), unchanged, "configuration reloaded");
}

fn log_listener(listener: &ListenerConfig, what: &str) {
    tracing::info!(listener = listener.name, listener_id = listener.id.0, bind = %listener.bind, "{what}");
}
