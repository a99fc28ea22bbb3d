//! The version of this build: printed by `--version`, exported as a metric, logged at start.

use std::sync::LazyLock;

/// The crate's version, such as `0.1.0`.
pub const PACKAGE: &str = env!("CARGO_PKG_VERSION");

/// The git revision it was built from, or `unknown` if the build script could not find it.
pub const REVISION: &str = match option_env!("UDP_FANOUT_REVISION") {
    Some(revision) if !revision.is_empty() => revision,
    _ => "unknown",
};

static LONG: LazyLock<String> = LazyLock::new(|| format!("{PACKAGE} ({REVISION})"));

/// Version and revision, such as `0.1.0 (abcdef123456)`.
#[must_use]
pub fn long() -> &'static str {
    &LONG
}
