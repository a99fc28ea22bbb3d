//! What an error of a socket says: something about the target, or only about this host. Pure.

use std::fmt;
use std::io;

use nix::errno::Errno;

use crate::health::model::{ProbeFailure, ProbeFailureKind};

/// Why a probe has not left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SendError {
    /// For a reason that lies on the way to the target: datagrams would not get there either.
    Target(ProbeFailure),
    /// For a reason that lies with this host and says nothing about the target; in words for the operator.
    Local(String),
}

impl From<ProbeFailure> for SendError {
    fn from(failure: ProbeFailure) -> SendError {
        SendError::Target(failure)
    }
}

/// What it says that a probe could not be sent.
pub fn send_error(error: &io::Error) -> SendError {
    let trouble = |fix: &str| SendError::Local(format!("{}; {fix}", words(error)));
    match errno(error) {
        Errno::EPERM => trouble("a packet filter on this host refuses it: let probes pass, or choose another protocol"),
        Errno::EMFILE => trouble("raise the limit of open files (systemd: LimitNOFILE=)"),
        Errno::ENFILE => trouble("raise the sysctl fs.file-max"),
        // ENOSPC: no room to watch one more descriptor.
        Errno::ENOSPC => trouble("raise the sysctl fs.epoll.max_user_watches"),
        Errno::ENOBUFS | Errno::ENOMEM => trouble("this host is short of memory for the network"),
        Errno::EAGAIN => trouble("the queue of outgoing probes is full: probe less often"),
        Errno::EADDRNOTAVAIL => {
            trouble("no local port or address to send from: widen the sysctl net.ipv4.ip_local_port_range")
        }
        _ => SendError::Target(probe_failure(error)),
    }
}

/// What it says that a connection, or a datagram on its way, has met with this error.
pub fn probe_failure(error: &io::Error) -> ProbeFailure {
    let kind = match errno(error) {
        Errno::ECONNREFUSED | Errno::ECONNRESET | Errno::EPIPE | Errno::ECONNABORTED => ProbeFailureKind::Refused,
        Errno::ETIMEDOUT => ProbeFailureKind::NoAnswer,
        _ => ProbeFailureKind::Unreachable,
    };
    ProbeFailure::new(kind, words(error))
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or_default())
}

/// The system's words for an error, in the middle of a sentence and without its number.
fn words(error: &io::Error) -> String {
    match errno(error) {
        Errno::ECONNREFUSED => "connection refused".to_owned(),
        Errno::ECONNRESET | Errno::EPIPE | Errno::ECONNABORTED => "connection reset".to_owned(),
        Errno::ENETUNREACH => "network unreachable: no route".to_owned(),
        Errno::EHOSTUNREACH => "host unreachable".to_owned(),
        // What a route of type `blackhole` and one of type `prohibit` answer.
        Errno::EINVAL => "no usable route (invalid argument)".to_owned(),
        Errno::EACCES => "prohibited by a route".to_owned(),
        Errno::EAFNOSUPPORT => "this host does not speak its IP version".to_owned(),
        Errno::UnknownErrno => error.to_string(),
        errno => errno.desc().to_lowercase(),
    }
}

impl fmt::Display for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SendError::Target(failure) => failure.fmt(f),
            SendError::Local(trouble) => f.write_str(trouble),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_with_this_host_is_no_failure_of_the_target() {
        use Errno::{EADDRNOTAVAIL, EAGAIN, EMFILE, ENFILE, ENOBUFS, ENOMEM, ENOSPC, EPERM};
        for errno in [EPERM, EMFILE, ENFILE, ENOBUFS, ENOMEM, EAGAIN, ENOSPC, EADDRNOTAVAIL] {
            let sent = send_error(&errno.into());
            assert!(matches!(&sent, SendError::Local(words) if words.contains("; ")), "{sent:?}");
        }
    }

    #[test]
    fn what_lies_on_the_way_is() {
        let cases = [
            (Errno::ENETUNREACH, ProbeFailureKind::Unreachable, "network unreachable: no route"),
            (Errno::EHOSTUNREACH, ProbeFailureKind::Unreachable, "host unreachable"),
            (Errno::EINVAL, ProbeFailureKind::Unreachable, "no usable route (invalid argument)"),
            (Errno::ECONNREFUSED, ProbeFailureKind::Refused, "connection refused"),
            (Errno::EAFNOSUPPORT, ProbeFailureKind::Unreachable, "this host does not speak its IP version"),
            (Errno::ETIMEDOUT, ProbeFailureKind::NoAnswer, "connection timed out"),
        ];
        for (errno, kind, reason) in cases {
            assert_eq!(send_error(&errno.into()), SendError::Target(ProbeFailure::new(kind, reason)));
        }
    }
}
