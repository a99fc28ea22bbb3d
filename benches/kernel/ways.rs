//! The ways through the kernel that are compared. Each is set up when it is its turn and gone afterwards.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use libbpf_rs::{Object, ObjectBuilder, TC_EGRESS, TC_INGRESS, TcAttachPoint, TcHookBuilder};

use super::pods::{IN, LISTENER, PORT, Pod, Pods};
use crate::bench::programs;
use udp_fanout_lab::daemon::{Daemon, DaemonConfig, ListenerSpec};

/// One way to be set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The kernel's own forwarding; senders address the pods themselves.
    Forwarding,
    /// A program of `references.bpf.c` at the gateway's ingress.
    Reference(&'static str),
    /// The daemon, balancing over so many pods.
    Balance(usize),
    /// The daemon, with a copy to each of so many pods.
    Replicate(usize),
    /// iptables' TEE to so many pods.
    Tee(usize),
    /// nftables' dup to so many pods.
    Dup(usize),
}

/// A way that has been set up, until it is dropped.
pub enum Running {
    /// Nothing to take away.
    Nothing,
    /// The daemon.
    Daemon(#[expect(dead_code, reason = "held for its end")] Box<Daemon>),
    /// A command that takes it away again.
    Undo(Command),
}

impl Drop for Running {
    fn drop(&mut self) {
        match self {
            Running::Undo(undo) => drop(undo.stdout(Stdio::null()).status()),
            Running::Nothing | Running::Daemon(_) => {}
        }
    }
}

impl Way {
    /// Where senders send to: the listener, or the pod that the kernel forwards to by itself.
    pub fn destination(self, bed: &Pods) -> SocketAddr {
        match self {
            Way::Forwarding => bed.pods[0].address,
            Way::Tee(count) | Way::Dup(count) => bed.pods[count - 1].address,
            Way::Reference(_) | Way::Balance(_) | Way::Replicate(_) => LISTENER,
        }
    }

    /// Sets it up on the gateway, with this daemon where there is one.
    ///
    /// # Errors
    /// With the complaint of what could not be started.
    pub fn start(self, bed: &Pods, binary: &Path) -> Result<Running> {
        match self {
            Way::Forwarding => Ok(Running::Nothing),
            Way::Reference(name) => reference(bed, name),
            Way::Balance(count) => daemon(bed, binary, count, ""),
            Way::Replicate(count) => daemon(bed, binary, count, "policy = \"replicate\"\n"),
            Way::Tee(count) => tee(bed, count),
            Way::Dup(count) => dup(bed, count),
        }
    }
}

fn daemon(bed: &Pods, binary: &Path, count: usize, extra: &str) -> Result<Running> {
    let downstreams = bed.addresses(count).into_iter().enumerate();
    let listener = ListenerSpec {
        name: "bench".into(),
        bind: LISTENER.to_string(),
        interface: Some(IN.to_owned()),
        mode: "tc_ebpf".to_owned(),
        downstreams: downstreams.map(|(number, address)| (format!("pod{number}"), address, 1)).collect(),
        samples: Vec::new(),
        extra: extra.to_owned(),
        settings: String::new(),
    };
    let config =
        DaemonConfig { listeners: vec![listener], metrics: Some(([127, 0, 0, 1], 9090).into()), head: String::new() };
    Ok(Running::Daemon(Box::new(Daemon::start_behind(&bed.gateway, &[], binary, &config)?)))
}

/// Hangs a program that does nothing on the outward side of every pod's link, as a network plugin's policy would: nobody
/// may bypass it, so datagrams have to leave by the device.
///
/// # Errors
/// When the program cannot be attached.
pub fn forbid_shortcuts(bed: &Pods) -> Result<()> {
    bed.pods.iter().try_for_each(|pod| attach(bed, "nothing", &pod.device, TC_EGRESS))
}

fn reference(bed: &Pods, name: &str) -> Result<Running> {
    attach(bed, name, IN, TC_INGRESS)?;
    let mut undo = bed.gateway.command("tc");
    undo.args(["filter", "del", "dev", IN, "ingress", "pref", "1"]);
    Ok(Running::Undo(undo))
}

/// Attaches a reference to a device of the gateway. The filter holds the program.
fn attach(bed: &Pods, name: &str, device: &str, point: TcAttachPoint) -> Result<()> {
    let pod = |pod: &Pod| Ok((pod.address, pod.index, mac(&pod.mac)?, mac(&pod.gateway_mac)?));
    let loaded = load(&bed.references, &bed.pods.iter().map(pod).collect::<Result<Vec<_>>>()?)?;
    let program =
        loaded.progs().find(|program| program.name() == name).with_context(|| format!("no program {name}"))?;
    let (program, index) = (program.as_fd(), i32::try_from(bed.gateway.link(device)?.index)?);
    bed.gateway.run(|| {
        let mut builder = TcHookBuilder::new(program);
        let mut hook = builder.ifindex(index).replace(true).handle(1).priority(1).hook(point);
        hook.create().and_then(|mut hook| hook.attach()).with_context(|| format!("cannot attach {name}"))?;
        Ok(())
    })
}

/// Where a reference sends to: address, link, the hardware addresses of the other end and of this one.
pub type Destination = (SocketAddr, u32, [u8; 6], [u8; 6]);

/// Compiles the references.
///
/// # Errors
/// With the compiler's complaint.
pub fn references() -> Result<Vec<u8>> {
    programs::compile(Path::new("benches/kernel/references.bpf.c"))
}

/// Loads the references for these destinations.
///
/// # Errors
/// With the kernel's complaint.
pub fn load(object: &[u8], destinations: &[Destination]) -> Result<Object> {
    let mut opened = ObjectBuilder::default().open_memory(object)?;
    let constants = constants(destinations)?;
    let mut rodata = opened
        .maps_mut()
        .find(|map| map.name().to_string_lossy().ends_with(".rodata"))
        .context("the references have no constants")?;
    let value = rodata.initial_value_mut().context("the references' constants have no memory")?;
    let value = value.get_mut(..constants.len()).context("the references' constants are of another size")?;
    value.copy_from_slice(&constants);
    opened.load().context("cannot load the references: this needs root")
}

/// `struct references` of the C file.
fn constants(destinations: &[Destination]) -> Result<Vec<u8>> {
    let SocketAddr::V4(listener) = LISTENER else { anyhow::bail!("the references know IPv4 only") };
    let mut bytes = listener.ip().octets().to_vec();
    bytes.extend(PORT.to_be_bytes());
    bytes.extend(u16::try_from(destinations.len())?.to_ne_bytes());
    for (address, index, mac, own) in destinations {
        let SocketAddr::V4(address) = address else { anyhow::bail!("the references know IPv4 only") };
        bytes.extend(address.ip().octets());
        bytes.extend(index.to_ne_bytes());
        bytes.extend(mac);
        bytes.extend(own);
    }
    Ok(bytes)
}

fn mac(text: &str) -> Result<[u8; 6]> {
    let bytes = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<Vec<_>, _>>()?;
    bytes.try_into().map_err(|_| anyhow::anyhow!("no hardware address: {text}"))
}

/// Senders address the last pod, to which the kernel forwards; each of the others gets a copy.
fn tee(bed: &Pods, count: usize) -> Result<Running> {
    let rule = |action: &str, gateway: &str| {
        format!("-t mangle {action} PREROUTING -i {IN} -p udp --dport {PORT} -j TEE --gateway {gateway}")
    };
    for pod in &bed.pods[..count - 1] {
        bed.gateway.tool("iptables", &rule("-A", &pod.address.ip().to_string()))?;
    }
    let mut undo = bed.gateway.command("iptables");
    undo.args(["-t", "mangle", "-F"]);
    Ok(Running::Undo(undo))
}

fn dup(bed: &Pods, count: usize) -> Result<Running> {
    let mut rules =
        String::from("add table ip bench\nadd chain ip bench pre { type filter hook prerouting priority -150; }\n");
    for pod in &bed.pods[..count - 1] {
        rules += &format!(
            "add rule ip bench pre iifname {IN} udp dport {PORT} dup to {} device \"{}\"\n",
            pod.address.ip(),
            pod.device
        );
    }
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("rules.nft");
    std::fs::write(&file, rules)?;
    bed.gateway.tool("nft", &format!("-f {}", file.display()))?;
    let mut undo = bed.gateway.command("nft");
    undo.args(["delete", "table", "ip", "bench"]);
    Ok(Running::Undo(undo))
}
