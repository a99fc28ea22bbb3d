//! Datagrams that come through a WireGuard tunnel. Not every kernel has it, so `make test` skips these tests and says
//! so; `make test-kernels` runs them. `l3_ingress` tests other L3 links.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

use super::counters::{PacketCounts, check_counters, check_downstream_counters, start};
use udp_fanout_lab::{Collectors, DaemonConfig, Expect, Lab, Namespace, Place, Sender};

/// One end of a tunnel.
struct Peer {
    private_key: PathBuf,
    public_key: String,
}

impl Peer {
    fn new(directory: &TempDir, name: &str) -> Peer {
        let private_key = directory.path().join(name);
        fs::write(&private_key, wg("genkey", None)).unwrap();
        let public_key = wg("pubkey", Some(&private_key)).trim().to_owned();
        Peer { private_key, public_key }
    }

    /// Creates the device, whose peer is `other` on the lab's network.
    fn open(&self, namespace: &Namespace, addresses: &str, other: &Peer, endpoint: &str) {
        let mut lines = "link add wg0 type wireguard\n".to_owned();
        for address in addresses.split_whitespace() {
            lines += &format!("address add {address} dev wg0\n");
        }
        namespace.ip_batch(&lines).unwrap();
        let peer = format!("peer {} endpoint {endpoint}:51820 allowed-ips 0.0.0.0/0,::/0", other.public_key);
        let key = self.private_key.display();
        namespace.tool("wg", &format!("set wg0 listen-port 51820 private-key {key} {peer}")).unwrap();
        namespace.ip("link set wg0 up").unwrap();
    }
}

/// The output of `wg` for a file's content as input.
fn wg(word: &str, input: Option<&PathBuf>) -> String {
    let mut command = Command::new("wg");
    command.arg(word);
    if let Some(path) = input {
        command.stdin(File::open(path).unwrap());
    }
    let output = command.output().expect("wg runs (Debian package wireguard-tools)");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
#[ignore = "needs WireGuard, which the kernels of make test-kernels have"]
fn netns_datagrams_out_of_a_wireguard_tunnel_are_forwarded() {
    let cases = [("10.5.0.1:5514", "10.5.0.2:0"), ("[fd00:5::1]:5514", "[fd00:5::2]:0")];
    for ((listener, source), policy) in cases.iter().flat_map(|case| ["round_robin", "replicate"].map(|to| (*case, to)))
    {
        let ipv6 = listener.starts_with('[');
        let lab = Lab::builder().receivers([Place::OtherInterface, Place::Pod, Place::GatewayHost]).ipv6(ipv6);
        let lab = lab.build().unwrap();
        let keys = TempDir::new().unwrap();
        let (near, far) = (Peer::new(&keys, "near"), Peer::new(&keys, "far"));
        near.open(&lab.gateway, "10.5.0.1/24 fd00:5::1/64", &far, "10.0.0.2");
        far.open(&lab.sender, "10.5.0.2/24 fd00:5::2/64", &near, "10.0.0.1");

        let mut config = DaemonConfig::for_lab(&lab, "tc_ebpf").extra(&format!("policy = \"{policy}\""));
        config.listeners[0].bind = listener.to_owned();
        config.listeners[0].interface = Some("wg0".to_owned());
        let daemon = start(&lab, &config);
        let expect = if policy == "replicate" { Expect::EachOfThem } else { Expect::OneOfThem };
        let collectors = Collectors::start(&lab, expect).unwrap();
        let (listener, source): (SocketAddr, SocketAddr) = (listener.parse().unwrap(), source.parse().unwrap());
        let mut small = Sender::open(&lab.sender, source, listener).unwrap();
        small.send(300, &collectors).unwrap();
        // In fragments.
        let mut long = Sender::open(&lab.sender, source, listener).unwrap().payload(4_000);
        long.send(30, &collectors).unwrap();
        let report = collectors.finish(&[&small, &long]).unwrap();
        assert!(report.is_complete(), "{policy} ipv6={ipv6}: {report}");
        assert!(report.all_from(source.ip()), "{report}");
        check_counters(&daemon, &lab.gateway, Some(PacketCounts::forwarded(330)), PacketCounts::NOTHING);
        check_downstream_counters(&daemon, &lab.gateway, &report);
    }
}
