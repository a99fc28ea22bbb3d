//! Takes a new configuration over while the daemon runs: whole, or not at all.
//!
//! ```text
//! SIGHUP, or the file has changed ─► Config::load ─► succeeding ─► attempt ─► controller ─┬─► commit
//!                                        └──── what is wrong ──────────┴─────────────────-┴─► refuse
//! ```
//!
//! Everything that can fail comes first: reading the file, taking the metrics port, loading the TC program, deciding the
//! modes, finding the cluster's credentials, and last the plan itself, which the controller takes back if a datapath
//! cannot follow it. Only then does the rest change.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use mio::{Interest, Registry, Token};

use super::{Daemon, fit_open_files, load_kernel, succession, take_due, track_next_hops};
use crate::config::watch::ConfigWatcher;
use crate::config::{Config, DownstreamSource, ListenerConfig, ListenerIdAllocator};
use crate::control::server::Server;
use crate::controller::Event;
use crate::datapath::kernel::handover::PreparedPins;
use crate::discovery::{Discovery, Update};
use crate::error_hints;
use crate::metrics::Reloads;
use crate::metrics::http::{self, Request};
use crate::model::Mode;

/// How long after the file has changed it is read: several changes may follow each other.
const SETTLE: Duration = Duration::from_millis(100);

/// Why the file is read again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// `SIGHUP`.
    Signal,
    /// It may have changed.
    File,
}

/// How reloading has fared, and what is under way.
#[derive(Debug)]
pub(super) struct Reloading {
    pub(super) record: Reloads,
    /// What was wrong the last time, if anything.
    pub(super) refusal: Option<(SystemTime, String)>,
    watch: Option<ConfigWatcher>,
    /// When the file is to be looked at.
    pub(super) due: Option<Instant>,
    numbers: ListenerIdAllocator,
    attempt: Option<Attempt>,
}

/// What becomes of the rest of the daemon once the plan is in force.
#[derive(Debug)]
struct Attempt {
    config: Config,
    http: Change<(http::Server, Receiver<Request>)>,
    discovery: Change<(Discovery, Receiver<Update>)>,
    /// The status socket, if it is another.
    control: Option<Server>,
    /// Where the kernel program is pinned, if there is one already.
    pins: Option<PreparedPins>,
}

/// What becomes of a part.
#[derive(Debug)]
enum Change<T> {
    Keep,
    End,
    Begin(T),
}

impl<T> Change<T> {
    fn carry_out(self, part: &mut Option<T>) -> Option<T> {
        match self {
            Change::Keep => None,
            Change::End => part.take(),
            Change::Begin(new) => part.replace(new),
        }
    }
}

impl Reloading {
    /// Begins to watch the file, if the configuration wants that.
    pub(super) fn new(config: &Config, registry: &Registry, token: Token, now: SystemTime) -> Reloading {
        let mut reloading = Reloading {
            record: Reloads { success: 0, error: 0, last_good: true, last_success: now },
            refusal: None,
            watch: None,
            due: None,
            numbers: ListenerIdAllocator::default(),
            attempt: None,
        };
        reloading.watch_or_not(config, registry, token);
        reloading
    }

    /// Watches the file or does not, as the configuration says. Not to be able to is no reason not to go on.
    fn watch_or_not(&mut self, config: &Config, registry: &Registry, token: Token) {
        if !config.watch {
            self.watch = None;
            self.due = None;
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
                // It may have changed since it was read.
                self.file_may_have_changed();
            }
            Err(error) => tracing::warn!("{error:#}"),
        }
    }

    /// True while a configuration that has been read is neither in force nor refused.
    pub(super) fn under_way(&self) -> bool {
        self.attempt.is_some()
    }

    fn file_may_have_changed(&mut self) {
        self.due.get_or_insert_with(|| Instant::now() + SETTLE);
    }

    /// Takes in what has happened to the file.
    pub(super) fn drain_watch(&mut self) {
        if self.watch.as_mut().is_some_and(ConfigWatcher::drain) {
            self.file_may_have_changed();
        }
    }

    /// Sees to it that the file is watched, also after its directory had gone.
    pub(super) fn tend(&mut self) {
        if self.watch.as_mut().is_some_and(ConfigWatcher::rescan) {
            self.file_may_have_changed();
        }
    }
}

impl Daemon {
    /// Looks at the file if it is time to.
    pub(super) fn look_at_config(&mut self, now: Instant) {
        if take_due(&mut self.reloading.due, now) {
            self.reload(Cause::File);
        }
    }

    /// Reads the file again and follows it, if it can be followed whole.
    pub(super) fn reload(&mut self, cause: Cause) {
        if cause == Cause::Signal {
            self.service.begin_reload();
        }
        self.read_and_follow(cause);
        self.end_reload();
    }

    fn read_and_follow(&mut self, cause: Cause) {
        let read = Config::load(&self.config.path).and_then(|config| {
            config.inherit_listener_ids(&self.config, self.kernel.is_some(), &mut self.reloading.numbers)
        });
        let config = match read {
            Ok(config) => config,
            Err(error) => return self.refuse(&error, cause),
        };
        if config == self.config {
            return self.nothing_new(cause);
        }
        tracing::info!(config = %config.path.display(), cause = cause.name(), "reloading the configuration");
        if cause == Cause::File {
            self.service.begin_reload();
        }
        for warning in &config.warnings {
            tracing::warn!("{warning}");
        }
        fit_open_files(&config);
        if let Err(error) = self.attempt(config) {
            self.refuse(&error, cause);
        }
    }

    fn nothing_new(&mut self, cause: Cause) {
        if cause == Cause::Signal {
            tracing::info!(config = %self.config.path.display(), "configuration reloaded: nothing in it has changed");
        } else if self.reloading.refusal.is_some() {
            tracing::info!(config = %self.config.path.display(), "the configuration in force is in the file again");
        } else {
            return;
        }
        self.count_success();
    }

    /// Prepares all that can fail, and has the controller try.
    fn attempt(&mut self, config: Config) -> Result<()> {
        let http = self.new_http(&config)?;
        let (kernel, support) = match self.kernel {
            Some(_) => (None, Ok(())),
            None => load_kernel(&config)?,
        };
        let prepared = self.controller.prepare(config.clone(), &support)?;
        let discovery = self.new_discovery(&config)?;
        let control = self.control.succeeding(&self.config, &config, self.poll.registry())?;
        let pins = self.kernel.as_ref().map(|kernel| kernel.prepare(&config.handover)).transpose()?;
        if prepared.wants_kernel()
            && let Some(mut kernel) = kernel
        {
            succession::begin(&mut kernel, &config, self.poll.registry())?;
            kernel.commit();
            track_next_hops(&kernel, &mut self.monitor, &mut self.host)?;
            self.kernel = Some(kernel);
        }
        self.reloading.attempt = Some(Attempt { config, http, discovery, control, pins });
        self.handle(Event::Config(prepared));
        Ok(())
    }

    fn new_http(&self, config: &Config) -> Result<Change<(http::Server, Receiver<Request>)>> {
        if config.metrics == self.config.metrics {
            return Ok(Change::Keep);
        }
        let Some(metrics) = &config.metrics else { return Ok(Change::End) };
        let same_port =
            self.config.metrics.as_ref().filter(|before| before.bind == metrics.bind).and(self.http.as_ref());
        let bound = match same_port {
            Some((server, _)) => server.with_path(&metrics.path),
            None => http::Bound::new(metrics)?,
        };
        tracing::info!(address = %bound.address(), "serving metrics");
        Ok(Change::Begin(bound.serve(Arc::clone(&self.waker), http::Limits::default())?))
    }

    fn new_discovery(&self, config: &Config) -> Result<Change<(Discovery, Receiver<Update>)>> {
        let wanted = config.listeners.iter().any(|listener| matches!(listener.source, DownstreamSource::Kubernetes(_)));
        if wanted && self.sources.can_follow(config)? {
            return Ok(Change::Keep);
        }
        let new = self.sources.start_discovery(config, &self.waker)?;
        Ok(new.map_or(Change::End, Change::Begin))
    }

    /// The controller's word on the last attempt.
    pub(super) fn settled(&mut self, outcome: Result<(), String>) {
        if !self.controller.modes().any(|(_, choice)| choice.mode == Mode::TcEbpf) {
            self.give_kernel_up();
        }
        match (self.reloading.attempt.take(), outcome) {
            (Some(attempt), Ok(())) => self.commit(attempt),
            (Some(_), Err(reason)) => self.refuse(&anyhow::Error::msg(reason), Cause::Signal),
            (None, _) => {}
        }
        self.trace_anew();
        self.end_reload();
    }

    /// The plan is in force: the rest follows, none of which can fail any more.
    fn commit(&mut self, attempt: Attempt) {
        let Attempt { config, http, discovery, control, pins } = attempt;
        // Whoever has asked the old endpoint gets an answer before it goes.
        self.answer_requests();
        if let Some((server, _)) = http.carry_out(&mut self.http) {
            server.shutdown();
        }
        let follows = matches!(discovery, Change::Keep);
        if let Some((discovery, _)) = discovery.carry_out(&mut self.sources.discovery) {
            discovery.shutdown();
            self.sources.lost = false;
        }
        if follows && let Err(error) = self.sources.follow_services(&config) {
            tracing::error!("{error:#}");
        }
        if let Some(control) = control {
            self.control.succeed(control);
        }
        if let (Some(kernel), Some(pins)) = (&mut self.kernel, pins) {
            kernel.configure(&config.handover, pins);
        }
        self.timers.beat = Some(Instant::now());
        self.sources.follow_names(&config, self.started.elapsed());
        let old = std::mem::replace(&mut self.config, config);
        self.watch_health();
        self.look_ahead();
        self.reloading.watch_or_not(&self.config, self.poll.registry(), super::CONFIG);
        self.count_success();
        // Whoever waits for these lines may rely on all of the above.
        tell_changes(&old, &self.config);
        self.tell_modes();
    }

    fn count_success(&mut self) {
        let reloading = &mut self.reloading;
        reloading.refusal = None;
        let success = reloading.record.success + 1;
        reloading.record = Reloads { success, last_good: true, last_success: SystemTime::now(), ..reloading.record };
    }

    /// Says what is wrong. What is said already is not said again just because something else happened to the file.
    fn refuse(&mut self, error: &anyhow::Error, cause: Cause) {
        let text = error_hints::add_open_files_hint(format!("{error:#}"));
        let known = self.reloading.refusal.as_ref().is_some_and(|(_, known)| *known == text);
        if known && cause == Cause::File {
            return;
        }
        for line in text.lines() {
            tracing::error!("{line}");
        }
        let config = self.config.path.display();
        tracing::error!(%config, "configuration not reloaded: the one in force stays in force, whole");
        let record = &mut self.reloading.record;
        record.error += 1;
        record.last_good = false;
        self.reloading.refusal = Some((SystemTime::now(), text));
    }
}

impl Cause {
    fn name(self) -> &'static str {
        match self {
            Cause::Signal => "SIGHUP",
            Cause::File => "the file has changed",
        }
    }
}

/// Says which listeners are not as they were.
fn tell_changes(old: &Config, new: &Config) {
    let named = |config: &Config, name: &str| config.listeners.iter().find(|other| other.name == name).cloned();
    let mut unchanged = 0;
    for listener in &new.listeners {
        match named(old, &listener.name) {
            Some(before) if before == *listener => unchanged += 1,
            Some(_) => tell(listener, "listener changed"),
            None => tell(listener, "listener added"),
        }
    }
    for listener in old.listeners.iter().filter(|listener| named(new, &listener.name).is_none()) {
        tell(listener, "listener removed");
    }
    let config: &Path = &new.path;
    tracing::info!(config = %config.display(), listeners = new.listeners.len(), unchanged, "configuration reloaded");
}

fn tell(listener: &ListenerConfig, what: &str) {
    tracing::info!(listener = listener.name, listener_id = listener.id.0, bind = %listener.bind, "{what}");
}
