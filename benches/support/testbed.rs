//! The network of the benchmarks: a generator, a gateway on which the forwarder runs, and a sink behind it.
//!
//! ```text
//!   generator ──────────── gateway ──────────── sink
//!   10.0.0.2   eth0    in  10.0.0.1   out  10.0.1.1    eth0  10.0.1.2, a TC program that counts and drops
//!                          the forwarder       route: 10.1.0.0/16 via 10.0.1.2, the downstreams
//! ```
//!
//! Two CPUs are used: one by the generator, one by the forwarder alone. For a forwarder in the kernel, the gateway also
//! receives packets on the forwarder's CPU ([`Testbed::kernel_forwards`]); for a program, it receives them on the generator's,
//! as with a network card whose interrupts go to another CPU. Devices do not segment (`tx-udp-segmentation off`), and the
//! gateway coalesces received packets as drivers of network cards do (`gro on`).

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};

use super::cpu::two_cpus;
use super::generator::{Generator, Load};
use super::sink::Sink;
use udp_fanout_lab::Namespace;
use udp_fanout_lab::netns::{End, connect};

/// The port of the listener and of every downstream.
pub const PORT: u16 = 5514;
/// The destination of the senders.
pub const LISTENER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), PORT);
/// The gateway's interface that faces the generator.
pub const IN: &str = "in";
/// The gateway's interface that faces the sink.
pub const OUT: &str = "out";

/// The namespaces and the sink. Dropping it removes everything.
pub struct Testbed {
    /// The namespace of the senders.
    pub generator: Namespace,
    /// The namespace of the program under test.
    pub gateway: Namespace,
    /// The namespaces of the receivers.
    pub receivers: Namespace,
    pub sink: Sink,
    cpus: [usize; 2],
}

impl Testbed {
    /// Builds the network.
    ///
    /// # Errors
    /// When not root, on a machine with one CPU, or when a command fails.
    pub fn build() -> Result<Testbed> {
        let cpus = two_cpus()?;
        let [generator, gateway, receivers] = ["generator", "gateway", "sink"].map(Namespace::create);
        let (generator, gateway, receivers) = (generator?, gateway?, receivers?);
        connect(
            End { namespace: &gateway, device: IN, addresses: "10.0.0.1/24" },
            End { namespace: &generator, device: "eth0", addresses: "10.0.0.2/24" },
        )?;
        connect(
            End { namespace: &gateway, device: OUT, addresses: "10.0.1.1/24" },
            End { namespace: &receivers, device: "eth0", addresses: "10.0.1.2/24" },
        )?;
        generator.ip("route add default via 10.0.0.1")?;
        gateway.ip("route add 10.1.0.0/16 via 10.0.1.2")?;
        receivers.ip("route add default via 10.0.1.1")?;
        for (namespace, device) in [(&generator, "eth0"), (&gateway, OUT)] {
            namespace.ethtool(&format!("-K {device} tx-udp-segmentation off"))?;
        }
        gateway.ethtool(&format!("-K {IN} gro on"))?;
        let sink = Sink::attach(&receivers, "eth0", PORT)?;
        let testbed = Testbed { generator, gateway, receivers, sink, cpus };
        testbed.kernel_forwards(false)?;
        Ok(testbed)
    }

    /// The addresses of the first downstreams.
    pub fn downstreams(count: u32) -> Vec<SocketAddr> {
        let first = u32::from(Ipv4Addr::new(10, 1, 0, 0));
        (1..=count).map(|number| SocketAddr::new(Ipv4Addr::from(first + number).into(), PORT)).collect()
    }

    /// The CPU that generators run on.
    pub fn generator_cpu(&self) -> usize {
        self.cpus[0]
    }

    /// The CPU that forwarders run on.
    pub fn forwarder_cpu(&self) -> usize {
        self.cpus[1]
    }

    /// A sender to the listener.
    ///
    /// # Errors
    /// As for [`Generator::open`].
    pub fn sender(&self, load: Load) -> Result<Generator> {
        self.sender_to(&[LISTENER], load)
    }

    /// A sender to these addresses.
    ///
    /// # Errors
    /// As for [`Generator::open`].
    pub fn sender_to(&self, to: &[SocketAddr], load: Load) -> Result<Generator> {
        Generator::open(&self.generator, to, load, self.cpus[0])
    }

    /// Sets whether the gateway's kernel forwards. If so, the gateway receives packets on the forwarder's CPU, else on the
    /// generator's.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kernel_forwards(&self, yes: bool) -> Result<()> {
        self.gateway.sysctl("net.ipv4.ip_forward", if yes { "1" } else { "0" })?;
        receive_on(&self.gateway, IN, yes.then_some(self.cpus[1]))
    }
}

/// Makes a device's received packets be processed on this CPU (RPS). None: on the CPU that receives them.
///
/// # Errors
/// When the kernel refuses.
pub fn receive_on(namespace: &Namespace, device: &str, cpu: Option<usize>) -> Result<()> {
    let mask = cpu.map_or(0, |cpu| 1u64 << cpu);
    let script = format!("echo {mask:x} > /sys/class/net/{device}/queues/rx-0/rps_cpus");
    // Unlike a command inside the namespace, it has a /sys that shows the namespace's devices.
    let status = std::process::Command::new("ip")
        .args(["netns", "exec", namespace.name(), "sh", "-c", &script])
        .status()
        .context("cannot run ip (Debian package iproute2)")?;
    ensure!(status.success(), "cannot choose the CPU that receives: `{script}` failed");
    Ok(())
}
