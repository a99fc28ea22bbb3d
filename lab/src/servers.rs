//! Receivers that answer, refuse or stay silent, each on a thread that ends when the value is dropped.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "only tests use this, and a panic is how a test fails")]

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use socket2::{Domain, Socket, Type};

/// How often a server checks whether it must stop.
const LOOK: Duration = Duration::from_millis(20);

/// A running server. Dropping it stops the server.
pub struct Server {
    /// The address that the server listens on.
    pub address: SocketAddr,
    /// Datagrams or connections received.
    received: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn spawn(address: SocketAddr, mut serve_one: impl FnMut() -> bool + Send + 'static) -> Server {
        let (stop, received) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&received));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if serve_one() {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Server { address, received, stop, thread: Some(thread) }
    }

    /// Calls `reply` with the socket, the sender and the payload of each datagram.
    pub fn udp(socket: UdpSocket, mut reply: impl FnMut(&UdpSocket, SocketAddr, &[u8]) + Send + 'static) -> Server {
        socket.set_read_timeout(Some(LOOK)).unwrap();
        let mut buffer = vec![0; 65_536];
        Server::spawn(socket.local_addr().unwrap(), move || match socket.recv_from(&mut buffer) {
            Ok((length, from)) => {
                reply(&socket, from, &buffer[..length]);
                true
            }
            Err(_) => false,
        })
    }

    /// Calls `serve` with each connection.
    pub fn tcp(listener: TcpListener, mut serve: impl FnMut(TcpStream) + Send + 'static) -> Server {
        listener.set_nonblocking(true).unwrap();
        Server::spawn(listener.local_addr().unwrap(), move || match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                serve(stream);
                true
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                thread::sleep(LOOK / 10);
                false
            }
        })
    }

    /// An HTTP server that answers each request with these bytes, written in pieces of `piece` bytes, and closes the connection.
    pub fn http(listener: TcpListener, answer: Vec<u8>, piece: usize) -> Server {
        Server::tcp(listener, move |mut stream| {
            let mut request = Vec::new();
            let mut buffer = [0; 1024];
            while !request.ends_with(b"\r\n\r\n") {
                match stream.read(&mut buffer) {
                    Ok(0) | Err(_) => return,
                    Ok(read) => request.extend_from_slice(&buffer[..read]),
                }
            }
            assert!(request.starts_with(b"GET /healthz HTTP/1.1\r\nHost: "), "{}", String::from_utf8_lossy(&request));
            stream.set_nodelay(true).unwrap();
            for piece in answer.chunks(piece) {
                if stream.write_all(piece).is_err() {
                    return;
                }
            }
        })
    }

    /// Datagrams or connections received so far.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let outcome = self.thread.take().unwrap().join();
        if !thread::panicking() {
            outcome.expect("the server thread panicked");
        }
    }
}

/// A UDP socket on a free port of a loopback address.
pub fn udp_socket(ip: &str) -> UdpSocket {
    UdpSocket::bind(SocketAddr::new(ip.parse().unwrap(), 0)).unwrap()
}

/// A TCP listener on a free port of a loopback address.
pub fn tcp_listener(ip: &str) -> TcpListener {
    TcpListener::bind(SocketAddr::new(ip.parse().unwrap(), 0)).unwrap()
}

/// A TCP listener with a full backlog, so that the kernel does not answer further connections.
pub fn deaf_listener(ip: &str) -> (SocketAddr, Vec<Socket>) {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&SocketAddr::new(ip.parse().unwrap(), 0).into()).unwrap();
    listener.listen(0).unwrap();
    let address = listener.local_addr().unwrap().as_socket().unwrap();
    let mut sockets = vec![listener];
    // A backlog of one connection, which is never accepted.
    for _ in 0..4 {
        let client = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        client.set_nonblocking(true).unwrap();
        let _ = client.connect(&address.into());
        sockets.push(client);
    }
    (address, sockets)
}
