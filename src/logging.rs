//! The log: lines on standard error, as text or JSON.
//!
//! The surroundings (terminal, journal, environment) are looked at once, in [`init`]; what follows from them is decided
//! by pure code. A log that cannot be written is lost and nothing else happens: forwarding datagrams matters more; [`stream`]
//! sees to that.

#[cfg(test)]
pub(crate) mod capture;
mod stream;

use std::io::IsTerminal;

use anyhow::{Context, anyhow};
use clap::ValueEnum;
use tracing::Subscriber;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::fmt::{self, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::Registry;
use tracing_subscriber::util::SubscriberInitExt;

pub use self::stream::take_lost;

/// What to log, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// The least severe of our messages that is logged. Libraries log warnings and errors, unless this is less.
    pub level: Level,
    /// How it is written.
    pub format: Format,
}

/// Severity of messages; each level includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, ValueEnum)]
pub enum Level {
    /// Nothing
    Off,
    /// What does not work
    Error,
    /// What may need attention
    Warn,
    /// What has changed
    #[default]
    Info,
    /// How it came to that
    Debug,
    /// Every step
    Trace,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Level::Off => "off",
            Level::Error => "error",
            Level::Warn => "warn",
            Level::Info => "info",
            Level::Debug => "debug",
            Level::Trace => "trace",
        }
    }
}

/// How messages are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    /// A line for people, and for grep: time, level, message, key=value ...
    #[default]
    Text,
    /// A JSON object a line
    Json,
}

/// Facts about the process that the log's looks depend on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Surroundings {
    rust_log: Option<String>,
    no_color: bool,
    terminal: bool,
    journal: bool,
}

impl Surroundings {
    fn of_process() -> anyhow::Result<Self> {
        let rust_log = match std::env::var("RUST_LOG") {
            Ok(directives) => Some(directives),
            Err(std::env::VarError::NotPresent) => None,
            Err(std::env::VarError::NotUnicode(_)) => return Err(bad_rust_log("it is not UTF-8")),
        };
        let stderr = nix::sys::stat::fstat(std::io::stderr()).ok();
        Ok(Surroundings {
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

/// Whether standard error is the stream to the journal that systemd has set up: it names it by device and inode, so
/// that a process whose output was sent elsewhere since can tell.
fn is_journal(journal_stream: Option<&str>, stderr: Option<(u64, u64)>) -> bool {
    let named = journal_stream.and_then(|value| {
        let (device, inode) = value.split_once(':')?;
        Some((device.parse().ok()?, inode.parse().ok()?))
    });
    named.is_some() && named == stderr
}

/// Starts logging to standard error, for the whole process.
///
/// # Errors
/// When `RUST_LOG` makes no sense, or logging has been started before.
pub fn init(options: Options) -> anyhow::Result<()> {
    let surroundings = Surroundings::of_process()?;
    subscriber(options, &surroundings, stream::Lines::new(std::io::stderr()))?
        .try_init()
        .context("cannot start logging")
}

fn subscriber<W>(
    options: Options,
    surroundings: &Surroundings,
    writer: W,
) -> anyhow::Result<impl Subscriber + Send + Sync + use<W>>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let lines = fmt::layer()
        .with_writer(writer)
        .with_target(false)
        .with_ansi(surroundings.terminal && !surroundings.no_color)
        // A failed write would be reported with eprintln!, which panics where standard error is what failed.
        .log_internal_errors(false);
    let lines: Box<dyn Layer<Registry> + Send + Sync> = match options.format {
        Format::Text if surroundings.journal => lines.without_time().boxed(),
        Format::Text => lines.boxed(),
        Format::Json => lines.json().with_target(true).flatten_event(true).with_current_span(false).boxed(),
    };
    Ok(tracing_subscriber::registry().with(lines).with(filter(options.level, surroundings.rust_log.as_deref())?))
}

fn filter(level: Level, rust_log: Option<&str>) -> anyhow::Result<EnvFilter> {
    match rust_log.map(str::trim).filter(|directives| !directives.is_empty()) {
        Some(directives) => EnvFilter::try_new(directives).map_err(|error| bad_rust_log(&error.to_string())),
        None => {
            let others = level.min(Level::Warn).name();
            let silenced = crate::discovery::LOG_DIRECTIVES.join(",");
            let directives = format!("{others},{silenced},udp_fanout={}", level.name());
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
