//! `tcp` and `http`.

use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::sync::mpsc;

use socket2::{Domain, Socket, Type};
use udp_fanout::health::model::ProbeOutcome;
use udp_fanout::health::settings::{ProbeKind, ProbeProtocol};

use super::bench::{Bench, settings, watch};
use super::servers::{Server, tcp_listener};
use udp_fanout_lab::in_new_netns;

const TCP: ProbeProtocol = ProbeProtocol::Tcp { port: None };

fn http() -> ProbeProtocol {
    ProbeProtocol::Http { port: None, path: "/healthz".into() }
}

/// A listener whose queue is full, so that the kernel leaves further connections unanswered.
fn deaf(ip: &str) -> (SocketAddr, Vec<Socket>) {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&SocketAddr::new(ip.parse().unwrap(), 0).into()).unwrap();
    listener.listen(0).unwrap();
    let address = listener.local_addr().unwrap().as_socket().unwrap();
    let mut sockets = vec![listener];
    // Room for one that is not accepted; the next are ignored.
    for _ in 0..4 {
        let client = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        client.set_nonblocking(true).unwrap();
        let _ = client.connect(&address.into());
        sockets.push(client);
    }
    (address, sockets)
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
    let (silent, _sockets) = deaf("127.0.0.1");
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
    assert!(bench.health.probe_stats().of(ProbeKind::Http).count(ProbeOutcome::BadAnswer) >= 6);
}

#[test]
fn http_servers_that_never_end_are_given_up() {
    // One accepts and says nothing, one never ends its headers.
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

#[test]
fn netns_hundreds_of_silent_servers_hold_up_nobody_and_leave_no_socket_behind() {
    in_new_netns(|| {
        // Deaf on every loopback address.
        let (deaf, _sockets) = deaf("0.0.0.0");
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
        assert_eq!(bench.health.probe_stats().of(ProbeKind::Tcp).in_flight(), 0);
    });
}
