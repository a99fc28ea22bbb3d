//! A small name server on 127.0.0.1:53 of a namespace, which says what the test wants it to.

use std::collections::HashMap;
use std::net::{IpAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::support::Namespace;

/// How long anything may take before a test fails. Nothing waits that long otherwise.
const LIMIT: Duration = Duration::from_secs(30);

/// What is said of a name.
#[derive(Debug, Clone)]
pub enum Answer {
    /// These, each to a question for its family.
    Addresses(Vec<IpAddr>),
    /// That the server cannot tell at the moment.
    ServerFailure,
    /// That there is no such name.
    NoSuchName,
}

/// The running server. Dropping it ends it.
pub struct Server {
    answers: Arc<Mutex<HashMap<String, Answer>>>,
    questions: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(namespace: &Namespace) -> Server {
        let socket = namespace.run(|| Ok(UdpSocket::bind("127.0.0.1:53")?)).unwrap();
        // Only to look whether it is time to end.
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let answers: Arc<Mutex<HashMap<String, Answer>>> = Arc::default();
        let (stop, questions): (Arc<AtomicBool>, Arc<AtomicU64>) = Default::default();
        let thread = {
            let (answers, stop, questions) = (Arc::clone(&answers), Arc::clone(&stop), Arc::clone(&questions));
            std::thread::spawn(move || {
                let mut packet = [0; 512];
                while !stop.load(Ordering::Relaxed) {
                    let Ok((length, from)) = socket.recv_from(&mut packet) else { continue };
                    let reply = reply(&packet[..length], &answers.lock().unwrap());
                    socket.send_to(&reply, from).unwrap();
                    questions.fetch_add(1, Ordering::SeqCst);
                }
            })
        };
        Server { answers, questions, stop, thread: Some(thread) }
    }

    pub fn set(&self, name: &str, answer: Answer) {
        self.answers.lock().unwrap().insert(name.to_owned(), answer);
    }

    /// Waits until so many more questions have been answered.
    pub fn wait_for_questions(&self, count: u64) {
        let target = self.questions.load(Ordering::SeqCst) + count;
        let guard = Instant::now() + LIMIT;
        while self.questions.load(Ordering::SeqCst) < target {
            assert!(Instant::now() < guard, "nobody asks any more");
            std::thread::yield_now();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// The answer to a packet with one question.
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
