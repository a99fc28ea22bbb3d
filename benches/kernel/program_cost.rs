//! The cost of the programs alone for each packet: test runs in the kernel (`BPF_PROG_TEST_RUN`) of 200 datagrams, of which the
//! fastest counts. On a machine that also runs other programs, the results are more stable than any rate.
//!
//! The downstreams are the listener itself, so that each forwarded datagram can be forwarded again, until its TTL ends.

use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use anyhow::{Context, Result, ensure};
use libbpf_rs::libbpf_sys;
use udp_fanout::testing::config::MapLimits;
use udp_fanout::testing::datapath::Datapath;
use udp_fanout::testing::datapath::kernel::{KernelDatapath, KernelSetup};
use udp_fanout::testing::plan::{Delivery, MacPair, Plan, PlanTarget};

use crate::paths;
use crate::pods::LISTENER;
use udp_fanout_testkit::kernel::packet::Frame;
use udp_fanout_testkit::kernel::run::{listener, target};

/// Datagrams in one test run: fewer than the maximum TTL.
const REPEAT: u32 = 200;
const RUNS: usize = 2_000;

/// A program and its cost per datagram, in nanoseconds.
pub fn costs() -> Result<Vec<(&'static str, f64)>> {
    let references = paths::references()?;
    let mut costs = Vec::new();
    for (name, reference) in [("floor: one pod, known", "floor_pod"), ("the obvious way", "obvious")] {
        let object = paths::load(&references, &[(LISTENER, 1, [2; 6], [2; 6])])?;
        let program = object.progs().find(|program| program.name() == reference).context(reference)?;
        costs.push((name, cost(program.as_fd(), "192.0.2.9:4000", LISTENER)?));
    }
    let v6 = "[2001:db8::1]:5514".parse()?;
    for (name, from, to, pods) in [
        ("udp-fanout, three pods", "192.0.2.9:4000", LISTENER, 3),
        ("udp-fanout, three pods, IPv6", "[2001:db8::9]:4000", v6, 3),
    ] {
        let datapath = ours(to, pods)?;
        costs.push((name, cost(datapath.program(), from, to)?));
    }
    Ok(costs)
}

fn ours(to: SocketAddr, pods: usize) -> Result<KernelDatapath> {
    let limits = MapLimits { max_listeners: 32, max_downstreams: 256, max_sources: 256, max_senders: 1_024 };
    let mut datapath = KernelDatapath::open(&KernelSetup::new(&limits))?;
    let macs = Some(MacPair { neighbour: [2, 0, 0, 0, 0, 7], own: [2, 0, 0, 0, 0, 1] });
    let delivery = Delivery::Neighbour { link: 1, next_hop: to.ip(), mtu: 1500, macs, into_pod: true };
    let targets: Vec<PlanTarget> = (0..pods).map(|_| target(&to.to_string(), delivery)).collect();
    datapath.apply(&Plan::from(vec![listener(0, &to.to_string(), targets)]))?;
    Ok(datapath)
}

fn cost(program: BorrowedFd<'_>, from: &str, to: SocketAddr) -> Result<f64> {
    let mut frame = Frame::new(from, &to.to_string(), &[b'x'; 100]);
    frame.ttl = 255;
    let packet = frame.bytes();
    let mut best = u32::MAX;
    for _ in 0..RUNS {
        // SAFETY: a C struct of integers and pointers, for which zero means "not given".
        let mut opts: libbpf_sys::bpf_test_run_opts = unsafe { std::mem::zeroed() };
        opts.sz = size_of_val(&opts) as _;
        opts.data_in = packet.as_ptr().cast();
        opts.data_size_in = u32::try_from(packet.len())?;
        opts.repeat = i32::try_from(REPEAT)?;
        // SAFETY: the packet lives across the call and has the length given.
        let error = unsafe { libbpf_sys::bpf_prog_test_run_opts(program.as_raw_fd(), &mut opts) };
        ensure!(error == 0, "test run failed: {}", std::io::Error::from_raw_os_error(-error));
        ensure!(opts.retval == 7, "the datagram is not redirected: {}", opts.retval);
        best = best.min(opts.duration);
    }
    Ok(f64::from(best))
}
