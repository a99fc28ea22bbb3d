//! The paths through the kernel that are compared. Each is set up for its turn and removed afterwards.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use libbpf_rs::{Object, ObjectBuilder, TC_EGRESS, TC_INGRESS, TcAttachPoint, TcHookBuilder};

use super::pods::{IN, LISTENER, PORT, Pod, Pods};
use crate::bench::programs;
use udp_fanout_lab::daemon::{Daemon, DaemonConfig, ListenerSpec};

/// One path to be set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BenchPath {
    /// The kernel's own forwarding; senders address the pods themselves.
    Forwarding,
    /// A program of `references.bpf.c` at the gateway's ingress.
    Reference(&'static str),
    /// The daemon, balancing over this many pods.
    Balance(usize),
    /// The daemon, with a copy to each of this many pods.
    Replicate(usize),
    /// iptables' TEE to this many pods.
    Tee(usize),
    /// nftables' dup to this many pods.
    Dup(usize),
}

/// A path that is set up. Dropping it removes it.
pub enum ActivePath {
    /// Nothing to remove.
    Nothing,
    /// The daemon.
    Daemon(#[expect(dead_code, reason = "dropping it ends the daemon")] Box<Daemon>),
    /// A command that removes it.
    Undo(Command),
}

impl Drop for ActivePath {
    fn drop(&mut self) {
        match self {
            ActivePath::Undo(undo) => drop(undo.stdout(Stdio::null()).status()),
            ActivePath::Nothing | ActivePath::Daemon(_) => {}
        }
    }
}

impl BenchPath {
    /// The destination of the senders: the listener, or the pod that the kernel forwards to.
    pub fn destination(self, testbed: &Pods) -> SocketAddr {
        match self {
            BenchPath::Forwarding => testbed.pods[0].address,
            BenchPath::Tee(count) | BenchPath::Dup(count) => testbed.pods[count - 1].address,
            BenchPath::Reference(_) | BenchPath::Balance(_) | BenchPath::Replicate(_) => LISTENER,
        }
    }

    /// Sets the path up on the gateway. `binary` is the daemon's, if the path needs it.
    ///
    /// # Errors
    /// When a command or the daemon cannot be started.
    pub fn start(self, testbed: &Pods, binary: &Path) -> Result<ActivePath> {
        match self {
            BenchPath::Forwarding => Ok(ActivePath::Nothing),
            BenchPath::Reference(name) => reference(testbed, name),
            BenchPath::Balance(count) => daemon(testbed, binary, count, ""),
            BenchPath::Replicate(count) => daemon(testbed, binary, count, "policy = \"replicate\"\n"),
            BenchPath::Tee(count) => tee(testbed, count),
            BenchPath::Dup(count) => dup(testbed, count),
        }
    }
}

fn daemon(testbed: &Pods, binary: &Path, count: usize, extra: &str) -> Result<ActivePath> {
    let downstreams = testbed.addresses(count).into_iter().enumerate();
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
    Ok(ActivePath::Daemon(Box::new(Daemon::start_behind(&testbed.gateway, &[], binary, &config)?)))
}

/// Attaches an empty program to the egress of every pod's link, as a CNI plugin's policy does. A redirect to the peer must
/// not skip it, so datagrams take the device's egress path.
///
/// # Errors
/// When the program cannot be attached.
pub fn forbid_shortcuts(testbed: &Pods) -> Result<()> {
    testbed.pods.iter().try_for_each(|pod| attach(testbed, "nothing", &pod.device, TC_EGRESS))
}

fn reference(testbed: &Pods, name: &str) -> Result<ActivePath> {
    attach(testbed, name, IN, TC_INGRESS)?;
    let mut undo = testbed.gateway.command("tc");
    undo.args(["filter", "del", "dev", IN, "ingress", "pref", "1"]);
    Ok(ActivePath::Undo(undo))
}

/// Attaches a reference program to a device of the gateway. The filter keeps the program loaded.
fn attach(testbed: &Pods, name: &str, device: &str, point: TcAttachPoint) -> Result<()> {
    let pod = |pod: &Pod| Ok((pod.address, pod.index, mac(&pod.mac)?, mac(&pod.gateway_mac)?));
    let loaded = load(&testbed.references, &testbed.pods.iter().map(pod).collect::<Result<Vec<_>>>()?)?;
    let program =
        loaded.progs().find(|program| program.name() == name).with_context(|| format!("no program {name}"))?;
    let (program, index) = (program.as_fd(), i32::try_from(testbed.gateway.link(device)?.index)?);
    testbed.gateway.run(|| {
        let mut builder = TcHookBuilder::new(program);
        let mut hook = builder.ifindex(index).replace(true).handle(1).priority(1).hook(point);
        hook.create().and_then(|mut hook| hook.attach()).with_context(|| format!("cannot attach {name}"))?;
        Ok(())
    })
}

/// A destination of the reference programs: address, interface index, MAC addresses of the pod's end and the gateway's end.
pub type Destination = (SocketAddr, u32, [u8; 6], [u8; 6]);

/// Compiles the reference programs.
///
/// # Errors
/// When the compilation fails.
pub fn references() -> Result<Vec<u8>> {
    programs::compile(Path::new("benches/kernel/references.bpf.c"))
}

/// Loads the reference programs for these destinations.
///
/// # Errors
/// When the kernel rejects a program.
pub fn load(object: &[u8], destinations: &[Destination]) -> Result<Object> {
    let mut opened = ObjectBuilder::default().open_memory(object)?;
    let constants = constants(destinations)?;
    let mut rodata = opened
        .maps_mut()
        .find(|map| map.name().to_string_lossy().ends_with(".rodata"))
        .context("the reference programs have no constants")?;
    let value = rodata.initial_value_mut().context("the reference programs' constants have no memory")?;
    let value =
        value.get_mut(..constants.len()).context("the reference programs' constants have an unexpected size")?;
    value.copy_from_slice(&constants);
    opened.load().context("cannot load the reference programs, which needs root")
}

/// `struct references` of the C file.
fn constants(destinations: &[Destination]) -> Result<Vec<u8>> {
    let SocketAddr::V4(listener) = LISTENER else { anyhow::bail!("the reference programs support only IPv4") };
    let mut bytes = listener.ip().octets().to_vec();
    bytes.extend(PORT.to_be_bytes());
    bytes.extend(u16::try_from(destinations.len())?.to_ne_bytes());
    for (address, index, mac, own) in destinations {
        let SocketAddr::V4(address) = address else { anyhow::bail!("the reference programs support only IPv4") };
        bytes.extend(address.ip().octets());
        bytes.extend(index.to_ne_bytes());
        bytes.extend(mac);
        bytes.extend(own);
    }
    Ok(bytes)
}

fn mac(text: &str) -> Result<[u8; 6]> {
    let bytes = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<Vec<_>, _>>()?;
    bytes.try_into().map_err(|_| anyhow::anyhow!("not a MAC address: {text}"))
}

/// Senders address the last pod, to which the kernel forwards; each of the others gets a copy.
fn tee(testbed: &Pods, count: usize) -> Result<ActivePath> {
    let rule = |action: &str, gateway: &str| {
        format!("-t mangle {action} PREROUTING -i {IN} -p udp --dport {PORT} -j TEE --gateway {gateway}")
    };
    for pod in &testbed.pods[..count - 1] {
        testbed.gateway.tool("iptables", &rule("-A", &pod.address.ip().to_string()))?;
    }
    let mut undo = testbed.gateway.command("iptables");
    undo.args(["-t", "mangle", "-F"]);
    Ok(ActivePath::Undo(undo))
}

fn dup(testbed: &Pods, count: usize) -> Result<ActivePath> {
    let mut rules =
        String::from("add table ip bench\nadd chain ip bench pre { type filter hook prerouting priority -150; }\n");
    for pod in &testbed.pods[..count - 1] {
        rules += &format!(
            "add rule ip bench pre iifname {IN} udp dport {PORT} dup to {} device \"{}\"\n",
            pod.address.ip(),
            pod.device
        );
    }
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("rules.nft");
    std::fs::write(&file, rules)?;
    testbed.gateway.tool("nft", &format!("-f {}", file.display()))?;
    let mut undo = testbed.gateway.command("nft");
    undo.args(["delete", "table", "ip", "bench"]);
    Ok(ActivePath::Undo(undo))
}
