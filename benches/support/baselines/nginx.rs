//! nginx's stream module.

use std::fmt::Write as _;
use std::fs;

use anyhow::Result;

use crate::bench::baselines::{ForwardingTask, Process, RunningBaseline};
use crate::bench::testbed::{PORT, Testbed};

/// Starts nginx with one worker. Per packet, each datagram is a separate session and goes to the next downstream; per
/// session, a sender stays with one downstream.
///
/// # Errors
/// When nginx does not start.
pub fn start(testbed: &Testbed, task: &ForwardingTask, per_packet: bool) -> Result<Box<dyn RunningBaseline>> {
    let directory = tempfile::tempdir()?;
    let mut servers = String::new();
    for downstream in Testbed::downstreams(task.downstreams) {
        let _ = writeln!(servers, "server {downstream};");
    }
    // `proxy_responses 0` ends a session with its last datagram; `proxy_requests 1` with its first.
    let per_packet = if per_packet { "proxy_requests 1;" } else { "" };
    let text = format!(
        "daemon off; master_process off; worker_rlimit_nofile 60000; pid {dir}/pid; error_log {dir}/error crit;
         load_module /usr/lib/nginx/modules/ngx_stream_module.so;
         events {{ worker_connections 30000; }}
         stream {{
             upstream downstreams {{ {servers} }}
             server {{ listen {PORT} udp rcvbuf=4m; proxy_pass downstreams; proxy_responses 0; {per_packet} \
                       proxy_timeout 10s; }}
         }}",
        dir = directory.path().display()
    );
    let config = directory.path().join("nginx.conf");
    fs::write(&config, text)?;
    let mut command = testbed.gateway.command("/usr/sbin/nginx");
    command.arg("-c").arg(config);
    let mut process = Process::start(testbed, &mut command, Some(directory))?;
    process.listens()?;
    Ok(Box::new(process))
}
