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
//!
//! With [`LabBuilder::ipv6`] everything has an IPv6 address beside that (10.a.b.c is fd00:0:a:b::c), and the lab's own
//! addresses are those.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::netns::{End, Namespace, connect};
use super::tun::Crossing;

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
    /// Addresses are IPv6 ones.
    ipv6: bool,
    /// What carries packets between sender and gateway where they are not connected by a cable.
    crossing: Option<Crossing>,
}

/// What a lab is to look like.
#[derive(Debug, Clone)]
pub struct LabBuilder {
    places: Vec<Place>,
    port: u16,
    ip_forward: bool,
    rp_filter: u8,
    ipv6: bool,
    on_machine: bool,
    headerless: bool,
}

impl Lab {
    /// The sender's IPv4 address.
    pub const SENDER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));
    /// The gateway's IPv4 address on the sender's network.
    pub const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));

    /// A lab without receivers, on a gateway that neither forwards nor lets odd sources in: `ip_forward=0`,
    /// `rp_filter=1`.
    pub fn builder() -> LabBuilder {
        LabBuilder {
            places: Vec::new(),
            port: LISTENER_PORT,
            ip_forward: false,
            rp_filter: 1,
            ipv6: false,
            on_machine: false,
            headerless: false,
        }
    }

    /// Where senders send to.
    pub fn listener(&self) -> SocketAddr {
        SocketAddr::new(self.address(Self::GATEWAY), LISTENER_PORT)
    }

    /// The sender's address.
    pub fn sender_address(&self) -> IpAddr {
        self.address(Self::SENDER)
    }

    /// The IPv4 address itself, or the IPv6 one that stands beside it in a lab of that family.
    fn address(&self, v4: IpAddr) -> IpAddr {
        match v4 {
            IpAddr::V4(v4) if self.ipv6 => beside(v4).into(),
            other => other,
        }
    }

    /// Takes the sender's link away, where it is one without frames: the devices at both ends go with it.
    pub fn cut(&mut self) {
        self.crossing = None;
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

    /// Whether the lab's addresses are IPv6 ones. `ip_forward` then holds for that family as well.
    pub fn ipv6(mut self, on: bool) -> Self {
        self.ipv6 = on;
        self
    }

    /// Whether the gateway is the machine itself, which must be the test's alone.
    pub fn on_machine(mut self, on: bool) -> Self {
        self.on_machine = on;
        self
    }

    /// Whether the sender's link carries IP packets without frames: a tun device at each end. No one else can be on it.
    pub fn headerless(mut self, on: bool) -> Self {
        self.headerless = on;
        self
    }

    /// Builds the network.
    ///
    /// # Errors
    /// When not root, or with the complaint of the command that failed. What had been built is removed.
    pub fn build(self) -> Result<Lab> {
        let sender = host("sender", self.ipv6)?;
        let gateway = if self.on_machine { Namespace::of_the_machine()? } else { host("gateway", self.ipv6)? };
        for scope in ["all", "default"] {
            gateway.sysctl(&format!("net.ipv4.conf.{scope}.rp_filter"), &self.rp_filter.to_string())?;
            let families: &[&str] = if self.ipv6 { &["ipv4", "ipv6"] } else { &["ipv4"] };
            for family in families {
                let value = if self.ip_forward { "1" } else { "0" };
                gateway.sysctl(&format!("net.{family}.conf.{scope}.forwarding"), value)?;
            }
        }
        let mut lab = Lab { sender, gateway, sites: Vec::new(), others: Vec::new(), ipv6: self.ipv6, crossing: None };
        lab.connect_sender(self.places.contains(&Place::SameInterface), self.headerless)?;
        for (position, place) in self.places.iter().enumerate() {
            let site = lab.build_site(position, *place, self.port)?;
            lab.sites.push(site);
        }
        if let Some(switch) = lab.others.first().filter(|_| self.places.contains(&Place::SameInterface)) {
            wait_for_bridge(switch)?;
        }
        Ok(lab)
    }
}

impl Lab {
    /// The sender's network: a cable, or a switch if others are on it too, or tun devices.
    fn connect_sender(&mut self, switched: bool, headerless: bool) -> Result<()> {
        let [near, far] = ["10.0.0.1/24", "10.0.0.2/24"].map(|cidr| self.cidrs(cidr));
        let sender = End { namespace: &self.sender, device: "eth0", addresses: &far };
        let gateway = End { namespace: &self.gateway, device: INGRESS, addresses: &near };
        if headerless {
            self.crossing = Some(Crossing::between(gateway, sender)?);
        } else if switched {
            let switch = Namespace::create("switch")?;
            switch.ip_batch("link add br0 type bridge stp_state 0\nlink set br0 up\n")?;
            plug(&switch, "sender", sender)?;
            plug(&switch, "gateway", gateway)?;
            self.others.push(switch);
        } else {
            connect(gateway, sender)?;
        }
        self.route(&self.sender, "default", "10.0.0.1")
    }

    fn build_site(&mut self, position: usize, place: Place, port: u16) -> Result<Site> {
        // Two digits keep the addresses readable and tell the receivers of one lab apart.
        let number = u8::try_from(position + 10).ok().filter(|n| *n < 100);
        let Some(n) = number else { bail!("a lab holds at most 90 receivers") };
        let label = format!("{}{}", place.label(), position + 1);
        let namespace = match place {
            Place::GatewayHost => None,
            _ => Some(host(&label, self.ipv6)?),
        };
        let mut address = SocketAddr::new(self.address(Self::GATEWAY), port);
        if let Some(inside) = &namespace {
            address.set_ip(match place {
                Place::OtherInterface => self.other_interface(inside, n)?,
                Place::SameInterface => self.same_interface(inside, n)?,
                Place::BehindRouter => {
                    let (router, ip) = self.behind_router(inside, n)?;
                    self.others.push(router);
                    ip
                }
                Place::Pod => self.pod(inside, n)?,
                Place::GatewayHost => Self::GATEWAY,
            });
            address.set_ip(self.address(address.ip()));
        } else {
            address.set_port(port + HOST_PORT_OFFSET + u16::from(n));
        }
        Ok(Site { name: format!("receiver-{}", position + 1), place, address, namespace })
    }

    fn other_interface(&self, inside: &Namespace, n: u8) -> Result<IpAddr> {
        let device = format!("out{}", n - 9);
        let [near, far] = [1, 2].map(|host| self.cidrs(&format!("10.0.{n}.{host}/24")));
        connect(
            End { namespace: &self.gateway, device: &device, addresses: &near },
            End { namespace: inside, device: "eth0", addresses: &far },
        )?;
        self.route(inside, "default", &format!("10.0.{n}.1"))?;
        Ok(Ipv4Addr::new(10, 0, n, 2).into())
    }

    fn same_interface(&self, inside: &Namespace, n: u8) -> Result<IpAddr> {
        let port = format!("port{}", n - 9);
        let address = self.cidrs(&format!("10.0.0.{n}/24"));
        plug(&self.others[0], &port, End { namespace: inside, device: "eth0", addresses: &address })?;
        self.route(inside, "default", "10.0.0.1")?;
        Ok(Ipv4Addr::new(10, 0, 0, n).into())
    }

    fn behind_router(&self, inside: &Namespace, n: u8) -> Result<(Namespace, IpAddr)> {
        let router = host(&format!("router{}", n - 9), self.ipv6)?;
        router.sysctl("net.ipv4.ip_forward", "1")?;
        if self.ipv6 {
            router.sysctl("net.ipv6.conf.all.forwarding", "1")?;
        }
        let device = format!("rtr{}", n - 9);
        let [near, far] = [1, 2].map(|host| self.cidrs(&format!("10.0.{n}.{host}/24")));
        connect(
            End { namespace: &self.gateway, device: &device, addresses: &near },
            End { namespace: &router, device: "near", addresses: &far },
        )?;
        let [near, far] = [1, 2].map(|host| self.cidrs(&format!("10.1.{n}.{host}/24")));
        connect(
            End { namespace: &router, device: "far", addresses: &near },
            End { namespace: inside, device: "eth0", addresses: &far },
        )?;
        self.route(&router, "default", &format!("10.0.{n}.1"))?;
        self.route(&self.gateway, &format!("10.1.{n}.0/24"), &format!("10.0.{n}.2"))?;
        self.route(inside, "default", &format!("10.1.{n}.1"))?;
        Ok((router, Ipv4Addr::new(10, 1, n, 2).into()))
    }

    /// A pod. Its gateway's hardware address is written into the neighbour table, as some plugins do, because with
    /// `ip_forward=0` the gateway would not answer for 169.254.1.1.
    fn pod(&self, inside: &Namespace, n: u8) -> Result<IpAddr> {
        let device = format!("pod{}", n - 9);
        let cidrs = self.cidrs(&format!("10.244.0.{n}/32"));
        connect(
            End { namespace: &self.gateway, device: &device, addresses: "" },
            End { namespace: inside, device: "eth0", addresses: &cidrs },
        )?;
        let mac = self.gateway.link(&device)?.mac;
        for address in cidrs.split_whitespace() {
            self.gateway.ip(&format!("route add {address} dev {device}"))?;
        }
        let mut lines = String::new();
        for gateway in self.cidrs("169.254.1.1/32").split_whitespace().filter_map(|cidr| cidr.split('/').next()) {
            lines += &format!(
                "neigh add {gateway} lladdr {mac} dev eth0 nud permanent\n\
                 route add {gateway} dev eth0 scope link\n\
                 route add default via {gateway} dev eth0\n"
            );
        }
        inside.ip_batch(&lines)?;
        Ok(Ipv4Addr::new(10, 244, 0, n).into())
    }

    /// The address with its prefix length, followed by the IPv6 one that stands beside it in a lab of that family.
    fn cidrs(&self, v4: &str) -> String {
        if !self.ipv6 {
            return v4.to_owned();
        }
        format!("{v4} {}", cidr_beside(v4))
    }

    /// Adds a route by way of a router, and its like for IPv6 in a lab of that family.
    fn route(&self, namespace: &Namespace, destination: &str, router: &str) -> Result<()> {
        namespace.ip(&format!("route add {destination} via {router}"))?;
        if self.ipv6 {
            let destination = if destination == "default" { destination } else { &cidr_beside(destination) };
            let router = cidr_beside(&format!("{router}/32"));
            namespace.ip(&format!("-6 route add {destination} via {}", router.trim_end_matches("/128")))?;
        }
        Ok(())
    }
}

/// The IPv6 address that stands beside an IPv4 one.
fn beside(v4: Ipv4Addr) -> Ipv6Addr {
    let [_, a, b, c] = v4.octets().map(u16::from);
    Ipv6Addr::new(0xfd00, 0, a, b, 0, 0, 0, c)
}

/// As [`beside`], with the prefix length: networks of /24 become /64, hosts of /32 become /128.
fn cidr_beside(v4: &str) -> String {
    let (address, length) = v4.split_once('/').unwrap_or((v4, "32"));
    let length = if length == "32" { 128 } else { 64 };
    address.parse().map_or_else(|_| v4.to_owned(), |v4| format!("{}/{length}", beside(v4)))
}

/// A namespace of a host that checks sources strictly, as distributions set it, and forwards nothing.
fn host(label: &str, ipv6: bool) -> Result<Namespace> {
    let namespace = Namespace::create(label)?;
    for scope in ["all", "default"] {
        namespace.sysctl(&format!("net.ipv4.conf.{scope}.rp_filter"), "1")?;
        if ipv6 {
            // Looking for duplicates first, an address could not be used for a second or two.
            namespace.sysctl(&format!("net.ipv6.conf.{scope}.accept_dad"), "0")?;
        }
    }
    Ok(namespace)
}

/// Connects a host to a port of the switch.
fn plug(switch: &Namespace, port: &str, end: End<'_>) -> Result<()> {
    connect(End { namespace: switch, device: port, addresses: "" }, end)?;
    switch.ip(&format!("link set {port} master br0"))?;
    Ok(())
}

/// Waits until every port of a namespace's bridges forwards; the kernel opens a port a moment after its link is up.
///
/// # Errors
/// When one does not open.
pub fn wait_for_bridge(namespace: &Namespace) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let ports = namespace.ip("-oneline -details link show type bridge_slave")?;
        if ports.lines().all(|port| port.contains(" state forwarding ")) {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("a bridge has not opened its ports:\n{ports}");
        }
    }
}
