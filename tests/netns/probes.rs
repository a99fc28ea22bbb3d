//! Health probes in network namespaces: hundreds of silent servers, and a receiver in another namespace.

use std::net::{SocketAddr, UdpSocket};

use udp_fanout::testing::health::settings::{ProbeKind, ProbeProtocol};
use udp_fanout_lab::netns::{End, connect};
use udp_fanout_lab::servers::{Server, deaf_listener, tcp_listener};
use udp_fanout_lab::{Namespace, in_new_netns};
use udp_fanout_testkit::probing::{Bench, settings, watch};

const ECHO: ProbeProtocol = ProbeProtocol::UdpEcho { port: None };
const TCP: ProbeProtocol = ProbeProtocol::Tcp { port: None };

#[test]
fn netns_hundreds_of_silent_servers_delay_no_others_and_leave_no_socket_behind() {
    in_new_netns(|| {
        // A server that never replies, on every loopback address.
        let (deaf, _sockets) = deaf_listener("0.0.0.0");
        let servers: Vec<Server> = (0..10).map(|_| Server::tcp(tcp_listener("127.0.0.1"), drop)).collect();
        let deaf = (0..=255).map(|n| SocketAddr::from(([127, 0, 1, n], deaf.port())));
        let downstreams: Vec<SocketAddr> = deaf.chain(servers.iter().map(|server| server.address)).collect();
        let mut bench = Bench::probing(&downstreams, TCP);
        for server in &servers {
            bench.until_healthy(server.address);
        }
        for downstream in &downstreams[..256] {
            assert_eq!(bench.until_unhealthy(*downstream), "no answer within 300ms");
        }
        bench.until_probed(1000);
        assert!(bench.health.open_sockets() <= 3 * downstreams.len());
        bench.set(&[watch(&[], &settings(TCP))]);
        assert_eq!(bench.health.open_sockets(), 0);
        let stats = bench.health.probe_stats().of(ProbeKind::Tcp);
        assert_eq!(stats.outcomes().map(|(_, n)| n).sum::<u64>(), stats.sent(), "none is in flight");
    });
}

#[test]
fn netns_a_receiver_in_another_namespace_dies_with_its_process() {
    let (gateway, receiver) = (Namespace::create("gateway").unwrap(), Namespace::create("receiver").unwrap());
    connect(
        End { namespace: &gateway, device: "eth0", addresses: "10.0.0.1/24" },
        End { namespace: &receiver, device: "eth0", addresses: "10.0.0.2/24" },
    )
    .unwrap();
    let socket = || receiver.run(|| Ok(UdpSocket::bind("10.0.0.2:5514")?)).unwrap();
    let echo = |socket| Server::udp(socket, |socket, from, bytes| drop(socket.send_to(bytes, from)));
    let server = echo(socket());
    let address = server.address;
    gateway
        .run(|| {
            let mut bench = Bench::probing(&[address], ECHO);
            bench.until_healthy(address);
            drop(server);
            assert_eq!(bench.until_unhealthy(address), "port unreachable, says 10.0.0.2");
            let _server = echo(socket());
            bench.until_healthy(address);
            // A firewall that drops without an error.
            receiver.ip("link set lo up")?;
            for rule in ["add table inet t", "add chain inet t in { type filter hook input priority 0 ; }"] {
                receiver.tool("nft", rule)?;
            }
            receiver.tool("nft", "add rule inet t in udp dport 5514 drop")?;
            assert_eq!(bench.until_unhealthy(address), "no answer within 300ms");
            receiver.tool("nft", "flush ruleset")?;
            bench.until_healthy(address);
            Ok(())
        })
        .unwrap();
}
