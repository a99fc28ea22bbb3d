//! Puts the program on interfaces and takes it off again.
//!
//! A `clsact` filter with a fixed handle and priority, so that `tc filter show dev eth0 ingress` always prints it the
//! same way and a daemon that died can be cleaned up after. Only that filter is ever touched: a `clsact` qdisc is
//! shared with other programs, is never removed here, and costs nothing while empty.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use anyhow::{Context, Result, bail};
use libbpf_rs::query::ProgramInfo;
use libbpf_rs::{ErrorKind, ProgramHandle, TC_INGRESS, TcHook, TcHookBuilder};

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
    /// Held while this daemon serves the interface, so that a second one does not take it over unnoticed.
    _claim: UnixDatagram,
}

impl Attachment {
    /// Attaches to an interface's ingress. A filter of ours that a dead daemon has left is replaced.
    ///
    /// # Errors
    /// When another live daemon serves the interface, when a foreign filter has our place, or with the kernel's reason.
    pub fn new(program: BorrowedFd<'_>, link: &LinkRef) -> Result<Attachment> {
        let claim = claim(link)?;
        let program = program.try_clone_to_owned().context("cannot keep the program's file descriptor")?;
        let program_id = libbpf_rs::Program::id_from_fd(program.as_fd()).context("cannot ask for the program's id")?;
        let mut hook = hook(program.as_fd(), link.index)?;
        hook.create().map_err(|error| explain(error, link))?;
        if let Some(occupant) = occupant(&mut hook)?
            && occupant != PROGRAM_NAME
        {
            bail!(
                "interface {}: the filter at pref {PRIORITY} handle {HANDLE:#x} is another program's ({}); remove it with \
                 `tc filter del dev {} ingress pref {PRIORITY} handle {HANDLE:#x} bpf` if it is not needed",
                link.name,
                occupant.to_string_lossy(),
                link.name
            );
        }
        hook.attach().map_err(|error| explain(error, link))?;
        tracing::info!(interface = link.name, "attached TC eBPF program to ingress");
        Ok(Attachment { link: link.clone(), program, program_id, attached: true, _claim: claim })
    }

    /// The interface.
    #[must_use]
    pub fn link(&self) -> &LinkRef {
        &self.link
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
        hook(self.program.as_fd(), self.link.index)?
            .detach()
            .with_context(|| format!("cannot detach the TC program from {}", self.link.name))?;
        tracing::info!(interface = self.link.name, "detached TC eBPF program from ingress");
        Ok(())
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            tracing::error!("{error:#}");
        }
    }
}

/// Takes off the filters that daemons which died have left on these interfaces. A filter without its daemon goes on
/// forwarding by itself, to receivers of yesterday. Those of living daemons, this one included, are left alone.
///
/// Where that takes more privilege than there is, a warning tells the operator what to do.
pub fn remove_leftovers<'a>(links: impl IntoIterator<Item = &'a LinkRef>) {
    super::quiet::route_libbpf_messages();
    // Neither asking nor taking off looks at the program's descriptor: any will do.
    let Ok(any) = UnixDatagram::unbound() else { return };
    for link in links {
        let Ok(mut hook) = hook(any.as_fd(), link.index) else { continue };
        let Ok(id) = hook.query() else { continue };
        if ProgramHandle::from_prog_id(id).is_ok_and(|program| program.name() != PROGRAM_NAME) {
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

fn hook(program: BorrowedFd<'_>, link: u32) -> Result<TcHook> {
    let index = i32::try_from(link).context("an interface index is out of range")?;
    let mut builder = TcHookBuilder::new(program);
    Ok(builder.ifindex(index).replace(true).handle(HANDLE).priority(PRIORITY).hook(TC_INGRESS))
}

/// The name of the program whose filter is in our place, if one is.
fn occupant(hook: &mut TcHook) -> Result<Option<OsString>> {
    match hook.query() {
        Ok(id) => {
            let program =
                ProgramHandle::from_prog_id(id).with_context(|| format!("cannot look at BPF program {id}"))?;
            Ok(Some(program.name().to_os_string()))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        // Nothing at this priority yet: the kernel answers EINVAL.
        Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(None),
        Err(error) => Err(error).context("cannot ask for the TC filter in our place"),
    }
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

/// Ids of loaded programs that carry our name, for tests and clean-up.
///
/// # Errors
/// Never at present; reading is best effort.
pub fn loaded_programs() -> Vec<u32> {
    libbpf_rs::query::ProgInfoIter::default()
        .filter(|info: &ProgramInfo| info.name.to_string_lossy() == PROGRAM_NAME)
        .map(|info| info.id)
        .collect()
}
