//! libbpf's own messages, which it would print to standard error, go to the log instead.

use std::sync::Once;

use libbpf_rs::{PrintLevel, set_print};

/// Sends libbpf's messages to the debug log. Failures come back as errors with their reason, so that the daemon
/// itself says what went wrong, once; the messages add the verifier's log for whoever asks.
pub fn route_libbpf_messages() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        set_print(Some((PrintLevel::Debug, |level, message| {
            let message = message.trim_end();
            match level {
                PrintLevel::Debug => tracing::trace!(target: "libbpf", "{message}"),
                PrintLevel::Info | PrintLevel::Warn => tracing::debug!(target: "libbpf", "{message}"),
            }
        })));
    });
}
