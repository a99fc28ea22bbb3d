//! The command `udp-fanout detach`: removes what daemons have left in force, by the program's name on every interface of
//! this network namespace, and by its pins.
//!
//! Looks at what is there, not at a configuration, so that it works whoever left it. A living daemon holds a claim on each
//! interface and a lock on its pins (`datapath::kernel`), by which it is recognised.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};

use crate::config::{Config, DEFAULT_CONFIG, PIN_PATH};
use crate::datapath::kernel::attach::{self, PROGRAM_NAME};
use crate::datapath::kernel::pins::{self, StalePins};
use crate::output;
use crate::plan::LinkRef;

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Where pins are looked for.
    pub pin_path: PathBuf,
    /// Only these interfaces; all if there are none.
    pub interfaces: Vec<String>,
    /// Also pins of other network namespaces.
    pub all: bool,
    /// Also while a daemon runs.
    pub force: bool,
}

/// The directory of the pins: the one named, or that of the configuration file named or else the default one, or the
/// default.
#[must_use]
pub fn pin_path(config: Option<&Path>, named: Option<PathBuf>) -> PathBuf {
    let of_config = || Config::pin_path_of(config.unwrap_or(Path::new(DEFAULT_CONFIG)));
    named.or_else(of_config).unwrap_or_else(|| PathBuf::from(PIN_PATH))
}

/// Removes what is there, and prints what that was.
///
/// # Errors
/// When a daemon runs, when there is no such interface, or with the kernel's reason; in one line with the fix.
pub fn run(options: &Options) -> Result<()> {
    let links = chosen(options)?;
    if !options.force {
        refuse_if_running(options, &links)?;
    }
    let mut text = String::new();
    for link in &links {
        let Some(id) = attach::own_program_on(link)? else { continue };
        attach::detach_filter(link)?;
        let id = id.map(|id| format!(" {id}")).unwrap_or_default();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}: removed the TC filter with program {PROGRAM_NAME}{id}", link.name);
    }
    let in_force: BTreeSet<u32> =
        attach::all_links().iter().filter_map(|link| attach::own_program_on(link).ok().flatten().flatten()).collect();
    for left in StalePins::find(&options.pin_path, options.all)? {
        for link in links.iter().filter(|link| left.has_link(link.index)) {
            left.detach_link(link.index)?;
            let _ = writeln!(text, "{}: removed the TCX program {PROGRAM_NAME} {}", link.name, left.id());
        }
        if in_force.contains(&left.id()) || !options.interfaces.is_empty() && left.has_any_link() {
            continue;
        }
        let path = left.path().display().to_string();
        left.remove()?;
        let _ = writeln!(text, "{path}: removed the pinned program and its maps");
    }
    pins::remove_unused(&options.pin_path);
    if text.is_empty() {
        text.push_str("nothing to remove\n");
    }
    output::print(text.as_bytes())
}

fn chosen(options: &Options) -> Result<Vec<LinkRef>> {
    let mut links = attach::all_links();
    for name in &options.interfaces {
        ensure!(
            links.iter().any(|link| link.name == *name),
            "interface not found: {name}; `ip link` shows those there are in this network namespace"
        );
    }
    links.retain(|link| options.interfaces.is_empty() || options.interfaces.contains(&link.name));
    Ok(links)
}

fn refuse_if_running(options: &Options, links: &[LinkRef]) -> Result<()> {
    let fix = "stop it first (`systemctl stop udp-fanout`), or give --force: it will put back what it misses";
    let served: Vec<&str> =
        links.iter().filter(|link| attach::is_claimed(link)).map(|link| link.name.as_str()).collect();
    if !served.is_empty() {
        bail!("a udp-fanout is running and serves {}; {fix}", served.join(", "));
    }
    if options.interfaces.is_empty() && pins::in_use(&options.pin_path)? {
        bail!("a udp-fanout is running and has its pins in {}; {fix}", options.pin_path.display());
    }
    Ok(())
}
