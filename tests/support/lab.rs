//! A sender, a gateway and receivers in every place a receiver can be.
//!
//! ```text
//!                                      gateway
//!   sender ──────────────(eth0 10.0.0.1)┬ out1 ── receiver        OtherInterface   10.0.11.2
//!   10.0.0.2      │                     ├ rtr2 ── router ── rcv.  BehindRouter     10.1.12.2
//!              receiver                 ├ pod3 ── eth0 (pod)      Pod              10.244.0.13
//!              SameInterface            └ a socket of its own     GatewayHost      10.0.0.1, another port
//!              10.0.0.10
//! ```
//!
//! The number in a name or address is the receiver's position in the lab. The daemon runs in `gateway` and listens on
//! [`Lab::listener`]. Nothing in the lab sends or forwards a datagram unless a test makes it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::netns::{End, Namespace, connect};

/// The port the daemon listens on.
const LISTENER_PORT: u16 = 5514;
/// What is added to the receivers' port for a receiver on the gateway, whose own port may be the listener's.
const HOST_PORT_OFFSET: u16 = 1000;
/// The gateway's interface that faces the sender.
pub const INGRESS: &str = "eth0";

/// Where a receiver is, seen from the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// On a network of its own behind another interface.
    OtherInterface,
    /// On the sender's network: datagrams leave by the interface they came in on.
    SameInterface,
    /// Two hops away.
    BehindRouter,
    /// In a local namespace as Kubernetes network plugins make them: one veth, a host route to a /32, and
    /// 169.254.1.1 as the pod's default gateway.
    Pod,
    /// A socket in the gateway's own namespace.
    GatewayHost,
}

impl Place {
    /// Every place.
    pub const ALL: [Place; 5] =
        [Place::OtherInterface, Place::SameInterface, Place::BehindRouter, Place::Pod, Place::GatewayHost];

    fn label(self) -> &'static str {
        match self {
            Place::OtherInterface => "other",
            Place::SameInterface => "same",
            Place::BehindRouter => "routed",
            Place::Pod => "pod",
            Place::GatewayHost => "host",
        }
    }
}

/// One receiver's place in the network. Nothing listens there until [`super::Collectors::start`].
#[derive(Debug)]
pub struct Site {
    /// Unique in the lab, such as `receiver-1`.
    pub name: String,
    /// Where it is.
    pub place: Place,
    /// The address datagrams for it are sent to.
    pub address: SocketAddr,
    /// Its namespace; none for a receiver on the gateway.
    namespace: Option<Namespace>,
}

/// The network. Everything in it goes when it is dropped.
#[derive(Debug)]
pub struct Lab {
    /// Where senders are; [`Lab::SENDER`] is its address.
    pub sender: Namespace,
    /// Where the daemon runs.
    pub gateway: Namespace,
    /// The receivers, in the order they were asked for.
    pub sites: Vec<Site>,
    /// The switch on the sender's network and the routers.
    others: Vec<Namespace>,
}

/// What a lab is to look like.
#[derive(Debug, Clone)]
pub struct LabBuilder {
    places: Vec<Place>,
    port: u16,
    ip_forward: bool,
    rp_filter: u8,
}

impl Lab {
    /// The sender's address.
    pub const SENDER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));
    /// The gateway's address on the sender's network.
    pub const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));

    /// A lab without receivers, on a gateway that neither forwards nor lets odd sources in: `ip_forward=0`,
    /// `rp_filter=1`.
    pub fn builder() -> LabBuilder {
        LabBuilder { places: Vec::new(), port: LISTENER_PORT, ip_forward: false, rp_filter: 1 }
    }

    /// Where senders send to.
    pub fn listener(&self) -> SocketAddr {
        SocketAddr::new(Self::GATEWAY, LISTENER_PORT)
    }

    /// The namespace a receiver is in.
    pub fn namespace_of<'a>(&'a self, site: &'a Site) -> &'a Namespace {
        site.namespace.as_ref().unwrap_or(&self.gateway)
    }

    /// Every address of the gateway but loopback's, which is what receivers see as the source in userspace mode.
    ///
    /// # Errors
    /// With `ip`'s complaint.
    pub fn gateway_addresses(&self) -> Result<Vec<IpAddr>> {
        let text = self.gateway.ip("-oneline address show scope global")?;
        let addresses = text.lines().filter_map(|line| line.split_whitespace().nth(3));
        Ok(addresses.filter_map(|cidr| cidr.split('/').next()?.parse().ok()).collect())
    }
}

impl LabBuilder {
    /// Adds a receiver.
    pub fn receiver(mut self, place: Place) -> Self {
        self.places.push(place);
        self
    }

    /// Adds a receiver in each of these places.
    pub fn receivers(mut self, places: impl IntoIterator<Item = Place>) -> Self {
        self.places.extend(places);
        self
    }

    /// The port receivers listen on; the listener's own unless told. Those on the gateway add 1000 and their position.
    pub fn port(mut self, port: u16) -> Self {
        self.port = port;
        self
    }

    /// Whether the gateway forwards IP packets by itself.
    pub fn ip_forward(mut self, on: bool) -> Self {
        self.ip_forward = on;
        self
    }

    /// The gateway's source validation: 0 off, 1 strict, 2 loose.
    pub fn rp_filter(mut self, value: u8) -> Self {
        self.rp_filter = value;
        self
    }

    /// Builds the network.
    ///
    /// # Errors
    /// When not root, or with the complaint of the command that failed. What had been built is removed.
    pub fn build(self) -> Result<Lab> {
        let sender = host("sender")?;
        let gateway = Namespace::create("gateway")?;
        for (key, value) in [("rp_filter", self.rp_filter), ("forwarding", self.ip_forward.into())] {
            for scope in ["all", "default"] {
                gateway.sysctl(&format!("net.ipv4.conf.{scope}.{key}"), &value.to_string())?;
            }
        }
        let mut lab = Lab { sender, gateway, sites: Vec::new(), others: Vec::new() };
        lab.connect_sender(self.places.contains(&Place::SameInterface))?;
        for (position, place) in self.places.iter().enumerate() {
            let site = lab.build_site(position, *place, self.port)?;
            lab.sites.push(site);
        }
        if let Some(switch) = lab.others.first().filter(|_| self.places.contains(&Place::SameInterface)) {
            wait_for_switch(switch)?;
        }
        Ok(lab)
    }
}

impl Lab {
    /// The sender's network: a cable, or a switch if others are on it too.
    fn connect_sender(&mut self, switched: bool) -> Result<()> {
        let sender = End { namespace: &self.sender, device: "eth0", address: "10.0.0.2/24" };
        let gateway = End { namespace: &self.gateway, device: INGRESS, address: "10.0.0.1/24" };
        if switched {
            let switch = Namespace::create("switch")?;
            switch.ip_batch("link add br0 type bridge stp_state 0\nlink set br0 up\n")?;
            plug(&switch, "sender", sender)?;
            plug(&switch, "gateway", gateway)?;
            self.others.push(switch);
        } else {
            connect(gateway, sender)?;
        }
        self.sender.ip("route add default via 10.0.0.1")?;
        Ok(())
    }

    fn build_site(&mut self, position: usize, place: Place, port: u16) -> Result<Site> {
        // Two digits keep the addresses readable and tell the receivers of one lab apart.
        let number = u8::try_from(position + 10).ok().filter(|n| *n < 100);
        let Some(n) = number else { bail!("a lab holds at most 90 receivers") };
        let label = format!("{}{}", place.label(), position + 1);
        let namespace = match place {
            Place::GatewayHost => None,
            _ => Some(host(&label)?),
        };
        let mut address = SocketAddr::new(Self::GATEWAY, port);
        if let Some(inside) = &namespace {
            address.set_ip(match place {
                Place::OtherInterface => other_interface(&self.gateway, inside, n)?,
                Place::SameInterface => same_interface(&self.others[0], inside, n)?,
                Place::BehindRouter => {
                    let (router, ip) = behind_router(&self.gateway, inside, n)?;
                    self.others.push(router);
                    ip
                }
                Place::Pod => pod(&self.gateway, inside, n)?,
                Place::GatewayHost => Self::GATEWAY,
            });
        } else {
            address.set_port(port + HOST_PORT_OFFSET + u16::from(n));
        }
        Ok(Site { name: format!("receiver-{}", position + 1), place, address, namespace })
    }
}

/// A namespace of a host that checks sources strictly, as distributions set it, and forwards nothing.
fn host(label: &str) -> Result<Namespace> {
    let namespace = Namespace::create(label)?;
    for scope in ["all", "default"] {
        namespace.sysctl(&format!("net.ipv4.conf.{scope}.rp_filter"), "1")?;
    }
    Ok(namespace)
}

/// Connects a host to a port of the switch.
fn plug(switch: &Namespace, port: &str, end: End<'_>) -> Result<()> {
    connect(End { namespace: switch, device: port, address: "" }, end)?;
    switch.ip(&format!("link set {port} master br0"))?;
    Ok(())
}

fn other_interface(gateway: &Namespace, inside: &Namespace, n: u8) -> Result<IpAddr> {
    let device = format!("out{}", n - 9);
    connect(
        End { namespace: gateway, device: &device, address: &format!("10.0.{n}.1/24") },
        End { namespace: inside, device: "eth0", address: &format!("10.0.{n}.2/24") },
    )?;
    inside.ip(&format!("route add default via 10.0.{n}.1"))?;
    Ok(Ipv4Addr::new(10, 0, n, 2).into())
}

fn same_interface(switch: &Namespace, inside: &Namespace, n: u8) -> Result<IpAddr> {
    let port = format!("port{}", n - 9);
    plug(switch, &port, End { namespace: inside, device: "eth0", address: &format!("10.0.0.{n}/24") })?;
    inside.ip("route add default via 10.0.0.1")?;
    Ok(Ipv4Addr::new(10, 0, 0, n).into())
}

fn behind_router(gateway: &Namespace, inside: &Namespace, n: u8) -> Result<(Namespace, IpAddr)> {
    let router = host(&format!("router{}", n - 9))?;
    router.sysctl("net.ipv4.ip_forward", "1")?;
    let device = format!("rtr{}", n - 9);
    connect(
        End { namespace: gateway, device: &device, address: &format!("10.0.{n}.1/24") },
        End { namespace: &router, device: "near", address: &format!("10.0.{n}.2/24") },
    )?;
    connect(
        End { namespace: &router, device: "far", address: &format!("10.1.{n}.1/24") },
        End { namespace: inside, device: "eth0", address: &format!("10.1.{n}.2/24") },
    )?;
    router.ip(&format!("route add default via 10.0.{n}.1"))?;
    gateway.ip(&format!("route add 10.1.{n}.0/24 via 10.0.{n}.2"))?;
    inside.ip(&format!("route add default via 10.1.{n}.1"))?;
    Ok((router, Ipv4Addr::new(10, 1, n, 2).into()))
}

/// A pod. Its gateway's hardware address is written into the neighbour table, as some plugins do, because with
/// `ip_forward=0` the gateway would not answer for 169.254.1.1.
fn pod(gateway: &Namespace, inside: &Namespace, n: u8) -> Result<IpAddr> {
    let device = format!("pod{}", n - 9);
    connect(
        End { namespace: gateway, device: &device, address: "" },
        End { namespace: inside, device: "eth0", address: &format!("10.244.0.{n}/32") },
    )?;
    gateway.ip(&format!("route add 10.244.0.{n}/32 dev {device} scope link"))?;
    let mac = gateway.link(&device)?.mac;
    inside.ip_batch(&format!(
        "neigh add 169.254.1.1 lladdr {mac} dev eth0 nud permanent\n\
         route add 169.254.1.1 dev eth0 scope link\n\
         route add default via 169.254.1.1 dev eth0\n"
    ))?;
    Ok(Ipv4Addr::new(10, 244, 0, n).into())
}

/// Waits until every port of the switch forwards; the kernel opens a port a moment after its link is up.
fn wait_for_switch(switch: &Namespace) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let ports = switch.ip("-oneline -details link show type bridge_slave")?;
        if ports.lines().all(|port| port.contains(" state forwarding ")) {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("the lab's switch has not opened its ports:\n{ports}");
        }
    }
}
