//! The daemon's process in a lab's gateway: its configuration, start, readiness and end. Dropping it ends the process.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::cleanup::{self, TempDirectory};
use super::netns::Namespace;
use super::scrape::{self, Metrics};
use super::topology::{INGRESS, Lab};

/// Timeout of every wait for the daemon. A passing test never reaches it.
const LIMIT: Duration = Duration::from_secs(30);
/// How often readiness is polled while the daemon prints nothing.
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// A configuration, written as TOML.
#[derive(Debug, Clone)]
pub struct DaemonConfig {
    /// At least one.
    pub listeners: Vec<ListenerSpec>,
    /// Address of metrics and probes; none omits the section.
    pub metrics: Option<SocketAddr>,
    /// Lines of TOML before the first section.
    pub head: String,
}

/// One listener of a [`DaemonConfig`].
#[derive(Debug, Clone)]
pub struct ListenerSpec {
    /// The listener's `name`.
    pub name: String,
    /// The listener's `bind` address.
    pub bind: String,
    /// The listener's `interface`; none omits the key.
    pub interface: Option<String>,
    /// `tc_ebpf`, `userspace` or `auto`.
    pub mode: String,
    /// Name, address and weight of each downstream.
    pub downstreams: Vec<(String, SocketAddr, u32)>,
    /// The `sample` of downstreams that have one, by name.
    pub samples: Vec<(String, f64)>,
    /// Further lines of TOML for the listener itself, such as `policy = "…"`.
    pub extra: String,
    /// Lines of TOML for its `settings`.
    pub settings: String,
}

/// Arguments and environment of the daemon's process.
#[derive(Debug, Clone, Default)]
pub struct Surroundings {
    /// Arguments at the end of the command line.
    pub arguments: Vec<String>,
    /// Environment variables.
    pub environment: Vec<(String, String)>,
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    lines: Receiver<String>,
    log: String,
    metrics: Option<SocketAddr>,
    ended: Option<ExitStatus>,
    directory: TempDirectory,
}

impl DaemonConfig {
    /// A configuration with one listener, named `lab`, on the lab's listener address, with all of the lab's receivers as
    /// downstreams, and metrics on 127.0.0.1:9090 inside the gateway.
    pub fn for_lab(lab: &Lab, mode: &str) -> Self {
        let listener = ListenerSpec {
            name: "lab".into(),
            bind: lab.listener().to_string(),
            interface: (mode != "userspace").then(|| INGRESS.to_owned()),
            mode: mode.to_owned(),
            downstreams: lab.sites.iter().map(|site| (site.name.clone(), site.address, 1)).collect(),
            samples: Vec::new(),
            extra: String::new(),
            settings: String::new(),
        };
        DaemonConfig {
            listeners: vec![listener],
            metrics: Some(SocketAddr::from(([127, 0, 0, 1], 9090))),
            head: String::new(),
        }
    }

    /// Sets the `settings` of the first listener, as lines of TOML.
    pub fn settings(mut self, lines: &str) -> Self {
        if let Some(listener) = self.listeners.first_mut() {
            lines.clone_into(&mut listener.settings);
        }
        self
    }

    /// Sets further keys of the first listener, as lines of TOML.
    pub fn extra(mut self, lines: &str) -> Self {
        if let Some(listener) = self.listeners.first_mut() {
            lines.clone_into(&mut listener.extra);
        }
        self
    }

    /// The text of the configuration file.
    pub fn to_toml(&self) -> String {
        let mut text = format!("{}\n", self.head);
        for listener in &self.listeners {
            listener.write(&mut text);
        }
        if let Some(bind) = self.metrics {
            let _ = write!(text, "[metrics]\nenabled = true\nbind = \"{bind}\"\npath = \"/metrics\"\n");
        }
        text
    }
}

impl ListenerSpec {
    fn write(&self, text: &mut String) {
        let ListenerSpec { name, bind, mode, extra, .. } = self;
        let _ = write!(text, "[[listeners]]\nname = \"{name}\"\nbind = \"{bind}\"\nmode = \"{mode}\"\n{extra}\n");
        if let Some(interface) = &self.interface {
            let _ = writeln!(text, "interface = \"{interface}\"");
        }
        if !self.settings.is_empty() {
            let _ = writeln!(text, "[listeners.settings]\n{}", self.settings);
        }
        for (name, address, weight) in &self.downstreams {
            let _ = write!(
                text,
                "[[listeners.downstream]]\nname = \"{name}\"\naddress = \"{address}\"\nweight = {weight}\n"
            );
            for (_, part) in self.samples.iter().filter(|(of, _)| of == name) {
                let _ = writeln!(text, "sample = {part}");
            }
        }
    }
}

impl Daemon {
    /// Starts the daemon in a namespace and waits until it is ready.
    ///
    /// # Errors
    /// When it ends or is not ready in time; the error contains its log.
    pub fn start(namespace: &Namespace, binary: &Path, config: &DaemonConfig) -> Result<Self> {
        Self::start_behind(namespace, &[], binary, config)
    }

    /// As [`Daemon::start`], with a wrapper command that executes the rest of its command line, such as `setpriv`.
    ///
    /// # Errors
    /// As for [`Daemon::start`].
    pub fn start_behind(namespace: &Namespace, before: &[&str], binary: &Path, config: &DaemonConfig) -> Result<Self> {
        let mut daemon = Self::spawn_behind(namespace, before, binary, &config.to_toml(), &Surroundings::default())?;
        daemon.metrics = config.metrics;
        daemon.wait_until_ready(namespace, config.listeners.len())?;
        Ok(daemon)
    }

    /// Starts the daemon in a namespace with these arguments and this environment, without waiting.
    ///
    /// # Errors
    /// When the binary cannot be executed.
    pub fn spawn_in(
        namespace: &Namespace,
        binary: &Path,
        config: &DaemonConfig,
        surroundings: &Surroundings,
    ) -> Result<Self> {
        let mut daemon = Self::spawn_behind(namespace, &[], binary, &config.to_toml(), surroundings)?;
        daemon.metrics = config.metrics;
        Ok(daemon)
    }

    /// Starts the daemon in a namespace with an arbitrary configuration text.
    ///
    /// # Errors
    /// When the binary cannot be executed.
    pub fn spawn(namespace: &Namespace, binary: &Path, config: &str) -> Result<Self> {
        Self::spawn_behind(namespace, &[], binary, config, &Surroundings::default())
    }

    /// As [`Daemon::spawn`], with a wrapper command, arguments and an environment.
    ///
    /// # Errors
    /// When the binary cannot be executed.
    pub fn spawn_behind(
        namespace: &Namespace,
        before: &[&str],
        binary: &Path,
        config: &str,
        surroundings: &Surroundings,
    ) -> Result<Self> {
        let directory = TempDirectory::new()?;
        let path: PathBuf = directory.path().join("config.toml");
        fs::write(&path, config)?;
        let mut words = before.iter().map(OsStr::new).chain([binary.as_os_str()]);
        let mut command = namespace.command(words.next().unwrap_or(binary.as_os_str()));
        command.args(words).args(["run", "--config"]).arg(&path).args(&surroundings.arguments);
        // Nothing from the caller's environment: above all, no access to the caller's cluster.
        for name in ["RUST_LOG", "KUBECONFIG", "KUBERNETES_SERVICE_HOST", "NODE_NAME"] {
            command.env_remove(name);
        }
        command.env("NO_COLOR", "1").env("HOME", directory.path());
        command.envs(surroundings.environment.iter().map(|(name, value)| (name, value)));
        command.arg("--status-socket").arg(status_socket(&directory)?);
        // Its own process group: Ctrl-C reaches only this process, which then ends the daemon.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
        let mut registry = cleanup::registry();
        let mut child = command.spawn().with_context(|| format!("cannot run {}", binary.display()))?;
        registry.add_child(pid_of(&child));
        drop(registry);
        let lines = read_lines(child.stderr.take());
        Ok(Daemon { child, lines, log: String::new(), metrics: None, ended: None, directory })
    }

    /// Waits for a log line that contains `needle`, among the lines not read yet, and returns it.
    ///
    /// # Errors
    /// When the daemon ends or the wait times out; the error contains its log.
    pub fn wait_for_line(&mut self, needle: &str) -> Result<String> {
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.next_line(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.contains(needle) => return Ok(line),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    bail!("timed out waiting for a log line with {needle:?}; the log:\n{}", self.log)
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the daemon ended without logging {needle:?}; the log:\n{}", self.log)
                }
            }
        }
    }

    /// Waits for a log line that contains `needle`, including lines already read, and returns it.
    ///
    /// # Errors
    /// As for [`Daemon::wait_for_line`].
    pub fn wait_for_logged(&mut self, needle: &str) -> Result<String> {
        match self.log().lines().find(|line| line.contains(needle)) {
            Some(line) => Ok(line.to_owned()),
            None => self.wait_for_line(needle),
        }
    }

    /// The log lines read so far. The latest lines may not have been read yet.
    pub fn log(&mut self) -> &str {
        while self.next_line(Duration::ZERO).is_ok() {}
        &self.log
    }

    /// Path of the status socket.
    pub fn status_socket(&self) -> PathBuf {
        self.directory.path().join("run/status.sock")
    }

    /// The process id.
    pub fn pid(&self) -> Pid {
        pid_of(&self.child)
    }

    /// Path of the configuration file.
    pub fn config_path(&self) -> PathBuf {
        self.directory.path().join("config.toml")
    }

    /// Replaces the configuration file atomically.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_config(&self, text: &str) -> Result<()> {
        let new = self.directory.path().join("config.toml.new");
        fs::write(&new, text)?;
        fs::rename(&new, self.config_path()).context("cannot replace the configuration file")
    }

    /// Replaces the configuration, sends `SIGHUP`, and waits until the daemon has logged the reload.
    ///
    /// # Errors
    /// When that does not happen in time.
    pub fn reload(&mut self, text: &str) -> Result<String> {
        self.write_config(text)?;
        self.signal(Signal::SIGHUP)?;
        self.wait_for_line("configuration reloaded")
    }

    /// Fetches the metrics.
    ///
    /// # Errors
    /// When the configuration has no metrics section or the page cannot be fetched.
    pub fn metrics(&self, namespace: &Namespace) -> Result<Metrics> {
        let address = self.metrics.context("this daemon serves no metrics")?;
        Metrics::scrape(namespace, address, "/metrics")
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When the daemon has already ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid(), signal).with_context(|| format!("cannot send {signal} to the daemon"))
    }

    /// Sends `SIGTERM` and returns the exit status, the time until the end, and the whole log.
    ///
    /// # Errors
    /// When the daemon does not end in time.
    pub fn stop(mut self) -> Result<(ExitStatus, Duration, String)> {
        self.signal(Signal::SIGTERM)?;
        let start = Instant::now();
        let status = self.wait()?;
        let took = start.elapsed();
        Ok((status, took, std::mem::take(&mut self.log)))
    }

    /// Waits until the daemon ends by itself.
    ///
    /// # Errors
    /// When that does not happen in time.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        let handle = cleanup::pidfd(self.pid()).context("cannot watch the daemon")?;
        if !cleanup::wait_readable(&handle, LIMIT) {
            bail!("the daemon did not end in time; its log:\n{}", self.log());
        }
        let mut registry = cleanup::registry();
        registry.unregister_child(self.pid());
        let status = self.child.wait()?;
        drop(registry);
        self.ended = Some(status);
        // The pipe is closed now, so the thread ends.
        while self.next_line(LIMIT).is_ok() {}
        Ok(status)
    }

    /// Waits until `/readyz` answers 200, or, without metrics, until every listener has logged its downstreams.
    ///
    /// # Errors
    /// When it ends or is not ready in time; the error contains its log.
    pub fn wait_until_ready(&mut self, namespace: &Namespace, listeners: usize) -> Result<()> {
        let Some(address) = self.metrics else {
            for _ in 0..listeners {
                self.wait_for_line("downstream set")?;
            }
            return Ok(());
        };
        let deadline = Instant::now() + LIMIT;
        loop {
            // Each log line triggers another poll. A refused connection means that the daemon is not listening yet.
            if scrape::get(namespace, address, "/readyz").is_ok_and(|page| page.status == 200) {
                self.log();
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the daemon did not become ready in time; its log:\n{}", self.log());
            }
            let no_more_lines = self.next_line(ASK_AGAIN) == Err(RecvTimeoutError::Disconnected);
            // The log may not go to this pipe.
            if no_more_lines && cleanup::wait_readable(&cleanup::pidfd(self.pid())?, ASK_AGAIN) {
                let status = self.wait()?;
                bail!("the daemon ended with {status}:\n{}", self.log);
            }
        }
    }

    fn next_line(&mut self, limit: Duration) -> Result<String, RecvTimeoutError> {
        let line = self.lines.recv_timeout(limit)?;
        self.log += &line;
        self.log.push('\n');
        Ok(line)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let mut registry = cleanup::registry();
        if self.ended.is_none() {
            registry.unregister_child(self.pid());
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A socket path in a directory that the daemon's user can write to.
fn status_socket(directory: &TempDirectory) -> Result<PathBuf> {
    let run = directory.path().join("run");
    fs::create_dir(&run)?;
    fs::set_permissions(&run, Permissions::from_mode(0o777))?;
    Ok(run.join("status.sock"))
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

/// Reads lines on a thread, so that a wait for one can time out and the pipe never fills up.
fn read_lines(stderr: Option<impl Read + Send + 'static>) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    if let Some(stderr) = stderr {
        thread::spawn(move || {
            for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
                if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                    break;
                }
            }
        });
    }
    receiver
}
