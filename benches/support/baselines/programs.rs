//! Programs that forward datagrams, each with the configuration that its manual recommends for speed.

use std::fmt::Write as _;
use std::fs;
use std::process::Stdio;

use anyhow::Result;

use crate::bench::baselines::{ForwardingTask, Process, RunningBaseline};
use crate::bench::testbed::{LISTENER, PORT, Testbed};

/// socat: from one port to one downstream, the most it supports.
///
/// # Errors
/// When the program does not start.
pub fn socat(testbed: &Testbed, task: &ForwardingTask) -> Result<Box<dyn RunningBaseline>> {
    let downstream = Testbed::downstreams(task.downstreams.min(1))[0];
    let mut command = testbed.gateway.command("socat");
    command.args(["-u", &format!("UDP4-RECV:{PORT},rcvbuf=4194304"), &format!("UDP4-SENDTO:{downstream}")]);
    let mut process = Process::start(testbed, &mut command, None)?;
    process.listens()?;
    Ok(Box::new(process))
}

/// dnsdist: queries to downstreams in turn. The downstreams do not answer.
///
/// # Errors
/// When the program does not start.
pub fn dnsdist(testbed: &Testbed, task: &ForwardingTask) -> Result<Box<dyn RunningBaseline>> {
    let directory = tempfile::tempdir()?;
    let mut text = format!("setLocal(\"{LISTENER}\")\nsetACL(\"0.0.0.0/0\")\nsetServerPolicy(roundrobin)\n");
    for downstream in Testbed::downstreams(task.downstreams) {
        let _ = writeln!(text, "newServer{{address=\"{downstream}\", healthCheckMode=\"up\"}}");
    }
    let config = directory.path().join("dnsdist.conf");
    fs::write(&config, text)?;
    let mut command = testbed.gateway.command("dnsdist");
    command.args(["--supervised", "--disable-syslog", "--config"]).arg(config);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut process = Process::start(testbed, &mut command, Some(directory))?;
    process.listens()?;
    Ok(Box::new(process))
}

/// rsyslog: unchanged messages to one downstream; Debian 12's version has no target pools.
///
/// # Errors
/// When the program does not start.
pub fn rsyslog(testbed: &Testbed, task: &ForwardingTask) -> Result<Box<dyn RunningBaseline>> {
    let directory = tempfile::tempdir()?;
    let place = directory.path().display();
    let downstream = Testbed::downstreams(task.downstreams.min(1))[0];
    let text = format!(
        "global(workDirectory=\"{place}\")
         module(load=\"imudp\" timeRequery=\"8\")
         template(name=\"raw\" type=\"string\" string=\"%rawmsg%\")
         input(type=\"imudp\" address=\"{}\" port=\"{PORT}\" rcvbufSize=\"4m\" ruleset=\"forward\")
         ruleset(name=\"forward\") {{
             action(type=\"omfwd\" target=\"{}\" port=\"{}\" protocol=\"udp\" template=\"raw\")
         }}",
        LISTENER.ip(),
        downstream.ip(),
        downstream.port()
    );
    let config = directory.path().join("rsyslog.conf");
    fs::write(&config, text)?;
    let mut command = testbed.gateway.command("rsyslogd");
    command.arg("-n").arg("-f").arg(config).arg("-i").arg(directory.path().join("pid"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut process = Process::start(testbed, &mut command, Some(directory))?;
    process.listens()?;
    Ok(Box::new(process))
}
