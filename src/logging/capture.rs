//! Log capture for tests: a subscriber for the test's thread that misses no message.
//!
//! While the process has only one subscriber, and that one belongs to another thread, `tracing` marks a message that is first
//! met on this thread as disabled for good. With two subscribers, it asks each of them.

use std::sync::LazyLock;

use tracing::{Dispatch, Subscriber};

static SECOND_SUBSCRIBER: LazyLock<Dispatch> =
    LazyLock::new(|| Dispatch::new(tracing::subscriber::NoSubscriber::new()));

/// Keeps messages that are first met from now on from being disabled for good. For tests that may log, at the same time,
/// messages that other tests capture.
pub(crate) fn prepare() {
    LazyLock::force(&SECOND_SUBSCRIBER);
}

/// Runs `work`; its messages go to this subscriber.
pub(crate) fn with(subscriber: impl Subscriber + Send + Sync + 'static, work: impl FnOnce()) {
    prepare();
    tracing::subscriber::with_default(subscriber, work);
}
