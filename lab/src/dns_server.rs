//! A small DNS server on 127.0.0.1:53 of a namespace. The test sets its responses.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "only tests use this, and a panic is how a test fails")]

use std::collections::HashMap;
use std::net::{IpAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::Namespace;

/// Timeout of every wait. A passing test never reaches it.
const LIMIT: Duration = Duration::from_secs(30);

/// The response to queries for a name.
#[derive(Debug, Clone)]
pub enum Answer {
    /// The addresses of the queried family.
    Addresses(Vec<IpAddr>),
    /// `SERVFAIL`.
    ServerFailure,
    /// `NXDOMAIN`, the default for every name.
    NoSuchName,
}

/// A running server. Dropping it stops the server.
pub struct DnsServer {
    answers: Arc<Mutex<HashMap<String, Answer>>>,
    queries: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl DnsServer {
    /// Starts the server.
    ///
    /// # Panics
    /// When the port is in use.
    pub fn start(namespace: &Namespace) -> DnsServer {
        let socket = namespace.run(|| Ok(UdpSocket::bind("127.0.0.1:53")?)).unwrap();
        // How often `stop` is checked.
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let answers: Arc<Mutex<HashMap<String, Answer>>> = Arc::default();
        let (stop, queries): (Arc<AtomicBool>, Arc<AtomicU64>) = Default::default();
        let thread = {
            let (answers, stop, queries) = (Arc::clone(&answers), Arc::clone(&stop), Arc::clone(&queries));
            std::thread::spawn(move || {
                let mut packet = [0; 512];
                while !stop.load(Ordering::Relaxed) {
                    let Ok((length, from)) = socket.recv_from(&mut packet) else { continue };
                    let reply = reply(&packet[..length], &answers.lock().unwrap());
                    socket.send_to(&reply, from).unwrap();
                    queries.fetch_add(1, Ordering::SeqCst);
                }
            })
        };
        DnsServer { answers, queries, stop, thread: Some(thread) }
    }

    /// Sets the response to queries for a name.
    ///
    /// # Panics
    /// When the server has panicked.
    pub fn set(&self, name: &str, answer: Answer) {
        self.answers.lock().unwrap().insert(name.to_owned(), answer);
    }

    /// Waits until this many more queries have been answered.
    ///
    /// # Panics
    /// When the wait times out.
    pub fn wait_for_queries(&self, count: u64) {
        let target = self.queries.load(Ordering::SeqCst) + count;
        let guard = Instant::now() + LIMIT;
        while self.queries.load(Ordering::SeqCst) < target {
            assert!(Instant::now() < guard, "timed out waiting for DNS queries");
            std::thread::yield_now();
        }
    }
}

impl Drop for DnsServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// The reply to a packet with one question.
fn reply(packet: &[u8], answers: &HashMap<String, Answer>) -> Vec<u8> {
    const HEADER: usize = 12;
    let mut labels = Vec::new();
    let mut at = HEADER;
    while packet[at] != 0 {
        let length = usize::from(packet[at]);
        labels.push(String::from_utf8_lossy(&packet[at + 1..=at + length]).to_ascii_lowercase());
        at += 1 + length;
    }
    let kind = u16::from_be_bytes([packet[at + 1], packet[at + 2]]);
    let question = &packet[HEADER..at + 5];
    let answer = answers.get(&labels.join(".")).cloned().unwrap_or(Answer::NoSuchName);
    let (code, addresses) = match answer {
        Answer::Addresses(addresses) => (0u8, addresses),
        Answer::ServerFailure => (2, vec![]),
        Answer::NoSuchName => (3, vec![]),
    };
    // Type A is 1, AAAA is 28.
    let fitting: Vec<IpAddr> = addresses.into_iter().filter(|ip| kind == if ip.is_ipv4() { 1 } else { 28 }).collect();
    let mut reply = packet[..2].to_vec();
    // A response with recursion, to one question.
    reply.extend([0x81, 0x80 | code, 0, 1]);
    reply.extend(u16::try_from(fitting.len()).unwrap().to_be_bytes());
    reply.extend([0; 4]);
    reply.extend(question);
    for ip in fitting {
        let octets = match ip {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        // The name of the question, its type, class IN, a time to live of 0.
        reply.extend([0xc0, 12]);
        reply.extend(kind.to_be_bytes());
        reply.extend([0, 1, 0, 0, 0, 0]);
        reply.extend(u16::try_from(octets.len()).unwrap().to_be_bytes());
        reply.extend(octets);
    }
    reply
}
