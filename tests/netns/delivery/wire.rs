//! Whole frames, sent and received unchanged on a device of the lab, and the kernel's counters for them.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result};
use socket2::{Domain, Socket, Type};

use udp_fanout_lab::INGRESS;
use udp_fanout_lab::{Lab, Namespace};
use udp_fanout_testkit::kernel::packet::Frame;

/// How long a frame may take to arrive. Only a failing test waits that long.
const LIMIT: Duration = Duration::from_secs(10);

/// A packet socket on a device.
#[derive(Debug)]
pub struct Wire {
    socket: Socket,
}

impl Wire {
    /// Opens a packet socket on a device.
    ///
    /// # Errors
    /// When there is no such device.
    pub fn open(namespace: &Namespace, device: &str) -> Result<Wire> {
        let index = namespace.link(device)?.index;
        namespace.run(|| {
            let every_protocol = (libc::ETH_P_ALL as u16).to_be();
            let protocol = socket2::Protocol::from(i32::from(every_protocol));
            let socket =
                Socket::new(Domain::PACKET, Type::RAW, Some(protocol)).context("cannot open a packet socket")?;
            socket.set_read_timeout(Some(LIMIT))?;
            let address = libc::sockaddr_ll {
                sll_family: libc::AF_PACKET as u16,
                sll_protocol: every_protocol,
                sll_ifindex: i32::try_from(index)?,
                sll_hatype: 0,
                sll_pkttype: 0,
                sll_halen: 0,
                sll_addr: [0; 8],
            };
            let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            // SAFETY: the pointer and the length are those of `address`, which lives until the call returns.
            let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
            if result != 0 {
                return Err(io::Error::last_os_error()).context("cannot bind a packet socket");
            }
            Ok(Wire { socket })
        })
    }

    /// Sends a frame as it is.
    ///
    /// # Errors
    /// When the device is down.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        let sent = self.socket.send(frame)?;
        assert_eq!(sent, frame.len());
        Ok(())
    }

    /// A datagram from the lab's sender to its listener.
    pub fn frame_to(&self, lab: &Lab) -> Frame {
        let source = SocketAddr::new(lab.sender_address(), 4_000);
        let mut frame = Frame::new(&source.to_string(), &lab.listener().to_string(), b"by hand");
        frame.destination_mac = gateway_mac(lab);
        frame
    }

    /// The next frames seen that hold a UDP datagram to this port in a packet without options or extension headers.
    ///
    /// # Errors
    /// When they do not arrive in time.
    pub fn udp_frames_to(&self, port: u16, count: usize) -> Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        let mut buffer = vec![0; 65_536];
        while frames.len() < count {
            // SAFETY: the pointer and the length are those of `buffer`.
            let length = unsafe { libc::recv(self.socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            let length = usize::try_from(length).map_err(|_| io::Error::last_os_error());
            let frame = &buffer[..length.with_context(|| format!("{} of {count} frames seen", frames.len()))?];
            let l4 = match frame.get(12..14) {
                Some([0x08, 0x00]) if frame[23] == 17 => 34,
                Some([0x86, 0xdd]) if frame[20] == 17 => 54,
                _ => continue,
            };
            if frame.get(l4 + 2..l4 + 4) == Some(&port.to_be_bytes()) {
                frames.push(frame.to_vec());
            }
        }
        Ok(frames)
    }
}

/// The hardware address of the gateway on the sender's network.
pub fn gateway_mac(lab: &Lab) -> [u8; 6] {
    mac(&lab.gateway, INGRESS)
}

/// The hardware address of a device.
pub fn mac(namespace: &Namespace, device: &str) -> [u8; 6] {
    let text = namespace.link(device).unwrap().mac;
    let mut bytes = [0; 6];
    for (byte, digits) in bytes.iter_mut().zip(text.split(':')) {
        *byte = u8::from_str_radix(digits, 16).unwrap();
    }
    bytes
}

/// Datagrams that a host's UDP has refused, of both families: bad checksum, truncated, no buffer space.
pub fn udp_errors(namespace: &Namespace) -> u64 {
    let counters = snmp(namespace);
    ["Udp.InErrors", "Udp6InErrors"].iter().filter_map(|name| counters.get(*name)).sum()
}

/// The counters of a host's stack: those of IPv4 as `Ip.InReceives`, those of IPv6 as `Ip6InReceives`.
pub fn snmp(namespace: &Namespace) -> BTreeMap<String, u64> {
    let read =
        |file: &str| namespace.run(|| Ok(std::fs::read_to_string(format!("/proc/thread-self/net/{file}"))?)).unwrap();
    let mut counters = BTreeMap::new();
    let v4 = read("snmp");
    let lines: Vec<&str> = v4.lines().collect();
    for pair in lines.chunks_exact(2) {
        let (Some((protocol, names)), Some((_, values))) = (pair[0].split_once(':'), pair[1].split_once(':')) else {
            continue;
        };
        for (name, value) in names.split_whitespace().zip(values.split_whitespace()) {
            counters.insert(format!("{protocol}.{name}"), value.parse().unwrap_or(0));
        }
    }
    for line in read("snmp6").lines() {
        if let Some((name, value)) = line.split_once(char::is_whitespace) {
            counters.insert(name.to_owned(), value.trim().parse().unwrap_or(0));
        }
    }
    counters
}
