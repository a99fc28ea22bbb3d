//! What an error of a socket says: something about the target, or only about this host. Pure.

use std::fmt;
use std::io;

use nix::errno::Errno;

use crate::health::model::{Failure, FailureKind};

/// Why a probe has not left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unsent {
    /// For a reason that lies on the way to the target: datagrams would not get there either.
    Failed(Failure),
    /// For a reason that lies with this host and says nothing about the target; in words for the operator.
    Trouble(String),
}

impl From<Failure> for Unsent {
    fn from(failure: Failure) -> Unsent {
        Unsent::Failed(failure)
    }
}

/// What it says that a probe could not be sent.
pub fn unsent(error: &io::Error) -> Unsent {
    let trouble = |fix: &str| Unsent::Trouble(format!("{}; {fix}", words(error)));
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
        _ => Unsent::Failed(failure(error)),
    }
}

/// What it says that a connection, or a datagram on its way, has met with this error.
pub fn failure(error: &io::Error) -> Failure {
    let kind = match errno(error) {
        Errno::ECONNREFUSED | Errno::ECONNRESET | Errno::EPIPE | Errno::ECONNABORTED => FailureKind::Refused,
        Errno::ETIMEDOUT => FailureKind::NoAnswer,
        _ => FailureKind::Unreachable,
    };
    Failure::new(kind, words(error))
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

impl fmt::Display for Unsent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unsent::Failed(failure) => failure.fmt(f),
            Unsent::Trouble(trouble) => f.write_str(trouble),
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
            let unsent = unsent(&errno.into());
            assert!(matches!(&unsent, Unsent::Trouble(words) if words.contains("; ")), "{unsent:?}");
        }
    }

    #[test]
    fn what_lies_on_the_way_is() {
        let cases = [
            (Errno::ENETUNREACH, FailureKind::Unreachable, "network unreachable: no route"),
            (Errno::EHOSTUNREACH, FailureKind::Unreachable, "host unreachable"),
            (Errno::EINVAL, FailureKind::Unreachable, "no usable route (invalid argument)"),
            (Errno::ECONNREFUSED, FailureKind::Refused, "connection refused"),
            (Errno::EAFNOSUPPORT, FailureKind::Unreachable, "this host does not speak its IP version"),
            (Errno::ETIMEDOUT, FailureKind::NoAnswer, "connection timed out"),
        ];
        for (errno, kind, reason) in cases {
            assert_eq!(unsent(&errno.into()), Unsent::Failed(Failure::new(kind, reason)));
        }
    }
}
