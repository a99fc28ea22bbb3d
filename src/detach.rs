//! The command `udp-fanout detach`: removes the kernel programs and pins that stopped daemons have left.
//!
//! It finds them by the program's name on every interface of this network namespace, and in the directory of the pins; it
//! does not need the configuration that installed them. A running daemon is recognised by its claim on each interface and its
//! lock on the pins (`datapath::kernel`).

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};

use crate::config::{Config, DEFAULT_CONFIG, PIN_PATH};
use crate::datapath::kernel::attach::{self, PROGRAM_NAME};
use crate::datapath::kernel::pins::{self, OwnerRule, StalePins};
use crate::output;
use crate::plan::LinkRef;

/// What to remove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DetachOptions {
    /// The directory of the pins.
    pub pin_path: PathBuf,
    /// Only from these interfaces. Empty: from all.
    pub interfaces: Vec<String>,
    /// Also remove pins of other network namespaces.
    pub all: bool,
    /// Also remove what a running daemon uses.
    pub force: bool,
}

/// The directory of the pins: `named`, else the `pin_path` of `config` or of the default configuration file, else the default.
#[must_use]
pub fn pin_path(config: Option<&Path>, named: Option<PathBuf>) -> PathBuf {
    let of_config = || Config::pin_path_of(config.unwrap_or(Path::new(DEFAULT_CONFIG)));
    named.or_else(of_config).unwrap_or_else(|| PathBuf::from(PIN_PATH))
}

/// Removes what stopped daemons have left, and prints a line for each thing removed.
///
/// # Errors
/// When a daemon runs, when a named interface does not exist, or when the kernel refuses.
pub fn run(options: &DetachOptions) -> Result<()> {
    let links = selected_links(options)?;
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
    for left in StalePins::find(&options.pin_path, options.all, OwnerRule::Any)? {
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

fn selected_links(options: &DetachOptions) -> Result<Vec<LinkRef>> {
    let mut links = attach::all_links();
    for name in &options.interfaces {
        ensure!(
            links.iter().any(|link| link.name == *name),
            "interface not found: {name}; `ip link` lists the interfaces of this network namespace"
        );
    }
    links.retain(|link| options.interfaces.is_empty() || options.interfaces.contains(&link.name));
    Ok(links)
}

fn refuse_if_running(options: &DetachOptions, links: &[LinkRef]) -> Result<()> {
    let fix = "stop it first (`systemctl stop udp-fanout`), or use --force; a running daemon attaches its program again within seconds";
    let served: Vec<&str> = attach::claimed_links(links).into_iter().map(|link| link.name.as_str()).collect();
    if !served.is_empty() {
        bail!("a udp-fanout daemon is running and serves {}; {fix}", served.join(", "));
    }
    if options.interfaces.is_empty() && pins::in_use(&options.pin_path)? {
        bail!("a udp-fanout daemon is running and has its pins in {}; {fix}", options.pin_path.display());
    }
    Ok(())
}
