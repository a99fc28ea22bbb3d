//! A link that carries IP packets without frames: a tun device in each of two namespaces, and a thread that takes across
//! what one of them sends.
//!
//! Checksums left to the device, and super-packets where the kernel knows them there (Linux 6.2), cross it as they are.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::netns::{End, Namespace};
use super::traffic::Pinned;

/// From `linux/if_tun.h`: the device computes checksums, and cuts up UDP datagrams of either IP version.
const OFFLOADS: [libc::c_ulong; 2] = [0x01 | 0x20 | 0x40, 0x01];
/// The longest packet, with what `IFF_VNET_HDR` puts before it.
const LONGEST: usize = 10 + 65_535;

/// What carries packets between two tun devices, for as long as it lives. The devices go with it.
#[derive(Debug)]
pub struct Crossing {
    stop: Option<PipeWriter>,
    carrier: Option<JoinHandle<()>>,
}

impl Crossing {
    /// Connects two namespaces, both ends up and addressed.
    ///
    /// # Errors
    /// When the kernel has no tun devices, or with `ip`'s complaint.
    pub fn between(a: End<'_>, b: End<'_>) -> Result<Crossing> {
        let ends = [open(a.namespace, a.device)?, open(b.namespace, b.device)?];
        a.bring_up()?;
        b.bring_up()?;
        let (stopped, stop) = io::pipe()?;
        let carrier = thread::Builder::new().name("crossing".into()).spawn(move || carry(&ends, &stopped))?;
        Ok(Crossing { stop: Some(stop), carrier: Some(carrier) })
    }
}

impl Drop for Crossing {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(carrier) = self.carrier.take() {
            let _ = carrier.join();
        }
    }
}

/// Makes a tun device in a namespace, which goes when the file is closed.
fn open(namespace: &Namespace, device: &str) -> Result<File> {
    namespace.run(|| {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
        let file = file.context("cannot open /dev/net/tun")?;
        // SAFETY: a C struct of integers and bytes, for which zero is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        ensure!(device.len() < request.ifr_name.len(), "{device} is too long a name");
        for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
        // SAFETY: the descriptor is open, and `request` is what this request reads and writes.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        if result != 0 {
            return Err(io::Error::last_os_error()).with_context(|| format!("cannot make the tun device {device}"));
        }
        // SAFETY: as above; this request takes a number.
        let takes = |what: &libc::c_ulong| unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, *what) == 0 };
        if !OFFLOADS.iter().any(takes) {
            bail!("the tun device {device} leaves no checksums to others");
        }
        Ok(file)
    })
}

/// Takes packets across until the other end of the pipe is closed, or one of the devices is gone. What a device does not take, because it is down or full, is
/// lost, as on a cable.
fn carry(ends: &[File; 2], stopped: &PipeReader) {
    // What comes in on several CPUs may overtake each other, and each CPU has rounds of its own.
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
            if !empty(&ends[from], &ends[to], &mut buffer) {
                return;
            }
        }
    }
}

/// Takes across all that one device has sent. False if somebody has deleted it.
fn empty(mut from: &File, mut to: &File, buffer: &mut [u8]) -> bool {
    loop {
        match from.read(buffer) {
            Ok(length) => drop(to.write(&buffer[..length])),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return error.kind() == ErrorKind::WouldBlock,
        }
    }
}
