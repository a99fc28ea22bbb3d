//! Entry point: reads the command line, hands over to the library, turns its answer into an exit code.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use udp_fanout::cli::{self, Invocation};
use udp_fanout::config::Config;
use udp_fanout::{event_loop, logging, version};

fn main() -> ExitCode {
    let result = match cli::parse() {
        Invocation::Run { config, log } => return run(&config, log),
        Invocation::Check { config } => check(&config),
        Invocation::Completions(shell) => cli::print(&cli::completions(shell)),
        Invocation::Man => cli::man().map_err(Into::into).and_then(|page| cli::print(&page)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Is the daemon. What goes wrong is a line in the log, in the log's format.
fn run(config: &Path, log: logging::Options) -> ExitCode {
    if let Err(error) = logging::init(log) {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    tracing::info!(version = version::long(), config = %config.display(), "starting udp-fanout");
    let config = Config::load(config).inspect(|config| {
        for warning in &config.warnings {
            tracing::warn!("{warning}");
        }
    });
    match config.and_then(event_loop::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            for line in format!("{error:#}").lines() {
                tracing::error!("{line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn check(config: &Path) -> Result<()> {
    let config = Config::load(config)?;
    for warning in &config.warnings {
        eprintln!("{}: warning: {warning}", config.path.display());
    }
    cli::print(config.render().as_bytes())
}
