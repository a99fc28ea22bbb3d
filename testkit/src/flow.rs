//! Numbered datagrams in a closed loop: never more in flight than the receivers' buffers hold, so that the program under test has lost
//! every missing one.

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};
use nix::unistd::Pid;
use udp_fanout::testing::config::UserspaceSettings;
use udp_fanout::testing::datapath::user::UserDatapath;
use udp_fanout::testing::datapath::{Datapath, DatapathCounters};
use udp_fanout::testing::model::{Downstream, ListenerCounters, ListenerId, Mode, Policy};
use udp_fanout::testing::plan::round_robin::interleave;
use udp_fanout::testing::plan::{Delivery, ListenerPlan, Plan, PlanTarget};

/// Timeout of every wait. A passing test never reaches it.
pub const GUARD: Duration = Duration::from_secs(20);

/// Maximum number of datagrams in flight.
const WINDOW: u64 = 48;

pub const ID: ListenerId = ListenerId(0);

/// A listener's plan with downstreams of these addresses and weights.
pub fn listener(id: u32, name: &str, bind: &str, downstreams: &[(SocketAddr, u32)]) -> ListenerPlan {
    let weights: Vec<u32> = downstreams.iter().map(|&(_, weight)| weight).collect();
    ListenerPlan {
        id: ListenerId(id),
        name: name.into(),
        mode: Mode::Userspace,
        bind: bind.parse().unwrap(),
        match_addresses: Vec::new(),
        links: Vec::new(),
        l3_ingress: Vec::new(),
        joins: Vec::new(),
        policy: Policy::RoundRobin,
        sources: Arc::default(),
        meter: None,
        socket_only: None,
        targets: downstreams
            .iter()
            .map(|&(address, weight)| PlanTarget {
                downstream: Downstream { name: address.to_string().into(), address, weight, sample: Downstream::ALL },
                delivery: Delivery::Unreachable,
            })
            .collect(),
        table: interleave(&weights).into(),
        settings: UserspaceSettings { workers: 2, batch_size: 16, ..UserspaceSettings::default() },
    }
}

/// A plan of these listeners.
pub fn plan(listeners: &[&ListenerPlan]) -> Plan {
    Plan::from(listeners.iter().map(|&listener| listener.clone()).collect::<Vec<_>>())
}

/// Polls until the condition holds.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < GUARD, "timed out waiting: {what}");
        std::thread::yield_now();
    }
}

/// Receivers and a sender.
pub struct Flow {
    sender: UdpSocket,
    sinks: Vec<UdpSocket>,
    next: u64,
    arrived: u64,
    /// The receivers that got each number, with repeats.
    pub seen: BTreeMap<u64, Vec<usize>>,
    /// Per receiver, the numbers in the order of their arrival.
    pub order: Vec<Vec<u64>>,
}

impl Flow {
    /// Opens this many receivers, all at this IP address.
    pub fn new(ip: &str, receivers: usize) -> Flow {
        let sinks: Vec<UdpSocket> = (0..receivers).map(|_| UdpSocket::bind((ip, 0)).unwrap()).collect();
        sinks.iter().for_each(|sink| sink.set_nonblocking(true).unwrap());
        let sender = UdpSocket::bind((ip, 0)).unwrap();
        Flow { sender, sinks, next: 0, arrived: 0, seen: BTreeMap::new(), order: vec![Vec::new(); receivers] }
    }

    /// The receivers' addresses, all with weight 1.
    pub fn receivers(&self) -> Vec<(SocketAddr, u32)> {
        self.sinks.iter().map(|sink| (sink.local_addr().unwrap(), 1)).collect()
    }

    /// Sends one numbered datagram of this many bytes without waiting, and returns its number.
    pub fn send_one(&mut self, to: SocketAddr, bytes: usize) -> u64 {
        let number = self.next;
        let mut datagram = vec![number as u8; bytes.max(8)];
        datagram[..8].copy_from_slice(&number.to_be_bytes());
        self.sender.send_to(&datagram, to).unwrap();
        self.next += 1;
        number
    }

    /// Sends this many numbered datagrams without waiting. They must fit a receiver's buffer.
    pub fn send(&mut self, to: SocketAddr, datagrams: u64) {
        for _ in 0..datagrams {
            self.send_one(to, 64);
        }
    }

    /// Sends numbered datagrams, of which these receivers get one in `every`, and waits for those.
    pub fn run(&mut self, to: SocketAddr, datagrams: u64, every: u64) {
        let (first, before) = (self.next, self.arrived);
        while self.next - first < datagrams {
            self.send_one(to, 64);
            while (self.next - first) / every > self.arrived - before + WINDOW / every {
                self.receive();
            }
        }
        while self.arrived - before < datagrams / every {
            self.receive();
        }
    }

    /// Sends numbered datagrams, of which each receiver gets a copy, and waits for all copies.
    pub fn run_copied(&mut self, to: SocketAddr, datagrams: u64) {
        let copies = self.sinks.len() as u64;
        let (first, before) = (self.next, self.arrived);
        while self.next - first < datagrams {
            self.send_one(to, 64);
            while (self.next - first) * copies > self.arrived - before + WINDOW * copies {
                self.receive();
            }
        }
        while self.arrived - before < datagrams * copies {
            self.receive();
        }
    }

    /// Fails unless every datagram sent so far has arrived exactly once at each receiver, in the order of sending.
    pub fn assert_each_once_everywhere(&self) {
        let all: Vec<u64> = (0..self.next).collect();
        for (receiver, numbers) in self.order.iter().enumerate() {
            assert!(*numbers == all, "receiver {receiver} got {} of {} or not in order", numbers.len(), all.len());
        }
    }

    /// Waits until a datagram arrives at any receiver, then reads all that have arrived.
    pub fn receive(&mut self) {
        let mut ready: Vec<PollFd> = self.sinks.iter().map(|s| PollFd::new(s.as_fd(), PollFlags::POLLIN)).collect();
        let timeout = PollTimeout::try_from(GUARD).unwrap();
        let count = poll(&mut ready, timeout).unwrap();
        assert!(count > 0, "of {} datagrams sent, {} arrived and no more came", self.next, self.arrived);
        self.collect();
    }

    /// Reads all datagrams that have arrived.
    pub fn collect(&mut self) {
        let mut buffer = vec![0; 65_536];
        for (index, sink) in self.sinks.iter().enumerate() {
            while let Ok(length) = sink.recv(&mut buffer) {
                let number = u64::from_be_bytes(buffer[..8].try_into().unwrap());
                assert!(buffer[8..length].iter().all(|&byte| byte == number as u8), "datagram {number} was changed");
                self.seen.entry(number).or_default().push(index);
                self.order[index].push(number);
                self.arrived += 1;
            }
        }
    }

    /// How many datagrams have arrived.
    pub fn arrived(&self) -> u64 {
        self.arrived
    }

    /// How many have been sent.
    pub fn sent(&self) -> u64 {
        self.next
    }

    /// Datagrams per receiver. Fails if any came twice.
    pub fn per_receiver(&self) -> Vec<u64> {
        let mut counts = vec![0; self.sinks.len()];
        for (number, receivers) in &self.seen {
            assert_eq!(receivers.len(), 1, "datagram {number} came to receivers {receivers:?}");
            counts[receivers[0]] += 1;
        }
        counts
    }

    /// Fails unless every datagram sent so far has arrived exactly once.
    pub fn assert_each_exactly_once(&self) {
        assert_eq!(self.per_receiver().iter().sum::<u64>(), self.next);
    }
}

/// A datapath that serves these listeners.
pub fn serving(listeners: &[&ListenerPlan]) -> UserDatapath {
    let mut datapath = UserDatapath::new();
    datapath.apply(&plan(listeners)).unwrap();
    datapath
}

/// True if every received datagram is counted as forwarded, passed or dropped.
pub fn balanced(counters: &ListenerCounters) -> bool {
    counters.packets_received == counters.packets_forwarded + counters.packets_passed + counters.dropped.total()
}

/// The counters after shutdown, when they are final.
pub fn final_counters(datapath: &mut UserDatapath) -> DatapathCounters {
    datapath.shutdown().unwrap();
    let counters = datapath.counters().unwrap();
    assert!(counters.listeners.values().all(balanced), "{counters:?}");
    counters
}

pub fn replicating(receivers: &[(SocketAddr, u32)], batch_size: u32) -> ListenerPlan {
    let mut listener = listener(0, "tee", "127.0.0.1:0", receivers);
    listener.policy = Policy::Replicate;
    listener.settings.workers = 3;
    listener.settings.batch_size = batch_size;
    listener
}

/// A datapath that serves these listeners on the same CPU as the calling thread: loopback does not keep the order of datagrams sent from
/// different CPUs.
pub fn serving_in_order(listeners: &[&ListenerPlan]) -> UserDatapath {
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this).unwrap();
    let mut one = CpuSet::new();
    one.set((0..CpuSet::count()).find(|&cpu| allowed.is_set(cpu).unwrap()).unwrap()).unwrap();
    sched_setaffinity(this, &one).unwrap();
    serving(listeners)
}

/// Sends datagrams of `each` bytes in one GSO message. The last one may be shorter.
pub fn send_joined(from: &UdpSocket, to: SocketAddr, payload: &[u8], each: u16) {
    let parts = [std::io::IoSlice::new(payload)];
    let size = [ControlMessage::UdpGsoSegments(&each)];
    let sent = sendmsg(from.as_raw_fd(), &parts, &size, MsgFlags::empty(), Some(&SockaddrStorage::from(to))).unwrap();
    assert_eq!(sent, payload.len());
}

/// The payload of a GSO message: numbered datagrams of `each` bytes, the last of `last` bytes.
pub fn numbered(numbers: std::ops::Range<u64>, each: usize, last: usize) -> Vec<u8> {
    let end = numbers.end - 1;
    let datagram = |number: u64| {
        let mut bytes = vec![number as u8; if number == end { last } else { each }];
        bytes[..8].copy_from_slice(&number.to_be_bytes());
        bytes
    };
    numbers.flat_map(datagram).collect()
}

/// Receives `count` datagrams and returns their numbers and lengths, in the order of arrival.
pub fn receive(sink: &UdpSocket, count: usize) -> Vec<(u64, usize)> {
    let mut buffer = vec![0; 65_536];
    let mut one = |n| {
        let length =
            sink.recv(&mut buffer).unwrap_or_else(|error| panic!("{n} of {count} datagrams arrived, then: {error}"));
        let number = u64::from_be_bytes(buffer[..8].try_into().unwrap());
        assert!(buffer[8..length].iter().all(|&byte| byte == number as u8), "datagram {number} was changed");
        (number, length)
    };
    (0..count).map(&mut one).collect()
}

pub fn sinks(count: usize) -> Vec<UdpSocket> {
    let sink = |_| {
        let sink = UdpSocket::bind("127.0.0.1:0").unwrap();
        sink.set_read_timeout(Some(GUARD)).unwrap();
        sink
    };
    (0..count).map(sink).collect()
}

pub fn addresses(sinks: &[UdpSocket]) -> Vec<(SocketAddr, u32)> {
    sinks.iter().map(|sink| (sink.local_addr().unwrap(), 1)).collect()
}

pub fn totals(datapath: &mut UserDatapath, received: u64) -> ListenerCounters {
    until("all are counted", || datapath.counters().unwrap().listeners[&ID].packets_received == received);
    final_counters(datapath).listeners[&ID]
}
