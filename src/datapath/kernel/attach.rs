//! Puts the program on interfaces and takes it off again.
//!
//! A `clsact` filter with a fixed handle and priority, so that `tc filter show dev eth0 ingress` always prints it the
//! same way and a daemon that died can be cleaned up after. Only that filter is ever touched: a `clsact` qdisc is
//! shared with other programs, is never removed here, and costs nothing while empty.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;

use anyhow::{Context, Result, bail};
use libbpf_rs::{ErrorKind, TC_INGRESS, TcHook, TcHookBuilder};

use super::pins::{self, Left};
use crate::host::filters::{BpfFilter, ingress_bpf_filters};
use crate::plan::LinkRef;

/// Priority (`pref`) of our filter.
pub const PRIORITY: u32 = 49_152;
/// Handle of our filter: "uf" in ASCII, which no other program is likely to have picked.
pub const HANDLE: u32 = 0x7566;
/// The program's name, by which a filter is recognised as ours.
pub const PROGRAM_NAME: &str = "udp_fanout";

/// The program on one interface. Dropping it takes the filter off.
#[derive(Debug)]
pub struct Attachment {
    link: LinkRef,
    program: OwnedFd,
    program_id: u32,
    attached: bool,
    /// It outlives this value.
    stays: bool,
    /// The program that was there before, which gets its place back while there is a way back.
    before: Option<OwnedFd>,
    /// Held while this daemon serves the interface, so that a second one does not take it over unnoticed.
    _claim: UnixDatagram,
}

impl Attachment {
    /// Attaches to an interface's ingress. A filter of ours that a dead daemon has left is replaced.
    ///
    /// # Errors
    /// When another live daemon serves the interface, when a foreign filter has our place, or with the kernel's reason.
    pub fn new(program: BorrowedFd<'_>, link: &LinkRef) -> Result<Attachment> {
        Self::instead_of(&[], program, link)
    }

    /// Likewise, and gives the place back to the one of these programs that had it, if it is dropped before
    /// [`Attachment::commit`] has been called.
    ///
    /// # Errors
    /// As for [`Attachment::new`].
    pub fn instead_of(before: &[Left], program: BorrowedFd<'_>, link: &LinkRef) -> Result<Attachment> {
        let claim = claim(link)?;
        let program = program.try_clone_to_owned().context("cannot keep the program's file descriptor")?;
        let program_id = libbpf_rs::Program::id_from_fd(program.as_fd()).context("cannot ask for the program's id")?;
        let mut hook = hook(program.as_fd(), link.index)?;
        hook.create().map_err(|error| explain(error, link))?;
        let (occupant, id) = occupant(link)?.unzip();
        if let Some(occupant) = occupant.filter(|occupant| occupant != PROGRAM_NAME) {
            bail!(
                "interface {}: the filter at pref {PRIORITY} handle {HANDLE:#x} is another program's ({}); remove it with \
                 `tc filter del dev {} ingress pref {PRIORITY} handle {HANDLE:#x} bpf` if it is not needed",
                link.name,
                occupant,
                link.name
            );
        }
        let before = before.iter().find(|left| Some(left.id()) == id.flatten()).and_then(Left::program);
        let before = before.map(|before| before.try_clone_to_owned()).transpose().context("cannot keep a program")?;
        hook.attach().map_err(|error| explain(error, link))?;
        tracing::info!(interface = link.name, "attached TC eBPF program to ingress");
        let (link, attached, stays) = (link.clone(), true, false);
        Ok(Attachment { link, program, program_id, attached, stays, before, _claim: claim })
    }

    /// The interface.
    #[must_use]
    pub fn link(&self) -> &LinkRef {
        &self.link
    }

    /// Whether it outlives this value.
    pub fn stay(&mut self, stays: bool) {
        self.stays = stays;
    }

    /// There is no way back: the program that was there before is forgotten.
    pub fn commit(&mut self) {
        self.before = None;
    }

    /// True while the filter on the interface is the one that was attached here.
    #[must_use]
    pub fn in_place(&self) -> bool {
        hook(self.program.as_fd(), self.link.index)
            .and_then(|mut hook| Ok(hook.query()?))
            .is_ok_and(|id| id == self.program_id)
    }

    /// Takes the filter off, unless it has gone already or is not this daemon's any more.
    ///
    /// # Errors
    /// With the kernel's reason.
    pub fn detach(mut self) -> Result<()> {
        self.remove()
    }

    fn remove(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.attached) || !self.in_place() {
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
            .with_context(|| format!("cannot detach the TC program from {}", self.link.name))?;
        tracing::info!(interface = self.link.name, "detached TC eBPF program from ingress");
        Ok(())
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        if self.stays && self.attached {
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
pub fn remove_leftovers<'a>(links: impl IntoIterator<Item = &'a LinkRef>, pin_path: &Path) {
    super::quiet::route_libbpf_messages();
    // Neither asking nor taking off looks at the program's descriptor: any will do.
    let Ok(any) = UnixDatagram::unbound() else { return };
    for link in links {
        let Ok(mut hook) = hook(any.as_fd(), link.index) else { continue };
        let Ok(Some((name, id))) = occupant(link) else { continue };
        if name != PROGRAM_NAME || id.is_some_and(|id| pins::is_kept_elsewhere(pin_path, id)) {
            continue;
        }
        // A living daemon holds its own.
        let Ok(_claim) = claim(link) else { continue };
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
}

/// Takes the filters of these programs off wherever they are in this network namespace.
pub fn remove_programs(ids: &[u32]) {
    for link in all_links() {
        let theirs = |(_, id): &(String, Option<u32>)| id.is_some_and(|id| ids.contains(&id));
        if occupant(&link).is_ok_and(|occupant| occupant.as_ref().is_some_and(theirs))
            && let Err(error) = take_off(&link)
        {
            tracing::warn!("{error:#}");
        }
    }
}

/// Takes the filter in our place off an interface, whose ever it is.
///
/// # Errors
/// With the kernel's reason.
pub fn take_off(link: &LinkRef) -> Result<()> {
    super::quiet::route_libbpf_messages();
    // The kernel does not look at the program's descriptor: any will do.
    let any = UnixDatagram::unbound().context("cannot open a socket")?;
    let detached = hook(any.as_fd(), link.index)?.detach();
    detached.with_context(|| format!("cannot take the TC filter off {}", link.name))
}

/// The program of ours on an interface, be it this daemon's or another's: its id, if the filter's name tells it.
///
/// # Errors
/// When the kernel cannot be asked.
pub fn ours_on(link: &LinkRef) -> Result<Option<Option<u32>>> {
    Ok(occupant(link)?.filter(|(name, _)| name == PROGRAM_NAME).map(|(_, id)| id))
}

/// True if a filter of ours is there, and no living daemon's.
#[must_use]
pub fn is_left_behind(link: &LinkRef) -> bool {
    ours_on(link).is_ok_and(|program| program.is_some()) && !is_served(link)
}

/// True if a living daemon of this network namespace serves the interface.
#[must_use]
pub fn is_served(link: &LinkRef) -> bool {
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
fn occupant(link: &LinkRef) -> Result<Option<(String, Option<u32>)>> {
    let filters = ingress_bpf_filters(link.index).with_context(|| format!("interface {}", link.name))?;
    let in_our_place = |filter: &BpfFilter| filter.priority == PRIORITY && filter.handle == HANDLE;
    let program = |filter: BpfFilter| match filter.name.split_once(":[") {
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
