//! The command line: what can be asked of the program, as clap definitions, and nothing of how it is done.
//!
//! `run` is the command when none is named, so its options are accepted before the command's name as well as after
//! it. [`Invocation`] is what comes of it all; help, shell completions and the manual page (`man`) are made
//! from the same definitions and the same prose (`prose`).

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

/// What the program is asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Invocation {
    /// Be the daemon.
    Run {
        /// The configuration file.
        config: PathBuf,
        /// What to log, and how.
        log: LogOptions,
        /// Where to find the API server of Kubernetes, if named.
        kubeconfig: Option<PathBuf>,
        /// The status socket, in place of the one that the configuration names.
        status_socket: Option<PathBuf>,
    },
    /// Say whether a configuration is right, and what it amounts to.
    Check {
        /// The configuration file.
        config: PathBuf,
    },
    /// Print what a configuration needs to be allowed in the cluster.
    Rbac {
        /// The configuration file.
        config: PathBuf,
        /// The service account's name.
        account: String,
        /// Its namespace.
        namespace: String,
    },
    /// Say what the running daemon is doing.
    Status {
        /// The configuration file that names the daemon's status socket, if one is named.
        config: Option<PathBuf>,
        /// The socket itself, if it is named.
        socket: Option<PathBuf>,
        /// JSON instead of tables.
        json: bool,
        /// Again and again.
        watch: bool,
        /// The time over which rates are taken.
        interval: Duration,
    },
    /// Show what becomes of single datagrams.
    Trace {
        /// The configuration file that names the daemon's status socket, if one is named.
        config: Option<PathBuf>,
        /// The socket itself, if it is named.
        socket: Option<PathBuf>,
        /// Only this listener's datagrams.
        listener: Option<String>,
        /// Only those from these addresses.
        source: Option<String>,
        /// End after so many.
        count: Option<u64>,
        /// JSON instead of text.
        json: bool,
    },
    /// Look for what silently breaks forwarding on this host.
    Doctor(DoctorOptions),
    /// Remove what daemons have left in force.
    Detach(DetachOptions),
    /// Forward real traffic in network namespaces and check it.
    Demo(DemoOptions),
    /// Print a completion script; see [`completions`].
    Completions(Shell),
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
    after_help = "`udp-fanout --help` tells more, and `udp-fanout man | man -l -` shows it as a manual page.",
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
    /// Run the daemon; this is what happens if no command is named
    Run(RunArgs),
    /// Check a configuration file and print what it amounts to
    ///
    /// Makes every check that can be made without looking at the host, and changes nothing. Prints the effective
    /// configuration, with every default filled in, and exits with 0; or prints what is wrong, where, and how to put
    /// it right, and exits with 1.
    Check(CheckArgs),
    /// Print the Roles and RoleBindings that a configuration needs in Kubernetes
    ///
    /// One Role for each namespace in which listeners follow Services, its binding, and a ClusterRole to read nodes if a
    /// listener prefers its zone; as YAML for `kubectl apply -f -`. Looks at nothing but the file.
    Rbac(RbacArgs),
    /// Show what the running daemon is doing
    ///
    /// Asks it through its status socket, twice, to show rates: listeners with their datapath and why they have it, what
    /// they receive, forward and drop, and for which reasons; downstreams with their health, their share and what they
    /// get; Kubernetes Services; and what is wrong at the moment. Takes the rights of root or of the daemon's user.
    Status(StatusArgs),
    /// Show live what becomes of single datagrams
    ///
    /// For each one that the kernel program handles: when, from whom, for which listener, which downstream was chosen and
    /// by which way it leaves; or why it was dropped, or left to the listener's socket. At most 1000 in a second. Costs
    /// nothing while nobody looks. What is forwarded in user space is not shown. Takes the rights of root or of the
    /// daemon's user.
    Trace(TraceArgs),
    /// Look at this host for what silently breaks forwarding
    ///
    /// Privileges and kernel, the interfaces and who is on them before us, routes and neighbours of every downstream,
    /// MTU, source validation, forwarding, buffers, pings, the API server and our rights there, and what the running
    /// daemon says. Each finding is a line: ok, warning or problem, and the fix. Changes nothing. Exits with 1 if there is
    /// a problem. Run it as the daemon runs, or as root.
    Doctor(DoctorArgs),
    /// Remove what daemons have left in force on this host
    ///
    /// With on_exit = "keep", and when it is killed, the daemon leaves its TC program in force. This takes it off all
    /// interfaces of this network namespace, or off those named, and removes what is pinned of it. Says what it has
    /// removed; to have nothing to remove is no mistake. Refuses while a daemon runs.
    Detach(DetachArgs),
    /// Forward real traffic in network namespaces of its own and check every datagram
    ///
    /// Makes a network of a sender, a gateway and three receivers, each in a network namespace, and runs a daemon in the
    /// gateway. One socket sends numbered datagrams. Prints what each receiver got, the kernel's filter and the daemon's
    /// counters, and checks them against each other. Does not touch the host's network, and leaves nothing behind. Needs
    /// root, and ip and tc (iproute2). Exits with 1 if a check fails.
    Demo(DemoArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell to print it for
        shell: Shell,
    },
    /// Print the manual page in roff
    Man,
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
    /// Least severe messages to log; RUST_LOG, if set, wins [default: info]
    #[arg(short, long, value_name = "LEVEL", value_enum, ignore_case = true)]
    log_level: Option<LogLevel>,
    /// How to write them to standard error [default: text]
    #[arg(long, value_name = "FORMAT", value_enum, ignore_case = true)]
    log_format: Option<LogFormat>,
    /// File that says where the API server of Kubernetes is and who we are there [default: the pod's service account,
    /// else $KUBECONFIG, else ~/.kube/config]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Unix socket on which to answer `udp-fanout status`, in place of the configuration's status_socket
    #[arg(long, value_name = "PATH")]
    status_socket: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct RbacArgs {
    #[command(flatten)]
    file: ConfigArg,
    /// Service account that gets the rights
    #[arg(long, value_name = "NAME", default_value = rbac::DEFAULT_ACCOUNT)]
    service_account: String,
    /// Namespace of the service account, and of Services that name none
    #[arg(long, value_name = "NAMESPACE", default_value = rbac::DEFAULT_ACCOUNT)]
    service_account_namespace: String,
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
    /// The daemon's status socket [default: the one that its configuration names]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Print JSON, one line a report
    #[arg(long)]
    json: bool,
    /// Go on, and show every interval anew, until interrupted
    #[arg(short, long)]
    watch: bool,
    /// Seconds over which rates are taken, from 0.1 to 3600
    #[arg(long, value_name = "SECS", default_value = "1", value_parser = interval)]
    interval: Duration,
}

#[derive(Debug, Args)]
struct TraceArgs {
    #[command(flatten)]
    file: ConfigArg,
    /// The daemon's status socket [default: the one that its configuration names]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Only datagrams of this listener
    #[arg(long, value_name = "NAME")]
    listener: Option<String>,
    /// Only datagrams from this address, or from addresses with this prefix
    #[arg(long, value_name = "CIDR")]
    source: Option<String>,
    /// End after so many lines
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Print JSON, one line for each
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct DoctorArgs {
    #[command(flatten)]
    file: ConfigArg,
    /// Also try whether the host lets in what comes from this address; may be given several times
    #[arg(long, value_name = "IP")]
    sender: Vec<IpAddr>,
    /// File that says where the API server of Kubernetes is and who we are there, as for run
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
    /// Only from this interface; may be given several times
    #[arg(short, long, value_name = "NAME")]
    interface: Vec<String>,
    /// From all interfaces, as without --interface; and also remove what is pinned of other network namespaces
    #[arg(long, conflicts_with = "interface")]
    all: bool,
    /// Where the program is pinned [default: the pin_path of the configuration]
    #[arg(long, value_name = "PATH")]
    pin_path: Option<PathBuf>,
    /// Also while a daemon runs, which will put its program back within seconds
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

/// What the process's own command line asks for. Ends the process, in clap's manner, after `--help`, `--version` or
/// a mistake (exit code 2).
#[must_use]
pub fn parse() -> Invocation {
    try_parse_from(std::env::args_os()).unwrap_or_else(|error| error.exit())
}

/// What a command line asks for, the program's name first.
///
/// # Errors
/// Also for `--help` and `--version`, as is clap's way.
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
        Some(CliCommand::Status(StatusArgs { file, socket, json, watch, interval })) => {
            Invocation::Status { config: only_config("status", before, file)?, socket, json, watch, interval }
        }
        Some(CliCommand::Trace(TraceArgs { file, socket, listener, source, count, json })) => {
            let config = only_config("trace", before, file)?;
            Invocation::Trace { config, socket, listener, source, count, json }
        }
        Some(CliCommand::Rbac(after)) => {
            let config = only_config("rbac", before, after.file)?;
            let (account, namespace) = (after.service_account, after.service_account_namespace);
            Invocation::Rbac { config: or_default(config), account, namespace }
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
    })
}

fn run(args: RunArgs) -> Invocation {
    let log = LogOptions { level: args.log_level.unwrap_or_default(), format: args.log_format.unwrap_or_default() };
    let RunArgs { file, kubeconfig, status_socket, .. } = args;
    Invocation::Run { config: or_default(file.config), log, kubeconfig, status_socket }
}

/// The configuration file, which is all that may stand before the name of a command other than `run`.
fn only_config(command: &str, before: RunArgs, after: ConfigArg) -> Result<Option<PathBuf>, clap::Error> {
    let config = once("--config <FILE>", before.file.config.clone(), after.config)?;
    no_options(command, &RunArgs { file: ConfigArg::default(), ..before })?;
    Ok(config)
}

fn or_default(config: Option<PathBuf>) -> PathBuf {
    config.unwrap_or_else(|| PathBuf::from(DEFAULT_CONFIG))
}

/// An option given before or after the command's name, but not both: clap sees two options there.
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

/// The definitions themselves.
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
