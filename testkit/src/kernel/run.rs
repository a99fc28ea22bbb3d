//! Loads the production program with listeners of every kind and runs packets through it.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use libbpf_rs::{MapCore, MapFlags, MapHandle, libbpf_sys};
use udp_fanout::testing::config::{MapLimits, UserspaceSettings};
use udp_fanout::testing::datapath::Datapath;
use udp_fanout::testing::datapath::kernel::skel::types::__sk_buff;
use udp_fanout::testing::datapath::kernel::{KernelDatapath, KernelSetup};
use udp_fanout::testing::model::{Downstream, ListenerId, Mode, Policy};
use udp_fanout::testing::plan::{Delivery, ListenerPlan, MacPair, Plan, PlanTarget};

/// The production datapath, not attached to any interface.
pub struct Program {
    pub datapath: KernelDatapath,
    pub plan: Plan,
}

/// The result of a test run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    pub verdict: i32,
    pub packet: Vec<u8>,
}

/// Offload fields of the skb.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Gso {
    pub size: u32,
    pub segments: u32,
}

impl Program {
    pub fn load(listeners: Vec<ListenerPlan>) -> Program {
        Self::load_with(listeners, |_| ())
    }

    /// As [`Program::load`], with a changed setup, such as that of an older kernel.
    pub fn load_with(listeners: Vec<ListenerPlan>, change: impl FnOnce(&mut KernelSetup)) -> Program {
        // Round-robin cursors are per CPU, so the whole test runs on one CPU.
        let mut here = nix::sched::CpuSet::new();
        here.set(0).unwrap();
        nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &here).unwrap();
        // A separate namespace, without the host's routes and neighbours.
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let limits = MapLimits { max_listeners: 32, max_downstreams: 256, max_sources: 256, max_senders: 1_024 };
        let mut setup = KernelSetup::new(&limits);
        change(&mut setup);
        let mut datapath = KernelDatapath::open(&setup).expect("cannot load the TC program: these tests need root");
        let plan = Plan::from(listeners);
        datapath.apply(&plan).unwrap();
        Program { datapath, plan }
    }

    pub fn apply(&mut self, listeners: Vec<ListenerPlan>) {
        self.plan = Plan::from(listeners);
        self.datapath.apply(&self.plan).unwrap();
    }

    pub fn run(&self, packet: &[u8], gso: Gso) -> Ran {
        run(self.datapath.program(), packet, gso)
    }

    /// Runs a packet after `write` has set fields of its skb, such as the mark.
    pub fn run_as(&self, packet: &[u8], write: impl FnOnce(&mut __sk_buff)) -> Ran {
        run_with(self.datapath.program(), packet, write)
    }

    /// A handle to run packets from another thread while the plan changes.
    pub fn runner(&self) -> Runner {
        Runner(self.datapath.program().try_clone_to_owned().unwrap())
    }

    /// The program's map of this name.
    pub fn map(&self, name: &str) -> MapHandle {
        maps_of(self.datapath.program()).find(|map| map.name() == name).expect("a map of this name")
    }

    /// Raw counters of a listener: packets received, forwarded, dropped, passed; bytes received, forwarded.
    pub fn stats(&self, id: u32) -> [u64; 6] {
        let mut sum = [0; 6];
        for cpu in self.map("STATS").lookup_percpu(&id.to_ne_bytes(), MapFlags::ANY).unwrap().unwrap() {
            for (total, word) in sum.iter_mut().zip(cpu.chunks_exact(8)) {
                *total += u64::from_ne_bytes(word.try_into().unwrap());
            }
        }
        sum
    }

    /// Runs packets in order.
    pub fn run_all(&self, frames: &[Vec<u8>]) -> Vec<Ran> {
        frames.iter().map(|frame| self.run(frame, Gso::default())).collect()
    }

    /// Stray fragments and lost fragments.
    pub fn fragments(&mut self) -> (u64, u64) {
        let fragments = self.datapath.counters().unwrap().fragments;
        (fragments.strays, fragments.lost)
    }

    /// Drops of a listener by reason, zeros left out.
    pub fn drops(&mut self, id: u32) -> BTreeMap<&'static str, u64> {
        let counters = self.datapath.counters().unwrap();
        let dropped = counters.listeners[&ListenerId(id)].dropped;
        dropped.iter().filter(|(_, n)| *n > 0).map(|(reason, n)| (reason.label(), n)).collect()
    }
}

/// The maps of a loaded program.
fn maps_of(program: BorrowedFd<'_>) -> impl Iterator<Item = MapHandle> {
    let mut ids = [0u32; 64];
    let mut info = libbpf_sys::bpf_prog_info {
        nr_map_ids: ids.len() as u32,
        map_ids: ids.as_mut_ptr() as u64,
        ..Default::default()
    };
    let mut length = size_of_val(&info) as u32;
    // SAFETY: `info` lives across the call and has the length given; the array it names has as many entries as it says.
    let err = unsafe { libbpf_sys::bpf_prog_get_info_by_fd(program.as_raw_fd(), &raw mut info, &raw mut length) };
    assert_eq!(err, 0, "cannot list the program's maps: {}", std::io::Error::last_os_error());
    ids.into_iter().take(info.nr_map_ids as usize).map(|id| MapHandle::from_map_id(id).unwrap())
}

/// A file descriptor of the program, to run packets from any thread.
pub struct Runner(OwnedFd);

/// A thread that repeats an action with a [`Runner`].
pub struct Meanwhile {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Meanwhile {
    /// Stops the thread and returns the number of repetitions.
    pub fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

impl Runner {
    /// Repeats `once` on a new thread while the test continues.
    pub fn meanwhile(self, once: impl Fn(&Runner) + Send + 'static) -> Meanwhile {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            // Any CPU: in parallel with the test where the machine has more than one.
            let mut anywhere = nix::sched::CpuSet::new();
            (0..nix::sched::CpuSet::count()).for_each(|cpu| anywhere.set(cpu).unwrap());
            nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &anywhere).unwrap();
            let mut done = 0;
            while !stopped.load(Ordering::Relaxed) {
                once(&self);
                done += 1;
            }
            done
        });
        Meanwhile { stop, thread }
    }

    pub fn run(&self, packet: &[u8], gso: Gso) -> Ran {
        run(self.0.as_fd(), packet, gso)
    }
}

fn run(program: BorrowedFd<'_>, packet: &[u8], gso: Gso) -> Ran {
    run_with(program, packet, |context| (context.gso_size, context.gso_segs) = (gso.size, gso.segments))
}

fn run_with(program: BorrowedFd<'_>, packet: &[u8], write: impl FnOnce(&mut __sk_buff)) -> Ran {
    // SAFETY: a C struct of integers and pointers. The kernel requires zeros in every byte that is not set, padding too.
    let mut context: __sk_buff = unsafe { std::mem::zeroed() };
    write(&mut context);
    let mut out = vec![0u8; packet.len() + 64];
    // SAFETY: a C struct of integers and pointers, for which zero means "not given".
    let mut opts: libbpf_sys::bpf_test_run_opts = unsafe { std::mem::zeroed() };
    opts.sz = size_of_val(&opts) as _;
    opts.data_in = packet.as_ptr().cast();
    opts.data_size_in = packet.len() as u32;
    opts.data_out = out.as_mut_ptr().cast();
    opts.data_size_out = out.len() as u32;
    opts.ctx_in = std::ptr::from_mut(&mut context).cast();
    opts.ctx_size_in = size_of_val(&context) as u32;
    opts.repeat = 1;
    // SAFETY: all buffers live across the call and have the sizes given.
    let err = unsafe { libbpf_sys::bpf_prog_test_run_opts(program.as_raw_fd(), &mut opts) };
    assert_eq!(err, 0, "test run failed: {}", std::io::Error::from_raw_os_error(-err));
    out.truncate(opts.data_size_out as usize);
    Ran { verdict: opts.retval as i32, packet: out }
}

/// A listener in tc_ebpf mode without interfaces; its table has one slot for each target, in order.
pub fn listener(id: u32, bind: &str, targets: Vec<PlanTarget>) -> ListenerPlan {
    let bind: SocketAddr = bind.parse().unwrap();
    ListenerPlan {
        id: ListenerId(id),
        name: format!("listener-{id}").into(),
        mode: Mode::TcEbpf,
        bind,
        match_addresses: vec![bind.ip()],
        links: Vec::new(),
        l3_ingress: Vec::new(),
        joins: Vec::new(),
        policy: Policy::RoundRobin,
        sources: Arc::default(),
        meter: None,
        socket_only: None,
        table: (0..targets.len() as u32).collect(),
        targets: targets.into(),
        settings: UserspaceSettings::default(),
    }
}

pub fn target(address: &str, delivery: Delivery) -> PlanTarget {
    PlanTarget {
        downstream: Downstream {
            name: address.into(),
            address: address.parse().unwrap(),
            weight: 1,
            sample: Downstream::ALL,
        },
        delivery,
    }
}

/// By interface 77, which need not exist: a test run does not execute redirects.
pub fn via(next_hop: &str, mtu: u32) -> Delivery {
    let next_hop = next_hop.parse::<IpAddr>().unwrap();
    Delivery::Neighbour { link: 77, next_hop, mtu, macs: None, into_pod: false }
}

/// The same, into a pod with a known MAC address, which every frame to it gets.
pub fn pod(next_hop: &str, mtu: u32) -> Delivery {
    let next_hop = next_hop.parse::<IpAddr>().unwrap();
    let last = match next_hop {
        IpAddr::V4(v4) => v4.octets()[3],
        IpAddr::V6(v6) => v6.octets()[15],
    };
    let macs = Some(MacPair { neighbour: [2, 0, 0, 0, 0, last], own: [2, 0, 0, 0, 0, 1] });
    Delivery::Neighbour { link: 77, next_hop, mtu, macs, into_pod: true }
}

impl Program {
    /// Dropped copies of a listener's datagrams, by reason.
    pub fn copies_dropped(&mut self, id: u32) -> udp_fanout::testing::model::Drops {
        self.datapath
            .counters()
            .unwrap()
            .listeners
            .get(&ListenerId(id))
            .map(|counted| counted.copies_dropped)
            .unwrap_or_default()
    }

    pub fn datapath_counters(
        &mut self,
    ) -> BTreeMap<(ListenerId, SocketAddr), udp_fanout::testing::model::DownstreamCounters> {
        self.datapath.counters().unwrap().downstreams
    }
}
