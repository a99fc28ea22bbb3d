//! `udp_echo` and `udp`.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use udp_fanout::testing::health::model::ProbeOutcome;
use udp_fanout::testing::health::settings::{ProbeBytes, ProbeKind, ProbeProtocol};

use udp_fanout_lab::servers::{Server, udp_socket};
use udp_fanout_testkit::probing::{Bench, LISTENER, ended, settings, watch};

const ECHO: ProbeProtocol = ProbeProtocol::UdpEcho { port: None };

fn echo(ip: &str) -> Server {
    Server::udp(udp_socket(ip), |socket, from, bytes| {
        socket.send_to(bytes, from).unwrap();
    })
}

fn question(payload: &str, expect: &str) -> ProbeProtocol {
    ProbeProtocol::Udp {
        port: None,
        payload: ProbeBytes::read(payload).unwrap(),
        expect: ProbeBytes::read(expect).unwrap(),
    }
}

/// A receiver that replies to a probe with something that is not the probe, or not from where it was sent.
fn liar(lie: impl Fn(&UdpSocket, SocketAddr, &[u8]) + Send + 'static) -> Server {
    Server::udp(udp_socket("127.0.0.1"), lie)
}

#[test]
fn echoes_are_healthy_over_both_families() {
    let servers = [echo("127.0.0.1"), echo("::1")];
    let addresses = servers.each_ref().map(|server| server.address);
    let mut bench = Bench::probing(&addresses, ECHO);
    for address in addresses {
        assert!(bench.until_healthy(address).round_trip.is_some());
    }
    assert!(bench.health.probe_stats().of(ProbeKind::UdpEcho).round_trips.count() >= 2);
    assert_eq!(bench.health.open_sockets(), 2);
    bench.set(&[watch(&addresses[..1], &settings(ECHO))]);
    assert_eq!(bench.health.open_sockets(), 1, "unused sockets are closed");
}

#[test]
fn what_is_not_the_probe_come_back_is_ignored() {
    let elsewhere = udp_socket("127.0.0.1");
    let lies = [
        liar(|socket, from, bytes| drop(socket.send_to(&bytes[1..], from))),
        liar(|socket, from, bytes| drop(socket.send_to(&[bytes, b"!"].concat(), from))),
        liar(|socket, from, bytes| {
            // The nonce is in hexadecimal digits before the line feed.
            let mut other = bytes.to_vec();
            let digit = other.len() - 2;
            other[digit] = if other[digit] == b'0' { b'1' } else { b'0' };
            drop(socket.send_to(&other, from));
        }),
        liar(|socket, from, _| drop(socket.send_to(b"", from))),
        liar(move |_, from, bytes| drop(elsewhere.send_to(bytes, from))),
        // Probes of later rounds get the reply to an early one, which is no longer valid.
        Server::udp(udp_socket("127.0.0.1"), {
            let mut seen: Vec<Vec<u8>> = Vec::new();
            move |socket, from, bytes| {
                if seen.len() > 3 {
                    drop(socket.send_to(&seen[0], from));
                }
                seen.push(bytes.to_vec());
            }
        }),
    ];
    let addresses: Vec<SocketAddr> = lies.iter().map(|server| server.address).collect();
    let mut bench = Bench::probing(&addresses, ECHO);
    for (server, address) in lies.iter().zip(addresses) {
        let reason = bench.until_unhealthy(address);
        assert_eq!(reason, "no answer within 300ms");
        assert!(server.received() >= 1);
    }
    bench.until_probed(40);
    assert_eq!(ended(bench.health.probe_stats().of(ProbeKind::UdpEcho), ProbeOutcome::Answered), 0);
}

#[test]
fn a_closed_port_is_refused_and_a_receiver_that_comes_back_is_found() {
    for ip in ["127.0.0.1", "::1"] {
        let server = echo(ip);
        let address = server.address;
        let mut bench = Bench::probing(&[address], ECHO);
        bench.until_healthy(address);
        drop(server);
        assert!(bench.until_unhealthy(address).starts_with("port unreachable, says "), "{ip}");
        assert!(ended(bench.health.probe_stats().of(ProbeKind::UdpEcho), ProbeOutcome::Refused) >= 3);
        let socket = UdpSocket::bind(address).unwrap();
        let _server = Server::udp(socket, |socket, from, bytes| drop(socket.send_to(bytes, from)));
        assert!(bench.until_healthy(address).recovered);
        let transitions: Vec<_> = bench.health.transitions().collect();
        assert_eq!(transitions[0].0, LISTENER);
        assert!(transitions[0].1.failed >= 1 && transitions[0].1.recovered >= 1);
    }
}

#[test]
fn a_refusal_does_not_disturb_the_others_on_the_same_socket() {
    let servers: Vec<Server> = (0..20).map(|_| echo("127.0.0.1")).collect();
    let mut addresses: Vec<SocketAddr> = servers.iter().map(|server| server.address).collect();
    let closed: Vec<SocketAddr> = (0..20).map(|_| udp_socket("127.0.0.1")).map(|s| s.local_addr().unwrap()).collect();
    addresses.extend(&closed);
    let mut bench = Bench::probing(&addresses, ECHO);
    for address in closed {
        assert!(bench.until_unhealthy(address).starts_with("port unreachable"));
    }
    for server in &servers {
        bench.until_healthy(server.address);
    }
}

#[test]
fn udp_asks_the_question_and_expects_the_beginning_of_the_answer() {
    let server = Server::udp(udp_socket("127.0.0.1"), |socket, from, bytes| {
        let answer: &[u8] = if bytes == b"ping\0" { b"pong 1.2.3" } else { b"what?" };
        drop(socket.send_to(answer, from));
    });
    let healthy = [("hex:70696e6700", "pong"), ("hex:70696e6700", ""), ("x", "what?"), ("", "")];
    for (payload, expect) in healthy {
        let mut bench = Bench::probing(&[server.address], question(payload, expect));
        bench.until_healthy(server.address);
    }
    let unhealthy = [("ping", "pong"), ("hex:70696e6700", "pong 2"), ("hex:70696e6700", "pong 1.2.3.4")];
    for (payload, expect) in unhealthy {
        let mut bench = Bench::probing(&[server.address], question(payload, expect));
        assert_eq!(bench.until_unhealthy(server.address), "no answer within 300ms");
    }
}

#[test]
fn probes_go_to_their_own_port_if_they_have_one() {
    let server = echo("127.0.0.1");
    let downstream = SocketAddr::from(([127, 0, 0, 1], 1));
    let port = Some(server.address.port());
    for protocol in [
        ProbeProtocol::UdpEcho { port },
        ProbeProtocol::Udp { port, payload: ProbeBytes::read("x").unwrap(), expect: ProbeBytes::read("x").unwrap() },
    ] {
        let mut bench = Bench::probing(&[downstream], protocol);
        bench.until_healthy(downstream);
    }
}

#[test]
fn listeners_with_equal_settings_share_probes_and_others_do_not_disturb() {
    let server = echo("127.0.0.1");
    let mut bench = Bench::new();
    let same = watch(&[server.address], &settings(ECHO));
    let mut other = same.clone();
    other.listener.0 = 1;
    let mut strict = watch(&[server.address], &settings(ECHO));
    strict.listener.0 = 2;
    strict.settings.probe.interval = Duration::from_millis(350);
    let mut asking = watch(&[server.address], &settings(question("q", "q")));
    asking.listener.0 = 3;
    bench.set(&[same, other, strict, asking]);
    bench.until("all four are healthy", |health| {
        health.downstreams().filter(|seen| seen.status.state.name() == "healthy").count() == 4
    });
    // One socket for the echoes of three listeners, one for the request of the fourth.
    assert_eq!(bench.health.open_sockets(), 2);
}
