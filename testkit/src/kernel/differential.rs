//! A differential test: the production program, with listeners of every kind, against the oracle. Both must agree on every frame's
//! verdict, on the whole packet, and on the counters. The test `random` and the fuzz target `kernel` generate the frames.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::net::SocketAddr;
use std::time::Duration;

use libbpf_rs::{MapCore, MapHandle};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use udp_fanout::testing::admission::{Meter, Prefix, SourceRules, TICKS_PER_SECOND};
use udp_fanout::testing::datapath::kernel::counters;
use udp_fanout::testing::model::{DropReason, HashOn, Policy};
use udp_fanout::testing::plan::{Delivery, ListenerPlan, PlanTarget};
use udp_fanout_lab::ip;

use super::oracle::{Copies, History, Outcome, REDIRECT, SHOT, UNSPEC, is_replicated, predict};
use super::packet::{Frame, sum};
use super::run::{Gso, Program, listener, pod, target, via};

/// IPv4 sender addresses. Without an Ethernet header, a test run reads bytes of the second as the protocol (see `oracle::framed`).
pub const SENDERS: [&str; 6] =
    ["203.0.113.5:4", "8.0.3.5:4", "10.255.0.1:65535", "127.0.0.1:5", "0.1.2.3:5", "239.1.1.1:6"];

/// IPv6 sender addresses. The second has the same property.
pub const SENDERS6: [&str; 5] =
    ["[2001:db8:5::5]:4", "[2001:db8:86dd::5]:4", "[::1]:4", "[ff02::1]:4", "[fe80::5]:65535"];

/// IPv4 destinations: every listener, and addresses without one.
pub const DESTINATIONS: [&str; 18] = [
    "192.0.2.1:5000",
    "192.0.2.1:5000",
    "192.0.2.1:5002",
    "192.0.2.1:5003",
    "192.0.2.2:5000",
    "8.8.8.8:53",
    "192.0.2.3:5000",
    "192.0.2.3:5001",
    "192.0.2.3:5002",
    "192.0.2.3:5003",
    "192.0.2.4:5000",
    "192.0.2.4:5001",
    "192.0.2.4:5002",
    "239.1.2.3:5000",
    "239.1.2.3:5001",
    "192.0.2.5:5000",
    "192.0.2.5:5000",
    "239.1.2.3:5002",
];

/// IPv6 destinations.
pub const DESTINATIONS6: [&str; 9] = [
    "[2001:db8::1]:5000",
    "[2001:db8::1]:5000",
    "[2001:db8::3]:5000",
    "[2001:db8::2]:5000",
    "[2001:db8::4]:5000",
    "[2001:db8::4]:5002",
    "[2001:db8::1]:1",
    "[ff05::1:3]:5000",
    "[2001:db8::5]:5000",
];

/// One listener of every kind that a test run can exercise.
pub fn plan() -> Vec<ListenerPlan> {
    let mut socket_only = listener(3, "192.0.2.1:5003", vec![target("198.51.100.8:5003", pod("198.51.100.8", 1500))]);
    socket_only.socket_only = Some("test".into());
    let mixed = vec![
        target("198.51.100.4:5000", pod("198.51.100.4", 1500)),
        target("198.51.100.1:5000", via("198.51.100.1", 1500)),
        target("198.51.100.2:6000", via("198.51.100.254", 600)),
        target("192.0.2.1:6001", Delivery::Local),
        target("198.51.100.5:6000", pod("198.51.100.5", 600)),
        target("198.51.100.3:6000", Delivery::Unreachable),
    ];
    let mixed6 = vec![
        target("[2001:db8:9::1]:5000", via("fe80::1", 1500)),
        target("[2001:db8:9::2]:6000", via("2001:db8::fe", 1280)),
        target("[2001:db8::1]:6001", Delivery::Local),
        target("[2001:db8:9::4]:5000", pod("fe80::4", 1500)),
        target("[2001:db8:9::5]:6000", pod("2001:db8::5", 1280)),
    ];
    let mut mixed = listener(0, "192.0.2.1:5000", mixed);
    // The loopback device, on which test runs receive.
    mixed.l3_ingress = vec![1];
    vec![
        mixed,
        listener(1, "[2001:db8::1]:5000", mixed6),
        ListenerPlan { policy: Policy::Hash(HashOn::SourceIp), ..listener(2, "192.0.2.1:5002", vec![]) },
        socket_only,
        listener(4, "192.0.2.2:5000", vec![target("203.0.113.1:5000", pod("198.51.100.9", 9000))]),
        hashing(5, "192.0.2.3:5000", Policy::Hash(HashOn::SourceIp)),
        hashing(6, "192.0.2.3:5001", Policy::Hash(HashOn::Source)),
        hashing(7, "192.0.2.3:5002", Policy::Hash(HashOn::Flow)),
        hashing(8, "[2001:db8::3]:5000", Policy::Hash(HashOn::Flow)),
        hashing(9, "192.0.2.3:5003", Policy::GelfMessage),
        with_sources(
            10,
            "192.0.2.4:5000",
            &["10.0.0.0/8", "10.1.2.0/24", "10.1.2.3/32", "203.0.113.5/32"],
            &["10.1.0.0/16", "10.1.2.3/32"],
        ),
        with_sources(11, "192.0.2.4:5001", &[], &["10.0.0.0/14", "10.3.3.3/32", "202.0.0.0/7"]),
        with_sources(12, "[2001:db8::4]:5000", &["2001:db8::/32", "fe80::/10"], &["2001:db8:5:0:0:0:0:2/127"]),
        with_rate_limit(13, "192.0.2.4:5002", 24),
        with_rate_limit(14, "[2001:db8::4]:5002", 64),
        listener(15, "239.1.2.3:5000", receiver_beside("0")),
        listener(16, "[ff05::1:3]:5000", receiver_beside("[")),
        listener(17, "239.1.2.3:5001", vec![target("192.0.2.9:7000", Delivery::Local)]),
        replicating(18, "192.0.2.5:5000"),
        replicating(19, "239.1.2.3:5002"),
        replicating(20, "[2001:db8::5]:5000"),
    ]
}

/// A listener that replicates to a downstream of every kind. The order of the copies shows the slots of the downstreams without one.
fn replicating(id: u32, bind: &str) -> ListenerPlan {
    let six = bind.starts_with('[');
    let address = |n: u32| if six { format!("[2001:db8:9::{n}]:8000") } else { format!("198.51.100.{n}:8000") };
    let next_hop = |n: u32| if six { format!("fe80::{n}") } else { format!("198.51.100.{n}") };
    let over_existing_link = |mut delivery| {
        if let Delivery::Neighbour { link, .. } = &mut delivery {
            *link = Clones::LINK;
        }
        delivery
    };
    let mut unsampled = target(&address(14), pod(&next_hop(14), 1500));
    unsampled.downstream.sample = 0;
    let targets = vec![
        target(&address(11), over_existing_link(pod(&next_hop(11), 1500))),
        target(&address(12), Delivery::Unreachable),
        target(&address(13), over_existing_link(via(&next_hop(13), 1400))),
        unsampled,
        target(&address(15), Delivery::Local),
    ];
    ListenerPlan { policy: Policy::Replicate, ..listener(id, bind, targets) }
}

/// A listener with source rules. The link to its receiver has a small MTU.
fn with_sources(id: u32, bind: &str, allow: &[&str], deny: &[&str]) -> ListenerPlan {
    let prefixes = |texts: &[&str]| texts.iter().map(|text| Prefix::parse(text).unwrap()).collect();
    let mut plan = listener(id, bind, receiver_beside(bind));
    plan.sources = SourceRules { allow: prefixes(allow), deny: prefixes(deny) }.into();
    plan
}

/// A rate-limited listener. Its senders' buckets do not refill during the test.
fn with_rate_limit(id: u32, bind: &str, prefix: u8) -> ListenerPlan {
    let mut plan = listener(id, bind, receiver_beside(bind));
    let interval = 24 * 3600 * TICKS_PER_SECOND;
    plan.meter = Some(Meter { interval, depth: 100 * interval, prefix, senders: 1024 });
    plan
}

fn receiver_beside(bind: &str) -> Vec<PlanTarget> {
    match bind.starts_with('[') {
        true => vec![target("[2001:db8:9::7]:7000", pod("fe80::7", 1280))],
        false => vec![target("198.51.100.7:7000", pod("198.51.100.7", 600))],
    }
}

/// A listener with a long table without a pattern, so that a wrong index shows.
fn hashing(id: u32, bind: &str, policy: Policy) -> ListenerPlan {
    let address =
        |i: u32| if bind.starts_with('[') { format!("[2001:db8:9::{i:x}]:7000") } else { format!("10.9.0.{i}:7000") };
    let next_hop = |i: u32| if bind.starts_with('[') { format!("fe80::{i:x}") } else { format!("198.51.100.{i}") };
    let delivery = |i: u32| if i.is_multiple_of(3) { via(&next_hop(i), 1500) } else { pod(&next_hop(i), 1500) };
    let mut plan = listener(id, bind, (1..=31).map(|i| target(&address(i), delivery(i))).collect());
    // For round robin, each downstream has one slot, so that the first datagram shows where the kernel started.
    let slots = if policy == Policy::GelfMessage { 31 } else { 997 };
    plan.table = (0..slots).map(|i| if slots == 31 { i } else { i * i % 31 }).collect();
    plan.policy = policy;
    plan
}

/// Number of listeners in [`plan`].
const LISTENERS: usize = 21;

/// Sets the time to live of a frame.
pub fn set_ttl(frame: &mut [u8], ttl: u8) {
    if frame[12..14] == [0x86, 0xdd] {
        frame[21] = ttl;
    } else {
        frame[22] = ttl;
        fix_ip_checksum(frame);
    }
}

/// Recomputes the checksum of an IPv4 header.
pub fn fix_ip_checksum(frame: &mut [u8]) {
    frame[24..26].fill(0);
    let header = (14 + usize::from(frame[14] & 15) * 4).clamp(34, frame.len());
    let check = !sum(&frame[14..header], 0);
    frame[24..26].copy_from_slice(&check.to_be_bytes());
}

/// Compares two packets. Every byte must be equal, except that the IPv4 checksum may be either zero of one's complement.
fn same(a: &[u8], b: &[u8]) -> bool {
    let zero = |bytes: &[u8], at: usize| matches!(bytes.get(at..at + 2), Some([0, 0] | [0xff, 0xff]));
    a.len() == b.len()
        && a.iter().zip(b).enumerate().all(|(i, (x, y))| {
            let word = i & !1;
            x == y || (word == 24 && zero(a, 24) && zero(b, 24))
        })
}

/// Counter values, as read from the program's maps or as predicted.
#[derive(Debug, Default, PartialEq)]
struct CounterTotals {
    listeners: [[u64; 6]; LISTENERS],
    /// Copies without a route to their downstream, by listener ID.
    unreachable: [u64; LISTENERS],
    /// Datagrams and bytes by listener ID and downstream. Downstreams that got none are left out.
    downstreams: BTreeMap<(u32, SocketAddr), [u64; 2]>,
    strays: u64,
    lost: u64,
}

impl CounterTotals {
    fn read(program: &mut Program, fragments: &MapHandle) -> CounterTotals {
        let [strays, lost] = counters::fragments(fragments).unwrap();
        let counters = program.datapath_counters().into_iter().filter(|(_, counted)| counted.packets > 0);
        let downstreams = counters.map(|((id, to), counted)| ((id.0, to), [counted.packets, counted.bytes]));
        let downstreams = downstreams.collect();
        let listeners = std::array::from_fn(|id| program.stats(id as u32));
        let unreachable = std::array::from_fn(|id| {
            let copies = program.copies_dropped(id as u32);
            assert_eq!(copies.total(), copies.get(DropReason::NoRoute), "listener {id}: {copies:?}");
            copies.total()
        });
        CounterTotals { listeners, unreachable, downstreams, strays, lost }
    }
}

/// A program and its oracle, started in the same state.
pub struct DifferentialTest {
    pub program: Program,
    pub history: History,
    expected: CounterTotals,
    /// The program's map of fragment counters.
    fragments: MapHandle,
    /// The program's maps of incomplete datagrams and of senders' token buckets.
    memory: [MapHandle; 2],
    clones: Clones,
}

/// Captures clones, which a test run does not return: they leave by an egress interface, or are reinjected into the loopback device,
/// on which test runs receive.
struct Clones {
    out: Socket,
    reinjected: Socket,
}

impl Clones {
    /// Index of the egress interface for clones. Its peer discards every packet.
    const LINK: u32 = 78;
    /// How long to wait for a clone.
    const PATIENCE: Duration = Duration::from_secs(10);

    fn capture() -> Clones {
        // Without IPv6, the kernel sends no packets of its own there.
        fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        ip("link set lo up");
        ip(&format!("link add clones index {} mtu 9000 type veth peer name sink mtu 9000", Self::LINK));
        ip("link set sink up");
        ip("link set clones up");
        Clones { out: packet_socket(Self::LINK), reinjected: packet_socket(1) }
    }

    /// Compares the captured clones with the predicted ones.
    fn check(&self, copies: &Copies, case: &str) {
        for (socket, expected, direction) in
            [(&self.out, &copies.out, "out"), (&self.reinjected, &copies.reinjected, "in")]
        {
            for (nth, packet) in expected.iter().enumerate() {
                let got = receive(socket);
                assert!(
                    got.as_ref().is_some_and(|got| same(got, packet)),
                    "{case}\nclone {nth} {direction}\nexpected {packet:02x?}\ngot      {got:02x?}"
                );
            }
        }
    }

    /// Asserts that no further clone has been captured.
    fn check_no_more(&self) {
        for socket in [&self.out, &self.reinjected] {
            socket.set_nonblocking(true).unwrap();
            assert_eq!(receive(socket), None);
            socket.set_nonblocking(false).unwrap();
        }
    }
}

/// A socket that captures every packet of an interface in the thread's namespace.
fn packet_socket(link: u32) -> Socket {
    let every = (libc::ETH_P_ALL as u16).to_be();
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(i32::from(every)))).unwrap();
    // SAFETY: a C struct of integers, for which zero is valid; it is no longer than the storage.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, length| {
            let address = storage.cast::<libc::sockaddr_ll>();
            (*address).sll_family = libc::AF_PACKET as u16;
            (*address).sll_protocol = every;
            (*address).sll_ifindex = link as i32;
            *length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            Ok(())
        })
    }
    .unwrap();
    socket.bind(&address).unwrap();
    socket.set_read_timeout(Some(Clones::PATIENCE)).unwrap();
    socket
}

fn receive(mut socket: &Socket) -> Option<Vec<u8>> {
    let mut packet = vec![0; 2048];
    let length = socket.read(&mut packet).ok()?;
    packet.truncate(length);
    Some(packet)
}

impl DifferentialTest {
    /// Loads the program, with a fragment timeout longer than any test.
    pub fn begin() -> DifferentialTest {
        let mut program = Program::load_with(plan(), |setup| setup.fragment_timeout = Duration::from_secs(24 * 3600));
        let clones = Clones::capture();
        let history = learn_round_robin(&program, &clones);
        let fragments = program.map("FRAGMENT_STAT");
        let expected = CounterTotals::read(&mut program, &fragments);
        let memory = ["fragments", "buckets"].map(|name| program.map(name));
        DifferentialTest { program, history, expected, fragments, memory, clones }
    }

    /// Compares program and oracle for one frame. `case` identifies the frame in a failure's message.
    pub fn frame(&mut self, bytes: &[u8], gso: Gso, case: &str) {
        // A test run's packet has no GSO type, and a device does not send a GSO packet without one.
        let gso = if is_replicated(&self.program.plan, bytes) { Gso::default() } else { gso };
        let outcome = predict(&self.program.plan, &mut self.history, bytes, gso);
        let ran = self.program.run(bytes, gso);
        let (verdict, packet) = match &outcome {
            Outcome::Foreign | Outcome::Passed { .. } => (UNSPEC, bytes),
            Outcome::Dropped { .. } => (SHOT, bytes),
            Outcome::Forwarded { verdict, packet, .. } | Outcome::Fragment { verdict, packet, .. } => {
                (*verdict, &packet[..])
            }
            Outcome::Copied { copies, .. } => last_copy(copies, &ran.packet),
        };
        let agree =
            ran.verdict == verdict && same(&ran.packet[compared_from(&outcome)..], &packet[compared_from(&outcome)..]);
        assert!(agree, "{case}\nframe    {bytes:02x?} {gso:?}\nexpected {outcome:02x?}\ngot      {ran:02x?}");
        if let Outcome::Copied { copies, .. } = &outcome {
            self.clones.check(copies, case);
        }
        count_outcome(&mut self.expected, &outcome);
    }

    /// Clears the state of senders and incomplete datagrams on both sides. The round-robin cursors stay.
    pub fn forget(&mut self) {
        for map in &self.memory {
            for key in map.keys().collect::<Vec<_>>() {
                map.delete(&key).unwrap();
            }
        }
        self.history.incomplete.clear();
        self.history.spent.clear();
    }

    /// Compares all counters with the predicted ones.
    pub fn audit(&mut self) {
        assert_eq!(CounterTotals::read(&mut self.program, &self.fragments), self.expected);
        self.clones.check_no_more();
    }
}

/// The kernel starts round robin at a random slot. One datagram for each listener shows which, and the oracle continues from there.
fn learn_round_robin(program: &Program, clones: &Clones) -> History {
    let mut history = History::default();
    let probes = [
        (9, Frame::new("203.0.113.5:4", "192.0.2.3:5003", b"x")),
        (0, Frame::new("203.0.113.5:4", "192.0.2.1:5000", b"x")),
        (1, Frame::new("[2001:db8:5::5]:4", "[2001:db8::1]:5000", b"x")),
    ];
    for (id, probe) in probes {
        let ran = program.run(&probe.bytes(), Gso::default());
        let slots = program.plan.listeners[id as usize].table.len();
        let slot = (0..slots)
            .find(|&slot| {
                let mut guess = History { round_robin: [(id, slot)].into(), ..History::default() };
                match predict(&program.plan, &mut guess, &probe.bytes(), Gso::default()) {
                    Outcome::Forwarded { packet, .. } => same(&packet, &ran.packet),
                    Outcome::Dropped { .. } => ran.verdict == SHOT,
                    _ => false,
                }
            })
            .expect("the first datagram went to none of the downstreams");
        history.round_robin.insert(id, (slot + 1) % slots);
    }
    let mut multicast = Frame::new("203.0.113.5:4", "239.1.2.3:5002", b"x");
    multicast.destination_mac = [1, 0, 0x5e, 1, 2, 3];
    let probes = [
        (18, Frame::new("203.0.113.5:4", "192.0.2.5:5000", b"x")),
        (19, multicast),
        (20, Frame::new("[2001:db8:5::5]:4", "[2001:db8::5]:5000", b"x")),
    ];
    for (id, probe) in probes {
        let ran = program.run(&probe.bytes(), Gso::default());
        let captured = |socket: &Socket| {
            socket.set_nonblocking(true).unwrap();
            let packets: Vec<Vec<u8>> = std::iter::from_fn(|| receive(socket)).collect();
            socket.set_nonblocking(false).unwrap();
            packets
        };
        let (out, reinjected) = (captured(&clones.out), captured(&clones.reinjected));
        let slots = program.plan.listeners[id as usize].table.len();
        let slot = (0..slots)
            .find(|&slot| {
                let mut guess = History { round_robin: [(id, slot)].into(), ..History::default() };
                match predict(&program.plan, &mut guess, &probe.bytes(), Gso::default()) {
                    Outcome::Copied { copies, .. } => {
                        let shown = copies.last.is_some() == (ran.verdict == REDIRECT);
                        shown && copies.out == out && copies.reinjected == reinjected
                    }
                    _ => false,
                }
            })
            .unwrap_or_else(|| {
                panic!("listener {id}: no order of copies is {out:02x?}, {reinjected:02x?}, {ran:02x?}")
            });
        history.round_robin.insert(id, (slot + 1) % slots);
    }
    history
}

/// The verdict for a replicated packet, and the packet.
fn last_copy<'a>(copies: &'a Copies, ran: &'a [u8]) -> (i32, &'a [u8]) {
    match &copies.last {
        Some(packet) => (REDIRECT, packet),
        // It is dropped, as rewritten for the copy before.
        None => (SHOT, ran),
    }
}

/// The first byte to compare: for a last copy, the one after the MAC addresses, which the kernel writes.
fn compared_from(outcome: &Outcome) -> usize {
    if matches!(outcome, Outcome::Copied { .. }) { 12 } else { 0 }
}

/// Adds a predicted outcome to the counters.
fn count_outcome(expected: &mut CounterTotals, outcome: &Outcome) {
    let (id, row) = match outcome {
        Outcome::Copied { listener, datagrams, bytes, copies } => {
            for to in &copies.to {
                let downstream = expected.downstreams.entry((*listener, *to)).or_default();
                downstream[0] += datagrams;
                downstream[1] += bytes;
            }
            expected.unreachable[*listener as usize] += copies.unreachable * datagrams;
            (*listener, [*datagrams, *datagrams, 0, 0, *bytes, *bytes])
        }
        Outcome::Foreign => return,
        Outcome::Fragment { stray, lost, .. } => {
            expected.strays += u64::from(*stray);
            expected.lost += u64::from(*lost);
            return;
        }
        Outcome::Passed { listener, datagrams, bytes } => (*listener, [*datagrams, 0, 0, *datagrams, *bytes, 0]),
        Outcome::Dropped { listener, datagrams, bytes, .. } => (*listener, [*datagrams, 0, *datagrams, 0, *bytes, 0]),
        Outcome::Forwarded { listener, datagrams, bytes, to, .. } => {
            let downstream = expected.downstreams.entry((*listener, *to)).or_default();
            downstream[0] += datagrams;
            downstream[1] += bytes;
            (*listener, [*datagrams, *datagrams, 0, 0, *bytes, *bytes])
        }
    };
    for (total, n) in expected.listeners[id as usize].iter_mut().zip(row) {
        *total += n;
    }
}
