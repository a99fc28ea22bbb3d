//! Maps errors of requests and watches to an [`ErrorKind`] and a [`Recovery`].

use std::error::Error as StdError;
use std::time::Duration;

use kube::core::Status;
use kube::runtime::watcher;

use super::super::status::ErrorKind;

/// The reason that the kube crate puts into the status of a reply that is not JSON.
const UNPARSED: &str = "Failed to parse error data";

/// What to do after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Recovery {
    /// The watcher resumes from the last version that it has seen; no event is lost.
    Resume,
    /// Events may be lost: list again.
    Relist,
    /// Read the credentials and query the API version again, then list.
    Reconnect,
}

/// A failed request or watch.
#[derive(Debug)]
pub(super) struct WatchFailure {
    pub(super) kind: ErrorKind,
    pub(super) recovery: Recovery,
    /// The cause, in one line.
    pub(super) text: String,
    /// The `Retry-After` of the server.
    pub(super) retry_after: Option<Duration>,
}

impl WatchFailure {
    /// The credentials could not be read or used.
    pub(super) fn before_connection(error: &anyhow::Error) -> WatchFailure {
        WatchFailure {
            kind: ErrorKind::Unauthorized,
            recovery: Recovery::Reconnect,
            text: format!("{error:#}"),
            retry_after: None,
        }
    }

    /// The server does not serve a known version of EndpointSlices.
    pub(super) fn not_served(text: String) -> WatchFailure {
        WatchFailure { kind: ErrorKind::NotServed, recovery: Recovery::Reconnect, text, retry_after: None }
    }

    /// A single request failed.
    pub(super) fn of_request(error: &kube::Error) -> WatchFailure {
        let kind = kind_of(error);
        let recovery = match kind {
            ErrorKind::Tls | ErrorKind::Unauthorized | ErrorKind::NotServed => Recovery::Reconnect,
            _ => Recovery::Relist,
        };
        WatchFailure { kind, recovery, text: text_of(error), retry_after: retry_after(error) }
    }

    /// The watcher failed, after `stalls` consecutive stalls.
    ///
    /// The watcher itself lists again after a failed list and after a 410 in the stream. Everything else it resumes; that would
    /// never end if the server rejects the old version, and would skip an event that could not be parsed.
    pub(super) fn of_watcher(error: &watcher::Error, stalls: u32) -> WatchFailure {
        match error {
            watcher::Error::InitialListFailed(error) => WatchFailure::of_request(error),
            watcher::Error::WatchStartFailed(error) => {
                let failure = WatchFailure::of_request(error);
                let resumable = match failure.kind {
                    ErrorKind::Connect | ErrorKind::Forbidden | ErrorKind::Throttled => true,
                    ErrorKind::Server => !from_the_future(error),
                    _ => false,
                };
                if resumable { WatchFailure { recovery: Recovery::Resume, ..failure } } else { failure }
            }
            watcher::Error::WatchFailed(kube::Error::ReadEvents(_)) if stalls > 0 => WatchFailure {
                kind: ErrorKind::Stalled,
                // One stall may be a lost connection. After a second one the server may be waiting for a version that never comes.
                recovery: if stalls > 1 { Recovery::Relist } else { Recovery::Resume },
                text: "the watch timed out without an event or bookmark".to_owned(),
                retry_after: None,
            },
            watcher::Error::WatchFailed(error @ (kube::Error::ReadEvents(_) | kube::Error::HyperError(_))) => {
                WatchFailure { recovery: Recovery::Resume, ..WatchFailure::of_request(error) }
            }
            watcher::Error::WatchFailed(error) => WatchFailure::of_request(error),
            watcher::Error::WatchError(status) => WatchFailure {
                kind: kind_of_code(status.code),
                recovery: Recovery::Relist,
                text: text_of_status(status),
                retry_after: None,
            },
            watcher::Error::NoResourceVersion => WatchFailure {
                kind: ErrorKind::Protocol,
                recovery: Recovery::Relist,
                text: "the API server sent no resourceVersion".to_owned(),
                retry_after: None,
            },
        }
    }
}

fn kind_of(error: &kube::Error) -> ErrorKind {
    match error {
        kube::Error::Api(status) => kind_of_code(status.code),
        kube::Error::Auth(_) => ErrorKind::Unauthorized,
        kube::Error::SerdeError(_) | kube::Error::FromUtf8(_) | kube::Error::BuildRequest(_) => ErrorKind::Protocol,
        error if chain(error).any(|cause| cause.is::<kube::client::AuthError>()) => ErrorKind::Unauthorized,
        // rustls' `InvalidCertificate`. The error is wrapped too deep for a downcast.
        error if chain(error).any(|cause| cause.to_string().contains("invalid peer certificate")) => ErrorKind::Tls,
        _ => ErrorKind::Connect,
    }
}

fn kind_of_code(code: u16) -> ErrorKind {
    match code {
        401 => ErrorKind::Unauthorized,
        403 => ErrorKind::Forbidden,
        404 => ErrorKind::NotServed,
        410 => ErrorKind::Expired,
        429 => ErrorKind::Throttled,
        500..=599 => ErrorKind::Server,
        _ => ErrorKind::Protocol,
    }
}

/// True if the version to resume from is newer than the server's: it was restored from a backup.
fn from_the_future(error: &kube::Error) -> bool {
    let kube::Error::Api(status) = error else { return false };
    let causes = status.details.iter().flat_map(|details| &details.causes);
    causes.into_iter().any(|cause| cause.reason == "ResourceVersionTooLarge")
        || status.message.starts_with("Too large resource version")
}

fn retry_after(error: &kube::Error) -> Option<Duration> {
    let kube::Error::Api(status) = error else { return None };
    let seconds = status.details.as_ref()?.retry_after_seconds;
    (seconds > 0).then(|| Duration::from_secs(seconds.into()))
}

/// The message of the server, or the error with all its causes.
pub(super) fn text_of(error: &kube::Error) -> String {
    if let kube::Error::Api(status) = error {
        return text_of_status(status);
    }
    join_causes(error)
}

/// The error and all its causes in one line, without those that are repeated.
pub(super) fn join_causes(error: &(dyn StdError + 'static)) -> String {
    let mut text = String::new();
    for cause in std::iter::successors(Some(error), |&cause| cause.source()) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&cause);
        }
    }
    text.replace('\n', " ")
}

fn text_of_status(status: &Status) -> String {
    let message = status.message.trim().replace('\n', " ");
    if status.reason == UNPARSED {
        // kube-apiserver's overload protection and proxies answer in plain text.
        let message = if message.is_empty() { "no text" } else { &message };
        return format!("the API server answered {}: {message}", status.code);
    }
    format!("the API server answered {} {}: {message}", status.code, status.reason)
}

fn chain(error: &kube::Error) -> impl Iterator<Item = &(dyn StdError + 'static)> {
    let first: &(dyn StdError + 'static) = error;
    std::iter::successors(Some(first), |&cause| cause.source())
}

#[cfg(test)]
mod tests;
