//! What systemd is told over `NOTIFY_SOCKET` (`sd_notify`): ready, one line of status, reloading, stopping, and the watchdog's
//! keep-alive.
//!
//! Without `NOTIFY_SOCKET` in the environment nothing is sent. A failure to send is logged once; the daemon goes on
//! forwarding.

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

/// Keep-alives sent within the watchdog's limit, so that one or two may be late.
const KEEPALIVES_PER_LIMIT: u32 = 3;

/// How long a send may block when the manager's socket is full. The event loop stands still meanwhile.
const SEND_TIMEOUT: Duration = Duration::from_millis(200);

/// Longest line of status, in bytes.
const MAX_STATUS: usize = 400;

/// The connection to the service manager, and what it was last told.
#[derive(Debug)]
pub struct ServiceManager {
    socket: Option<NotifySocket>,
    status: String,
    reloading: bool,
    /// How often a keep-alive is sent; none without a watchdog.
    watchdog_interval: Option<Duration>,
    /// When the next keep-alive is due.
    pub watchdog_due: Option<Instant>,
    /// The last send failed, and a warning was logged.
    failed: bool,
}

#[derive(Debug)]
struct NotifySocket {
    socket: UnixDatagram,
    manager: SocketAddr,
}

impl NotifySocket {
    fn open(name: &OsString) -> Result<NotifySocket> {
        let manager = match name.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
            _ => SocketAddr::from_pathname(name),
        };
        let manager =
            manager.with_context(|| format!("NOTIFY_SOCKET is {name:?}, which is not the name of a Unix socket"))?;
        let socket = UnixDatagram::unbound().context("cannot open a Unix socket")?;
        socket.set_write_timeout(Some(SEND_TIMEOUT)).context("cannot set a Unix socket's timeout")?;
        Ok(NotifySocket { socket, manager })
    }

    /// Sends one message, whole or not at all.
    fn send(&self, message: &str) -> io::Result<()> {
        self.socket.send_to_addr(message.as_bytes(), &self.manager).map(drop)
    }
}

impl ServiceManager {
    /// The manager named by the environment, if there is one.
    #[must_use]
    pub fn from_environment() -> ServiceManager {
        let socket = env::var_os("NOTIFY_SOCKET").and_then(|name| {
            let socket = NotifySocket::open(&name);
            socket.inspect_err(|error| tracing::warn!("cannot notify the service manager: {error:#}")).ok()
        });
        let limit = watchdog_limit(&|name| env::var(name).ok()).filter(|_| socket.is_some());
        let watchdog_interval = limit.map(|limit| limit / KEEPALIVES_PER_LIMIT);
        ServiceManager {
            socket,
            status: String::new(),
            reloading: false,
            watchdog_interval,
            watchdog_due: None,
            failed: false,
        }
    }

    /// Whether there is a manager to notify.
    #[must_use]
    pub fn is_present(&self) -> bool {
        self.socket.is_some()
    }

    /// Whether the manager was told of a reload, and not yet of its end.
    #[must_use]
    pub fn is_reloading(&self) -> bool {
        self.reloading
    }

    fn send(&mut self, message: &str) {
        let Some(socket) = &self.socket else { return };
        match socket.send(message) {
            Ok(()) => self.failed = false,
            Err(error) if !self.failed => {
                self.failed = true;
                tracing::warn!(%error, "cannot notify the service manager (NOTIFY_SOCKET)");
            }
            Err(_) => {}
        }
    }

    /// The daemon serves, or does so again after a reload.
    pub fn notify_ready(&mut self, status: String, now: Instant) {
        self.reloading = false;
        self.send(&format!("READY=1\nSTATUS={status}\n"));
        self.status = status;
        if self.watchdog_due.is_none() {
            self.watchdog_due = self.watchdog_interval.map(|_| now);
        }
    }

    /// A reload begins; [`notify_ready`](Self::notify_ready) must follow, whatever its outcome. The manager uses the
    /// time to tell this reload from later ones.
    pub fn notify_reloading(&mut self) {
        // This clock always exists, so reading it does not fail.
        if let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC) {
            self.reloading = true;
            self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}\n", Duration::from(now).as_micros()));
        }
    }

    /// The daemon stops.
    pub fn notify_stopping(&mut self) {
        self.send("STOPPING=1\nSTATUS=stopping: queued datagrams are still forwarded\n");
    }

    /// Sends the status if it has changed, and everything again if the manager may have missed it.
    pub fn notify_status(&mut self, status: String) {
        if self.failed && !self.reloading {
            self.notify_ready(status, Instant::now());
        } else if status != self.status {
            self.send(&format!("STATUS={status}\n"));
            self.status = status;
        }
    }

    /// Sends a keep-alive, and sets when the next is due.
    pub fn feed_watchdog(&mut self, now: Instant) {
        self.watchdog_due = self.watchdog_interval.map(|interval| now + interval);
        self.send("WATCHDOG=1\n");
    }
}

/// The time within which the manager expects a keep-alive, if it watches this process.
fn watchdog_limit(variable: &dyn Fn(&str) -> Option<String>) -> Option<Duration> {
    let limit: u64 = variable("WATCHDOG_USEC")?.parse().ok()?;
    let ours = variable("WATCHDOG_PID").is_none_or(|pid| pid.parse() == Ok(std::process::id()));
    (ours && limit > 0).then_some(Duration::from_micros(limit))
}

/// What the line of status says.
#[derive(Debug, Default)]
pub struct StatusFacts {
    /// Listeners in mode `tc_ebpf`.
    pub kernel: usize,
    /// Listeners in mode `userspace`.
    pub sockets: usize,
    /// Listeners that have had no downstreams yet.
    pub waiting: usize,
    /// Downstreams of all listeners.
    pub downstreams: usize,
    /// Of those, the unhealthy ones.
    pub unhealthy: usize,
    /// Present problems, most important first.
    pub problems: Vec<String>,
}

/// The status in one line: the first problem in full, and how many there are.
#[must_use]
pub fn status_line(facts: &StatusFacts) -> String {
    let StatusFacts { kernel, sockets, waiting, downstreams, unhealthy, problems } = facts;
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
    fn only_the_watched_process_feeds_the_watchdog() {
        let own = std::process::id().to_string();
        let of = |usec: Option<&str>, pid: Option<&str>| {
            watchdog_limit(&|name| if name == "WATCHDOG_USEC" { usec } else { pid }.map(str::to_owned))
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
        let address = |name: &str| NotifySocket::open(&name.into()).unwrap().manager;
        assert_eq!(address("/run/systemd/notify").as_pathname().unwrap().to_str(), Some("/run/systemd/notify"));
        assert_eq!(address("@/org/x").as_abstract_name(), Some(&b"/org/x"[..]));
        assert!(NotifySocket::open(&"x".repeat(300).into()).is_err());
    }

    #[test]
    fn the_status_is_one_line_of_what_matters() {
        let few = StatusFacts { sockets: 1, downstreams: 1, ..StatusFacts::default() };
        assert_eq!(status_line(&few), "1 listener in userspace, 1 downstream");
        let many = StatusFacts {
            kernel: 3,
            sockets: 1,
            waiting: 1,
            downstreams: 12,
            unhealthy: 2,
            problems: vec!["no route\nto 10.0.0.1".into(), "another".into()],
        };
        assert_eq!(
            status_line(&many),
            "4 listeners (3 in the kernel, 1 in userspace), 1 of them waiting for the first downstreams, 12 downstreams \
             (2 unhealthy); 2 problems: no route to 10.0.0.1"
        );
    }

    #[test]
    fn a_long_problem_is_cut_between_characters() {
        for extra in 0..4 {
            let problem = format!("{}{}", "x".repeat(extra), "é…".repeat(MAX_STATUS));
            let facts = StatusFacts { kernel: 2, problems: vec![problem], ..StatusFacts::default() };
            let line = status_line(&facts);
            assert!(line.starts_with("2 listeners in the kernel, 0 downstreams; 1 problem: "), "{line}");
            assert!(line.len() <= MAX_STATUS + '…'.len_utf8() && line.ends_with('…'), "{line}");
        }
    }
}
