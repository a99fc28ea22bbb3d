//! Events about single datagrams: the first drop of each reason in an interval, for the log, and traced datagrams.
//!
//! The program writes [`DatagramEvent`]s to a ring buffer (`bpf/events.h`) whose descriptor becomes readable;
//! [`EventReader::drain`] empties it. A store into memory shared with the program switches tracing on and off; it
//! costs nothing while off. Kernels before 5.8 have no ring buffers and report no events; counters do not depend on
//! them.

use std::mem::{offset_of, size_of};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libbpf_rs::{RingBuffer, RingBufferBuilder};

use super::entries::{address_of, mapped_words};
use super::maps::MappedArray;
use super::skel::{LoadedProgram, types};
use crate::model::{DropReason, ListenerId};

/// `EVENT_LOGGED`.
const LOGGED: u32 = 1;
/// `EVENT_TRACED`.
const TRACED: u32 = 2;
/// `TRACE_ALL_LISTENERS`.
const ALL_LISTENERS: u32 = u32::MAX;

/// What became of a datagram (or super-packet), or of one copy of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DatagramEvent {
    /// When it was handled, by `CLOCK_MONOTONIC`.
    pub at: Duration,
    /// The listener that it was for.
    pub listener: ListenerId,
    /// Its source.
    pub source: SocketAddr,
    /// Its destination as it arrived.
    pub destination: SocketAddr,
    /// The chosen downstream, if any.
    pub downstream: Option<SocketAddr>,
    /// What became of it.
    pub outcome: DatagramOutcome,
    /// Index of the ingress interface.
    pub link: u32,
    /// Index of the egress interface; 0 for none.
    pub out_link: u32,
    /// Number of datagrams in the packet.
    pub datagrams: u32,
    /// UDP payload of all of them, in bytes.
    pub bytes: u32,
    /// For the log: the first of its kind in an interval. The value is the number of such datagrams on the same CPU
    /// that were not logged since the one before.
    pub logged: Option<u64>,
    /// It matches the trace filter.
    pub traced: bool,
}

/// What became of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DatagramOutcome {
    /// Sent to the downstream.
    Forwarded(DeliveryPath),
    /// Passed to the listener's socket.
    Passed,
    /// Dropped.
    Dropped(DropReason),
    /// One copy of a replicated datagram was sent to the downstream.
    Copied(DeliveryPath),
    /// One copy of a replicated datagram was dropped.
    CopyDropped(DropReason),
}

/// How a datagram was delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeliveryPath {
    /// Not delivered, or copied to all downstreams.
    None,
    /// To this host's own stack.
    Local,
    /// The kernel resolves the neighbour.
    Neighbour,
    /// Out of a device, to a neighbour already resolved.
    Known,
    /// Redirected into a pod's network namespace.
    Pod,
    /// Out of an L3 device.
    L3Device,
}

impl DeliveryPath {
    /// `enum delivery_path` of `bpf/fanout_abi.h`, in its order.
    pub const ALL: [DeliveryPath; 6] = [
        DeliveryPath::None,
        DeliveryPath::Local,
        DeliveryPath::Neighbour,
        DeliveryPath::Known,
        DeliveryPath::Pod,
        DeliveryPath::L3Device,
    ];

    /// The value of `way` in traces.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            DeliveryPath::None => "none",
            DeliveryPath::Local => "local",
            DeliveryPath::Neighbour => "neighbour",
            DeliveryPath::Known => "known",
            DeliveryPath::Pod => "pod",
            DeliveryPath::L3Device => "bare",
        }
    }
}

/// Which datagrams are traced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceFilter {
    /// This listener only; `None` for all.
    pub listener: Option<ListenerId>,
    /// Sources in this prefix only: an address and the number of leading bits, up to 32 or 128. `None` for all
    /// sources of both families.
    pub source: Option<(IpAddr, u8)>,
}

/// The user-space end of the ring buffer, and the trace filter.
pub struct EventReader {
    trace: MappedArray<types::trace_control>,
    ring: Option<EventRing>,
}

struct EventRing {
    ring: RingBuffer<'static>,
    received: Receiver<Option<DatagramEvent>>,
}

impl std::fmt::Debug for EventReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").field("ring", &self.ring.is_some()).finish_non_exhaustive()
    }
}

impl EventReader {
    /// Opens the ring buffer, if the program has one.
    ///
    /// # Errors
    /// When the kernel refuses to map it.
    pub fn new(loaded: &LoadedProgram) -> Result<EventReader> {
        let trace = MappedArray::new(&loaded.trace)?;
        let ring = loaded
            .events
            .as_ref()
            .map(|map| {
                let (sender, received) = mpsc::channel();
                let mut builder = RingBufferBuilder::new();
                // The receiver lives as long as the ring, so sending cannot fail.
                builder.add(map, move |bytes| {
                    let _ = sender.send(DatagramEvent::read(bytes));
                    0
                })?;
                Ok::<_, libbpf_rs::Error>(EventRing { ring: builder.build()?, received })
            })
            .transpose()
            .context("cannot open the TC program's ring buffer")?;
        Ok(EventReader { trace, ring })
    }

    /// A descriptor that is readable when there are events. It lives as long as `self`. `None` without a ring buffer.
    #[must_use]
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        let fd: RawFd = self.ring.as_ref()?.ring.epoll_fd();
        // SAFETY: the descriptor belongs to the ring, which lives at least as long as the borrow of `self`.
        Some(unsafe { BorrowedFd::borrow_raw(fd) })
    }

    /// All pending events.
    ///
    /// # Errors
    /// When the ring buffer cannot be read, or an event is malformed.
    pub fn drain(&mut self) -> Result<Vec<DatagramEvent>> {
        let Some(ring) = &self.ring else { return Ok(Vec::new()) };
        ring.ring.poll(Duration::ZERO).context("cannot read the TC program's ring buffer")?;
        ring.received.try_iter().collect::<Option<_>>().context("malformed event in the TC program's ring buffer")
    }

    /// Number of events lost because the ring buffer was full.
    #[must_use]
    pub fn lost(&self) -> u64 {
        // SAFETY: the field is aligned to 8, within the entry, and mapped as long as `self` lives.
        unsafe { AtomicU64::from_ptr(self.field(offset_of!(types::trace_control, lost)).cast()) }
            .load(Ordering::Relaxed)
    }

    /// Sets the trace filter, or stops tracing. While it changes, a few events may match neither the old nor the new
    /// filter.
    ///
    /// # Errors
    /// When the source is not a valid prefix, or there is no ring buffer.
    pub fn trace(&mut self, filter: Option<&TraceFilter>) -> Result<()> {
        self.store(offset_of!(types::trace_control, on), 0);
        let Some(filter) = filter else { return Ok(()) };
        ensure!(
            self.ring.is_some(),
            "this kernel has no BPF ring buffers, which tracing needs: use Linux 5.8 or later"
        );
        let listener = filter.listener.map_or(ALL_LISTENERS, |id| id.0);
        self.store(offset_of!(types::trace_control, listener), listener);
        let (source, mask) = filter.source.map_or(Ok(([0; 4], [0; 4])), prefix)?;
        for (index, (source, mask)) in source.into_iter().zip(mask).enumerate() {
            self.store(offset_of!(types::trace_control, source_be) + index * 4, source & mask);
            self.store(offset_of!(types::trace_control, mask_be) + index * 4, mask);
        }
        self.store(offset_of!(types::trace_control, on), 1);
        Ok(())
    }

    fn store(&mut self, offset: usize, value: u32) {
        // SAFETY: the field is aligned to 4, within the entry, and mapped as long as `self` lives.
        unsafe { AtomicU32::from_ptr(self.field(offset).cast()) }.store(value, Ordering::SeqCst);
    }

    fn field(&self, offset: usize) -> *mut u8 {
        assert!(offset < size_of::<types::trace_control>(), "a field of the entry");
        // SAFETY: within the mapped entry, by the assertion above.
        unsafe { self.trace.entry(0).as_ptr().add(offset) }
    }
}

/// Address and mask of a prefix in the maps' form: IPv4 as v4-mapped IPv6.
fn prefix((address, bits): (IpAddr, u8)) -> Result<([u32; 4], [u32; 4])> {
    let most = if address.is_ipv4() { 32 } else { 128 };
    ensure!(bits <= most, "{address}/{bits} is no prefix: it can have at most {most} bits");
    let bits = u32::from(bits) + 128 - u32::from(most);
    let mask = Ipv6Addr::from_bits(u128::MAX.checked_shl(128 - bits).unwrap_or(0));
    Ok((mapped_words(address), mapped_words(mask.into())))
}

impl DatagramEvent {
    /// Parses a record of the ring buffer. `None` if it is malformed.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Option<DatagramEvent> {
        if bytes.len() < size_of::<types::event>() {
            return None;
        }
        // SAFETY: a C struct of integers, for which every bit pattern is valid; there are enough bytes, and reading
        // needs no alignment.
        let event: types::event = unsafe { bytes.as_ptr().cast::<types::event>().read_unaligned() };
        let reason = DropReason::ALL.get(event.reason as usize).copied()?;
        let path = DeliveryPath::ALL.get(usize::from(event.path)).copied()?;
        let outcome = match event.kind {
            0 => DatagramOutcome::Forwarded(path),
            1 => DatagramOutcome::Passed,
            2 => DatagramOutcome::Dropped(reason),
            3 => DatagramOutcome::Copied(path),
            4 => DatagramOutcome::CopyDropped(reason),
            _ => return None,
        };
        let chosen = event.to_port_be != 0;
        Some(DatagramEvent {
            at: Duration::from_nanos(event.time),
            listener: ListenerId(event.listener),
            source: address_of(event.src_be, event.sport_be),
            destination: address_of(event.dst_be, event.dport_be),
            downstream: chosen.then(|| address_of(event.to_be, event.to_port_be)),
            outcome,
            link: event.ifindex,
            out_link: event.out_ifindex,
            datagrams: event.datagrams,
            bytes: event.bytes,
            logged: (event.flags & LOGGED != 0).then_some(event.suppressed),
            traced: event.flags & TRACED != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_compared_as_the_program_keeps_addresses() {
        let (source, mask) = prefix(("10.1.0.0".parse().unwrap(), 16)).unwrap();
        assert_eq!(source, mapped_words("10.1.0.0".parse().unwrap()));
        assert_eq!(mask, [u32::MAX, u32::MAX, u32::MAX, u32::from_be(0xffff_0000)]);
        assert_eq!(prefix(("::".parse().unwrap(), 0)).unwrap().1, [0; 4]);
        assert_eq!(prefix(("::1".parse().unwrap(), 128)).unwrap().1, [u32::MAX; 4]);
        let refusal = prefix(("10.0.0.0".parse().unwrap(), 33)).unwrap_err().to_string();
        assert_eq!(refusal, "10.0.0.0/33 is no prefix: it can have at most 32 bits");
    }

    fn header_name(path: DeliveryPath) -> String {
        match path {
            DeliveryPath::L3Device => "L3_DEVICE".to_owned(),
            path => path.name().to_uppercase(),
        }
    }

    #[test]
    fn the_header_numbers_kinds_and_paths_likewise() {
        let header = include_str!("../../../bpf/fanout_abi.h");
        let words = header.split_whitespace().collect::<Vec<_>>().join(" ");
        let has = |name: &str, number: usize| {
            let line = format!(" {name} = {number},");
            assert!(words.contains(&line), "{line}");
        };
        for (number, path) in DeliveryPath::ALL.iter().enumerate() {
            has(&format!("PATH_{}", header_name(*path)), number);
        }
        let kinds = ["EVENT_FORWARDED", "EVENT_PASSED", "EVENT_DROPPED", "EVENT_COPIED", "EVENT_COPY_DROPPED"];
        for (number, kind) in kinds.into_iter().enumerate() {
            has(kind, number);
        }
        has("EVENT_LOGGED", LOGGED as usize);
        has("EVENT_TRACED", TRACED as usize);
        assert!(header.contains("TRACE_ALL_LISTENERS 0xffffffff"));
    }

    #[test]
    fn what_makes_no_sense_is_no_event() {
        assert_eq!(DatagramEvent::read(&[0; 8]), None);
        let mut bytes = vec![0; size_of::<types::event>()];
        assert!(DatagramEvent::read(&bytes).is_some());
        bytes[offset_of!(types::event, kind)] = 9;
        assert_eq!(DatagramEvent::read(&bytes), None);
    }
}
