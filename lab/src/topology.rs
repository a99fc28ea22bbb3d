//! A sender, a gateway, and receivers at every supported place.
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
//! [`Lab::listener`]. Nothing in the lab sends or forwards a datagram without a test's request.
//!
//! With [`LabBuilder::ipv6`] everything also has an IPv6 address (fd00:0:a:b::c for 10.a.b.c), and the lab's methods return
//! the IPv6 addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::netns::{End, Namespace, connect};
use super::tun::TunLink;

/// The port the daemon listens on.
const LISTENER_PORT: u16 = 5514;
/// Offset of the port of a receiver on the gateway, where the listener may use the receivers' port.
const HOST_PORT_OFFSET: u16 = 1000;
/// The gateway's interface that faces the sender.
pub const INGRESS: &str = "eth0";

/// A receiver's place in the network, relative to the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// On a separate network behind another interface.
    OtherInterface,
    /// On the sender's network: the ingress and egress interface are the same.
    SameInterface,
    /// Two hops away, behind a router.
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

/// A receiver's host. Nothing listens there until [`super::Collectors::start`].
#[derive(Debug)]
pub struct Site {
    /// Unique in the lab, such as `receiver-1`.
    pub name: String,
    /// The place in the network.
    pub place: Place,
    /// The receiver's address and port.
    pub address: SocketAddr,
    /// The receiver's namespace; none for a receiver on the gateway.
    namespace: Option<Namespace>,
}

/// The network. Dropping it removes everything.
#[derive(Debug)]
pub struct Lab {
    /// The senders' namespace; [`Lab::SENDER`] is its address.
    pub sender: Namespace,
    /// The daemon's namespace.
    pub gateway: Namespace,
    /// The receivers, in the order of the builder.
    pub sites: Vec<Site>,
    /// The bridge on the sender's network, and the routers.
    others: Vec<Namespace>,
    /// The lab's methods return IPv6 addresses.
    ipv6: bool,
    /// The link between sender and gateway, if it is an L3 link.
    tun_link: Option<TunLink>,
}

/// Parameters of a lab.
#[derive(Debug, Clone)]
pub struct LabBuilder {
    places: Vec<Place>,
    port: u16,
    ip_forward: bool,
    rp_filter: u8,
    ipv6: bool,
    on_machine: bool,
    l3_ingress: bool,
}

impl Lab {
    /// The sender's IPv4 address.
    pub const SENDER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));
    /// The gateway's IPv4 address on the sender's network.
    pub const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));

    /// A lab without receivers. The gateway does not forward and validates sources strictly: `ip_forward=0`, `rp_filter=1`.
    pub fn builder() -> LabBuilder {
        LabBuilder {
            places: Vec::new(),
            port: LISTENER_PORT,
            ip_forward: false,
            rp_filter: 1,
            ipv6: false,
            on_machine: false,
            l3_ingress: false,
        }
    }

    /// The listener's address.
    pub fn listener(&self) -> SocketAddr {
        SocketAddr::new(self.address(Self::GATEWAY), LISTENER_PORT)
    }

    /// The sender's address.
    pub fn sender_address(&self) -> IpAddr {
        self.address(Self::SENDER)
    }

    /// This IPv4 address, or its IPv6 counterpart in an IPv6 lab.
    fn address(&self, v4: IpAddr) -> IpAddr {
        match v4 {
            IpAddr::V4(v4) if self.ipv6 => ipv6_of(v4).into(),
            other => other,
        }
    }

    /// Removes the sender's L3 link with the devices at both ends.
    pub fn cut(&mut self) {
        self.tun_link = None;
    }

    /// A receiver's namespace.
    pub fn namespace_of<'a>(&'a self, site: &'a Site) -> &'a Namespace {
        site.namespace.as_ref().unwrap_or(&self.gateway)
    }

    /// All addresses of the gateway except loopback. In userspace mode, receivers see one of them as the source.
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

    /// Adds a receiver at each of these places.
    pub fn receivers(mut self, places: impl IntoIterator<Item = Place>) -> Self {
        self.places.extend(places);
        self
    }

    /// Sets the port of the receivers; by default the listener's. A receiver on the gateway adds 1000 and its position.
    pub fn port(mut self, port: u16) -> Self {
        self.port = port;
        self
    }

    /// Sets whether the gateway's kernel forwards IP packets.
    pub fn ip_forward(mut self, on: bool) -> Self {
        self.ip_forward = on;
        self
    }

    /// Sets the gateway's source validation: 0 off, 1 strict, 2 loose.
    pub fn rp_filter(mut self, value: u8) -> Self {
        self.rp_filter = value;
        self
    }

    /// Sets whether the lab uses IPv6 addresses. `ip_forward` then applies to IPv6 as well.
    pub fn ipv6(mut self, on: bool) -> Self {
        self.ipv6 = on;
        self
    }

    /// Sets whether the gateway is the machine's own namespace. The test must have the machine to itself.
    pub fn on_machine(mut self, on: bool) -> Self {
        self.on_machine = on;
        self
    }

    /// Sets whether the sender's link is an L3 link: a tun device at each end, without Ethernet headers and without other hosts.
    pub fn l3_ingress(mut self, on: bool) -> Self {
        self.l3_ingress = on;
        self
    }

    /// Builds the network.
    ///
    /// # Errors
    /// When not root, or with the error output of the failed command. A partially built network is removed.
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
        let mut lab = Lab { sender, gateway, sites: Vec::new(), others: Vec::new(), ipv6: self.ipv6, tun_link: None };
        lab.connect_sender(self.places.contains(&Place::SameInterface), self.l3_ingress)?;
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
    /// Builds the sender's network: a veth pair, a bridge if receivers are on it too, or a pair of tun devices.
    fn connect_sender(&mut self, switched: bool, l3_ingress: bool) -> Result<()> {
        let [near, far] = ["10.0.0.1/24", "10.0.0.2/24"].map(|cidr| self.cidrs(cidr));
        let sender = End { namespace: &self.sender, device: "eth0", addresses: &far };
        let gateway = End { namespace: &self.gateway, device: INGRESS, addresses: &near };
        if l3_ingress {
            self.tun_link = Some(TunLink::between(gateway, sender)?);
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
        // Two digits keep the addresses readable and unique within a lab.
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

    /// Adds a pod. The MAC address of its default gateway is a static neighbour entry, as with some plugins: with
    /// `ip_forward=0` the gateway does not answer ARP requests for 169.254.1.1.
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

    /// The address with its prefix length, followed by its IPv6 counterpart in an IPv6 lab.
    fn cidrs(&self, v4: &str) -> String {
        if !self.ipv6 {
            return v4.to_owned();
        }
        format!("{v4} {}", ipv6_cidr_of(v4))
    }

    /// Adds a route via a router, and its IPv6 counterpart in an IPv6 lab.
    fn route(&self, namespace: &Namespace, destination: &str, router: &str) -> Result<()> {
        namespace.ip(&format!("route add {destination} via {router}"))?;
        if self.ipv6 {
            let destination = if destination == "default" { destination } else { &ipv6_cidr_of(destination) };
            let router = ipv6_cidr_of(&format!("{router}/32"));
            namespace.ip(&format!("-6 route add {destination} via {}", router.trim_end_matches("/128")))?;
        }
        Ok(())
    }
}

/// The IPv6 counterpart of an IPv4 address.
fn ipv6_of(v4: Ipv4Addr) -> Ipv6Addr {
    let [_, a, b, c] = v4.octets().map(u16::from);
    Ipv6Addr::new(0xfd00, 0, a, b, 0, 0, 0, c)
}

/// As [`ipv6_of`], with the prefix length: networks of /24 become /64, hosts of /32 become /128.
fn ipv6_cidr_of(v4: &str) -> String {
    let (address, length) = v4.split_once('/').unwrap_or((v4, "32"));
    let length = if length == "32" { 128 } else { 64 };
    address.parse().map_or_else(|_| v4.to_owned(), |v4| format!("{}/{length}", ipv6_of(v4)))
}

/// A host's namespace with strict source validation, the default of distributions, and without forwarding.
fn host(label: &str, ipv6: bool) -> Result<Namespace> {
    let namespace = Namespace::create(label)?;
    for scope in ["all", "default"] {
        namespace.sysctl(&format!("net.ipv4.conf.{scope}.rp_filter"), "1")?;
        if ipv6 {
            // With duplicate address detection, an address is unusable for a second or two.
            namespace.sysctl(&format!("net.ipv6.conf.{scope}.accept_dad"), "0")?;
        }
    }
    Ok(namespace)
}

/// Connects a host to a port of the bridge.
fn plug(switch: &Namespace, port: &str, end: End<'_>) -> Result<()> {
    connect(End { namespace: switch, device: port, addresses: "" }, end)?;
    switch.ip(&format!("link set {port} master br0"))?;
    Ok(())
}

/// Waits until every port of a namespace's bridges forwards, which takes a moment after its link is up.
///
/// # Errors
/// When a port does not forward in time.
pub fn wait_for_bridge(namespace: &Namespace) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let ports = namespace.ip("-oneline -details link show type bridge_slave")?;
        if ports.lines().all(|port| port.contains(" state forwarding ")) {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("bridge ports are not in the forwarding state:\n{ports}");
        }
    }
}
