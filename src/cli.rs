//! The command line, as clap definitions. Parsing it results in an [`Invocation`], which `main` carries out.
//!
//! `run` is the default command, so its options are accepted both before and after its name. Help, shell completions and
//! the manual page (`man`) share the definitions and the text (`prose`).

mod man;
mod prose;

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

pub use man::man;

use crate::config::DEFAULT_CONFIG;
use crate::demo::DemoOptions;
use crate::detach::{self, DetachOptions};
use crate::discovery::rbac;
use crate::doctor::DoctorOptions;
use crate::logging::{LogFormat, LogLevel, LogOptions};
use crate::model::Mode;
use crate::version;

const NAME: &str = "udp-fanout";

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Invocation {
    /// Run the daemon.
    Run {
        /// The configuration file.
        config: PathBuf,
        /// Log level and format.
        log: LogOptions,
        /// The kubeconfig file, if named.
        kubeconfig: Option<PathBuf>,
        /// The status socket, instead of the configuration's.
        status_socket: Option<PathBuf>,
    },
    /// Check a configuration file, and print the effective configuration.
    Check {
        /// The configuration file.
        config: PathBuf,
    },
    /// Print the Kubernetes permissions that a configuration needs.
    Rbac {
        /// The configuration file.
        config: PathBuf,
        /// The service account's name.
        account: String,
        /// The service account's namespace.
        namespace: String,
        /// The name of the Roles and bindings, if given.
        name: Option<String>,
    },
    /// Show what the running daemon does.
    Status {
        /// The configuration file that names the status socket, if given.
        config: Option<PathBuf>,
        /// The status socket, if given.
        socket: Option<PathBuf>,
        /// JSON instead of tables.
        json: bool,
        /// Repeat until interrupted.
        watch: bool,
        /// The interval over which rates are measured.
        interval: Duration,
    },
    /// Check that the running daemon's main loop replies.
    StatusCheck {
        /// The configuration file that names the status socket, if given.
        config: Option<PathBuf>,
        /// The status socket, if given.
        socket: Option<PathBuf>,
    },
    /// Show where single datagrams go.
    Trace {
        /// The configuration file that names the status socket, if given.
        config: Option<PathBuf>,
        /// The status socket, if given.
        socket: Option<PathBuf>,
        /// Only this listener's datagrams.
        listener: Option<String>,
        /// Only datagrams from this address or prefix.
        source: Option<String>,
        /// End after so many datagrams.
        count: Option<u64>,
        /// JSON instead of text.
        json: bool,
    },
    /// Check this host for what breaks forwarding.
    Doctor(DoctorOptions),
    /// Detach programs that daemons have left.
    Detach(DetachOptions),
    /// Forward real traffic in network namespaces and check it.
    Demo(DemoOptions),
    /// Print a completion script; see [`completions`].
    Completions(Shell),
    /// Print the JSON Schema of configuration files.
    Schema,
    /// Print the manual page; see [`man`](fn@man).
    Man,
}

#[derive(Debug, Parser)]
#[command(
    name = NAME,
    version = version::long(),
    override_usage = prose::USAGE,
    about = prose::ABOUT,
    long_about = prose::long_about(),
    after_help = "`udp-fanout --help` shows details, and `udp-fanout man | man -l -` shows them as a manual page.",
    after_long_help = prose::sections_as_text(),
    max_term_width = 100,
)]
struct Cli {
    #[command(flatten)]
    before: RunArgs,
    #[command(subcommand)]
    command: Option<CliCommand>,
}

#[derive(Debug, Subcommand)]
enum CliCommand {
    /// Run the daemon; the default command
    Run(RunArgs),
    /// Check a configuration file and print the effective configuration
    ///
    /// Checks everything that does not depend on the host, and changes nothing. Prints the configuration with all defaults
    /// filled in and exits with 0; or prints what is wrong, where, and how to fix it, and exits with 1.
    Check(CheckArgs),
    /// Print the Roles and RoleBindings that a configuration needs in Kubernetes
    ///
    /// A Role and RoleBinding for each namespace in which listeners follow Services, and a ClusterRole to read nodes if a
    /// listener prefers its zone; as YAML for `kubectl apply -f -`. Reads nothing but the file.
    Rbac(RbacArgs),
    /// Show what the running daemon does
    ///
    /// Asks it twice through its status socket, to show rates. Shows listeners with their datapath and the reason for it,
    /// what they receive, forward and drop, and why; downstreams with their health, share and traffic; Kubernetes
    /// Services; and present problems. Must run as root or as the daemon's user.
    Status(StatusArgs),
    /// Show live where single datagrams go
    ///
    /// For each datagram that the kernel program handles: the time, sender and listener, the selected downstream and the
    /// egress interface; or why it was dropped or passed to the listener's socket. At most 1000 in a second. Costs nothing
    /// while no trace runs. Does not show what sockets forward. Must run as root or as the daemon's user.
    Trace(TraceArgs),
    /// Check this host for what silently breaks forwarding
    ///
    /// Checks privileges and kernel, interfaces and the programs that precede ours on them, routes and neighbours of every
    /// downstream, MTU, source validation, forwarding, buffers, ICMP, access to the Kubernetes API, and the running
    /// daemon's status. Each finding is a line: ok, warning or problem, and the fix. Changes nothing. Exits with 1 if there
    /// is a problem. Run it with the daemon's user and privileges, or as root.
    Doctor(DoctorArgs),
    /// Detach TC programs that daemons have left on this host
    ///
    /// With on_exit = "keep", and when it is killed, the daemon leaves its TC program in force. This detaches it from all
    /// interfaces of this network namespace, or from those named, and removes its pins. Prints what it has removed; finding
    /// nothing is not an error. Refuses while a daemon runs.
    Detach(DetachArgs),
    /// Forward real traffic in network namespaces of its own and check every datagram
    ///
    /// Creates a network of a sender, a gateway and three receivers, each in a network namespace, and runs a daemon in the
    /// gateway. One socket sends numbered datagrams. Prints what each receiver got, the kernel's filter and the daemon's
    /// counters, and checks them against each other. Does not touch the host's network and leaves nothing behind. Needs
    /// root, and ip and tc (iproute2). Exits with 1 if a check fails.
    Demo(DemoArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell to print it for
        shell: Shell,
    },
    /// Print the manual page in roff
    Man,
    /// Print the JSON Schema of configuration files, for editors
    ///
    /// Draft 2020-12, with every key, its type, range, default, meaning and an example. Editors that understand JSON
    /// Schema complete and check TOML and YAML files by it. `udp-fanout check` checks more: what takes several keys, and the
    /// inside of texts such as addresses.
    Schema,
}

#[derive(Debug, Default, Args)]
struct ConfigArg {
    /// Configuration file: TOML, or YAML if its name ends in .yaml or .yml [default: /etc/udp-fanout/config.toml]
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Default, Args)]
struct RunArgs {
    #[command(flatten)]
    file: ConfigArg,
    /// Lowest severity to log; RUST_LOG takes precedence [default: info]
    #[arg(short, long, value_name = "LEVEL", value_enum, ignore_case = true)]
    log_level: Option<LogLevel>,
    /// Format of the log on standard error [default: text]
    #[arg(long, value_name = "FORMAT", value_enum, ignore_case = true)]
    log_format: Option<LogFormat>,
    /// kubeconfig file for the Kubernetes API [default: the pod's service account, else $KUBECONFIG, else ~/.kube/config]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Unix socket for `udp-fanout status` and `trace`, instead of the configuration's status_socket
    #[arg(long, value_name = "PATH")]
    status_socket: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct RbacArgs {
    #[command(flatten)]
    file: ConfigArg,
    /// Service account that gets the permissions
    #[arg(long, value_name = "NAME", default_value = rbac::DEFAULT_ACCOUNT)]
    service_account: String,
    /// Namespace of the service account, and of Services that name none
    #[arg(long, value_name = "NAMESPACE", default_value = rbac::DEFAULT_ACCOUNT)]
    service_account_namespace: String,
    /// Name of the Roles and bindings [default: udp-fanout, or udp-fanout-NAMESPACE-ACCOUNT for another account]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
}

#[derive(Debug, Args)]
struct CheckArgs {
    #[command(flatten)]
    file: ConfigArg,
}

#[derive(Debug, Args)]
struct StatusArgs {
    #[command(flatten)]
    file: ConfigArg,
    /// The daemon's status socket [default: status_socket of the configuration]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Print nothing and exit with 0 if the daemon's main loop replies within two seconds; else print why not and exit with 1
    #[arg(long, conflicts_with_all = ["json", "watch", "interval"])]
    check: bool,
    /// Print JSON, one line per report
    #[arg(long)]
    json: bool,
    /// Repeat every interval until interrupted
    #[arg(short, long)]
    watch: bool,
    /// Seconds over which rates are measured, from 0.1 to 3600
    #[arg(long, value_name = "SECS", default_value = "1", value_parser = interval)]
    interval: Duration,
}

#[derive(Debug, Args)]
struct TraceArgs {
    #[command(flatten)]
    file: ConfigArg,
    /// The daemon's status socket [default: status_socket of the configuration]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Only datagrams of this listener
    #[arg(long, value_name = "NAME")]
    listener: Option<String>,
    /// Only datagrams from this address or prefix
    #[arg(long, value_name = "CIDR")]
    source: Option<String>,
    /// End after so many datagrams
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Print JSON, one line per datagram
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct DoctorArgs {
    #[command(flatten)]
    file: ConfigArg,
    /// Also check whether the host accepts datagrams from this address; may be repeated
    #[arg(long, value_name = "IP")]
    sender: Vec<IpAddr>,
    /// kubeconfig file for the Kubernetes API, as for run
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct DetachArgs {
    #[command(flatten)]
    file: ConfigArg,
    /// Only from this interface; may be repeated
    #[arg(short, long, value_name = "NAME")]
    interface: Vec<String>,
    /// From all interfaces, as without --interface; and also remove the pins of other network namespaces
    #[arg(long, conflicts_with = "interface")]
    all: bool,
    /// Directory of the pins [default: pin_path of the configuration]
    #[arg(long, value_name = "PATH")]
    pin_path: Option<PathBuf>,
    /// Even while a daemon runs; it attaches its program again within seconds
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
struct DemoArgs {
    /// How the daemon forwards
    #[arg(long, value_name = "MODE", default_value = "tc_ebpf", value_parser = mode())]
    mode: Mode,
    /// How many datagrams to send, at most 100000000
    #[arg(long, value_name = "N", default_value_t = 30_000, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    count: u64,
}

/// Reads the name of a datapath.
fn mode() -> impl TypedValueParser<Value = Mode> {
    let names = [Mode::TcEbpf, Mode::Userspace].map(Mode::name);
    PossibleValuesParser::new(names)
        .map(|name| if name == Mode::TcEbpf.name() { Mode::TcEbpf } else { Mode::Userspace })
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds: &f64| (0.1..=3600.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "expected seconds from 0.1 to 3600".to_owned())
}

/// Parses the process's command line. Ends the process after `--help` or `--version` (exit code 0) and after an error
/// (exit code 2).
#[must_use]
pub fn parse() -> Invocation {
    try_parse_from(std::env::args_os()).unwrap_or_else(|error| error.exit())
}

/// Parses a command line that begins with the program's name.
///
/// # Errors
/// Also for `--help` and `--version`, as clap has it.
pub fn try_parse_from<I, T>(arguments: I) -> Result<Invocation, clap::Error>
where
    I: IntoIterator<Item = T>,
    T: Into<OsString> + Clone,
{
    let Cli { before, command } = Cli::try_parse_from(arguments)?;
    Ok(match command {
        None => run(before),
        Some(CliCommand::Run(after)) => run(RunArgs {
            file: ConfigArg { config: once("--config <FILE>", before.file.config, after.file.config)? },
            log_level: once("--log-level <LEVEL>", before.log_level, after.log_level)?,
            log_format: once("--log-format <FORMAT>", before.log_format, after.log_format)?,
            kubeconfig: once("--kubeconfig <FILE>", before.kubeconfig, after.kubeconfig)?,
            status_socket: once("--status-socket <PATH>", before.status_socket, after.status_socket)?,
        }),
        Some(CliCommand::Check(after)) => {
            Invocation::Check { config: or_default(only_config("check", before, after.file)?) }
        }
        Some(CliCommand::Status(StatusArgs { file, socket, check: true, .. })) => {
            Invocation::StatusCheck { config: only_config("status", before, file)?, socket }
        }
        Some(CliCommand::Status(StatusArgs { file, socket, check: false, json, watch, interval })) => {
            Invocation::Status { config: only_config("status", before, file)?, socket, json, watch, interval }
        }
        Some(CliCommand::Trace(TraceArgs { file, socket, listener, source, count, json })) => {
            let config = only_config("trace", before, file)?;
            Invocation::Trace { config, socket, listener, source, count, json }
        }
        Some(CliCommand::Rbac(after)) => {
            let config = only_config("rbac", before, after.file)?;
            let (account, namespace) = (after.service_account, after.service_account_namespace);
            Invocation::Rbac { config: or_default(config), account, namespace, name: after.name }
        }
        Some(CliCommand::Doctor(DoctorArgs { file, sender, kubeconfig, json })) => {
            let config = or_default(only_config("doctor", before, file)?);
            Invocation::Doctor(DoctorOptions { config, senders: sender, kubeconfig, json })
        }
        Some(CliCommand::Detach(DetachArgs { file, interface, all, pin_path, force })) => {
            let config = only_config("detach", before, file)?;
            let pin_path = detach::pin_path(config.as_deref(), pin_path);
            Invocation::Detach(DetachOptions { pin_path, interfaces: interface, all, force })
        }
        Some(CliCommand::Demo(DemoArgs { mode, count })) => {
            no_options("demo", &before)?;
            Invocation::Demo(DemoOptions { mode, count })
        }
        Some(CliCommand::Completions { shell }) => {
            no_options("completions", &before)?;
            Invocation::Completions(shell)
        }
        Some(CliCommand::Man) => {
            no_options("man", &before)?;
            Invocation::Man
        }
        Some(CliCommand::Schema) => {
            no_options("schema", &before)?;
            Invocation::Schema
        }
    })
}

fn run(args: RunArgs) -> Invocation {
    let log = LogOptions { level: args.log_level.unwrap_or_default(), format: args.log_format.unwrap_or_default() };
    let RunArgs { file, kubeconfig, status_socket, .. } = args;
    Invocation::Run { config: or_default(file.config), log, kubeconfig, status_socket }
}

/// The configuration file, the only option that other commands than `run` accept before their name.
fn only_config(command: &str, before: RunArgs, after: ConfigArg) -> Result<Option<PathBuf>, clap::Error> {
    let config = once("--config <FILE>", before.file.config.clone(), after.config)?;
    no_options(command, &RunArgs { file: ConfigArg::default(), ..before })?;
    Ok(config)
}

fn or_default(config: Option<PathBuf>) -> PathBuf {
    config.unwrap_or_else(|| PathBuf::from(DEFAULT_CONFIG))
}

/// An option given before or after the command's name. Giving it twice is an error, which clap cannot see here.
fn once<T>(option: &str, before: Option<T>, after: Option<T>) -> Result<Option<T>, clap::Error> {
    if before.is_some() && after.is_some() {
        return Err(conflict(&format!("the argument '{option}' cannot be used multiple times")));
    }
    Ok(after.or(before))
}

fn no_options(command: &str, before: &RunArgs) -> Result<(), clap::Error> {
    not_with(command, "--config <FILE>", before.file.config.is_some())?;
    not_with(command, "--log-level <LEVEL>", before.log_level.is_some())?;
    not_with(command, "--log-format <FORMAT>", before.log_format.is_some())?;
    not_with(command, "--kubeconfig <FILE>", before.kubeconfig.is_some())?;
    not_with(command, "--status-socket <PATH>", before.status_socket.is_some())
}

fn not_with(command: &str, option: &str, given: bool) -> Result<(), clap::Error> {
    if given {
        return Err(conflict(&format!("the argument '{option}' cannot be used with '{command}'")));
    }
    Ok(())
}

fn conflict(message: &str) -> clap::Error {
    command().error(ErrorKind::ArgumentConflict, message)
}

/// The clap definitions.
#[must_use]
pub fn command() -> clap::Command {
    Cli::command()
}

/// A shell's completion script.
#[must_use]
pub fn completions(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command(), NAME, &mut script);
    script
}

#[cfg(test)]
mod tests;
