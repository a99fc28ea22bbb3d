//! The real daemon's metrics port while one host has more connections than its limit, and the check over the status
//! socket.

use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Output};

use nix::sys::signal::Signal;
use udp_fanout_lab::{Daemon, DaemonConfig, Lab, Place, scrape};

/// More than every limit: of one host, of all hosts, and of this host.
const IDLE: usize = 200;
/// The limit of connections from one other host.
const PER_SOURCE: usize = 8;

fn check(lab: &Lab, daemon: &Daemon) -> Output {
    let binary = Path::new(env!("CARGO_BIN_EXE_udp-fanout"));
    let mut command = lab.gateway.command(binary);
    command.args(["status", "--check", "--socket"]).arg(daemon.status_socket()).output().unwrap()
}

#[test]
fn netns_a_host_that_holds_connections_keeps_nobody_else_from_the_probes() {
    let lab = Lab::builder().receivers([Place::OtherInterface]).build().unwrap();
    let mut config = DaemonConfig::for_lab(&lab, "userspace");
    config.metrics = Some(SocketAddr::from(([0, 0, 0, 0], 9090)));
    let daemon = Daemon::start(&lab.gateway, Path::new(env!("CARGO_BIN_EXE_udp-fanout")), &config).unwrap();
    let page = SocketAddr::new(Lab::GATEWAY, 9090);
    // A refused connection is reset, perhaps before `connect` returns.
    let is_reset = |error: &std::io::Error| error.kind() == ErrorKind::ConnectionReset;
    let connect = || -> anyhow::Result<Vec<TcpStream>> {
        let attempts = (0..IDLE).map(|_| TcpStream::connect(page));
        attempts.filter(|attempt| !attempt.as_ref().is_err_and(is_reset)).map(|attempt| Ok(attempt?)).collect()
    };
    let mut held = lab.sender.run(connect).unwrap();

    // These wait behind all the connections above in the kernel's queue.
    let elsewhere = lab.namespace_of(&lab.sites[0]);
    for (namespace, address) in
        [(elsewhere, page), (&lab.gateway, page), (&lab.gateway, "127.0.0.1:9090".parse().unwrap())]
    {
        let answer = scrape::get(namespace, address, "/healthz").unwrap();
        assert_eq!((answer.status, answer.body.as_str()), (200, "ok\n"));
    }
    let checked = check(&lab, &daemon);
    assert!(checked.status.success() && checked.stdout.is_empty() && checked.stderr.is_empty(), "{checked:?}");
    held.retain_mut(|stream| {
        stream.set_nonblocking(true).unwrap();
        matches!(stream.read(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock)
    });
    assert!(held.len() <= PER_SOURCE, "{} connections of one host are open", held.len());
    daemon.stop().unwrap();
}

#[test]
fn netns_a_check_fails_in_one_line_while_the_main_loop_stands_still() {
    let lab = Lab::builder().receivers([Place::OtherInterface]).build().unwrap();
    let config = DaemonConfig::for_lab(&lab, "userspace");
    let daemon = Daemon::start(&lab.gateway, Path::new(env!("CARGO_BIN_EXE_udp-fanout")), &config).unwrap();
    daemon.signal(Signal::SIGSTOP).unwrap();
    let checked = check(&lab, &daemon);
    assert_eq!(checked.status.code(), Some(1));
    let said = String::from_utf8(checked.stderr).unwrap();
    assert!(said.starts_with("the daemon has not answered within 2s; ") && said.lines().count() == 1, "{said}");
    daemon.signal(Signal::SIGCONT).unwrap();
    assert!(check(&lab, &daemon).status.success());
    let socket = daemon.status_socket();
    daemon.stop().unwrap();
    let gone =
        Command::new(env!("CARGO_BIN_EXE_udp-fanout")).args(["status", "--check", "--socket"]).arg(&socket).output();
    let said = String::from_utf8(gone.unwrap().stderr).unwrap();
    assert!(said.starts_with("no udp-fanout answers at ") && said.lines().count() == 1, "{said}");
}
