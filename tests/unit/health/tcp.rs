//! `tcp` and `http`.

use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::sync::mpsc;

use udp_fanout::testing::health::model::ProbeOutcome;
use udp_fanout::testing::health::settings::{ProbeKind, ProbeProtocol};

use udp_fanout_lab::servers::{Server, deaf_listener, tcp_listener};
use udp_fanout_testkit::probing::{Bench, ended};

const TCP: ProbeProtocol = ProbeProtocol::Tcp { port: None };

fn http() -> ProbeProtocol {
    ProbeProtocol::Http { port: None, path: "/healthz".into() }
}

#[test]
fn a_port_that_accepts_is_healthy_one_that_refuses_or_keeps_silent_is_not() {
    for ip in ["127.0.0.1", "::1"] {
        let accepting = Server::tcp(tcp_listener(ip), drop);
        let closed = tcp_listener(ip).local_addr().unwrap();
        let mut bench = Bench::probing(&[accepting.address, closed], TCP);
        assert!(bench.until_healthy(accepting.address).round_trip.is_some());
        assert_eq!(bench.until_unhealthy(closed), "connection refused");
        let address = accepting.address;
        drop(accepting);
        assert_eq!(bench.until_unhealthy(address), "connection refused");
        let _again = Server::tcp(TcpListener::bind(address).unwrap(), drop);
        bench.until_healthy(address);
    }
    let (silent, _sockets) = deaf_listener("127.0.0.1");
    let mut bench = Bench::probing(&[silent], TCP);
    assert_eq!(bench.until_unhealthy(silent), "no answer within 300ms");
    assert_eq!(bench.health.open_sockets(), 0, "connections given up are closed");
}

#[test]
fn an_own_port_is_probed_instead_of_the_downstreams() {
    let server = Server::tcp(tcp_listener("127.0.0.1"), drop);
    let downstream = SocketAddr::from(([127, 0, 0, 1], 1));
    let mut bench = Bench::probing(&[downstream], ProbeProtocol::Tcp { port: Some(server.address.port()) });
    bench.until_healthy(downstream);
}

#[test]
fn http_statuses() {
    let cases = [
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", Ok(())),
        ("HTTP/1.0 204 No Content\r\n\r\n", Ok(())),
        ("HTTP/1.1 302 Found\r\nLocation: /x\r\n\r\n", Ok(())),
        ("HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", Ok(())),
        ("HTTP/1.1 404 Not Found\r\n\r\n", Err("HTTP status 404")),
        ("HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\n\r\nno", Err("HTTP status 503")),
        ("", Err("connection closed without an answer")),
        ("HTTP/1.1 200 OK\r\nServer", Err("connection closed amid an answer")),
        ("SSH-2.0-OpenSSH_9.9\r\n", Err("answer is not HTTP: invalid HTTP version")),
    ];
    let servers: Vec<(Server, Result<(), &str>)> = [4096, 1]
        .into_iter()
        .flat_map(|piece| cases.map(|(answer, outcome)| (piece, answer, outcome)))
        .map(|(piece, answer, outcome)| {
            (Server::http(tcp_listener("127.0.0.1"), answer.as_bytes().to_vec(), piece), outcome)
        })
        .collect();
    let downstreams: Vec<SocketAddr> = servers.iter().map(|(server, _)| server.address).collect();
    let mut bench = Bench::probing(&downstreams, http());
    for (server, outcome) in &servers {
        match outcome {
            Ok(()) => drop(bench.until_healthy(server.address)),
            Err(reason) => assert_eq!(bench.until_unhealthy(server.address), *reason),
        }
    }
    assert!(ended(bench.health.probe_stats().of(ProbeKind::Http), ProbeOutcome::BadAnswer) >= 6);
}

#[test]
fn http_servers_that_never_end_are_given_up() {
    // One accepts and sends nothing, one never ends its headers.
    let (send, streams) = mpsc::channel();
    let mute = Server::tcp(tcp_listener("127.0.0.1"), move |stream| drop(send.send(stream)));
    let endless = Server::tcp(tcp_listener("::1"), |mut stream| {
        let header = b"X-Long: ".iter().chain(&[b'a'; 1000]).chain(b"\r\n").copied().collect::<Vec<u8>>();
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n");
        while stream.write_all(&header).is_ok() {}
    });
    let refused = tcp_listener("127.0.0.1").local_addr().unwrap();
    let mut bench = Bench::probing(&[mute.address, endless.address, refused], http());
    assert_eq!(bench.until_unhealthy(mute.address), "no answer within 300ms");
    assert_eq!(bench.until_unhealthy(endless.address), "more than 16384 bytes of HTTP headers");
    assert_eq!(bench.until_unhealthy(refused), "connection refused");
    drop(bench);
    drop(streams);
}
