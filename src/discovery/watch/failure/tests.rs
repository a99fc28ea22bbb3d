use kube::core::response::{StatusCause, StatusDetails};

use super::*;

fn api(code: u16, reason: &str) -> kube::Error {
    kube::Error::Api(Status::failure("it says", reason).with_code(code).boxed())
}

fn details() -> StatusDetails {
    serde_json::from_str("{}").unwrap()
}

fn silence() -> kube::Error {
    kube::Error::ReadEvents(std::io::Error::other("nothing came"))
}

#[test]
fn a_watch_is_resumed_only_where_that_can_help() {
    use ErrorKind as Kind;
    use Recovery::{Reconnect, Relist, Resume};
    for (code, kind, recovery) in [
        (400, Kind::Protocol, Relist),
        (401, Kind::Unauthorized, Reconnect),
        (403, Kind::Forbidden, Resume),
        (404, Kind::NotServed, Reconnect),
        (410, Kind::Expired, Relist),
        (429, Kind::Throttled, Resume),
        (500, Kind::Server, Resume),
        (503, Kind::Server, Resume),
    ] {
        let failure = WatchFailure::of_watcher(&watcher::Error::WatchStartFailed(api(code, "Reason")), 0);
        assert_eq!((failure.kind, failure.recovery), (kind, recovery), "{code}");
        assert!(failure.text.contains("it says"), "{}", failure.text);
    }
    let connection =
        WatchFailure::of_watcher(&watcher::Error::WatchStartFailed(kube::Error::Service("refused".into())), 0);
    assert_eq!((connection.kind, connection.recovery), (Kind::Connect, Resume));
}

#[test]
fn a_version_from_the_future_needs_a_list() {
    let mut status = Status::failure("Too large resource version: 9, current: 1", "Timeout").with_code(504);
    let cause = |reason: &str| StatusCause { reason: reason.to_owned(), message: String::new(), field: String::new() };
    let by_message = kube::Error::Api(status.clone().boxed());
    status.message = "elsewise".to_owned();
    status.details = Some(StatusDetails { causes: vec![cause("ResourceVersionTooLarge")], ..details() });
    for error in [by_message, kube::Error::Api(status.boxed())] {
        let failure = WatchFailure::of_watcher(&watcher::Error::WatchStartFailed(error), 0);
        assert_eq!(failure.recovery, Recovery::Relist);
    }
}

#[test]
fn an_open_watch_that_fails_is_resumed_unless_an_event_may_be_lost() {
    let broken = WatchFailure::of_watcher(&watcher::Error::WatchFailed(silence()), 0);
    assert_eq!((broken.kind, broken.recovery), (ErrorKind::Connect, Recovery::Resume));
    let once = WatchFailure::of_watcher(&watcher::Error::WatchFailed(silence()), 1);
    assert_eq!((once.kind, once.recovery), (ErrorKind::Stalled, Recovery::Resume));
    let twice = WatchFailure::of_watcher(&watcher::Error::WatchFailed(silence()), 2);
    assert_eq!((twice.kind, twice.recovery), (ErrorKind::Stalled, Recovery::Relist));
    let nonsense = serde_json::from_str::<u8>("{").unwrap_err();
    let unread = WatchFailure::of_watcher(&watcher::Error::WatchFailed(kube::Error::SerdeError(nonsense)), 0);
    assert_eq!((unread.kind, unread.recovery), (ErrorKind::Protocol, Recovery::Relist));
    let reported =
        WatchFailure::of_watcher(&watcher::Error::WatchError(Status::failure("x", "Y").with_code(500).boxed()), 0);
    assert_eq!((reported.kind, reported.recovery), (ErrorKind::Server, Recovery::Relist));
}

#[test]
fn the_server_may_ask_us_to_stay_away() {
    let details = StatusDetails { retry_after_seconds: 7, ..details() };
    let status = Status::failure("busy", "TooManyRequests").with_code(429).with_details(details);
    let failure = WatchFailure::of_request(&kube::Error::Api(status.boxed()));
    assert_eq!(failure.retry_after, Some(Duration::from_secs(7)));
    assert_eq!(WatchFailure::of_request(&api(429, "TooManyRequests")).retry_after, None);
}

#[test]
fn a_refused_certificate_is_told_from_a_lost_connection() {
    let tls = std::io::Error::other("invalid peer certificate: UnknownIssuer");
    let failure = WatchFailure::of_request(&kube::Error::Service(Box::new(tls)));
    assert_eq!((failure.kind, failure.recovery), (ErrorKind::Tls, Recovery::Reconnect));
}

#[test]
fn a_reply_in_plain_text_is_quoted_and_no_cause_is_repeated() {
    let status = |message: &str| Status::failure(message, "Failed to parse error data").with_code(429);
    let overloaded = kube::Error::Api(status("Too many requests, please try again later.").boxed());
    let failure = WatchFailure::of_request(&overloaded);
    assert_eq!(failure.kind, ErrorKind::Throttled);
    assert_eq!(failure.text, "the API server answered 429: Too many requests, please try again later.");
    assert_eq!(text_of(&kube::Error::Api(status("").boxed())), "the API server answered 429: no text");

    let missing = kube::config::Kubeconfig::read_from("/nonexistent/kubeconfig").unwrap_err();
    let text = join_causes(&missing);
    assert_eq!(text.matches("No such file or directory").count(), 1, "{text}");
}
