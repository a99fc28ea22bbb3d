//! Attaches the program to interfaces and detaches it.
//!
//! There are two ways, see [`AttachMode`]. A `clsact` filter has a fixed handle and priority, so `tc filter show dev
//! eth0 ingress` always shows it alike, and a later daemon can remove it. Only that filter is ever touched: a
//! `clsact` qdisc may be shared, is never removed here, and costs nothing while empty. A TCX program (`tcx`) is
//! detached when the daemon ends.
//!
//! To change the mode, the program is attached to both hooks for a moment. It handles each datagram at the first hook
//! and ignores it at the second.

mod claim;
mod tcx;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use anyhow::{Context, Result, bail};
use libbpf_rs::{ErrorKind, TC_INGRESS, TcHook, TcHookBuilder};

use self::claim::{Claim, claim};
use self::tcx::TcxLink;
use super::pins::{self, StalePins};
use crate::config::{AttachConfig, AttachHook, TcxOrder};
use crate::host::filters::{TcFilter, ingress_bpf_filters};
use crate::host::preceding_programs::{self, FilterKey, ProgramPosition};
use crate::plan::LinkRef;

/// Priority (`pref`) of the filter.
pub const PRIORITY: u32 = 49_152;
/// Handle of the filter: "uf" in ASCII, unlikely to be used by other programs.
pub const HANDLE: u32 = 0x7566;
/// Name of the program, which identifies its filters.
pub const PROGRAM_NAME: &str = "udp_fanout";

/// Position of the filter.
pub const FILTER: ProgramPosition = ProgramPosition::Filter(FilterKey { priority: PRIORITY, handle: HANDLE });

/// How the program is attached to an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttachMode {
    /// As a filter of a `clsact` qdisc.
    Clsact,
    /// As a TCX program.
    Tcx(TcxOrder),
}

impl AttachMode {
    /// Chooses the mode for a configuration.
    ///
    /// # Errors
    /// When the configuration requires TCX and the kernel has none.
    pub fn choose(wanted: AttachConfig, has_tcx: bool) -> Result<AttachMode> {
        match wanted.hook {
            AttachHook::Clsact => Ok(AttachMode::Clsact),
            AttachHook::Tcx if !has_tcx => bail!(
                "attach = \"tcx\" needs Linux 6.6, with CONFIG_NET_XGRESS; set attach = \"clsact\", or \"auto\" to use what \
                 there is"
            ),
            AttachHook::Auto if !has_tcx => Ok(AttachMode::Clsact),
            AttachHook::Tcx | AttachHook::Auto => Ok(AttachMode::Tcx(wanted.order)),
        }
    }
}

/// The program on one interface. Dropping it detaches the program, unless it is persistent.
#[derive(Debug)]
pub struct Attachment {
    link: LinkRef,
    program: OwnedFd,
    program_id: u32,
    mode: AttachMode,
    /// This daemon's filter was attached.
    filter: bool,
    tcx: Option<TcxLink>,
    /// The program stays attached when this value is dropped.
    persistent: bool,
    /// The program whose filter was replaced. It is attached again if the start fails.
    previous: Option<OwnedFd>,
    /// The claim on the interface, which keeps a second daemon from taking it over.
    _claim: Claim,
}

impl Attachment {
    /// Attaches the program to an interface's ingress, replacing the filter of a dead daemon. If the replaced filter belongs
    /// to one of `previous`, it is attached again when this value is dropped before [`Attachment::commit`].
    ///
    /// # Errors
    /// When another daemon serves the interface, when a foreign filter has the place, or with the kernel's reason.
    pub fn replacing(
        previous: &[StalePins],
        program: BorrowedFd<'_>,
        link: &LinkRef,
        mode: AttachMode,
    ) -> Result<Attachment> {
        let claim = claim(link)?;
        let program = program.try_clone_to_owned().context("cannot duplicate the program's file descriptor")?;
        let program_id = libbpf_rs::Program::id_from_fd(program.as_fd()).context("cannot read the program's id")?;
        let id = installed_filter(link)?.and_then(|(_, id)| id);
        let stale = previous.iter().find(|stale| Some(stale.id()) == id);
        let previous = stale.and_then(StalePins::program).map(|program| program.try_clone_to_owned()).transpose();
        let mut attachment = Attachment {
            link: link.clone(),
            program,
            program_id,
            mode,
            filter: false,
            tcx: None,
            persistent: false,
            previous: previous.context("cannot duplicate a program's file descriptor")?,
            _claim: claim,
        };
        attachment.attach_hook(mode)?;
        match mode {
            AttachMode::Clsact => tracing::info!(interface = link.name, "attached TC eBPF program to ingress"),
            AttachMode::Tcx(_) => {
                tracing::info!(interface = link.name, hook = "tcx", "attached TC eBPF program to ingress");
                // A filter that may be restored is removed later: it ignores what the TCX program has seen.
                if stale.is_none() {
                    attachment.replace_stale_filter();
                }
            }
        }
        Ok(attachment)
    }

    /// The interface that the program is attached to.
    #[must_use]
    pub fn link(&self) -> &LinkRef {
        &self.link
    }

    /// Whether the program stays attached when this value is dropped. For a TCX program, its link must be pinned too:
    /// see [`Attachment::tcx_link`].
    pub fn set_persistent(&mut self, persistent: bool) {
        self.persistent = persistent;
    }

    /// The start has succeeded: the previous program will not be restored.
    pub fn commit(&mut self) {
        self.previous = None;
    }

    /// The BPF link that holds a TCX program.
    #[must_use]
    pub fn tcx_link(&self) -> Option<BorrowedFd<'_>> {
        self.tcx.as_ref().map(TcxLink::descriptor)
    }

    /// How the program is attached.
    #[must_use]
    pub fn mode(&self) -> AttachMode {
        self.mode
    }

    /// True while the program on the interface is this one. Also true if that cannot be determined for lack of file
    /// descriptors.
    #[must_use]
    pub fn in_place(&self) -> bool {
        match self.mode {
            AttachMode::Clsact => self.filter_in_place(),
            AttachMode::Tcx(_) => self.tcx.as_ref().is_some_and(TcxLink::in_place),
        }
    }

    /// Attaches the program in another mode, then detaches it from the previous hook. It is attached at every moment.
    ///
    /// `wait` waits for an RCU grace period.
    ///
    /// # Errors
    /// As for [`Attachment::replacing`]; the program then stays where it was.
    pub fn move_to(&mut self, mode: AttachMode, wait: &dyn Fn() -> Result<()>) -> Result<()> {
        if let (AttachMode::Tcx(_), AttachMode::Tcx(_)) = (self.mode, mode) {
            // A list takes a program only once, so it moves by way of the other hook.
            self.move_to(AttachMode::Clsact, wait)?;
        }
        self.attach_hook(mode)?;
        wait()?;
        match mode {
            AttachMode::Clsact => self.remove_tcx()?,
            AttachMode::Tcx(_) => self.remove_filter()?,
        }
        self.mode = mode;
        tracing::info!(interface = self.link.name, ?mode, "moved TC eBPF program to another hook");
        Ok(())
    }

    /// Descriptions of the programs and filters that see packets before this one.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn preceding_programs(&self) -> Result<Vec<String>> {
        let place = match self.mode {
            AttachMode::Clsact => FILTER,
            AttachMode::Tcx(_) => ProgramPosition::Tcx { program: Some(self.program_id) },
        };
        preceding_programs::list(self.link.index, place)
    }

    /// Detaches the program, unless it is gone already or was replaced.
    ///
    /// # Errors
    /// With the kernel's reason.
    pub fn detach(mut self) -> Result<()> {
        self.remove()
    }

    /// Attaches the program to another hook, in addition.
    fn attach_hook(&mut self, mode: AttachMode) -> Result<()> {
        let link = &self.link;
        match mode {
            AttachMode::Clsact => {
                let mut hook = hook(self.program.as_fd(), link.index)?;
                hook.create().map_err(|error| explain(error, link))?;
                if let Some((installed, _)) = installed_filter(link)?
                    && installed != PROGRAM_NAME
                {
                    bail!(
                        "interface {}: the filter at pref {PRIORITY} handle {HANDLE:#x} is another program's ({}); remove it \
                         with `tc filter del dev {} ingress pref {PRIORITY} handle {HANDLE:#x} bpf` if it is not needed",
                        link.name,
                        installed,
                        link.name
                    );
                }
                hook.attach().map_err(|error| explain(error, link))?;
                self.filter = true;
            }
            // Left by an earlier attempt that failed half-way.
            AttachMode::Tcx(_) if self.tcx.as_ref().is_some_and(TcxLink::in_place) => {}
            AttachMode::Tcx(order) => {
                let tcx = TcxLink::new(self.program.as_fd(), link.index, order)
                    .map_err(|error| explain(libbpf_rs::Error::from(error), link))?;
                self.tcx = Some(tcx);
            }
        }
        Ok(())
    }

    /// Removes the filter of a dead daemon. It would get only what this program passes.
    fn replace_stale_filter(&self) {
        if own_program_on(&self.link).is_ok_and(|program| program.is_some()) {
            remove_stale_filter(self.program.as_fd(), &self.link);
        }
    }

    fn filter_in_place(&self) -> bool {
        match hook(self.program.as_fd(), self.link.index).and_then(|mut hook| Ok(hook.query()?)) {
            Ok(id) => id == self.program_id,
            // The query needs a socket. If one can be opened, the query failed because there is no filter.
            Err(_) => UnixDatagram::unbound().is_err(),
        }
    }

    fn remove_filter(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.filter) || !self.filter_in_place() {
            return Ok(());
        }
        if let Some(previous) = self.previous.take() {
            hook(previous.as_fd(), self.link.index)?
                .attach()
                .with_context(|| format!("cannot restore the earlier TC program on {}", self.link.name))?;
            tracing::info!(interface = self.link.name, "restored the TC program of the earlier daemon");
            return Ok(());
        }
        hook(self.program.as_fd(), self.link.index)?
            .detach()
            .with_context(|| format!("cannot detach the TC program from {}", self.link.name))
    }

    fn remove_tcx(&mut self) -> Result<()> {
        let Some(tcx) = self.tcx.take() else { return Ok(()) };
        tcx.detach().with_context(|| format!("cannot detach the TCX program from {}", self.link.name))
    }

    fn remove(&mut self) -> Result<()> {
        if !self.filter && self.tcx.is_none() {
            return Ok(());
        }
        let there = self.in_place();
        let (filter, tcx) = (self.remove_filter(), self.remove_tcx());
        filter.and(tcx)?;
        if there {
            tracing::info!(interface = self.link.name, "detached TC eBPF program from ingress");
        }
        Ok(())
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        let attached = self.filter || self.tcx.is_some();
        if self.persistent && attached {
            if self.in_place() {
                tracing::info!(interface = self.link.name, "the TC eBPF program stays attached without a daemon");
            }
        } else if let Err(error) = self.remove() {
            tracing::error!("{error:#}");
        }
    }
}

/// Removes the filters that dead daemons left on these interfaces. Such a filter keeps forwarding to outdated
/// receivers. The filters of live daemons, including this one, are kept.
///
/// Filters whose pins are in a sibling of `pin_path` are kept too. If privileges are missing, a warning says what to
/// do.
pub fn remove_stale_filters<'a>(links: impl IntoIterator<Item = &'a LinkRef>, pin_path: &Path) {
    super::libbpf_log::route_libbpf_messages();
    // Neither query nor detach uses the program's descriptor: any will do.
    let Ok(any) = UnixDatagram::unbound() else { return };
    for link in links {
        let Ok(Some((name, id))) = installed_filter(link) else { continue };
        if name != PROGRAM_NAME || id.is_some_and(|id| pins::is_pinned_elsewhere(pin_path, id)) {
            continue;
        }
        // A live daemon holds the claim.
        let Ok(_claim) = claim(link) else { continue };
        remove_stale_filter(any.as_fd(), link);
    }
}

/// Removes the filter of a dead daemon. `any` may be any descriptor.
fn remove_stale_filter(any: BorrowedFd<'_>, link: &LinkRef) {
    let Ok(mut hook) = hook(any, link.index) else { return };
    match hook.detach() {
        Ok(()) => {
            tracing::info!(interface = link.name, "removed the TC filter of a udp-fanout that died");
        }
        Err(error) => tracing::warn!(
            interface = link.name,
            "cannot remove the TC filter of a udp-fanout that died, which keeps forwarding ({error}); remove it with \
             `tc filter del dev {} ingress pref {PRIORITY}`",
            link.name
        ),
    }
}

/// Removes the filters of these programs from all interfaces of this network namespace.
pub fn detach_programs(ids: &[u32]) {
    for link in all_links() {
        let theirs = |(_, id): &(String, Option<u32>)| id.is_some_and(|id| ids.contains(&id));
        if installed_filter(&link).is_ok_and(|installed| installed.as_ref().is_some_and(theirs))
            && let Err(error) = detach_filter(&link)
        {
            tracing::warn!("{error:#}");
        }
    }
}

/// Removes the filter at this program's place, whoever owns it.
///
/// # Errors
/// With the kernel's reason.
pub fn detach_filter(link: &LinkRef) -> Result<()> {
    super::libbpf_log::route_libbpf_messages();
    // The kernel does not use the program's descriptor: any will do.
    let any = UnixDatagram::unbound().context("cannot open a socket")?;
    let detached = hook(any.as_fd(), link.index)?.detach();
    detached.with_context(|| format!("cannot remove the TC filter from {}", link.name))
}

/// Tells whether a udp-fanout filter is on an interface, of any daemon. The inner value is the program's id, if
/// known.
///
/// # Errors
/// When the kernel does not answer.
pub fn own_program_on(link: &LinkRef) -> Result<Option<Option<u32>>> {
    Ok(installed_filter(link)?.filter(|(name, _)| name == PROGRAM_NAME).map(|(_, id)| id))
}

/// True if a udp-fanout filter is there without a live daemon.
#[must_use]
pub fn has_stale_filter(link: &LinkRef) -> bool {
    own_program_on(link).is_ok_and(|program| program.is_some()) && claimed_links([link]).is_empty()
}

/// Those of `links` that a live daemon of this network namespace serves.
#[must_use]
pub fn claimed_links<'a>(links: impl IntoIterator<Item = &'a LinkRef>) -> Vec<&'a LinkRef> {
    claim::claimed(links)
}

/// All interfaces of this network namespace.
#[must_use]
pub fn all_links() -> Vec<LinkRef> {
    let links = nix::net::if_::if_nameindex();
    let link = |link: &nix::net::if_::Interface| LinkRef {
        index: link.index(),
        name: link.name().to_string_lossy().into_owned(),
    };
    links.iter().flat_map(|links| links.iter().map(link).collect::<Vec<_>>()).collect()
}

fn hook(program: BorrowedFd<'_>, link: u32) -> Result<TcHook> {
    let index = i32::try_from(link).context("an interface index is out of range")?;
    let mut builder = TcHookBuilder::new(program);
    Ok(builder.ifindex(index).replace(true).handle(HANDLE).priority(PRIORITY).hook(TC_INGRESS))
}

/// Name and id of the program whose filter is at this program's place. libbpf names a filter after its program, with
/// the program's id in brackets.
fn installed_filter(link: &LinkRef) -> Result<Option<(String, Option<u32>)>> {
    let filters = ingress_bpf_filters(link.index).with_context(|| format!("interface {}", link.name))?;
    let in_our_place = |filter: &TcFilter| filter.priority == PRIORITY && filter.handle == HANDLE;
    let program = |filter: TcFilter| match filter.name.split_once(":[") {
        Some((name, rest)) => (name.to_owned(), rest.strip_suffix(']').and_then(|id| id.parse().ok())),
        None => (filter.name, None),
    };
    Ok(filters.into_iter().find(in_our_place).map(program))
}

fn explain(error: libbpf_rs::Error, link: &LinkRef) -> anyhow::Error {
    let name = &link.name;
    match error.kind() {
        ErrorKind::PermissionDenied => anyhow::anyhow!(
            "failed to attach TC program: permission denied on {name}: CAP_NET_ADMIN is needed (run as root, or add it in \
             the unit's AmbientCapabilities or the container's securityContext)"
        ),
        _ => anyhow::Error::new(error).context(format!("failed to attach TC program to {name}")),
    }
}
