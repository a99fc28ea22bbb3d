//! The kernel's packet filter: destination NAT, rewriting without connection tracking, copying.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::bench::baselines::{ForwardingTask, RunningBaseline};
use crate::bench::testbed::{PORT, Testbed};

/// The next hop of all downstreams.
const NEIGHBOUR: &str = "10.0.1.2";

/// Rules. Dropping it removes them.
struct Rules {
    undo: Command,
}

impl RunningBaseline for Rules {
    fn cpu_seconds(&self) -> Option<f64> {
        None
    }
}

impl Drop for Rules {
    fn drop(&mut self) {
        // An error is harmless: the namespace is removed soon, too.
        let _ = self.undo.status();
    }
}

/// No rules: the kernel forwards to the address that senders use.
///
/// # Errors
/// None.
pub fn nothing(testbed: &Testbed, _task: &ForwardingTask) -> Result<Box<dyn RunningBaseline>> {
    Ok(guard(testbed))
}

/// nftables, destination NAT with connection tracking, which keeps a sender with one downstream.
///
/// # Errors
/// With the error output of nft.
pub fn nft_nat(testbed: &Testbed, task: &ForwardingTask) -> Result<Box<dyn RunningBaseline>> {
    let text = format!(
        "table ip bench {{ chain prerouting {{ type nat hook prerouting priority dstnat;
             udp dport {PORT} dnat to numgen inc mod {} map {{ {} }}; }}; }}",
        task.downstreams,
        slot_map(task)
    );
    apply(testbed, &["nft", "-f", "-"], &text)
}

/// nftables without connection tracking: each datagram's destination is rewritten, round robin.
///
/// # Errors
/// With the error output of nft.
pub fn nft_stateless(testbed: &Testbed, task: &ForwardingTask) -> Result<Box<dyn RunningBaseline>> {
    let text = format!(
        "table ip bench {{ chain prerouting {{ type filter hook prerouting priority raw;
             udp dport {PORT} notrack ip daddr set numgen inc mod {} map {{ {} }}; }}; }}",
        task.downstreams,
        slot_map(task)
    );
    apply(testbed, &["nft", "-f", "-"], &text)
}

/// nftables' `dup`: copies to a gateway, with unchanged destination.
///
/// # Errors
/// With the error output of nft.
pub fn nft_dup(testbed: &Testbed, task: &ForwardingTask) -> Result<Box<dyn RunningBaseline>> {
    let copies = format!("dup to {NEIGHBOUR} device \"out\" ").repeat(task.downstreams as usize);
    let text = format!(
        "table ip bench {{ chain prerouting {{ type filter hook prerouting priority mangle;
             udp dport {PORT} {copies} drop; }}; }}"
    );
    apply(testbed, &["nft", "-f", "-"], &text)
}

/// iptables' `statistic`: one rule for each downstream, which matches every nth new flow.
///
/// # Errors
/// With the error output of iptables.
pub fn iptables_statistic(testbed: &Testbed, task: &ForwardingTask) -> Result<Box<dyn RunningBaseline>> {
    let mut text = "*nat\n".to_owned();
    for (before, downstream) in Testbed::downstreams(task.downstreams).into_iter().enumerate() {
        let every = task.downstreams as usize - before;
        let _ = writeln!(
            text,
            "-A PREROUTING -p udp --dport {PORT} -m statistic --mode nth --every {every} --packet 0 \
             -j DNAT --to-destination {downstream}"
        );
    }
    apply(testbed, &["iptables-nft-restore"], &(text + "COMMIT\n"))
}

/// iptables' `TEE`: copies to a gateway, with unchanged destination.
///
/// # Errors
/// With the error output of iptables.
pub fn iptables_tee(testbed: &Testbed, task: &ForwardingTask) -> Result<Box<dyn RunningBaseline>> {
    let mut text = "*mangle\n".to_owned();
    for _ in 0..task.downstreams {
        let _ = writeln!(text, "-A PREROUTING -p udp --dport {PORT} -j TEE --gateway {NEIGHBOUR}");
    }
    let _ = writeln!(text, "-A PREROUTING -p udp --dport {PORT} -j DROP\nCOMMIT");
    apply(testbed, &["iptables-nft-restore"], &text)
}

/// The elements of a map from round-robin slots to downstreams.
fn slot_map(task: &ForwardingTask) -> String {
    let downstreams = Testbed::downstreams(task.downstreams).into_iter().enumerate();
    downstreams.map(|(turn, downstream)| format!("{turn} : {}", downstream.ip())).collect::<Vec<_>>().join(", ")
}

fn guard(testbed: &Testbed) -> Box<Rules> {
    // iptables-nft stores its rules in nftables.
    let mut undo = testbed.gateway.command("nft");
    undo.args(["flush", "ruleset"]);
    Box::new(Rules { undo })
}

fn apply(testbed: &Testbed, words: &[&str], text: &str) -> Result<Box<dyn RunningBaseline>> {
    let rules = guard(testbed);
    let mut command = testbed.gateway.command(words[0]);
    command.args(&words[1..]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run {} (on Debian: `make deps`)", words[0]))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(text.as_bytes()).with_context(|| format!("cannot write to {}", words[0]))?;
    }
    let output = child.wait_with_output()?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{} refuses: {}", words[0], complaint.trim().lines().next().unwrap_or_default());
    Ok(rules)
}
