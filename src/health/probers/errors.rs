//! Classifies socket errors: failures of the target or the path, and errors of this host. Pure.

use std::fmt;
use std::io;

use nix::errno::Errno;

use crate::health::model::{ProbeFailure, ProbeFailureKind};

/// Why a probe could not be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SendError {
    /// The target or the path to it fails: datagrams would not arrive either.
    Target(ProbeFailure),
    /// An error of this host, which does not count against the target: reason and fix for the operator.
    Local(String),
}

impl From<ProbeFailure> for SendError {
    fn from(failure: ProbeFailure) -> SendError {
        SendError::Target(failure)
    }
}

/// Classifies an error of sending or opening a socket.
pub fn send_error(error: &io::Error) -> SendError {
    let trouble = |fix: &str| SendError::Local(format!("{}; {fix}", words(error)));
    match errno(error) {
        Errno::EPERM => {
            trouble("a packet filter on this host rejects probes: allow them, or set another health.protocol")
        }
        Errno::EMFILE => trouble("raise the limit of open files (systemd: LimitNOFILE=)"),
        Errno::ENFILE => trouble("raise the sysctl fs.file-max"),
        // epoll_ctl: too many watched descriptors.
        Errno::ENOSPC => trouble("raise the sysctl fs.epoll.max_user_watches"),
        Errno::ENOBUFS | Errno::ENOMEM => {
            trouble("this host has too little memory for network buffers: free memory, or probe less often")
        }
        Errno::EAGAIN => trouble("the send buffer is full: raise health.interval_secs"),
        Errno::EADDRNOTAVAIL => trouble("no free local port or address: widen the sysctl net.ipv4.ip_local_port_range"),
        _ => SendError::Target(probe_failure(error)),
    }
}

/// The failure that an error of a connection or a sent datagram means.
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

/// The message of an error in lower case, without its number.
fn words(error: &io::Error) -> String {
    match errno(error) {
        Errno::ECONNREFUSED => "connection refused".to_owned(),
        Errno::ECONNRESET | Errno::EPIPE | Errno::ECONNABORTED => "connection reset".to_owned(),
        Errno::ENETUNREACH => "network unreachable: no route".to_owned(),
        Errno::EHOSTUNREACH => "host unreachable".to_owned(),
        // EINVAL comes from a `blackhole` route, EACCES from a `prohibit` one.
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
