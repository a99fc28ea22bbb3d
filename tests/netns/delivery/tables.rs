//! A listener's table changes a thousand times under full load, in each mode: a datapath reads one
//! whole table or the next, and never a slot that another table has reused.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use anyhow::Result;
use udp_fanout::testing::config::{Config, ListenerConfig};
use udp_fanout::testing::datapath::Datapath;
use udp_fanout::testing::datapath::kernel::KernelDatapath;
use udp_fanout::testing::datapath::user::UserDatapath;
use udp_fanout::testing::host::{HostFacts, HostNetwork, NextHopTracking};
use udp_fanout::testing::model::{Downstream, HashOn, ListenerId, Mode, Policy};
use udp_fanout::testing::plan::compile::compile;
use udp_fanout::testing::plan::{ListenerPlan, Plan};

use udp_fanout_lab::traffic::PATIENCE;
use udp_fanout_lab::{Collectors, DaemonConfig, Expect, Lab, Place, Sender};

const CHANGES: usize = 1_000;
/// Minimum number of datagrams between two changes.
const BETWEEN: u64 = 150;

/// Each receiver's two addresses, which lead to the same socket.
type Addresses = Vec<[SocketAddr; 2]>;

fn lab() -> (Lab, Addresses) {
    let places = [Place::OtherInterface, Place::Pod, Place::OtherInterface, Place::Pod];
    let lab = Lab::builder().receivers(places).build().unwrap();
    let second = |site: &udp_fanout_lab::Site, number: usize| {
        let (place, inside) = (site.place, lab.namespace_of(site));
        let IpAddr::V4(first) = site.address.ip() else { panic!("an IPv4 lab") };
        let mut octets = first.octets();
        if place == Place::Pod {
            octets[2] = 1;
            let address = IpAddr::from(octets);
            inside.ip(&format!("addr add {address}/32 dev eth0")).unwrap();
            lab.gateway.ip(&format!("route add {address}/32 dev pod{number}")).unwrap();
        } else {
            octets[3] = 9;
            inside.ip(&format!("addr add {}/24 dev eth0", IpAddr::from(octets))).unwrap();
        }
        [site.address, SocketAddr::new(octets.into(), site.address.port())]
    };
    let addresses = lab.sites.iter().zip(1..).map(|(site, number)| second(site, number)).collect();
    (lab, addresses)
}

fn collect(lab: &Lab, expect: Expect) -> Collectors {
    let any = |site: &udp_fanout_lab::Site| SocketAddr::from(([0, 0, 0, 0], site.address.port()));
    let places = lab.sites.iter().map(|site| (site.name.as_str(), lab.namespace_of(site), any(site)));
    Collectors::start_at(places, expect).unwrap()
}

/// A datapath with one listener and no daemon around it.
struct DatapathOnly {
    datapath: Box<dyn Datapath>,
    mode: Mode,
    listener: ListenerConfig,
    facts: HostFacts,
    before: Option<ListenerPlan>,
}

impl DatapathOnly {
    fn open(mode: Mode, lab: &Lab, addresses: &Addresses) -> Result<DatapathOnly> {
        let text = DaemonConfig::for_lab(lab, "tc_ebpf").to_toml() + "[limits]\nmax_downstreams = 16\n";
        let config = Config::parse(&text, Path::new("c.toml"))?;
        let mut host = HostNetwork::open()?;
        host.track_next_hops(NextHopTracking::ResolvePods);
        let facts = host.facts(&addresses.iter().flatten().map(SocketAddr::ip).collect())?;
        let datapath: Box<dyn Datapath> = match mode {
            Mode::TcEbpf => Box::new(KernelDatapath::new(&config.limits)?),
            Mode::Userspace => Box::new(UserDatapath::new()),
        };
        Ok(DatapathOnly { datapath, mode, listener: config.listeners[0].clone(), facts, before: None })
    }

    fn apply(&mut self, policy: Policy, downstreams: Vec<Downstream>) -> Result<()> {
        self.listener.policy = policy;
        let plan = compile(&self.listener, &downstreams, self.mode, &self.facts, self.before.as_ref());
        self.before = Some(plan.clone());
        self.datapath.apply(&Plan::from(vec![plan]))
    }

    /// Received and forwarded datagrams, and the sum of all other counters, once `received` have been counted. A worker
    /// counts a batch a moment after it has arrived.
    fn counts(&mut self, received: u64) -> Result<[u64; 3]> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let counters = self.datapath.counters()?;
            let of = counters.listeners[&ListenerId(0)];
            if of.packets_received >= received || Instant::now() > deadline {
                let others = of.packets_passed + of.dropped.total() + of.copies_dropped.total();
                return Ok([of.packets_received, of.packets_forwarded, others]);
            }
        }
    }
}

/// A fixed pseudo-random sequence.
fn pseudo_random(n: usize) -> usize {
    (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) + n
}

/// The receivers in a different order for each change, each with one of its two addresses.
fn shuffled(addresses: &Addresses, change: usize) -> Vec<Downstream> {
    let bits = pseudo_random(change);
    let mut set: Vec<Downstream> = (0..addresses.len())
        .map(|index| Downstream {
            name: format!("r{index}").into(),
            address: addresses[index][bits >> index & 1],
            weight: 1 + (bits >> (4 + index) & 3) as u32,
            sample: Downstream::ALL,
        })
        .collect();
    set.rotate_left(bits % 4);
    if bits & 256 != 0 {
        set.swap(0, 2);
    }
    set
}

/// Makes the changes while numbered datagrams flow. Each must arrive as often as expected, through the datapath.
fn change_under_load(mode: Mode, expect: Expect, set: impl Fn(&Addresses, usize) -> (Policy, Vec<Downstream>) + Send) {
    let (lab, addresses) = lab();
    let collectors = collect(&lab, expect);
    let mut sender = Sender::in_lab(&lab).unwrap();
    let (ready, done) = (AtomicBool::new(false), AtomicBool::new(false));
    let copies = if expect == Expect::EachOfThem { addresses.len() as u64 } else { 1 };
    let (through, all_through) = mpsc::channel::<()>();
    let (reaches, begins, ends, networks) = (&collectors, &ready, &done, &lab);
    let changes = move || -> Result<[u64; 3]> {
        let _stops = SetOnDrop(ends);
        let _starts = SetOnDrop(begins);
        let mut datapath = DatapathOnly::open(mode, networks, &addresses)?;
        for change in 0..CHANGES {
            let (policy, downstreams) = set(&addresses, change);
            datapath.apply(policy, downstreams)?;
            begins.store(true, Ordering::SeqCst);
            let arrived = reaches.progress().now().1;
            anyhow::ensure!(reaches.wait_for(arrived + BETWEEN * copies, PATIENCE), "datagrams no longer arrive");
        }
        ends.store(true, Ordering::SeqCst);
        // The datapath stays until the last datagram has arrived, when the other end of this channel is dropped.
        let _ = all_through.recv();
        datapath.counts(reaches.progress().now().0)
    };
    let counts = thread::scope(|scope| {
        let changing = scope.spawn(move || networks.gateway.run(changes));
        while !ready.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        while !done.load(Ordering::SeqCst) {
            sender.send(500, &collectors).unwrap();
        }
        drop(through);
        changing.join().unwrap().unwrap()
    });
    let report = collectors.finish(&[&sender]).unwrap();
    assert!(report.is_complete(), "{report}");
    assert_eq!(counts, [sender.sent(), sender.sent(), 0], "{report}");
    assert!(sender.sent() >= BETWEEN * CHANGES as u64);
}

/// Sets the flag when dropped, also on a panic.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn to_one(addresses: &Addresses, change: usize) -> (Policy, Vec<Downstream>) {
    let mut set = shuffled(addresses, change);
    // From one receiver to all of them, by round robin and by hash.
    set.truncate(1 + pseudo_random(change) / 512 % 4);
    let policy = if change.is_multiple_of(3) { Policy::Hash(HashOn::SourceIp) } else { Policy::RoundRobin };
    (policy, set)
}

fn to_each(addresses: &Addresses, change: usize) -> (Policy, Vec<Downstream>) {
    (Policy::Replicate, shuffled(addresses, change))
}

#[test]
fn netns_a_thousand_changes_in_the_kernel_lose_and_double_nothing() {
    change_under_load(Mode::TcEbpf, Expect::OneOfThem, to_one);
}

#[test]
fn netns_a_thousand_changes_in_the_kernel_lose_and_double_no_copy() {
    change_under_load(Mode::TcEbpf, Expect::EachOfThem, to_each);
}

#[test]
fn netns_a_thousand_changes_in_user_space_lose_and_double_nothing() {
    change_under_load(Mode::Userspace, Expect::OneOfThem, to_one);
}

#[test]
fn netns_a_thousand_changes_in_user_space_lose_and_double_no_copy() {
    change_under_load(Mode::Userspace, Expect::EachOfThem, to_each);
}
