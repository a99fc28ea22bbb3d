//! A network namespace with a unique name, in which threads and commands run. It is removed when dropped.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::panic::resume_unwind;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};
use serde::Deserialize;

use super::cleanup;

/// A network namespace. Dropping it removes it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    handle: File,
}

/// An interface inside a namespace.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct LinkInfo {
    /// The interface index.
    #[serde(rename = "ifindex")]
    pub index: u32,
    /// The MAC address in colon notation; empty if it has none.
    #[serde(rename = "address", default)]
    pub mac: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// `UP`, `DOWN`, `LOWERLAYERDOWN` or `UNKNOWN`.
    pub operstate: String,
}

/// One end of a link between two namespaces.
#[derive(Debug, Clone, Copy)]
pub struct End<'a> {
    /// The namespace of this end.
    pub namespace: &'a Namespace,
    /// The interface's name in that namespace.
    pub device: &'a str,
    /// Addresses with prefix lengths, such as `10.0.0.1/24`, separated by spaces; empty for none.
    pub addresses: &'a str,
}

impl Namespace {
    /// Creates a namespace with its loopback interface up. `label` becomes part of the name in `ip netns list`.
    ///
    /// # Errors
    /// When not root, or when the kernel refuses.
    pub fn create(label: &str) -> Result<Self> {
        Self::create_named(label, |name| vec!["netns", "add", name])
    }

    /// Names the namespace of process 1: for a test that has the machine to itself.
    ///
    /// # Errors
    /// When not root.
    pub fn of_the_machine() -> Result<Self> {
        Self::create_named("machine", |name| vec!["netns", "attach", name, "1"])
    }

    /// Names a namespace with these arguments of `ip`.
    fn create_named(label: &str, words: fn(&str) -> Vec<&str>) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        cleanup::arm()?;
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}{}-{number}-{label}", cleanup::PREFIX, std::process::id());
        let mut registry = cleanup::registry();
        registry.add_namespace(&name);
        let made = run_command(Command::new("ip").args(words(&name))).and_then(|_| {
            let path = format!("/run/netns/{name}");
            File::open(&path).with_context(|| format!("cannot open {path}"))
        });
        let handle = match made {
            Ok(handle) => handle,
            Err(error) => {
                registry.remove_namespace(&name);
                return Err(error.context(format!("cannot create the network namespace {name}")));
            }
        };
        drop(registry);
        let namespace = Namespace { name, handle };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// The name in `ip netns list`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` on a thread inside the namespace and returns its result; panics if it panics. Sockets that it opens stay in
    /// the namespace and may be used from any thread afterwards.
    ///
    /// # Errors
    /// Errors of `work`, or when the namespace cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let handle = self.handle.as_fd();
        thread::scope(|scope| {
            let inside = scope.spawn(move || {
                setns(handle, CloneFlags::CLONE_NEWNET).context("cannot enter the network namespace")?;
                work()
            });
            inside.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
        .with_context(|| format!("in network namespace {}", self.name))
    }

    /// A command that runs inside the namespace, with the host's file system and `/sys`. (`ip netns exec` would mount another
    /// `/sys`, without bpffs.) It is killed when the thread that started it ends.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let fd = self.handle.as_raw_fd();
        let enter = move || {
            // SAFETY: the descriptor is the parent's, copied by fork and not yet closed by exec; if the namespace
            // has been dropped before the command was started, setns refuses and the start fails.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            setns(fd, CloneFlags::CLONE_NEWNET)?;
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            Ok(())
        };
        // SAFETY: between fork and exec only two system calls are made; nothing allocates or takes a lock.
        unsafe { command.pre_exec(enter) };
        command
    }

    /// Runs `ip` with these arguments inside the namespace and returns its output.
    ///
    /// # Errors
    /// With the command and its error output.
    pub fn ip(&self, words: &str) -> Result<String> {
        self.tool("ip", words)
    }

    /// Runs `tc` with these arguments inside the namespace and returns its output.
    ///
    /// # Errors
    /// With the command and its error output.
    pub fn tc(&self, words: &str) -> Result<String> {
        self.tool("tc", words)
    }

    /// Runs `ethtool` with these arguments, for example `-K eth0 tx off`, which makes the kernel compute checksums before the
    /// device.
    ///
    /// # Errors
    /// With the command and its error output.
    pub fn ethtool(&self, words: &str) -> Result<String> {
        self.tool("ethtool", words)
    }

    /// Runs a program with these arguments inside the namespace and returns its output.
    ///
    /// # Errors
    /// With the command and its error output.
    pub fn tool(&self, program: &str, words: &str) -> Result<String> {
        run_command(self.command(program).args(words.split_whitespace()))
            .with_context(|| format!("in network namespace {}", self.name))
    }

    /// Runs many `ip` commands, one per line, in one process.
    ///
    /// # Errors
    /// With the error output of `ip`, which names the line.
    pub fn ip_batch(&self, lines: &str) -> Result<()> {
        let mut command = self.command("ip");
        command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot run ip (Debian package iproute2)")?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(lines.as_bytes()).context("cannot write to ip")?;
        }
        let output = child.wait_with_output()?;
        if !output.status.success() {
            let complaint = String::from_utf8_lossy(&output.stderr);
            bail!("ip -batch in {} failed: {}; the batch was:\n{lines}", self.name, complaint.trim());
        }
        Ok(())
    }

    /// Sets a sysctl of the namespace, such as `net.ipv4.ip_forward`.
    ///
    /// # Errors
    /// When the sysctl does not exist or the kernel rejects the value.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        self.run(|| fs::write(&path, value).with_context(|| format!("cannot set {key} to {value}")))
    }

    /// Index, MAC address, MTU and state of an interface.
    ///
    /// # Errors
    /// When there is no interface of that name.
    pub fn link(&self, device: &str) -> Result<LinkInfo> {
        let text = self.ip(&format!("-json link show dev {device}"))?;
        let links: Vec<LinkInfo> = serde_json::from_str(&text).context("cannot parse the output of ip")?;
        links.into_iter().next().ok_or_else(|| anyhow!("no interface {device} in {}", self.name))
    }

    /// True if no namespace of that name exists any more.
    pub fn is_gone(name: &str) -> bool {
        !std::path::Path::new("/run/netns").join(name).exists()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        cleanup::registry().remove_namespace(&self.name);
    }
}

/// Connects two namespaces by a veth pair, both ends up and addressed. The pair is never in the host's namespace.
///
/// # Errors
/// With the error output of `ip`.
pub fn connect(a: End<'_>, b: End<'_>) -> Result<()> {
    a.namespace.ip(&format!(
        "link add {} address {} type veth peer name {} address {} netns {}",
        a.device,
        next_mac(),
        b.device,
        next_mac(),
        b.namespace.name
    ))?;
    a.bring_up()?;
    b.bring_up()
}

impl End<'_> {
    /// Adds the addresses to the existing interface and brings it up.
    ///
    /// # Errors
    /// With the error output of `ip`.
    pub fn bring_up(&self) -> Result<()> {
        let mut lines = String::new();
        for address in self.addresses.split_whitespace() {
            lines += &format!("address add {address} dev {}\n", self.device);
        }
        lines += &format!("link set {} up\n", self.device);
        self.namespace.ip_batch(&lines)
    }
}

/// A locally administered MAC address, unique within the process and easy to recognise in a capture.
fn next_mac() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(1);
    let [_, a, b, c] = COUNT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    format!("02:75:66:{a:02x}:{b:02x}:{c:02x}")
}

/// Runs a command until it ends and returns its output.
fn run_command(command: &mut Command) -> Result<String> {
    let shown = format!("{command:?}").replace('"', "");
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {shown}"))?;
    if !output.status.success() {
        bail!("{shown} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
