//! Every kind of probe through the daemon: a listener for each, with receivers that start and stop replying.

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::Path;

use super::{ignore_pings, metrics, shares_by, wait_for_metrics};
use udp_fanout_lab::servers::Server;
use udp_fanout_lab::{Daemon, DaemonConfig, Lab, ListenerSpec, Place};

/// Name, `health` of the listener, and the port that a receiver answers on.
const KINDS: [(&str, &str, u16); 5] = [
    ("icmp", "enabled = true", 0),
    ("udp_echo", "protocol = \"udp_echo\", port = 7001", 7001),
    ("udp", "protocol = \"udp\", port = 7002, payload = \"ping\", expect = \"hex: 706f 6e67\"", 7002),
    ("tcp", "protocol = \"tcp\", port = 7003", 7003),
    ("http", "protocol = \"http\", port = 7004, path = \"/healthz\"", 7004),
];

const HEAD: &str = "[health]\nenabled = true\ninterval_secs = 0.4\ntimeout_secs = 0.4\nhealthy_threshold = 1\n";

fn listeners(lab: &Lab, mode: &str) -> DaemonConfig {
    let mut config = DaemonConfig::for_lab(lab, mode);
    config.head = HEAD.to_owned();
    let model = config.listeners[0].clone();
    let listener = |(index, (name, health, _)): (usize, &(&str, &str, u16))| ListenerSpec {
        name: (*name).to_owned(),
        bind: bind(lab, index).to_string(),
        extra: format!("health = {{ {health} }}"),
        ..model.clone()
    };
    config.listeners = KINDS.iter().enumerate().map(listener).collect();
    config
}

fn bind(lab: &Lab, index: usize) -> SocketAddr {
    let index = u16::try_from(index).unwrap();
    SocketAddr::new(lab.listener().ip(), 9_200 + index)
}

/// Makes a receiver reply to probes of every kind, until the servers are dropped.
fn answer(lab: &Lab, receiver: usize) -> Vec<Server> {
    let site = &lab.sites[receiver];
    ignore_all_probes(lab, receiver, false);
    let udp = |port| lab.namespace_of(site).run(|| Ok(UdpSocket::bind((site.address.ip(), port))?)).unwrap();
    let tcp = |port| lab.namespace_of(site).run(|| Ok(TcpListener::bind((site.address.ip(), port))?)).unwrap();
    let echo = Server::udp(udp(KINDS[1].2), |socket, from, probe| drop(socket.send_to(probe, from)));
    let pong = Server::udp(udp(KINDS[2].2), |socket, from, probe| {
        assert_eq!(probe, b"ping");
        drop(socket.send_to(b"pong and more", from));
    });
    let accept = Server::tcp(tcp(KINDS[3].2), drop);
    let http = Server::http(tcp(KINDS[4].2), b"HTTP/1.1 204 No Content\r\n\r\n".to_vec(), 7);
    vec![echo, pong, accept, http]
}

/// Blocks pings to a receiver, or unblocks them.
fn ignore_all_probes(lab: &Lab, receiver: usize, silent: bool) {
    ignore_pings(lab, receiver, silent);
    let namespace = lab.namespace_of(&lab.sites[receiver]);
    namespace.sysctl("net.ipv6.icmp.echo_ignore_all", u8::from(silent).to_string().as_str()).unwrap();
}

/// Waits until each listener's receivers are as given, and checks that datagrams go to those.
fn expect_healthy(lab: &Lab, healthy: [bool; 2]) {
    wait_for_metrics(lab, &format!("all are {healthy:?}"), |page| {
        KINDS.iter().all(|(name, _, _)| {
            let agrees = |(site, healthy): (usize, bool)| {
                let labels = [("listener", *name), ("endpoint", &lab.sites[site].address.to_string())];
                page.sum("udp_fanout_downstream_health", &labels) == u64::from(healthy)
            };
            let active = page.sum("udp_fanout_downstream_active", &[("listener", *name)]);
            let well = healthy.into_iter().filter(|healthy| *healthy).count();
            healthy.into_iter().enumerate().all(agrees) && active == well as u64
        })
    });
    let expected: Vec<u64> = match healthy {
        [true, true] => vec![25, 25],
        [one, _] => vec![50 * u64::from(one), 50 * u64::from(!one)],
    };
    for (index, (name, _, _)) in KINDS.iter().enumerate() {
        assert_eq!(shares_by(lab, bind(lab, index), 50), expected, "{name}");
    }
}

fn every_kind(mode: &str, ipv6: bool) {
    let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod]).ipv6(ipv6).build().unwrap();
    let first = answer(&lab, 0);
    ignore_all_probes(&lab, 1, true);
    let binary = Path::new(env!("CARGO_BIN_EXE_udp-fanout"));
    let mut daemon = Daemon::start(&lab.gateway, binary, &listeners(&lab, mode)).unwrap();
    expect_healthy(&lab, [true, false]);
    for (name, _, _) in KINDS {
        let line = format!("health check failed downstream={} listener=\"{name}\"", lab.sites[1].address);
        let line = daemon.wait_for_logged(&line).unwrap();
        assert!(line.contains(&format!("protocol=\"{name}\" reason=\"")), "{line}");
    }
    let second = answer(&lab, 1);
    expect_healthy(&lab, [true, true]);
    drop(first);
    ignore_all_probes(&lab, 0, true);
    expect_healthy(&lab, [false, true]);
    drop(second);
    assert_eq!(metrics(&lab).sum("udp_fanout_config_reloads_total", &[("result", "error")]), 0);
    let (status, _, log) = daemon.stop().unwrap();
    assert!(status.success(), "{log}");
}

#[test]
fn netns_every_kind_of_probe_decides_about_the_kernels_round() {
    every_kind("tc_ebpf", false);
}

#[test]
fn netns_every_kind_of_probe_decides_about_the_sockets_round() {
    every_kind("userspace", true);
}
