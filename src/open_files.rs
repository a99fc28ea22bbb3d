//! Raises the limit of open files (`RLIMIT_NOFILE`) to what a configuration needs.
//!
//! Hosts start programs with a soft limit of 1024 because old programs use `select`. A program that does not use it may
//! raise the soft limit up to the hard limit. The event loop calls [`raise`] before it opens anything and before it
//! tries a new configuration. The health checks take a fixed part of the limit.

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::{Config, ListenerConfig, RequestedMode};
use crate::health;

/// Descriptors besides those of workers and health checks: maps and links of the TC program, netlink, clients of the
/// HTTP endpoint and of the status socket, connections to the API server.
const REST: u64 = 256;

/// Descriptors of a worker: one receiving socket, two sending sockets, an epoll instance and an eventfd. Twice that,
/// because during a reload new workers exist beside the old ones.
const PER_WORKER: u64 = 10;

/// How many descriptors a configuration may need. `cpus` is the number of workers of a listener with `workers = 0`.
#[must_use]
pub fn needed(config: &Config, cpus: u64) -> u64 {
    let workers = |listener: &ListenerConfig| match listener.settings.workers {
        _ if listener.bind.ip().is_multicast() => 1,
        0 if listener.mode == RequestedMode::TcEbpf => 1,
        // The mode that `auto` selects is not known yet.
        0 => cpus,
        count => u64::from(count),
    };
    REST + PER_WORKER * config.listeners.iter().map(workers).sum::<u64>()
}

/// Raises the limit as far as needed and allowed. Never lowers it.
///
/// Returns a warning with the fix if the limit stays too low.
///
/// # Errors
/// When the limit cannot be read.
pub fn raise(config: &Config) -> Result<Option<String>> {
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64);
    let needed = needed(config, cpus);
    let wanted = needed + health::MAX_SOCKETS * health::OPEN_FILES_DIVISOR;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("cannot read the limit of open files")?;
    if soft >= wanted {
        return Ok(None);
    }
    // Raising the hard limit needs CAP_SYS_RESOURCE.
    let reached = if hard < wanted && setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).is_ok() {
        wanted
    } else {
        let most = hard.min(wanted);
        setrlimit(Resource::RLIMIT_NOFILE, most, hard).map_or(soft, |()| most)
    };
    tracing::debug!(from = soft, to = reached, "the limit of open files has been raised");
    Ok((reached < needed).then(|| too_low(reached, needed)))
}

fn too_low(limit: u64, needed: u64) -> String {
    format!(
        "the limit of open files is {limit}, and the listeners' workers may need {needed}, so that sockets may be \
         missing; raise the hard limit (LimitNOFILE={needed} in the unit, ulimit -Hn, or the container \
         runtime's), or set fewer settings.workers"
    )
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn config(listeners: &[(&str, &str, u32)]) -> Config {
        let listener = |(index, (bind, mode, workers)): (usize, &(&str, &str, u32))| {
            format!(
                "[[listeners]]\nname = \"l{index}\"\nbind = \"{bind}:{}\"\nmode = \"{mode}\"\ninterface = \"eth0\"\n\
                 downstream = [{{ address = \"10.0.0.1:1\" }}]\nsettings.workers = {workers}\n",
                5_000 + index
            )
        };
        let text: String = listeners.iter().enumerate().map(listener).collect();
        Config::parse(&text, Path::new("c.toml")).unwrap()
    }

    #[test]
    fn every_worker_counts() {
        let needed = |listeners: &[_]| needed(&config(listeners), 8);
        assert_eq!(needed(&[("0.0.0.0", "userspace", 4)]), 256 + 40);
        assert_eq!(needed(&[("0.0.0.0", "userspace", 0)]), 256 + 80);
        assert_eq!(needed(&[("0.0.0.0", "auto", 0), ("0.0.0.0", "tc_ebpf", 0)]), 256 + 80 + 10);
        assert_eq!(needed(&[("239.1.1.1", "userspace", 0)]), 256 + 10);
    }

    #[test]
    fn the_warning_says_what_to_do() {
        let text = too_low(1024, 5376);
        assert!(text.contains("the limit of open files is 1024, and the listeners' workers may need 5376"), "{text}");
        assert!(text.contains("LimitNOFILE=5376"), "{text}");
    }
}
