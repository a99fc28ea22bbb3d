//! Puts the program on interfaces and takes it off again.
//!
//! By one of two ways, see [`AttachMode`]. A `clsact` filter has a fixed handle and priority, so that `tc filter show dev eth0
//! ingress` always prints it the same way and a daemon that died can be cleaned up after. Only that filter is ever touched:
//! a `clsact` qdisc is shared with other programs, is never removed here, and costs nothing while empty. A TCX program
//! (`tcx`) goes with the daemon.
//!
//! From one way to the other the program goes by hanging on both hooks for a moment; it then takes each datagram at the
//! first and leaves it alone at the second.

mod tcx;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;

use anyhow::{Context, Result, bail};
use libbpf_rs::{ErrorKind, TC_INGRESS, TcHook, TcHookBuilder};

use self::tcx::TcxLink;
use super::pins::{self, StalePins};
use crate::config::{AttachConfig, AttachHook, TcxOrder};
use crate::host::filters::{TcFilter, ingress_bpf_filters};
use crate::host::preceding_programs::{self, FilterKey, ProgramPosition};
use crate::plan::LinkRef;

/// Priority (`pref`) of our filter.
pub const PRIORITY: u32 = 49_152;
/// Handle of our filter: "uf" in ASCII, which no other program is likely to have picked.
pub const HANDLE: u32 = 0x7566;
/// The program's name, by which a filter is recognised as ours.
pub const PROGRAM_NAME: &str = "udp_fanout";

/// The place of our filter.
pub const FILTER: ProgramPosition = ProgramPosition::Filter(FilterKey { priority: PRIORITY, handle: HANDLE });

/// How the program is attached to an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttachMode {
    /// As a filter of `clsact`.
    Clsact,
    /// As a TCX program.
    Tcx(TcxOrder),
}

impl AttachMode {
    /// What a configuration means on this host, where the kernel has TCX or not.
    ///
    /// # Errors
    /// When it asks for TCX and the kernel has none.
    pub fn choose(wanted: AttachConfig, has_tcx: bool) -> Result<AttachMode> {
        match wanted.hook {
            AttachHook::Clsact => Ok(AttachMode::Clsact),
            AttachHook::Tcx if !has_tcx => bail!(
                "attach = \"tcx\" needs Linux 6.6, with CONFIG_NET_XGRESS; set attach = \"clsact\", or \"auto\" to take what \
                 there is"
            ),
            AttachHook::Auto if !has_tcx => Ok(AttachMode::Clsact),
            AttachHook::Tcx | AttachHook::Auto => Ok(AttachMode::Tcx(wanted.order)),
        }
    }
}

/// The program on one interface. Dropping it takes the program off.
#[derive(Debug)]
pub struct Attachment {
    link: LinkRef,
    program: OwnedFd,
    program_id: u32,
    mode: AttachMode,
    /// Whether our filter is on the interface, as far as we have seen to it.
    filter: bool,
    tcx: Option<TcxLink>,
    /// It outlives this value.
    persistent: bool,
    /// The program whose filter was there before, which gets its place back while there is a way back.
    before: Option<OwnedFd>,
    /// Held while this daemon serves the interface, so that a second one does not take it over unnoticed.
    _claim: UnixDatagram,
}

impl Attachment {
    /// Attaches to an interface's ingress. A filter of ours that a dead daemon has left is replaced.
    ///
    /// # Errors
    /// When another live daemon serves the interface, when a foreign filter has our place, or with the kernel's reason.
    pub fn new(program: BorrowedFd<'_>, link: &LinkRef, mode: AttachMode) -> Result<Attachment> {
        Self::replacing(&[], program, link, mode)
    }

    /// Likewise, and gives the place of the filter back to the one of these programs that had it, if it is dropped before
    /// [`Attachment::commit`] has been called.
    ///
    /// # Errors
    /// As for [`Attachment::new`].
    pub fn replacing(
        before: &[StalePins],
        program: BorrowedFd<'_>,
        link: &LinkRef,
        mode: AttachMode,
    ) -> Result<Attachment> {
        let claim = claim(link)?;
        let program = program.try_clone_to_owned().context("cannot keep the program's file descriptor")?;
        let program_id = libbpf_rs::Program::id_from_fd(program.as_fd()).context("cannot ask for the program's id")?;
        let id = installed_filter(link)?.and_then(|(_, id)| id);
        let left = before.iter().find(|left| Some(left.id()) == id);
        let before = left.and_then(StalePins::program).map(|before| before.try_clone_to_owned()).transpose();
        let mut attachment = Attachment {
            link: link.clone(),
            program,
            program_id,
            mode,
            filter: false,
            tcx: None,
            persistent: false,
            before: before.context("cannot keep a program")?,
            _claim: claim,
        };
        attachment.attach_hook(mode)?;
        match mode {
            AttachMode::Clsact => tracing::info!(interface = link.name, "attached TC eBPF program to ingress"),
            AttachMode::Tcx(_) => {
                tracing::info!(interface = link.name, hook = "tcx", "attached TC eBPF program to ingress");
                // One that may get its place back goes later: behind ours it is left nothing that ours has seen.
                if left.is_none() {
                    attachment.replace_stale_filter();
                }
            }
        }
        Ok(attachment)
    }

    /// The interface.
    #[must_use]
    pub fn link(&self) -> &LinkRef {
        &self.link
    }

    /// Whether it outlives this value. A TCX program does only if its link is pinned: see [`Attachment::tcx_link`].
    pub fn set_persistent(&mut self, persistent: bool) {
        self.persistent = persistent;
    }

    /// There is no way back: the program that was there before is forgotten.
    pub fn commit(&mut self) {
        self.before = None;
    }

    /// The BPF link that holds the program on the interface, where it is a TCX program.
    #[must_use]
    pub fn tcx_link(&self) -> Option<BorrowedFd<'_>> {
        self.tcx.as_ref().map(TcxLink::descriptor)
    }

    /// How the program is attached.
    #[must_use]
    pub fn mode(&self) -> AttachMode {
        self.mode
    }

    /// True while the program on the interface is the one that was attached here. Also while that cannot be found out for
    /// lack of descriptors, which is no reason to believe anything else.
    #[must_use]
    pub fn in_place(&self) -> bool {
        match self.mode {
            AttachMode::Clsact => self.filter_in_place(),
            AttachMode::Tcx(_) => self.tcx.as_ref().is_some_and(TcxLink::in_place),
        }
    }

    /// Attaches another way, and takes the program off where it was. There is no moment at which it is nowhere.
    ///
    /// `wait` waits until no CPU is still at a packet that came in before it was called.
    ///
    /// # Errors
    /// As for [`Attachment::new`]; the program then stays where it was.
    pub fn move_to(&mut self, mode: AttachMode, wait: &dyn Fn() -> Result<()>) -> Result<()> {
        if let (AttachMode::Tcx(_), AttachMode::Tcx(_)) = (self.mode, mode) {
            // It cannot have two places in one list, so it waits at the other hook.
            self.move_to(AttachMode::Clsact, wait)?;
        }
        self.attach_hook(mode)?;
        wait()?;
        match mode {
            AttachMode::Clsact => self.remove_tcx()?,
            AttachMode::Tcx(_) => self.remove_filter()?,
        }
        self.mode = mode;
        tracing::info!(interface = self.link.name, ?mode, "attached TC eBPF program to ingress another way");
        Ok(())
    }

    /// The programs and filters that see the interface's packets before ours does, in words.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn preceding_programs(&self) -> Result<Vec<String>> {
        let place = match self.mode {
            AttachMode::Clsact => FILTER,
            AttachMode::Tcx(_) => ProgramPosition::Tcx { program: Some(self.program_id) },
        };
        preceding_programs::list(self.link.index, place)
    }

    /// Takes the program off, unless it has gone already or is not this daemon's any more.
    ///
    /// # Errors
    /// With the kernel's reason.
    pub fn detach(mut self) -> Result<()> {
        self.remove()
    }

    /// Attaches, beside what is attached already.
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
            // From an attempt to move that has failed half-way.
            AttachMode::Tcx(_) if self.tcx.as_ref().is_some_and(TcxLink::in_place) => {}
            AttachMode::Tcx(order) => {
                let tcx = TcxLink::new(self.program.as_fd(), link.index, order)
                    .map_err(|error| explain(libbpf_rs::Error::from(error), link))?;
                self.tcx = Some(tcx);
            }
        }
        Ok(())
    }

    /// Takes off the filter that a daemon which died has left on an interface where ours is no filter. It would take
    /// nothing of ours, but what our program leaves to others.
    fn replace_stale_filter(&self) {
        if own_program_on(&self.link).is_ok_and(|program| program.is_some()) {
            remove_stale_filter(self.program.as_fd(), &self.link);
        }
    }

    fn filter_in_place(&self) -> bool {
        match hook(self.program.as_fd(), self.link.index).and_then(|mut hook| Ok(hook.query()?)) {
            Ok(id) => id == self.program_id,
            // The question takes a socket. Where there is one, the answer was that no filter is there.
            Err(_) => UnixDatagram::unbound().is_err(),
        }
    }

    fn remove_filter(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.filter) || !self.filter_in_place() {
            return Ok(());
        }
        if let Some(before) = self.before.take() {
            hook(before.as_fd(), self.link.index)?
                .attach()
                .with_context(|| format!("cannot give {} back to the earlier TC program", self.link.name))?;
            tracing::info!(interface = self.link.name, "the TC program of the earlier daemon has its place back");
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
                tracing::info!(interface = self.link.name, "the TC eBPF program stays in force without a daemon");
            }
        } else if let Err(error) = self.remove() {
            tracing::error!("{error:#}");
        }
    }
}

/// Takes off the filters that daemons which died have left on these interfaces. A filter without its daemon goes on
/// forwarding by itself, to receivers of yesterday. Those of living daemons, this one included, are left alone.
///
/// Those of daemons that have their pins beside ours, not in the same directory, are left alone too. Where it takes more
/// privilege than there is, a warning tells the operator what to do.
pub fn remove_stale_filters<'a>(links: impl IntoIterator<Item = &'a LinkRef>, pin_path: &Path) {
    super::libbpf_log::route_libbpf_messages();
    // Neither asking nor taking off looks at the program's descriptor: any will do.
    let Ok(any) = UnixDatagram::unbound() else { return };
    for link in links {
        let Ok(Some((name, id))) = installed_filter(link) else { continue };
        if name != PROGRAM_NAME || id.is_some_and(|id| pins::is_pinned_elsewhere(pin_path, id)) {
            continue;
        }
        // A living daemon holds its own.
        let Ok(_claim) = claim(link) else { continue };
        remove_stale_filter(any.as_fd(), link);
    }
}

/// Takes off a filter of ours whose daemon has died. `any` may be any descriptor.
fn remove_stale_filter(any: BorrowedFd<'_>, link: &LinkRef) {
    let Ok(mut hook) = hook(any, link.index) else { return };
    match hook.detach() {
        Ok(()) => {
            tracing::info!(interface = link.name, "removed the TC filter that a udp-fanout which died had left");
        }
        Err(error) => tracing::warn!(
            interface = link.name,
            "a udp-fanout which died has left its TC filter, which goes on forwarding ({error}); remove it with \
             `tc filter del dev {} ingress pref {PRIORITY}`",
            link.name
        ),
    }
}

/// Takes the filters of these programs off wherever they are in this network namespace.
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

/// Takes the filter in our place off an interface, whose ever it is.
///
/// # Errors
/// With the kernel's reason.
pub fn detach_filter(link: &LinkRef) -> Result<()> {
    super::libbpf_log::route_libbpf_messages();
    // The kernel does not look at the program's descriptor: any will do.
    let any = UnixDatagram::unbound().context("cannot open a socket")?;
    let detached = hook(any.as_fd(), link.index)?.detach();
    detached.with_context(|| format!("cannot take the TC filter off {}", link.name))
}

/// The program of ours on an interface, be it this daemon's or another's: its id, if the filter's name tells it.
///
/// # Errors
/// When the kernel cannot be asked.
pub fn own_program_on(link: &LinkRef) -> Result<Option<Option<u32>>> {
    Ok(installed_filter(link)?.filter(|(name, _)| name == PROGRAM_NAME).map(|(_, id)| id))
}

/// True if a filter of ours is there, and no living daemon's.
#[must_use]
pub fn has_stale_filter(link: &LinkRef) -> bool {
    own_program_on(link).is_ok_and(|program| program.is_some()) && !is_claimed(link)
}

/// True if a living daemon of this network namespace serves the interface.
#[must_use]
pub fn is_claimed(link: &LinkRef) -> bool {
    claim(link).is_err()
}

/// The interfaces of this network namespace.
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

/// The name and id of the program whose filter is in our place on an interface, if there is one. libbpf names a filter
/// after its program and adds the program's id in brackets.
fn installed_filter(link: &LinkRef) -> Result<Option<(String, Option<u32>)>> {
    let filters = ingress_bpf_filters(link.index).with_context(|| format!("interface {}", link.name))?;
    let in_our_place = |filter: &TcFilter| filter.priority == PRIORITY && filter.handle == HANDLE;
    let program = |filter: TcFilter| match filter.name.split_once(":[") {
        Some((name, rest)) => (name.to_owned(), rest.strip_suffix(']').and_then(|id| id.parse().ok())),
        None => (filter.name, None),
    };
    Ok(filters.into_iter().find(in_our_place).map(program))
}

/// Takes the name that stands for this interface among daemons of this network namespace. The kernel gives it up
/// with the process, however that ends.
fn claim(link: &LinkRef) -> Result<UnixDatagram> {
    let address =
        SocketAddr::from_abstract_name(format!("udp-fanout/tc/{}", link.index)).context("cannot name a claim")?;
    UnixDatagram::bind_addr(&address).with_context(|| {
        format!(
            "interface {} is served by another udp-fanout already; stop it, or put its listeners into one configuration",
            link.name
        )
    })
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
