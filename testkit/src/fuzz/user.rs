//! Datagrams of any length through the userspace datapath, single and as GSO messages. Asserts that the right receiver gets each one,
//! whole, once and in order, with the original source address if that is preserved, and that the counters agree. Needs root, for a
//! network namespace and for raw sockets.
//!
//! Everything runs on one CPU, where loopback keeps the order of datagrams. The MTU is that of Ethernet, so longer datagrams arrive as
//! fragments.

use std::cell::RefCell;
use std::io::{ErrorKind, IoSlice};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

use nix::sched::{CloneFlags, CpuSet, sched_getaffinity, sched_setaffinity, unshare};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg, setsockopt, sockopt::RcvBufForce};
use nix::unistd::Pid;
use udp_fanout::testing::datapath::Datapath;
use udp_fanout::testing::datapath::user::UserDatapath;
use udp_fanout::testing::model::{DropReason, ListenerId, Policy};
use udp_fanout::testing::plan::hash;

use super::bytes::Bytes;
use crate::flow;

/// `max_packet_size` of the listeners, in bytes.
const LONGEST: usize = 3_000;
/// Maximum number of messages per input.
const MESSAGES: usize = 12;
/// Maximum number of datagrams per GSO message.
const JOINED: usize = 16;
/// Receive buffer size in bytes: larger than all datagrams of one input together.
const BUFFER: usize = 4 << 20;

/// Policy and `preserve_source` of each listener.
const LISTENERS: [(Policy, bool); 4] =
    [(Policy::RoundRobin, false), (Policy::GelfMessage, false), (Policy::Replicate, false), (Policy::RoundRobin, true)];
/// Number of receivers per listener.
const SINKS: usize = 3;

thread_local! {
    static FIXTURE: RefCell<Option<Fixture>> = const { RefCell::new(None) };
}

/// Sends the datagrams that the bytes describe.
pub fn run(bytes: &[u8]) {
    FIXTURE.with_borrow_mut(|slot| {
        // Taken out during the run, so that a panic leaves no inconsistent state for the next input.
        let mut fixture = slot.take().unwrap_or_else(Fixture::begin);
        fixture.send_all(&mut Bytes(bytes));
        *slot = Some(fixture);
    });
}

struct Fixture {
    datapath: UserDatapath,
    listeners: Vec<Listener>,
    sender: UdpSocket,
}

struct Listener {
    id: ListenerId,
    address: SocketAddr,
    policy: Policy,
    keeps_sender: bool,
    sinks: Vec<UdpSocket>,
    /// The datagrams that each sink must get next.
    expected: Vec<Vec<Vec<u8>>>,
    /// The next round-robin slot.
    next: usize,
    taken: u64,
    too_long: u64,
}

impl Fixture {
    fn begin() -> Fixture {
        unshare(CloneFlags::CLONE_NEWNET).expect("cannot make a network namespace: run this as root");
        udp_fanout_lab::ip("link set lo mtu 1500 up");
        let this = Pid::from_raw(0);
        let allowed = sched_getaffinity(this).unwrap();
        let mut one = CpuSet::new();
        one.set((0..CpuSet::count()).find(|&cpu| allowed.is_set(cpu).unwrap()).unwrap()).unwrap();
        sched_setaffinity(this, &one).unwrap();
        let sinks: Vec<Vec<UdpSocket>> = LISTENERS.iter().map(|_| (0..SINKS).map(|_| sink()).collect()).collect();
        let plans: Vec<_> = (0..)
            .zip(LISTENERS)
            .zip(&sinks)
            .map(|((id, (policy, keeps_sender)), sinks)| {
                let addresses: Vec<_> = sinks.iter().map(|sink| (sink.local_addr().unwrap(), 1)).collect();
                let mut plan = flow::listener(id, &format!("listener-{id}"), "127.0.0.1:0", &addresses);
                plan.policy = policy;
                plan.settings.workers = 1;
                plan.settings.max_packet_size = LONGEST as u32;
                plan.settings.recv_buf_size = Some(BUFFER as u32);
                plan.settings.preserve_source = keeps_sender;
                plan
            })
            .collect();
        let datapath = flow::serving(&plans.iter().collect::<Vec<_>>());
        let listeners = plans.iter().zip(sinks).map(|(plan, sinks)| Listener {
            id: plan.id,
            address: datapath.local_address(plan.id).unwrap(),
            policy: plan.policy,
            keeps_sender: plan.settings.preserve_source,
            sinks,
            expected: vec![Vec::new(); SINKS],
            next: 0,
            taken: 0,
            too_long: 0,
        });
        Fixture { listeners: listeners.collect(), datapath, sender: UdpSocket::bind("127.0.0.1:0").unwrap() }
    }

    fn send_all(&mut self, bytes: &mut Bytes<'_>) {
        for _ in 0..MESSAGES {
            if bytes.ended() {
                break;
            }
            let listener = &mut self.listeners[usize::from(bytes.byte()) % LISTENERS.len()];
            let (payload, each) = message(bytes);
            send(&self.sender, listener.address, &payload, each);
            let datagrams: Vec<&[u8]> = match each {
                Some(each) => payload.chunks(each.into()).collect(),
                None => vec![&payload],
            };
            datagrams.into_iter().for_each(|datagram| listener.expect(datagram));
        }
        let from = self.sender.local_addr().unwrap();
        for listener in &mut self.listeners {
            listener.receive(from);
        }
        self.audit();
    }

    /// Waits until all datagrams are counted, and asserts that no receiver has got more than it should.
    fn audit(&mut self) {
        for listener in &self.listeners {
            let (id, datapath) = (listener.id, &mut self.datapath);
            let mut counted = || datapath.counters().unwrap().listeners[&id];
            flow::until("all datagrams are counted", || counted().packets_received == listener.taken);
            let counted = counted();
            assert_eq!(counted.dropped.get(DropReason::Truncated), listener.too_long);
            assert_eq!(counted.dropped.total(), listener.too_long, "{counted:?}");
            assert_eq!(counted.packets_forwarded, listener.taken - listener.too_long);
            for sink in &listener.sinks {
                sink.set_nonblocking(true).unwrap();
                let more = sink.recv(&mut [0; 1]).map_err(|error| error.kind());
                assert_eq!(more, Err(ErrorKind::WouldBlock), "{} got more than it should", sink.local_addr().unwrap());
                sink.set_nonblocking(false).unwrap();
            }
        }
    }
}

impl Listener {
    /// Records which sinks must get a datagram.
    fn expect(&mut self, datagram: &[u8]) {
        self.taken += 1;
        if datagram.len() > LONGEST {
            self.too_long += 1;
            return;
        }
        let mut turn = || {
            let next = (self.next + 1) % SINKS;
            std::mem::replace(&mut self.next, next)
        };
        let sinks = match self.policy {
            Policy::Replicate => 0..SINKS,
            Policy::GelfMessage => match datagram.strip_prefix(&[0x1e, 0x0f]).and_then(<[u8]>::first_chunk) {
                Some(id) => {
                    let place = hash::table_slot(hash::message_hash(*id), SINKS as u32) as usize;
                    place..place + 1
                }
                None => one(turn()),
            },
            _ => one(turn()),
        };
        for sink in sinks {
            self.expected[sink].push(datagram.to_vec());
        }
    }

    fn receive(&mut self, sender: SocketAddr) {
        let mut buffer = [0; 65_536];
        for (sink, expected) in self.sinks.iter().zip(&mut self.expected) {
            for datagram in expected.drain(..) {
                let (length, from) = sink.recv_from(&mut buffer).expect("an expected datagram has not arrived");
                let (got, lengths) = (&buffer[..length], (length, datagram.len()));
                assert!(got == datagram, "{:?}: {lengths:?}, got {got:02x?} instead of {datagram:02x?}", self.policy);
                assert_eq!(from == sender, self.keeps_sender, "{from}");
            }
        }
    }
}

fn one(place: usize) -> std::ops::Range<usize> {
    place..place + 1
}

fn sink() -> UdpSocket {
    let sink = UdpSocket::bind("127.0.0.1:0").unwrap();
    setsockopt(&sink, RcvBufForce, &BUFFER).unwrap();
    sink.set_read_timeout(Some(flow::GUARD)).unwrap();
    sink
}

/// The payload of one message, and the segment size if it is a GSO message.
fn message(bytes: &mut Bytes<'_>) -> (Vec<u8>, Option<u16>) {
    let shape = bytes.byte();
    let length = if shape & 1 != 0 { usize::from(bytes.word()) % (LONGEST + 500) } else { usize::from(bytes.byte()) };
    let each = (shape & 2 != 0 && length > 0).then(|| 1 + bytes.word() % 1_400);
    let unit = usize::from(each.unwrap_or(u16::MAX)).min(length).max(1);
    let mut pattern = if shape & 4 != 0 { vec![0x1e, 0x0f] } else { Vec::new() };
    pattern.extend(bytes.take(usize::from(shape >> 3)));
    // Each datagram begins with the pattern, so that each may be a GELF chunk.
    let mut payload = vec![shape; length];
    for (number, datagram) in payload.chunks_mut(unit).enumerate() {
        let count = pattern.len().min(datagram.len());
        datagram[..count].copy_from_slice(&pattern[..count]);
        if let Some(last) = datagram[count..].last_mut() {
            *last = number as u8;
        }
    }
    payload.truncate(unit.saturating_mul(JOINED));
    (payload, each)
}

fn send(from: &UdpSocket, to: SocketAddr, payload: &[u8], each: Option<u16>) {
    let parts = [IoSlice::new(payload)];
    let size = each.as_ref().map(ControlMessage::UdpGsoSegments);
    let to = SockaddrStorage::from(to);
    let sent = sendmsg(from.as_raw_fd(), &parts, size.as_slice(), MsgFlags::empty(), Some(&to)).unwrap();
    assert_eq!(sent, payload.len());
}
