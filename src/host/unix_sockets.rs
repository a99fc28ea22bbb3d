//! The abstract UNIX sockets of a network namespace, as `NETLINK_SOCK_DIAG` lists them (`CONFIG_UNIX_DIAG`).

use std::io;

use anyhow::{Context, Result, bail};
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, parse_u32};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use netlink_sys::{Socket, SocketAddr};

use super::netlink::{BUFFER_SIZE, REPLY_TIMEOUT, after_header, attributes, raw_messages};

/// `SOCK_DIAG_BY_FAMILY`.
const BY_FAMILY: u16 = 20;
/// `UDIAG_SHOW_NAME`, `UDIAG_SHOW_MEMINFO` and `UDIAG_SHOW_UID`.
const SHOW: u32 = 0x01 | 0x20 | 0x40;
/// `struct unix_diag_msg`: four bytes, the inode, a cookie of eight bytes.
const MESSAGE_LENGTH: usize = 16;
const UNIX_DIAG_NAME: u16 = 0;
const UNIX_DIAG_MEMINFO: u16 = 5;
const UNIX_DIAG_UID: u16 = 7;
const SK_MEMINFO_RCVBUF: usize = 1;
const SK_MEMINFO_SNDBUF: usize = 3;

/// A socket with an abstract name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AbstractSocket {
    /// Without the zero byte in front.
    pub name: Vec<u8>,
    /// Its inode, as in `/proc/PID/fd`.
    pub inode: u32,
    /// The user id that it was opened with. Linux 5.3 tells it.
    pub uid: Option<u32>,
    /// The limits of its receive and send buffer, in bytes, as `getsockopt` returns them.
    pub buffer_limits: [u32; 2],
}

/// The sockets in the network namespace of the calling thread whose names begin with `prefix`.
///
/// # Errors
/// When netlink fails, or the kernel has no `CONFIG_UNIX_DIAG`.
pub fn abstract_sockets(prefix: &[u8]) -> Result<Vec<AbstractSocket>> {
    list(prefix).context("cannot list the host's UNIX sockets")
}

fn list(prefix: &[u8]) -> Result<Vec<AbstractSocket>> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket2::SockRef::from(&socket).set_read_timeout(Some(REPLY_TIMEOUT))?;
    socket.send(&request(), 0)?;
    let mut buffer = vec![0; BUFFER_SIZE];
    let mut found = Vec::new();
    loop {
        let length = match socket.recv(&mut &mut buffer[..], 0) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            received => received?,
        };
        for message in raw_messages(&buffer[..length]) {
            let message = message?;
            match message.kind {
                NLMSG_DONE | NLMSG_ERROR => match message.error()? {
                    Some(error) => bail!(error),
                    None => return Ok(found),
                },
                BY_FAMILY => found.extend(read(message.payload)?.filter(|socket| socket.name.starts_with(prefix))),
                _ => {}
            }
        }
    }
}

/// `struct nlmsghdr` and `struct unix_diag_req`, for sockets in any state.
fn request() -> Vec<u8> {
    let mut bytes = 40u32.to_ne_bytes().to_vec();
    bytes.extend([BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP].map(u16::to_ne_bytes).concat());
    bytes.extend([0; 8]);
    bytes.extend([libc::AF_UNIX as u8, 0, 0, 0]);
    bytes.extend([u32::MAX, 0, SHOW, 0, 0].map(u32::to_ne_bytes).concat());
    bytes
}

/// None for a socket without an abstract name.
fn read(payload: &[u8]) -> Result<Option<AbstractSocket>> {
    let rest = after_header(payload, MESSAGE_LENGTH)?;
    let mut socket = AbstractSocket { inode: parse_u32(&payload[4..8])?, ..AbstractSocket::default() };
    let mut is_abstract = false;
    for attribute in attributes(rest) {
        match attribute? {
            (UNIX_DIAG_NAME, [0, name @ ..]) => {
                is_abstract = true;
                socket.name = name.to_vec();
            }
            (UNIX_DIAG_UID, value) => socket.uid = Some(parse_u32(value)?),
            (UNIX_DIAG_MEMINFO, value) => {
                let word = |index: usize| {
                    parse_u32(value.get(index * 4..index * 4 + 4).context("memory information that is too short")?)
                        .context("malformed memory information")
                };
                socket.buffer_limits = [word(SK_MEMINFO_RCVBUF)?, word(SK_MEMINFO_SNDBUF)?];
            }
            _ => {}
        }
    }
    Ok(is_abstract.then_some(socket))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn a_socket_is_listed_with_inode_owner_and_buffer_limits() {
        let name = format!("udp-fanout-test/{}", std::process::id());
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        let socket2 = socket2::SockRef::from(&socket);
        socket2.set_recv_buffer_size(50_000).unwrap();
        let limits = [socket2.recv_buffer_size().unwrap(), socket2.send_buffer_size().unwrap()];
        let inode = std::fs::read_link(format!("/proc/self/fd/{}", socket.as_raw_fd())).unwrap();
        let [found] = abstract_sockets(name.as_bytes()).unwrap().try_into().unwrap();
        assert_eq!(format!("socket:[{}]", found.inode), inode.to_str().unwrap());
        assert_eq!((found.name, found.uid), (name.into_bytes(), Some(nix::unistd::geteuid().as_raw())));
        assert_eq!(found.buffer_limits.map(|limit| limit as usize), limits);
    }

    #[test]
    fn malformed_messages_are_refused() {
        assert!(read(&[0; 15]).is_err());
        assert_eq!(read(&[0; 16]).unwrap(), None);
        let mut short = vec![0; 16];
        short.extend([8, 0, 5, 0, 0, 0, 0, 0]);
        assert!(read(&short).is_err());
    }
}
