//! The log: lines on standard error, as text or JSON.
//!
//! [`init`] reads the environment once (terminal, journal, variables) and configures `tracing` from it. [`stream`] writes the
//! lines without blocking: a line that cannot be written is dropped and counted, because forwarding matters more.

#[cfg(test)]
pub(crate) mod capture;
mod stream;

use std::io::IsTerminal;

use anyhow::{Context, anyhow};
use clap::ValueEnum;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{self, FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::{LookupSpan, Registry};
use tracing_subscriber::util::SubscriberInitExt;

pub use self::stream::take_lost_lines;

/// Filter directives that silence the kube crates. Discovery logs each failure once, with a remedy, while they repeat it with
/// every attempt.
const SILENCED_CRATES: &str = "kube_client=off,kube_runtime=off";

/// What to log, and in which format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LogOptions {
    /// The least severe level of this program's messages. Libraries log warnings and errors at most.
    pub level: LogLevel,
    /// For people or for programs.
    pub format: LogFormat,
}

/// Severity of messages; each level includes those above it. The variants' comments are the help of `--log-level`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, ValueEnum)]
pub enum LogLevel {
    /// Nothing
    Off,
    /// What fails
    Error,
    /// What may need attention
    Warn,
    /// What has changed
    #[default]
    Info,
    /// Details of decisions
    Debug,
    /// Every step
    Trace,
}

impl LogLevel {
    fn name(self) -> &'static str {
        match self {
            LogLevel::Off => "off",
            LogLevel::Error => "error",
            LogLevel::Warn => "warn",
            LogLevel::Info => "info",
            LogLevel::Debug => "debug",
            LogLevel::Trace => "trace",
        }
    }
}

/// The format of log lines. The variants' comments are the help of `--log-format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum LogFormat {
    /// Lines for people and for grep: time, level, message, key=value ...
    #[default]
    Text,
    /// One JSON object per line
    Json,
}

/// The facts about the process that the log depends on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct LogEnvironment {
    rust_log: Option<String>,
    no_color: bool,
    terminal: bool,
    journal: bool,
}

impl LogEnvironment {
    fn of_process() -> anyhow::Result<Self> {
        let rust_log = match std::env::var("RUST_LOG") {
            Ok(directives) => Some(directives),
            Err(std::env::VarError::NotPresent) => None,
            Err(std::env::VarError::NotUnicode(_)) => return Err(bad_rust_log("it is not UTF-8")),
        };
        let stderr = nix::sys::stat::fstat(std::io::stderr()).ok();
        Ok(LogEnvironment {
            rust_log,
            no_color: std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()),
            terminal: std::io::stderr().is_terminal(),
            journal: is_journal(
                std::env::var("JOURNAL_STREAM").ok().as_deref(),
                stderr.map(|stat| (stat.st_dev, stat.st_ino)),
            ),
        })
    }
}

/// True if standard error still is the stream that systemd connected to the journal. `JOURNAL_STREAM` contains that stream's
/// device and inode.
fn is_journal(journal_stream: Option<&str>, stderr: Option<(u64, u64)>) -> bool {
    let named = journal_stream.and_then(|value| {
        let (device, inode) = value.split_once(':')?;
        Some((device.parse().ok()?, inode.parse().ok()?))
    });
    named.is_some() && named == stderr
}

/// Puts the priority of syslog(3) in front of a line, as the journal understands it from sd-daemon(3): `journalctl -p err`
/// shows errors alone. The journal does not keep the prefix.
struct JournalFormat<F>(F);

impl<S, N, F> FormatEvent<S, N> for JournalFormat<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        let priority = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        write!(writer, "<{priority}>")?;
        self.0.format_event(context, writer, event)
    }
}

/// Starts logging to standard error, for the whole process.
///
/// # Errors
/// When `RUST_LOG` is invalid, or logging has already been started.
pub fn init(options: LogOptions) -> anyhow::Result<()> {
    let environment = LogEnvironment::of_process()?;
    subscriber(options, &environment, stream::NonBlockingWriter::new(std::io::stderr()))?
        .try_init()
        .context("cannot start logging")
}

fn subscriber<W>(
    options: LogOptions,
    environment: &LogEnvironment,
    writer: W,
) -> anyhow::Result<impl Subscriber + Send + Sync + use<W>>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let lines = fmt::layer()
        .with_writer(writer)
        .with_target(false)
        .with_ansi(environment.terminal && !environment.no_color)
        // Otherwise, a failed write is reported with eprintln!, which panics because standard error is what failed.
        .log_internal_errors(false);
    let lines: Box<dyn Layer<Registry> + Send + Sync> = match options.format {
        LogFormat::Text if environment.journal => lines.without_time().map_event_format(JournalFormat).boxed(),
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().with_target(true).flatten_event(true).with_current_span(false).boxed(),
    };
    Ok(tracing_subscriber::registry().with(lines).with(filter(options.level, environment.rust_log.as_deref())?))
}

fn filter(level: LogLevel, rust_log: Option<&str>) -> anyhow::Result<EnvFilter> {
    match rust_log.map(str::trim).filter(|directives| !directives.is_empty()) {
        Some(directives) => EnvFilter::try_new(directives).map_err(|error| bad_rust_log(&error.to_string())),
        None => {
            let others = level.min(LogLevel::Warn).name();
            let directives = format!("{others},{SILENCED_CRATES},udp_fanout={}", level.name());
            EnvFilter::try_new(directives).context("cannot set the log level")
        }
    }
}

fn bad_rust_log(reason: &str) -> anyhow::Error {
    anyhow!(
        "environment variable RUST_LOG: {reason}; set it to a level such as `debug`, to `udp_fanout=debug`, or unset it"
    )
}

#[cfg(test)]
mod tests;
