//! The production program with listeners of every sort, and the oracle beside it: both must agree on every frame's verdict, on
//! the whole packet, and on the counters. `random` asks them about frames that chance has made, fuzzing about others.

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

use super::oracle::{Copies, Fate, History, REDIRECT, SHOT, UNSPEC, fate, is_replicated};
use super::packet::{Frame, sum};
use super::run::{Gso, Program, listener, pod, target, via};

/// Senders of interest, IPv4. A test run takes the second address for the protocol in a frame (oracle::framed).
pub const SENDERS: [&str; 6] =
    ["203.0.113.5:4", "8.0.3.5:4", "10.255.0.1:65535", "127.0.0.1:5", "0.1.2.3:5", "239.1.1.1:6"];

/// Senders of interest, IPv6. The same of the second.
pub const SENDERS6: [&str; 5] =
    ["[2001:db8:5::5]:4", "[2001:db8:86dd::5]:4", "[::1]:4", "[ff02::1]:4", "[fe80::5]:65535"];

/// Where datagrams go, IPv4: to all the listeners, and elsewhere.
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

/// The same, IPv6.
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

/// Listeners of every sort that a test run can show.
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
    // What a test run comes by.
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
        guarded(
            10,
            "192.0.2.4:5000",
            &["10.0.0.0/8", "10.1.2.0/24", "10.1.2.3/32", "203.0.113.5/32"],
            &["10.1.0.0/16", "10.1.2.3/32"],
        ),
        guarded(11, "192.0.2.4:5001", &[], &["10.0.0.0/14", "10.3.3.3/32", "202.0.0.0/7"]),
        guarded(12, "[2001:db8::4]:5000", &["2001:db8::/32", "fe80::/10"], &["2001:db8:5:0:0:0:0:2/127"]),
        limited(13, "192.0.2.4:5002", 24),
        limited(14, "[2001:db8::4]:5002", 64),
        listener(15, "239.1.2.3:5000", receiver_beside("0")),
        listener(16, "[ff05::1:3]:5000", receiver_beside("[")),
        listener(17, "239.1.2.3:5001", vec![target("192.0.2.9:7000", Delivery::Local)]),
        replicating(18, "192.0.2.5:5000"),
        replicating(19, "239.1.2.3:5002"),
        replicating(20, "[2001:db8::5]:5000"),
    ]
}

/// A listener with a downstream of every kind. Where the turn of those without a copy is shows by the order of the others.
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

/// A listener that not everybody may send to. One of its receivers is behind a narrow link.
fn guarded(id: u32, bind: &str, allow: &[&str], deny: &[&str]) -> ListenerPlan {
    let prefixes = |texts: &[&str]| texts.iter().map(|text| Prefix::parse(text).unwrap()).collect();
    let mut plan = listener(id, bind, receiver_beside(bind));
    plan.sources = SourceRules { allow: prefixes(allow), deny: prefixes(deny) }.into();
    plan
}

/// A listener whose senders may send so much and then no more for as long as the test runs.
fn limited(id: u32, bind: &str, prefix: u8) -> ListenerPlan {
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

/// A listener whose table is long and has no pattern a wrong index could hide in.
fn hashing(id: u32, bind: &str, policy: Policy) -> ListenerPlan {
    let address =
        |i: u32| if bind.starts_with('[') { format!("[2001:db8:9::{i:x}]:7000") } else { format!("10.9.0.{i}:7000") };
    let next_hop = |i: u32| if bind.starts_with('[') { format!("fe80::{i:x}") } else { format!("198.51.100.{i}") };
    let way = |i: u32| if i.is_multiple_of(3) { via(&next_hop(i), 1500) } else { pod(&next_hop(i), 1500) };
    let mut plan = listener(id, bind, (1..=31).map(|i| target(&address(i), way(i))).collect());
    // A round must show by its first datagram where it started, so each downstream stands in it once.
    let places = if policy == Policy::GelfMessage { 31 } else { 997 };
    plan.table = (0..places).map(|i| if places == 31 { i } else { i * i % 31 }).collect();
    plan.policy = policy;
    plan
}

/// Listeners of the plan above.
const LISTENERS: usize = 21;

/// Sets the time to live of a frame.
pub fn set_ttl(frame: &mut [u8], ttl: u8) {
    if frame[12..14] == [0x86, 0xdd] {
        frame[21] = ttl;
    } else {
        frame[22] = ttl;
        mend(frame);
    }
}

/// Makes the checksum of an IPv4 header right.
pub fn mend(frame: &mut [u8]) {
    frame[24..26].fill(0);
    let header = (14 + usize::from(frame[14] & 15) * 4).clamp(34, frame.len());
    let check = !sum(&frame[14..header], 0);
    frame[24..26].copy_from_slice(&check.to_be_bytes());
}

/// One's complement has two zeros; everything else must be equal to the letter.
fn same(a: &[u8], b: &[u8]) -> bool {
    let zero = |bytes: &[u8], at: usize| matches!(bytes.get(at..at + 2), Some([0, 0] | [0xff, 0xff]));
    a.len() == b.len()
        && a.iter().zip(b).enumerate().all(|(i, (x, y))| {
            let word = i & !1;
            x == y || (word == 24 && zero(a, 24) && zero(b, 24))
        })
}

/// What the books must say.
#[derive(Debug, Default, PartialEq)]
struct Books {
    listeners: [[u64; 6]; LISTENERS],
    /// Copies that no route leads to.
    unreachable: [u64; LISTENERS],
    /// Of each listener's downstreams: datagrams and bytes. Those that had none are left out.
    downstreams: BTreeMap<(u32, SocketAddr), [u64; 2]>,
    strays: u64,
    lost: u64,
}

impl Books {
    fn of(program: &mut Program, fragments: &MapHandle) -> Books {
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
        Books { listeners, unreachable, downstreams, strays, lost }
    }
}

/// A program and its oracle, from the same beginning.
pub struct Trial {
    pub program: Program,
    pub history: History,
    books: Books,
    /// Where the program counts fragments, and where it remembers single senders and datagrams.
    fragments: MapHandle,
    memory: [MapHandle; 2],
    clones: Clones,
}

/// What becomes of clones, which a test run does not show: they leave by a link, or come in again by the loopback device,
/// on which test runs happen.
struct Clones {
    out: Socket,
    reinjected: Socket,
}

impl Clones {
    /// The index of a link in the namespace of a trial that takes everything and passes on nothing.
    const LINK: u32 = 78;
    /// How long a clone is waited for. None takes that long.
    const PATIENCE: Duration = Duration::from_secs(10);

    fn capture() -> Clones {
        // Without IPv6 addresses on it, the kernel sends nothing of its own there.
        fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        ip("link set lo up");
        ip(&format!("link add clones index {} mtu 9000 type veth peer name sink mtu 9000", Self::LINK));
        ip("link set sink up");
        ip("link set clones up");
        Clones { out: packet_socket(Self::LINK), reinjected: packet_socket(1) }
    }

    /// Compares what has been captured with what must have been.
    fn check(&self, copies: &Copies, case: &str) {
        for (socket, expected, whereto) in
            [(&self.out, &copies.out, "out"), (&self.reinjected, &copies.reinjected, "in")]
        {
            for (nth, packet) in expected.iter().enumerate() {
                let got = receive(socket);
                assert!(
                    got.as_ref().is_some_and(|got| same(got, packet)),
                    "{case}\nclone {nth} {whereto}\nexpected {packet:02x?}\ngot      {got:02x?}"
                );
            }
        }
    }

    /// Nothing has been captured but what was expected.
    fn check_no_more(&self) {
        for socket in [&self.out, &self.reinjected] {
            socket.set_nonblocking(true).unwrap();
            assert_eq!(receive(socket), None);
            socket.set_nonblocking(false).unwrap();
        }
    }
}

/// A socket that gets every packet of a link of the thread's namespace.
fn packet_socket(link: u32) -> Socket {
    let every = (libc::ETH_P_ALL as u16).to_be();
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(i32::from(every)))).unwrap();
    // SAFETY: a C struct of integers, for which zero is a value; it is no longer than the storage.
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

impl Trial {
    /// Loads the program, with memory for fragments that forgets nothing.
    pub fn begin() -> Trial {
        let mut program = Program::load_with(plan(), |setup| setup.fragment_timeout = Duration::from_secs(24 * 3600));
        let clones = Clones::capture();
        let history = settle_rounds(&program, &clones);
        let fragments = program.map("FRAGMENT_STAT");
        let books = Books::of(&mut program, &fragments);
        let memory = ["fragments", "buckets"].map(|name| program.map(name));
        Trial { program, history, books, fragments, memory, clones }
    }

    /// Asks both about a frame; `case` says which it is, should they differ.
    pub fn frame(&mut self, bytes: &[u8], gso: Gso, case: &str) {
        // A test run's packet has no type of offload, without which a link does not send what is to be cut up.
        let gso = if is_replicated(&self.program.plan, bytes) { Gso::default() } else { gso };
        let fate = fate(&self.program.plan, &mut self.history, bytes, gso);
        let ran = self.program.run(bytes, gso);
        let (verdict, packet) = match &fate {
            Fate::Foreign | Fate::Passed { .. } => (UNSPEC, bytes),
            Fate::Dropped { .. } => (SHOT, bytes),
            Fate::Forwarded { verdict, packet, .. } | Fate::Fragment { verdict, packet, .. } => (*verdict, &packet[..]),
            Fate::Copied { copies, .. } => last_copy(copies, &ran.packet),
        };
        let agree =
            ran.verdict == verdict && same(&ran.packet[compared_from(&fate)..], &packet[compared_from(&fate)..]);
        assert!(agree, "{case}\nframe    {bytes:02x?} {gso:?}\nexpected {fate:02x?}\ngot      {ran:02x?}");
        if let Fate::Copied { copies, .. } = &fate {
            self.clones.check(copies, case);
        }
        book(&mut self.books, &fate);
    }

    /// Has both forget all senders and datagrams. Each round goes on where it is.
    pub fn forget(&mut self) {
        for map in &self.memory {
            for key in map.keys().collect::<Vec<_>>() {
                map.delete(&key).unwrap();
            }
        }
        self.history.incomplete.clear();
        self.history.spent.clear();
    }

    /// Compares all counters.
    pub fn audit(&mut self) {
        assert_eq!(Books::of(&mut self.program, &self.fragments), self.books);
        self.clones.check_no_more();
    }
}

/// The kernel starts each round somewhere random: one datagram shows where, and the oracle goes on from there.
fn settle_rounds(program: &Program, clones: &Clones) -> History {
    let mut history = History::default();
    let probes = [
        (9, Frame::new("203.0.113.5:4", "192.0.2.3:5003", b"x")),
        (0, Frame::new("203.0.113.5:4", "192.0.2.1:5000", b"x")),
        (1, Frame::new("[2001:db8:5::5]:4", "[2001:db8::1]:5000", b"x")),
    ];
    for (id, probe) in probes {
        let ran = program.run(&probe.bytes(), Gso::default());
        let places = program.plan.listeners[id as usize].table.len();
        let place = (0..places)
            .find(|&place| {
                let mut guess = History { rounds: [(id, place)].into(), ..History::default() };
                match fate(&program.plan, &mut guess, &probe.bytes(), Gso::default()) {
                    Fate::Forwarded { packet, .. } => same(&packet, &ran.packet),
                    Fate::Dropped { .. } => ran.verdict == SHOT,
                    _ => false,
                }
            })
            .expect("the first datagram went to none of the downstreams");
        history.rounds.insert(id, (place + 1) % places);
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
        let places = program.plan.listeners[id as usize].table.len();
        let place = (0..places)
            .find(|&place| {
                let mut guess = History { rounds: [(id, place)].into(), ..History::default() };
                match fate(&program.plan, &mut guess, &probe.bytes(), Gso::default()) {
                    Fate::Copied { copies, .. } => {
                        let shown = copies.last.is_some() == (ran.verdict == REDIRECT);
                        shown && copies.out == out && copies.reinjected == reinjected
                    }
                    _ => false,
                }
            })
            .unwrap_or_else(|| {
                panic!("listener {id}: no order of copies is {out:02x?}, {reinjected:02x?}, {ran:02x?}")
            });
        history.rounds.insert(id, (place + 1) % places);
    }
    history
}

/// The verdict on a packet that has been copied, and the packet.
fn last_copy<'a>(copies: &'a Copies, ran: &'a [u8]) -> (i32, &'a [u8]) {
    match &copies.last {
        Some(packet) => (REDIRECT, packet),
        // It is dropped, as the last copy before has left it.
        None => (SHOT, ran),
    }
}

/// Where a comparison begins: behind the addresses of a last copy's frame, which are the kernel's to write.
fn compared_from(fate: &Fate) -> usize {
    if matches!(fate, Fate::Copied { .. }) { 12 } else { 0 }
}

fn book(books: &mut Books, fate: &Fate) {
    let (id, row) = match fate {
        Fate::Copied { listener, datagrams, bytes, copies } => {
            for to in &copies.to {
                let downstream = books.downstreams.entry((*listener, *to)).or_default();
                downstream[0] += datagrams;
                downstream[1] += bytes;
            }
            books.unreachable[*listener as usize] += copies.unreachable * datagrams;
            (*listener, [*datagrams, *datagrams, 0, 0, *bytes, *bytes])
        }
        Fate::Foreign => return,
        Fate::Fragment { stray, lost, .. } => {
            books.strays += u64::from(*stray);
            books.lost += u64::from(*lost);
            return;
        }
        Fate::Passed { listener, datagrams, bytes } => (*listener, [*datagrams, 0, 0, *datagrams, *bytes, 0]),
        Fate::Dropped { listener, datagrams, bytes, .. } => (*listener, [*datagrams, 0, *datagrams, 0, *bytes, 0]),
        Fate::Forwarded { listener, datagrams, bytes, to, .. } => {
            let downstream = books.downstreams.entry((*listener, *to)).or_default();
            downstream[0] += datagrams;
            downstream[1] += bytes;
            (*listener, [*datagrams, *datagrams, 0, 0, *bytes, *bytes])
        }
    };
    for (total, n) in books.listeners[id as usize].iter_mut().zip(row) {
        *total += n;
    }
}
