//! The program: parses the command line, runs what it asks for, and turns the result into an exit code.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;

use crate::cli::{self, Invocation};
use crate::config::{Config, ListenerConfig, keys};
use crate::control::client::StatusClient;
use crate::control::{status_command, trace_command};
use crate::discovery::rbac::{self, Installation, ServiceAccount};
use crate::logging::LogOptions;
use crate::{demo, detach, doctor, event_loop, logging, output, version};

/// Runs the program with the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let result = match cli::parse() {
        Invocation::Run { config, log, kubeconfig, status_socket } => {
            return run(&config, log, event_loop::DaemonOptions { kubeconfig, status_socket });
        }
        Invocation::Doctor(options) => return report(doctor::run(&options)),
        Invocation::Demo(options) => return report(demo::run(options)),
        Invocation::Check { config } => check(&config),
        Invocation::Rbac { config, account, namespace, name } => rbac(&config, &account, &namespace, name.as_deref()),
        Invocation::Status { config, socket, json, watch, interval } => {
            let socket = status_command::socket(config.as_deref(), socket);
            status_command::run(&status_command::StatusOptions { socket, json, watch, interval })
        }
        Invocation::StatusCheck { config, socket } => {
            StatusClient::check(&status_command::socket(config.as_deref(), socket))
        }
        Invocation::Trace { config, socket, listener, source, count, json } => {
            let socket = status_command::socket(config.as_deref(), socket);
            trace_command::run(&trace_command::TraceOptions { socket, listener, source, count, json })
        }
        Invocation::Detach(options) => detach::run(&options),
        Invocation::Completions(shell) => output::print(&cli::completions(shell)),
        Invocation::Schema => output::print(keys::json_schema().as_bytes()),
        Invocation::Man => cli::man().map_err(Into::into).and_then(|page| output::print(&page)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// `EX_CONFIG` of sysexits.h: the configuration file does not exist, so starting again is of no use before someone creates
/// it. The systemd unit has it in `RestartPreventExitStatus=`.
const NO_CONFIG_FILE: u8 = 78;

/// Runs the daemon. Errors are lines of the log, in its format.
fn run(config: &Path, log: LogOptions, options: event_loop::DaemonOptions) -> ExitCode {
    if let Err(error) = logging::init(log) {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    tracing::info!(version = version::long(), config = %config.display(), "starting udp-fanout");
    let missing = std::fs::metadata(config).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
    let config = Config::load(config).inspect(|config| {
        for warning in &config.warnings {
            tracing::warn!("{warning}");
        }
    });
    match config.and_then(|config| event_loop::run(config, options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            for line in format!("{error:#}").lines() {
                tracing::error!("{line}");
            }
            if missing { ExitCode::from(NO_CONFIG_FILE) } else { ExitCode::FAILURE }
        }
    }
}

fn rbac(config: &Path, account: &str, namespace: &str, name: Option<&str>) -> Result<()> {
    let installation = Installation::new(ServiceAccount::new(account, namespace)?, name)?;
    let config = Config::load(config)?;
    let requests: Vec<_> = config.listeners.iter().filter_map(ListenerConfig::discovery_request).collect();
    if requests.is_empty() {
        eprintln!("{}: no listener follows a Kubernetes Service, so no permissions are needed", config.path.display());
    }
    output::print(rbac::manifests(&requests, &installation).as_bytes())
}

/// The exit code of a command whose checks may fail.
fn report(passed: Result<bool>) -> ExitCode {
    match passed {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn check(config: &Path) -> Result<()> {
    let config = Config::load(config)?;
    for warning in &config.warnings {
        eprintln!("{}: warning: {warning}", config.path.display());
    }
    output::print(config.render().as_bytes())
}
