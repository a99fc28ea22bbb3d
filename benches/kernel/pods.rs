//! The network of the kernel program's benchmark: a generator, a gateway, and pods on the gateway.
//!
//! ```text
//!   generator ──────────── gateway ──────────── pods, each in a namespace of its own
//!   10.0.0.2   eth0    in  10.0.0.1   pod1 …    eth0  10.244.0.1 …, a TC program that counts and drops
//! ```
//!
//! The generator has one CPU; everything from the gateway's receive queue on has another, so that the result is what one CPU
//! forwards. A sender's socket buffer is free again only when its datagrams have been dropped, so it never sends more than is
//! forwarded.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::bench::cpu::two_cpus;
use crate::bench::generator::{Generator, Load};
use crate::bench::sink::Sink;
use crate::bench::testbed::receive_on;
use crate::paths;
use udp_fanout_lab::Namespace;
use udp_fanout_lab::netns::{End, connect};

/// The port of the listener and of every pod.
pub const PORT: u16 = 5514;
/// The listener's address, to which senders send.
pub const LISTENER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), PORT);
/// The gateway's interface that faces the generator.
pub const IN: &str = "in";
/// A rate above any generator's limit: it sends as fast as it can.
const AS_FAST_AS_IT_CAN: f64 = 1e8;

/// The limit of datagrams in flight, copies included, in bytes of kernel memory: some hundred datagrams, fewer than queues between
/// devices hold. The kernel does not charge copies to the socket, so the limit is reduced for them.
const IN_FLIGHT: usize = 200_000;

/// A receiver.
pub struct Pod {
    /// The pod's address and port.
    pub address: SocketAddr,
    /// The gateway's interface to the pod.
    pub device: String,
    /// The index of that interface.
    pub index: u32,
    /// The MAC address of the pod's interface.
    pub mac: String,
    /// The MAC address of the gateway's interface.
    pub gateway_mac: String,
    sink: Sink,
    _namespace: Namespace,
}

/// The namespaces. Dropping it removes everything.
pub struct Pods {
    /// The namespace of the senders.
    generator: Namespace,
    /// The namespace of the program under test.
    pub gateway: Namespace,
    /// The namespaces of the receivers.
    pub pods: Vec<Pod>,
    /// The compiled reference programs, which are loaded for every turn.
    pub references: Vec<u8>,
    cpus: [usize; 2],
}

impl Pods {
    /// Builds the network with this many pods.
    ///
    /// # Errors
    /// When not root, on a machine with one CPU, or when a command fails.
    pub fn build(count: u8) -> Result<Pods> {
        let cpus = two_cpus()?;
        let (generator, gateway) = (Namespace::create("generator")?, Namespace::create("gateway")?);
        connect(
            End { namespace: &gateway, device: IN, addresses: "10.0.0.1/24" },
            End { namespace: &generator, device: "eth0", addresses: "10.0.0.2/24" },
        )?;
        generator.ip("route add default via 10.0.0.1")?;
        generator.ethtool("-K eth0 tx-udp-segmentation off")?;
        gateway.sysctl("net.ipv4.ip_forward", "1")?;
        let pods = (1..=count).map(|number| pod(&gateway, number)).collect::<Result<Vec<_>>>()?;
        receive_on(&gateway, IN, Some(cpus[1]))?;
        Ok(Pods { generator, gateway, pods, references: paths::references()?, cpus })
    }

    /// The addresses of the first pods.
    pub fn addresses(&self, count: usize) -> Vec<SocketAddr> {
        self.pods.iter().take(count).map(|pod| pod.address).collect()
    }

    /// Sends to this address as fast as possible and returns the rate of arrivals, in datagrams per second.
    ///
    /// # Errors
    /// When sending fails, or when more than a thousandth was lost, which makes the rate meaningless.
    pub fn measure(&self, to: SocketAddr, size: usize, copies: u64, length: Duration) -> Result<f64> {
        let mut generator = Generator::open(&self.generator, &[to], Load::one_sender(size), self.cpus[0])?;
        generator.limit_buffers(IN_FLIGHT / copies as usize)?;
        generator.run(AS_FAST_AS_IT_CAN, length / 8)?;
        self.settle()?;
        let before = self.arrived()?;
        let sent = generator.run(AS_FAST_AS_IT_CAN, length)?;
        let at_end = self.arrived()? - before;
        let arrived = self.settle()? - before;
        let wanted = sent.datagrams * copies;
        ensure!(
            arrived * 1000 >= wanted * 999 && arrived <= wanted,
            "of {wanted} datagrams {arrived} arrived: the rate means nothing"
        );
        Ok(at_end as f64 / sent.seconds)
    }

    fn arrived(&self) -> Result<u64> {
        self.pods.iter().map(|pod| Ok(pod.sink.arrived()?.datagrams)).sum()
    }

    /// Waits until nothing more arrives, and returns the number of arrivals.
    fn settle(&self) -> Result<u64> {
        let mut last = self.arrived()?;
        loop {
            std::thread::sleep(Duration::from_millis(20));
            let now = self.arrived()?;
            if now == last {
                return Ok(now);
            }
            last = now;
        }
    }
}

fn pod(gateway: &Namespace, number: u8) -> Result<Pod> {
    let namespace = Namespace::create(&format!("pod{number}"))?;
    let (device, ip) = (format!("pod{number}"), Ipv4Addr::new(10, 244, 0, number));
    connect(
        End { namespace: gateway, device: &device, addresses: "" },
        End { namespace: &namespace, device: "eth0", addresses: &format!("{ip}/32") },
    )?;
    gateway.ip(&format!("route add {ip} dev {device}"))?;
    let near = gateway.link(&device)?;
    namespace.ip_batch(&format!(
        "neigh add 169.254.1.1 lladdr {} dev eth0 nud permanent\n\
         route add 169.254.1.1 dev eth0 scope link\n\
         route add default via 169.254.1.1 dev eth0\n",
        near.mac
    ))?;
    let sink = Sink::attach(&namespace, "eth0", PORT)?;
    Ok(Pod {
        address: SocketAddr::new(ip.into(), PORT),
        device,
        index: near.index,
        mac: namespace.link("eth0")?.mac,
        gateway_mac: near.mac,
        sink,
        _namespace: namespace,
    })
}
