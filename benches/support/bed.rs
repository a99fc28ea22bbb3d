//! The network that benchmarks run in: a generator, a gateway on which the contender runs, and a sink behind it.
//!
//! ```text
//!   generator ──────────── gateway ──────────── sink
//!   10.0.0.2   eth0    in  10.0.0.1   out  10.0.1.1    eth0  10.0.1.2, a TC program that counts and drops
//!                          the contender        route: 10.1.0.0/16 via 10.0.1.2, the downstreams
//! ```
//!
//! Two CPUs take part. The generator has one, the contender the other, to itself: also the kernel's work for a forwarder in
//! the kernel is put there ([`Bed::kernel_forwards`]), while a program is spared the work of receiving packets, as it is
//! where a network card's interrupts go elsewhere. Devices cut nothing into packets by themselves (`tx-udp-segmentation
//! off`), and the gateway joins what arrives as network cards' drivers do (`gro on`).

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use nix::sched::sched_getaffinity;
use nix::unistd::Pid;

use super::generator::{Generator, Load};
use super::sink::Sink;
use udp_fanout_lab::Namespace;
use udp_fanout_lab::netns::{End, connect};

/// The port of the listener and of every downstream.
pub const PORT: u16 = 5514;
/// Where senders send to.
pub const LISTENER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), PORT);
/// The gateway's interface that faces the generator.
pub const IN: &str = "in";
/// The gateway's interface that faces the sink.
pub const OUT: &str = "out";

/// The namespaces and the sink. Everything goes when it is dropped.
pub struct Bed {
    /// Where datagrams come from.
    pub generator: Namespace,
    /// Where contenders run.
    pub gateway: Namespace,
    /// Where datagrams end.
    pub receivers: Namespace,
    /// Counts them.
    pub sink: Sink,
    cpus: [usize; 2],
}

impl Bed {
    /// Builds the network.
    ///
    /// # Errors
    /// When not root, on a machine with one CPU, or with the complaint of the command that failed.
    pub fn build() -> Result<Bed> {
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
        let bed = Bed { generator, gateway, receivers, sink, cpus };
        bed.kernel_forwards(false)?;
        Ok(bed)
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

    /// The CPU that contenders run on.
    pub fn contender_cpu(&self) -> usize {
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

    /// Says where the gateway's kernel does its part: for a forwarder in the kernel, on the contender's CPU; for one that
    /// is a program, with the generator. Also whether the gateway forwards by itself.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kernel_forwards(&self, yes: bool) -> Result<()> {
        self.gateway.sysctl("net.ipv4.ip_forward", if yes { "1" } else { "0" })?;
        receive_on(&self.gateway, IN, yes.then_some(self.cpus[1]))
    }
}

/// Has what comes in by a device dealt with on this CPU; none for where it comes in.
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

/// The first two CPUs that this process may use.
///
/// # Errors
/// When there is but one.
pub fn two_cpus() -> Result<[usize; 2]> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let mut cpus = (0..nix::sched::CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false));
    match (cpus.next(), cpus.next()) {
        (Some(first), Some(second)) => Ok([first, second]),
        _ => anyhow::bail!("benchmarks need two CPUs: one for the generator, one for the contender"),
    }
}
