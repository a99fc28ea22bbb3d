//! An L3 link, without Ethernet headers: a tun device in each of two namespaces, and a thread that copies packets between them.
//!
//! Packets with offloaded checksums, and GSO packets where the kernel supports them on tun devices (Linux 6.2), pass unchanged.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::netns::{End, Namespace};
use super::traffic::Pinned;

/// From `linux/if_tun.h`: checksum offload with UDP segmentation (IPv4, IPv6), or checksum offload alone.
const OFFLOADS: [libc::c_ulong; 2] = [0x01 | 0x20 | 0x40, 0x01];
/// The longest packet, with the header of `IFF_VNET_HDR`, in bytes.
const LONGEST: usize = 10 + 65_535;

/// An L3 link between two namespaces. Dropping it removes both tun devices.
#[derive(Debug)]
pub struct TunLink {
    stop: Option<PipeWriter>,
    forwarder: Option<JoinHandle<()>>,
}

impl TunLink {
    /// Connects two namespaces, both ends up and addressed.
    ///
    /// # Errors
    /// When the kernel does not support tun devices, or with the error output of `ip`.
    pub fn between(a: End<'_>, b: End<'_>) -> Result<TunLink> {
        let ends = [open(a.namespace, a.device)?, open(b.namespace, b.device)?];
        a.bring_up()?;
        b.bring_up()?;
        let (stopped, stop) = io::pipe()?;
        let forwarder =
            thread::Builder::new().name("tun-link".into()).spawn(move || forward_packets(&ends, &stopped))?;
        Ok(TunLink { stop: Some(stop), forwarder: Some(forwarder) })
    }
}

impl Drop for TunLink {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(forwarder) = self.forwarder.take() {
            let _ = forwarder.join();
        }
    }
}

/// Creates a tun device in a namespace. Closing the file removes the device.
fn open(namespace: &Namespace, device: &str) -> Result<File> {
    namespace.run(|| {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
        let file = file.context("cannot open /dev/net/tun")?;
        // SAFETY: a C struct of integers and bytes, for which zero is valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        ensure!(device.len() < request.ifr_name.len(), "the interface name {device} is too long");
        for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
        // SAFETY: the descriptor is open, and the kernel reads and writes only `request`.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        if result != 0 {
            return Err(io::Error::last_os_error()).with_context(|| format!("cannot create the tun device {device}"));
        }
        // SAFETY: the descriptor is open; the argument is a number.
        let takes = |what: &libc::c_ulong| unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, *what) == 0 };
        if !OFFLOADS.iter().any(takes) {
            bail!("the tun device {device} does not support checksum offload");
        }
        Ok(file)
    })
}

/// Copies packets until the other end of the pipe is closed or a device is deleted. A packet that a device does not accept, because it
/// is down or its queue is full, is lost.
fn forward_packets(ends: &[File; 2], stopped: &PipeReader) {
    // Packets injected from several CPUs may be reordered, and each CPU has its own round-robin cursors.
    let _pinned = Pinned::here();
    let mut buffer = vec![0; LONGEST];
    loop {
        let mut waiting =
            [ends[0].as_fd(), ends[1].as_fd(), stopped.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        if poll(&mut waiting, PollTimeout::NONE).is_err() {
            continue;
        }
        let ready = waiting.map(|fd| fd.any().unwrap_or(true));
        if ready[2] {
            return;
        }
        for (from, to) in [(0, 1), (1, 0)].into_iter().filter(|&(from, _)| ready[from]) {
            if !forward_pending(&ends[from], &ends[to], &mut buffer) {
                return;
            }
        }
    }
}

/// Copies all packets that one device has sent. False if the device has been deleted.
fn forward_pending(mut from: &File, mut to: &File, buffer: &mut [u8]) -> bool {
    loop {
        match from.read(buffer) {
            Ok(length) => drop(to.write(&buffer[..length])),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return error.kind() == ErrorKind::WouldBlock,
        }
    }
}
