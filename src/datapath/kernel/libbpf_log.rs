//! Routes libbpf's messages, which would go to standard error, to the log.

use std::sync::Once;

use libbpf_rs::{PrintLevel, set_print};

/// Sends libbpf's messages to the debug log. Errors carry their reason and are logged once by the daemon; these
/// messages add the verifier's log.
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
