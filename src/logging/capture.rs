//! For tests that look at what is logged: a subscriber of the thread's own that misses nothing.
//!
//! While there is only one subscriber in the process, and it is one thread's, a message that another thread comes upon first is
//! taken by `tracing` to be of no interest to anyone, also later and there. Two are enough for each of them to be asked.

use std::sync::LazyLock;

use tracing::{Dispatch, Subscriber};

static ANOTHER: LazyLock<Dispatch> = LazyLock::new(|| Dispatch::new(tracing::subscriber::NoSubscriber::new()));

/// Sees to it that messages that are first met from now on are not taken to be of no interest. To be called by tests that
/// may meet, at the same time, messages that others look at.
pub(crate) fn prepare() {
    LazyLock::force(&ANOTHER);
}

/// Runs `work`, whose messages go to this subscriber.
pub(crate) fn with(subscriber: impl Subscriber + Send + Sync + 'static, work: impl FnOnce()) {
    prepare();
    tracing::subscriber::with_default(subscriber, work);
}
