//! What the service manager is told (`sd_notify`): that the daemon is ready, what it is doing in one line, that it reloads,
//! that it stops, and, for as long as the loop turns, that it does.
//!
//! Without `NOTIFY_SOCKET` in the environment all of this is nothing. A manager that cannot be told is no reason to stop
//! forwarding: it is said once, in the log.

use std::env;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::time::{ClockId, clock_gettime};

use super::{Daemon, take_due};
use crate::model::Mode;

/// Times that the watchdog is fed within what it allows: late by one or two is still in time.
const FEEDS: u32 = 3;

/// How long a manager that is busy is waited for. The loop does nothing else then.
const PATIENCE: Duration = Duration::from_millis(200);

/// Longest line of status, in bytes: what is beyond is of no use there.
const MAX_STATUS: usize = 400;

/// What has been told, and when to tell again.
#[derive(Debug)]
pub(super) struct Service {
    manager: Option<Manager>,
    status: String,
    reloading: bool,
    /// How often the watchdog is fed, if there is one.
    pace: Option<Duration>,
    /// When it is fed next.
    pub(super) due: Option<Instant>,
    /// Telling has failed, and that has been said.
    failed: bool,
}

/// Who wants to know.
#[derive(Debug)]
struct Manager {
    socket: UnixDatagram,
    address: SocketAddr,
}

impl Manager {
    fn named(name: &OsString) -> Result<Manager> {
        let address = match name.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
            _ => SocketAddr::from_pathname(name),
        };
        let address = address.with_context(|| format!("NOTIFY_SOCKET is {name:?}, which is no Unix socket's name"))?;
        let socket = UnixDatagram::unbound().context("cannot open a Unix socket")?;
        socket.set_write_timeout(Some(PATIENCE)).context("cannot set a Unix socket's timeout")?;
        Ok(Manager { socket, address })
    }

    /// Sends one message, whole or not at all.
    fn send(&self, message: &str) -> io::Result<()> {
        self.socket.send_to_addr(message.as_bytes(), &self.address).map(drop)
    }
}

impl Service {
    /// Reads from the environment who wants to know.
    pub(super) fn from_environment() -> Service {
        let manager = env::var_os("NOTIFY_SOCKET").and_then(|name| {
            let manager = Manager::named(&name);
            manager.inspect_err(|error| tracing::warn!("cannot tell the service manager anything: {error:#}")).ok()
        });
        let pace = watchdog(&|name| env::var(name).ok()).filter(|_| manager.is_some()).map(|limit| limit / FEEDS);
        Service { manager, status: String::new(), reloading: false, pace, due: None, failed: false }
    }

    fn tell(&mut self, message: &str) {
        let Some(manager) = &self.manager else { return };
        match manager.send(message) {
            Ok(()) => self.failed = false,
            Err(error) if !self.failed => {
                self.failed = true;
                tracing::warn!(%error, "cannot tell the service manager (NOTIFY_SOCKET) what the daemon is doing");
            }
            Err(_) => {}
        }
    }

    /// The daemon serves, or does so again after a reload.
    fn ready(&mut self, status: String, now: Instant) {
        self.reloading = false;
        self.tell(&format!("READY=1\nSTATUS={status}\n"));
        self.status = status;
        if self.due.is_none() {
            self.due = self.pace.map(|_| now);
        }
    }

    /// A reload has begun; [`ready`](Self::ready) is to follow, whatever comes of it. The manager must know when, to tell
    /// this reload from one that it asks for later.
    pub(super) fn begin_reload(&mut self) {
        // Nothing but a wrong number of the clock could make this fail.
        if let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC) {
            self.reloading = true;
            self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={}\n", Duration::from(now).as_micros()));
        }
    }

    /// The end has begun.
    pub(super) fn stopping(&mut self) {
        self.tell("STOPPING=1\nSTATUS=stopping: what is queued is still forwarded\n");
    }
}

/// How long the manager's watchdog waits, if it watches this process.
fn watchdog(variable: &dyn Fn(&str) -> Option<String>) -> Option<Duration> {
    let limit: u64 = variable("WATCHDOG_USEC")?.parse().ok()?;
    let ours = variable("WATCHDOG_PID").is_none_or(|pid| pid.parse() == Ok(std::process::id()));
    (ours && limit > 0).then_some(Duration::from_micros(limit))
}

impl Daemon {
    /// The first plan is in force.
    pub(super) fn tell_ready(&mut self) {
        if self.service.manager.is_some() {
            let status = self.status_line();
            self.service.ready(status, Instant::now());
        }
    }

    /// A reload that the manager has been told of has ended, unless it is still being tried.
    pub(super) fn end_reload(&mut self) {
        if self.service.reloading && !self.reloading.under_way() {
            self.tell_ready();
        }
    }

    /// Feeds the watchdog, if it is time to. Called from the loop and nowhere else: a loop that hangs feeds nobody.
    pub(super) fn feed_watchdog(&mut self, now: Instant) {
        if take_due(&mut self.service.due, now) {
            self.service.due = self.service.pace.map(|pace| now + pace);
            self.service.tell("WATCHDOG=1\n");
        }
    }

    /// Tells the manager what the daemon is doing, if that is something else than before; and all of it again, if it may
    /// not have heard.
    pub(super) fn tell_status(&mut self) {
        if self.service.manager.is_none() {
            return;
        }
        let status = self.status_line();
        if self.service.failed && !self.service.reloading {
            self.service.ready(status, Instant::now());
        } else if status != self.service.status {
            self.service.tell(&format!("STATUS={status}\n"));
            self.service.status = status;
        }
    }

    fn status_line(&self) -> String {
        let modes: Vec<Mode> = self.controller.modes().map(|(_, choice)| choice.mode).collect();
        let of = |mode: Mode| modes.iter().filter(|taken| **taken == mode).count();
        let downstreams = self.controller.sets().filter_map(|(_, set)| set).map(|set| set.downstreams.len()).sum();
        let unhealthy = self.health.downstreams().filter(|checked| !checked.status.state.usable()).count();
        let waiting = self.controller.sets().filter(|(_, set)| set.is_none()).count();
        line(&Facts {
            kernel: of(Mode::TcEbpf),
            sockets: of(Mode::Userspace),
            waiting,
            downstreams,
            unhealthy,
            problems: self.problems(),
        })
    }
}

/// What the line of status is made of.
#[derive(Default)]
struct Facts {
    kernel: usize,
    sockets: usize,
    waiting: usize,
    downstreams: usize,
    unhealthy: usize,
    problems: Vec<String>,
}

/// One line; the first problem in full, of the others the number.
fn line(facts: &Facts) -> String {
    let Facts { kernel, sockets, waiting, downstreams, unhealthy, problems } = facts;
    let many = |count: usize, thing: &str| format!("{count} {thing}{}", if count == 1 { "" } else { "s" });
    let mut line = many(kernel + sockets, "listener");
    match (kernel, sockets) {
        (0, _) => line += " in userspace",
        (_, 0) => line += " in the kernel",
        // Writing to a string cannot fail.
        _ => drop(write!(line, " ({kernel} in the kernel, {sockets} in userspace)")),
    }
    if *waiting > 0 {
        line += &format!(", {waiting} of them waiting for the first downstreams");
    }
    line += &format!(", {}", many(*downstreams, "downstream"));
    if *unhealthy > 0 {
        line += &format!(" ({unhealthy} unhealthy)");
    }
    if let Some(first) = problems.first() {
        line += &format!("; {}: {}", many(problems.len(), "problem"), first.replace(char::is_control, " "));
    }
    if line.len() > MAX_STATUS {
        let end = (0..=MAX_STATUS).rev().find(|&end| line.is_char_boundary(end)).unwrap_or_default();
        line.truncate(end);
        line.push('…');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watchdog_is_fed_only_by_whom_it_watches() {
        let own = std::process::id().to_string();
        let of = |usec: Option<&str>, pid: Option<&str>| {
            watchdog(&|name| if name == "WATCHDOG_USEC" { usec } else { pid }.map(str::to_owned))
        };
        assert_eq!(of(Some("30000000"), None), Some(Duration::from_secs(30)));
        assert_eq!(of(Some("30000000"), Some(&own)), Some(Duration::from_secs(30)));
        for (usec, pid) in
            [(None, None), (Some("0"), None), (Some("x"), None), (Some("1"), Some("1")), (Some("1"), Some(""))]
        {
            assert_eq!(of(usec, pid), None, "{usec:?} {pid:?}");
        }
    }

    #[test]
    fn sockets_are_named_by_path_or_abstractly() {
        let address = |name: &str| Manager::named(&name.into()).unwrap().address;
        assert_eq!(address("/run/systemd/notify").as_pathname().unwrap().to_str(), Some("/run/systemd/notify"));
        assert_eq!(address("@/org/x").as_abstract_name(), Some(&b"/org/x"[..]));
        assert!(Manager::named(&"x".repeat(300).into()).is_err());
    }

    #[test]
    fn the_status_is_one_line_of_what_matters() {
        let few = Facts { sockets: 1, downstreams: 1, ..Facts::default() };
        assert_eq!(line(&few), "1 listener in userspace, 1 downstream");
        let many = Facts {
            kernel: 3,
            sockets: 1,
            waiting: 1,
            downstreams: 12,
            unhealthy: 2,
            problems: vec!["no route\nto 10.0.0.1".into(), "another".into()],
        };
        assert_eq!(
            line(&many),
            "4 listeners (3 in the kernel, 1 in userspace), 1 of them waiting for the first downstreams, 12 downstreams \
             (2 unhealthy); 2 problems: no route to 10.0.0.1"
        );
    }

    #[test]
    fn a_long_problem_is_cut_between_characters() {
        for extra in 0..4 {
            let problem = format!("{}{}", "x".repeat(extra), "é…".repeat(MAX_STATUS));
            let facts = Facts { kernel: 2, problems: vec![problem], ..Facts::default() };
            let line = line(&facts);
            assert!(line.starts_with("2 listeners in the kernel, 0 downstreams; 1 problem: "), "{line}");
            assert!(line.len() <= MAX_STATUS + '…'.len_utf8() && line.ends_with('…'), "{line}");
        }
    }
}
