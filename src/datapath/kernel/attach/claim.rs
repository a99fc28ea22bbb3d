//! Claims: a daemon that serves an interface holds one, and no second daemon takes the interface over.
//!
//! A claim is an abstract UNIX socket named after the interface's index. Abstract names belong to a network namespace, as
//! interfaces do, and the kernel releases them when the process ends. So they work alike for root, for a service account
//! (`DynamicUser=` differs at each start), and for pods of the host network, which share neither `/run` nor process ids
//! with each other. A lock file would need a directory that all of them share.
//!
//! But anybody may bind an abstract name, even root in a container without privileges. So a claim counts only if its
//! holder proves `CAP_NET_ADMIN`, without which nobody attaches programs: the socket's buffer limits are raised to the
//! maximum, beyond `net.core.rmem_max` and `wmem_max`, and only `CAP_NET_ADMIN` may do that (`SO_RCVBUFFORCE`,
//! `SO_SNDBUFFORCE`). Every process can read those limits by `NETLINK_SOCK_DIAG`. (They prove nothing on a host where an
//! administrator has set both sysctls to the maximum.) The proof is on the socket, so it needs no reply from a daemon that
//! may hang, and no process ids.
//!
//! If the name is held by a process without the capability, the claim is a name with a random suffix. A daemon first binds,
//! then looks for other claims: of two that start at once, at least one sees the other.
//!
//! Daemons before this version bind the same name, without proof. One that is visible in `/proc`, as a process named
//! udp-fanout with `CAP_NET_ADMIN`, counts too.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use nix::errno::Errno;
use nix::sys::socket::{UnixAddr, setsockopt, sockopt};
use nix::sys::stat::fstat;

use crate::host::unix_sockets::{AbstractSocket, abstract_sockets};
use crate::plan::LinkRef;

/// What all names begin with; the index of the interface follows.
const PREFIX: &str = "udp-fanout/tc/";
/// The limits are set to this, the largest value that the kernel accepts, …
const FORCED: usize = (i32::MAX / 2) as usize;
/// … which it doubles.
const PROOF: u32 = 2 * FORCED as u32;
/// Bit of `CAP_NET_ADMIN` in `CapEff` of `/proc/PID/status`.
const NET_ADMIN: u64 = 1 << 12;

/// An interface claimed for this process, until it is dropped.
#[derive(Debug)]
pub(super) struct Claim {
    _socket: UnixDatagram,
}

/// Claims an interface.
///
/// # Errors
/// When another daemon holds a claim.
pub(super) fn claim(link: &LinkRef) -> Result<Claim> {
    let socket = UnixDatagram::unbound().context("cannot open a socket")?;
    // Without CAP_NET_ADMIN this fails, and so does attaching.
    let _ = setsockopt(&socket, sockopt::RcvBufForce, &FORCED);
    let _ = setsockopt(&socket, sockopt::SndBufForce, &FORCED);
    let inode = fstat(socket.as_fd()).context("cannot read the socket's inode")?.st_ino;
    let name = format!("{PREFIX}{}", link.index);
    let squatted = match bind(&socket, &name) {
        Err(Errno::EADDRINUSE) => true,
        bound => {
            bound.context("cannot bind the socket that claims an interface")?;
            false
        }
    };
    let mut held = match abstract_sockets(name.as_bytes()) {
        Ok(held) => held,
        // Without the list, only the plain name counts.
        Err(_) if !squatted => return Ok(Claim { _socket: socket }),
        Err(_) => return Err(already_served(link)),
    };
    if squatted && !held.iter().any(|other| is_claim(other, &name)) {
        warn_of_squatters(link, &name, &held);
        bind(&socket, &format!("{name}/{:016x}", rand::random::<u64>()))
            .context("cannot bind the socket that claims an interface")?;
        held = abstract_sockets(name.as_bytes())?;
    }
    if held.iter().any(|other| u64::from(other.inode) != inode && is_claim(other, &name)) {
        return Err(already_served(link));
    }
    Ok(Claim { _socket: socket })
}

/// Those of `links` that a daemon of this network namespace serves.
pub(super) fn claimed<'a>(links: impl IntoIterator<Item = &'a LinkRef>) -> Vec<&'a LinkRef> {
    let links = links.into_iter();
    match abstract_sockets(PREFIX.as_bytes()) {
        Ok(held) => {
            let is_claimed = |link: &&LinkRef| {
                let name = format!("{PREFIX}{}", link.index);
                held.iter().any(|socket| is_claim(socket, &name))
            };
            links.filter(is_claimed).collect()
        }
        Err(_) => links.filter(|link| claim(link).is_err()).collect(),
    }
}

fn already_served(link: &LinkRef) -> anyhow::Error {
    anyhow!(
        "interface {} is already served by another udp-fanout; stop it, or put all listeners into one configuration",
        link.name
    )
}

fn warn_of_squatters(link: &LinkRef, name: &str, held: &[AbstractSocket]) {
    let uid = held.iter().find(|socket| socket.name == name.as_bytes()).and_then(|socket| socket.uid);
    tracing::warn!(
        interface = link.name,
        "ignored a process without CAP_NET_ADMIN (uid {}) that has bound @{name}, the name of this daemon's claim on the \
         interface; `ss -xap | grep {PREFIX}` shows it",
        uid.map_or_else(|| "unknown".to_owned(), |uid| uid.to_string())
    );
}

fn bind(socket: &UnixDatagram, name: &str) -> Result<(), Errno> {
    let address = UnixAddr::new_abstract(name.as_bytes())?;
    nix::sys::socket::bind(socket.as_raw_fd(), &address)
}

/// True if the socket is a claim on the interface whose plain name is `name`.
fn is_claim(socket: &AbstractSocket, name: &str) -> bool {
    match socket.name.strip_prefix(name.as_bytes()) {
        Some([]) => has_proof(socket) || is_of_earlier_version(socket.inode),
        Some([b'/', ..]) => has_proof(socket),
        _ => false,
    }
}

fn has_proof(socket: &AbstractSocket) -> bool {
    socket.buffer_limits.iter().all(|&limit| limit >= PROOF)
}

/// True if a visible udp-fanout with `CAP_NET_ADMIN` has this socket.
fn is_of_earlier_version(inode: u32) -> bool {
    let socket = format!("socket:[{inode}]");
    let holds = |process: &Path| {
        let named = fs::read_to_string(process.join("comm")).is_ok_and(|name| name.trim_end() == "udp-fanout");
        let descriptors = || fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        let mut files = descriptors().filter_map(|entry| fs::read_link(entry.path()).ok());
        named && has_net_admin(process) && files.any(|file| file.as_os_str() == socket.as_str())
    };
    fs::read_dir("/proc").into_iter().flatten().flatten().any(|entry| holds(&entry.path()))
}

fn has_net_admin(process: &Path) -> bool {
    let status = fs::read_to_string(process.join("status")).unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).is_some_and(|bits| bits & NET_ADMIN != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sockets_with_proof_are_claims_and_only_on_their_interface() {
        let socket = |name: &str, buffer_limits| AbstractSocket {
            name: name.into(),
            inode: u32::MAX,
            uid: Some(0),
            buffer_limits,
        };
        let name = "udp-fanout/tc/2";
        for (held, expected) in [(name, true), ("udp-fanout/tc/2/ab", true), ("udp-fanout/tc/21", false)] {
            assert_eq!(is_claim(&socket(held, [PROOF; 2]), name), expected, "{held}");
            assert!(!is_claim(&socket(held, [PROOF, 212_992]), name), "{held}");
        }
    }
}
