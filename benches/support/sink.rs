//! The receiving end: a TC program that counts datagrams and drops them, and what it has counted.
//!
//! One program stands for any number of receivers, which differ in the last two bytes of their addresses. 0 is not used.

use std::cell::Cell;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use libbpf_rs::{MapCore, MapFlags, MapHandle, Object, TC_INGRESS, TcHookBuilder};

use super::programs;
use udp_fanout_lab::Namespace;

/// How long nothing may arrive before a run counts as over.
const QUIET: Duration = Duration::from_millis(30);
/// Timeout of that wait.
const PATIENCE: Duration = Duration::from_secs(3);
/// As in `sink.bpf.c`.
const BUCKET_BITS: u32 = 5;
const BUCKETS: u32 = 1280;
const RECEIVERS: u32 = 65_536;
const SEEN_WORDS: u32 = 1 << 20;

/// What the sink inspects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Counts datagrams only, which takes the least CPU time.
    Count,
    /// Also numbers and times: duplicates, order, latency. `copies` is how many receivers get a copy of each datagram,
    /// 1 if one of them gets it.
    Inspect {
        /// At least 1.
        copies: u32,
    },
}

/// What has arrived since the last reset.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Arrived {
    /// Datagrams.
    pub datagrams: u64,
    /// Bytes of UDP payload.
    pub bytes: u64,
    /// Datagrams that had arrived before; under replication, at the same receiver.
    pub duplicated: u64,
    /// Datagrams with a lower number than the one before at the same receiver.
    pub reordered: u64,
}

/// A program on the ingress of an interface.
pub struct Sink {
    object: Object,
    port: u16,
    stamp_at: Cell<u16>,
    inspecting: Cell<bool>,
}

impl Sink {
    /// Attaches a sink for datagrams to this port to an interface of a namespace. It is removed with the namespace.
    ///
    /// # Errors
    /// When the program cannot be compiled, loaded or attached.
    pub fn attach(namespace: &Namespace, device: &str, port: u16) -> Result<Sink> {
        let object = programs::load(Path::new("benches/support/sink.bpf.c"))?;
        let index = i32::try_from(namespace.link(device)?.index)?;
        let program = object
            .progs()
            .find(|program| program.name() == "sink")
            .context("the object file has no program named sink")?;
        let program = program.as_fd();
        namespace.run(|| {
            let mut builder = TcHookBuilder::new(program);
            let mut hook = builder.ifindex(index).replace(true).handle(1).priority(1).hook(TC_INGRESS);
            hook.create().and_then(|mut hook| hook.attach()).context("cannot attach the sink")?;
            Ok(())
        })?;
        let sink = Sink { object, port, stamp_at: Cell::new(0), inspecting: Cell::new(true) };
        sink.reset()?;
        sink.look(Look::Count)?;
        Ok(sink)
    }

    /// Sets the number of payload bytes before the number and the time, from the next [`Sink::look`] on.
    pub fn stamps_at(&self, offset: u16) {
        self.stamp_at.set(offset);
    }

    /// Sets what to inspect from now on.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn look(&self, look: Look) -> Result<()> {
        let (inspect, copies) = match look {
            Look::Count => (0u32, 1),
            Look::Inspect { copies } => (1, copies),
        };
        let mut value = [0u8; 16];
        value[0..4].copy_from_slice(&inspect.to_ne_bytes());
        value[4..8].copy_from_slice(&copies.to_ne_bytes());
        value[8..10].copy_from_slice(&self.port.to_be_bytes());
        value[10..12].copy_from_slice(&self.stamp_at.get().to_ne_bytes());
        self.inspecting.set(inspect == 1);
        self.map("settings")?.update(&0u32.to_ne_bytes(), &value, MapFlags::ANY)?;
        Ok(())
    }

    /// Resets all counts.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn reset(&self) -> Result<()> {
        let cpus = libbpf_rs::num_possible_cpus()?;
        self.map("totals")?.update_percpu(&0u32.to_ne_bytes(), &vec![vec![0; 32]; cpus], MapFlags::ANY)?;
        let zeroes = vec![vec![0; 8]; cpus];
        for (name, entries) in
            [("latencies", BUCKETS), ("receivers", 2048)].into_iter().skip(usize::from(!self.inspecting.get()))
        {
            let map = self.map(name)?;
            (0..entries).try_for_each(|key| map.update_percpu(&key.to_ne_bytes(), &zeroes, MapFlags::ANY))?;
        }
        if !self.inspecting.get() {
            // Megabytes that have not been written to.
            return Ok(());
        }
        for (name, entries) in [("seen", SEEN_WORDS), ("newest", RECEIVERS)] {
            clear(&self.map(name)?, entries)?;
        }
        Ok(())
    }

    /// The counts since the last reset.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn arrived(&self) -> Result<Arrived> {
        let values = self.map("totals")?.lookup_percpu(&0u32.to_ne_bytes(), MapFlags::ANY)?;
        let mut sum = [0u64; 4];
        for value in values.unwrap_or_default() {
            sum.iter_mut().zip(value.chunks_exact(8)).for_each(|(sum, bytes)| *sum += number(bytes));
        }
        let [datagrams, bytes, duplicated, reordered] = sum;
        Ok(Arrived { datagrams, bytes, duplicated, reordered })
    }

    /// Waits until nothing more arrives, or until this many datagrams have, and returns the counts.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn settle(&self, expected: u64) -> Result<Arrived> {
        let start = Instant::now();
        let mut last = self.arrived()?;
        let mut since = Instant::now();
        while last.datagrams < expected && since.elapsed() < QUIET && start.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(2));
            let now = self.arrived()?;
            if now != last {
                (last, since) = (now, Instant::now());
            }
        }
        Ok(last)
    }

    /// Datagrams at each of the first receivers, from number 1 on.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn by_receiver(&self, receivers: u32) -> Result<Vec<u64>> {
        ensure!(receivers < 2048, "only the first 2,047 receivers are counted one by one");
        let map = self.map("receivers")?;
        (1..=receivers).map(|receiver| sum(&map, receiver)).collect()
    }

    /// The latencies of inspected datagrams.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn latencies(&self) -> Result<Latencies> {
        let map = self.map("latencies")?;
        Ok(Latencies { buckets: (0..BUCKETS).map(|bucket| sum(&map, bucket)).collect::<Result<_>>()? })
    }

    fn map(&self, name: &str) -> Result<MapHandle> {
        let map = self.object.maps().find(|map| map.name() == name);
        let map = map.ok_or_else(|| anyhow!("the sink has no map {name}"))?;
        Ok(MapHandle::try_from(&map)?)
    }
}

/// Latencies of datagrams.
#[derive(Debug, Clone, Default)]
pub struct Latencies {
    buckets: Vec<u64>,
}

impl Latencies {
    /// The latency that this share of the datagrams did not exceed, in nanoseconds, accurate to 3 per cent; none if
    /// nothing was inspected.
    pub fn quantile(&self, share: f64) -> Option<u64> {
        let total: u64 = self.buckets.iter().sum();
        let rank = (share * total as f64).ceil().max(1.0) as u64;
        let mut below = 0;
        let bucket = self.buckets.iter().position(|&count| {
            below += count;
            total > 0 && below >= rank
        })?;
        Some(middle(bucket as u32))
    }
}

/// The middle of a bucket's range.
fn middle(bucket: u32) -> u64 {
    let (power, rest) = (bucket >> BUCKET_BITS, u64::from(bucket & ((1 << BUCKET_BITS) - 1)));
    if power == 0 {
        return rest;
    }
    let width = 1u64 << (power - 1);
    ((rest | 1 << BUCKET_BITS) << (power - 1)) + width / 2
}

fn number(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_ne_bytes)
}

/// One entry of a map of numbers, summed over all CPUs.
fn sum(map: &MapHandle, key: u32) -> Result<u64> {
    let values = map.lookup_percpu(&key.to_ne_bytes(), MapFlags::ANY)?.unwrap_or_default();
    Ok(values.iter().map(|value| number(&value[..8])).sum())
}

/// Sets all entries of an array of numbers to zero.
fn clear(map: &MapHandle, entries: u32) -> Result<()> {
    let keys: Vec<u8> = (0..entries).flat_map(u32::to_ne_bytes).collect();
    let values = vec![0; entries as usize * 8];
    map.update_batch(&keys, &values, entries, MapFlags::ANY, MapFlags::ANY)?;
    Ok(())
}
