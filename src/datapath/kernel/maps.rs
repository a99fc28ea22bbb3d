//! Typed access to the program's maps: the mapped arrays, the destination keys, and waiting for the program.

use std::fmt;
use std::marker::PhantomData;
use std::mem::{offset_of, size_of};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use nix::sys::mman::{MapFlags as MmapFlags, ProtFlags, mmap, munmap};
use nix::unistd::{SysconfVar, sysconf};

use super::admission::Admission;
use super::arena::Region;
use super::skel::{
    DELIVER_LOCAL, DELIVER_NEIGHBOUR, DELIVER_NOWHERE, DOWNSTREAM_BARE, DOWNSTREAM_MACS, DOWNSTREAM_PEER, KEY_ADDRESS,
    KEY_HEADERLESS_LINK, KEY_LISTENER, types,
};
use crate::plan::{Delivery, Target};

/// Types that the program and we see as the same plain bytes.
///
/// # Safety
/// Only for `repr(C)` types of integers without implicit padding, for which every bit pattern is valid.
pub unsafe trait Plain: Copy {}
// SAFETY: four and one and one integers, 20 bytes, no holes (asserted in `skel`).
unsafe impl Plain for types::listener_key {}
// SAFETY: two u32.
unsafe impl Plain for types::fanout_listener {}
// SAFETY: integers only, without holes, 32 bytes (asserted in `skel`).
unsafe impl Plain for types::first_look {}
// SAFETY: integers only, without padding, 64 bytes (asserted in `skel`).
unsafe impl Plain for types::downstream {}
// SAFETY: integers only, without padding, 48 bytes (asserted in `skel`).
unsafe impl Plain for types::trace_control {}
// SAFETY: an integer.
unsafe impl Plain for types::lease {}
// SAFETY: an integer.
unsafe impl Plain for types::links {}
// SAFETY: bytes.
unsafe impl Plain for types::listener_name {}
// SAFETY: integers without holes, 24 bytes (asserted in `skel`).
unsafe impl Plain for types::ledger_key {}
// SAFETY: integers.
unsafe impl Plain for types::ledger_entry {}
// SAFETY: integers without holes, 56 bytes (asserted in `skel`).
unsafe impl Plain for types::pins_about {}
// SAFETY: an integer.
unsafe impl Plain for u32 {}
// SAFETY: integers only, without holes, 56 bytes (asserted in `skel`).
unsafe impl Plain for types::listener_state {}
// SAFETY: six u32 (asserted in `skel`).
unsafe impl Plain for types::source_key {}

/// The value's bytes, as the kernel wants them.
pub fn bytes_of<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: `Plain` types have no padding, so all their bytes are initialised; the lifetime is the borrow's.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// An array map (`BPF_F_MMAPABLE`) in our address space, or a part of it. The kernel strides entries by multiples of 8 bytes.
#[derive(Debug)]
pub struct MappedArray<T> {
    memory: NonNull<u8>,
    length: NonZeroUsize,
    /// Bytes of the first page before the first entry.
    before: usize,
    part: Region,
    of: PhantomData<T>,
}

// SAFETY: the mapping belongs to this value alone and is not tied to a thread.
unsafe impl<T> Send for MappedArray<T> {}

impl<T: Plain> MappedArray<T> {
    const STRIDE: usize = size_of::<T>().next_multiple_of(8);

    /// Maps the whole array.
    ///
    /// # Errors
    /// When the kernel refuses, or the map's values are not `T`s.
    pub fn new(map: &MapHandle) -> Result<Self> {
        Self::part(map, Region { start: 0, len: map.max_entries() })
    }

    /// Maps some of its entries.
    ///
    /// # Errors
    /// As for [`MappedArray::new`], and when it has fewer entries, or none are asked for.
    pub fn part(map: &MapHandle, part: Region) -> Result<Self> {
        let name = map.name().to_string_lossy();
        ensure!(map.value_size() as usize == size_of::<T>(), "map {name} has values of another size than expected");
        let page = usize::try_from(sysconf(SysconfVar::PAGE_SIZE)?.context("no page size")?)?;
        let start = part.start as usize * Self::STRIDE;
        let before = start % page;
        let length = NonZeroUsize::new(part.len as usize * Self::STRIDE)
            .with_context(|| format!("map {name} has no entries"))?
            .saturating_add(before);
        let (access, offset) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, i64::try_from(start - before)?);
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let memory = unsafe { mmap(None, length, access, MmapFlags::MAP_SHARED, map.as_fd(), offset) }
            .with_context(|| format!("cannot map the array {name} into memory"))?;
        Ok(Self { memory: memory.cast(), length, before, part, of: PhantomData })
    }

    /// Where an entry is.
    ///
    /// # Panics
    /// If `index` is not in the array, or not in the part of it that is mapped.
    pub(super) fn entry(&self, index: u32) -> NonNull<u8> {
        let place = index.checked_sub(self.part.start).filter(|&place| place < self.part.len);
        let Some(place) = place else { panic!("entry {index} of an array of which {:?} is mapped", self.part) };
        // SAFETY: within the mapping, by the check above.
        unsafe { self.memory.add(self.before + place as usize * Self::STRIDE) }
    }

    /// Reads an entry.
    ///
    /// # Panics
    /// If `index` is past the array's end.
    #[must_use]
    pub fn read(&self, index: u32) -> T {
        // SAFETY: `entry` is in bounds and aligned to 8, `T` is at most 8-aligned, and any bits make one.
        unsafe { self.entry(index).cast::<T>().as_ptr().read_volatile() }
    }

    /// How many entries are mapped.
    #[must_use]
    pub fn entries(&self) -> u32 {
        self.part.len
    }

    /// Writes an entry that the program does not read yet.
    ///
    /// # Panics
    /// If `index` is past the array's end.
    pub fn write(&mut self, index: u32, value: T) {
        // SAFETY: `entry` is in bounds and aligned to 8, and `T` is at most 8-aligned. The program may read any entry
        // at any time, but what it reads here it does not use before a table names it.
        unsafe { self.entry(index).cast::<T>().as_ptr().write_volatile(value) }
    }
}

impl MappedArray<types::first_look> {
    /// Stores 16 bits of an entry, `offset` bytes from its start, and after all that was written before.
    pub(super) fn store_short(&mut self, index: u32, offset: usize, value: u16) {
        assert!(offset.is_multiple_of(2) && offset + 2 <= Self::STRIDE, "nothing of 16 bits at {offset}");
        // SAFETY: in bounds and within the entry, aligned to 2, and mapped for as long as `self` lives.
        let short = unsafe { self.entry(index).add(offset).cast::<u16>() };
        // SAFETY: as above; the kernel reads it as one 16-bit word.
        unsafe { AtomicU16::from_ptr(short.as_ptr()) }.store(value, Ordering::Release);
    }
}

impl MappedArray<types::listener_state> {
    /// Sets a listener's policy and the smallest MTU on its ways out. The program may see it with the table before or
    /// after.
    ///
    /// # Panics
    /// If `index` is past the array's end.
    pub fn set_policy(&mut self, index: u32, policy: u32, least_mtu: u32) {
        self.store(index, offset_of!(types::listener_state, policy), policy);
        self.store(index, offset_of!(types::listener_state, least_mtu), least_mtu);
    }

    /// Sets who may send to a listener, and how fast. The rules and the buckets are each named by one store; what the
    /// meter counts by is there before its number is.
    ///
    /// # Panics
    /// If `index` is past the array's end.
    pub fn set_admission(&mut self, index: u32, admission: &Admission) {
        self.store_long(index, offset_of!(types::listener_state, interval), admission.interval);
        self.store_long(index, offset_of!(types::listener_state, depth), admission.depth);
        for (word, at) in admission.sender_mask_be.into_iter().zip(0..) {
            self.store(index, offset_of!(types::listener_state, sender_mask_be) + at * size_of::<u32>(), word);
        }
        self.store(index, offset_of!(types::listener_state, meter), admission.meter);
        self.store(index, offset_of!(types::listener_state, rules), admission.rules);
    }

    /// Stores 64 bits of an entry, `offset` bytes from its start, and after all that was written before.
    fn store_long(&mut self, index: u32, offset: usize, value: u64) {
        assert!(offset.is_multiple_of(8) && offset + 8 <= Self::STRIDE, "nothing of 64 bits at {offset}");
        // SAFETY: in bounds and within the entry, aligned to 8, and mapped for as long as `self` lives.
        let long = unsafe { self.entry(index).add(offset).cast::<u64>() };
        // SAFETY: as above; the kernel reads it as one 64-bit word.
        unsafe { AtomicU64::from_ptr(long.as_ptr()) }.store(value, Ordering::Release);
    }

    /// The same for 32 bits.
    fn store(&mut self, index: u32, offset: usize, value: u32) {
        assert!(offset.is_multiple_of(4) && offset + 4 <= Self::STRIDE, "nothing of 32 bits at {offset}");
        // SAFETY: in bounds and within the entry, aligned to 4, and mapped for as long as `self` lives.
        let word = unsafe { self.entry(index).add(offset).cast::<u32>() };
        // SAFETY: as above; the kernel reads it as one 32-bit word.
        unsafe { AtomicU32::from_ptr(word.as_ptr()) }.store(value, Ordering::Release);
    }

    /// Publishes a listener's table: the program sees the old one or the new one, and with the new one everything that
    /// was written before.
    ///
    /// # Panics
    /// If `index` is past the array's end.
    pub fn publish(&mut self, index: u32, region: Region) {
        let table = u64::from(region.start) << 32 | u64::from(region.len);
        self.store_long(index, offset_of!(types::listener_state, table), table);
    }
}

impl<T> Drop for MappedArray<T> {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; no reference into it outlives `self`. An error would leak memory
        // at worst, and there is nobody to tell.
        let _ = unsafe { munmap(self.memory.cast(), self.length.get()) };
    }
}

/// Waits until no CPU runs the program with tables or downstreams it read before this call.
///
/// # Errors
/// When the kernel refuses the update that does the waiting.
pub fn wait_for_readers(rcu_barrier: &MapHandle, inner: &MapHandle) -> Result<()> {
    let fd = u32::try_from(inner.as_fd().as_raw_fd()).context("a file descriptor is negative")?;
    rcu_barrier
        .update(bytes_of(&0u32), bytes_of(&fd), MapFlags::ANY)
        .context("cannot wait for the TC program to finish with an old table")
}

/// Sums a per-CPU entry of `N` 64-bit words over all CPUs.
///
/// # Errors
/// When the kernel refuses to read it.
pub fn sum_over_cpus<const N: usize>(map: &MapHandle, index: u32) -> Result<[u64; N]> {
    let values = map
        .lookup_percpu(bytes_of(&index), MapFlags::ANY)
        .and_then(|found| found.ok_or_else(|| std::io::Error::from_raw_os_error(libc::ENOENT).into()))
        .with_context(|| format!("cannot read entry {index} of map {}", map.name().to_string_lossy()))?;
    let mut sum = [0u64; N];
    for cpu in values {
        for (total, word) in sum.iter_mut().zip(cpu.chunks_exact(8)) {
            *total += word.try_into().map_or(0, u64::from_ne_bytes);
        }
    }
    Ok(sum)
}

/// Sets a per-CPU entry to zero on all CPUs.
///
/// # Errors
/// When the kernel refuses to write it.
pub fn zero_on_all_cpus(map: &MapHandle, index: u32) -> Result<()> {
    let cpus = libbpf_rs::num_possible_cpus().context("cannot count CPUs")?;
    let zeros = vec![vec![0u8; map.value_size() as usize]; cpus];
    map.update_percpu(bytes_of(&index), &zeros, MapFlags::ANY)
        .with_context(|| format!("cannot clear entry {index} of map {}", map.name().to_string_lossy()))
}

/// Reads a value of an array or a hash map; none if there is no such key.
///
/// # Errors
/// When the kernel refuses, or the value has another size.
pub fn look_up<K: Plain, V: Plain>(map: &MapHandle, key: &K) -> Result<Option<V>> {
    let name = || map.name().to_string_lossy().into_owned();
    let found = map.lookup(bytes_of(key), MapFlags::ANY).with_context(|| format!("cannot read map {}", name()))?;
    found
        .map(|bytes| value_of(&bytes).with_context(|| format!("map {} has values of another size", name())))
        .transpose()
}

/// The value that these bytes are, if they are as many.
#[must_use]
pub fn value_of<T: Plain>(bytes: &[u8]) -> Option<T> {
    // SAFETY: as many bytes as the type has, any bits make one, and reading needs no alignment.
    (bytes.len() == size_of::<T>()).then(|| unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// Writes a value.
///
/// # Errors
/// When the kernel refuses: there is no room.
pub fn store<K: Plain, V: Plain>(map: &MapHandle, key: &K, value: &V) -> Result<()> {
    map.update(bytes_of(key), bytes_of(value), MapFlags::ANY)
        .with_context(|| format!("cannot write to map {}", map.name().to_string_lossy()))
}

/// The address that words in a map stand for.
#[must_use]
pub fn address_of(words: [u32; 4], port_be: u16) -> SocketAddr {
    let mut octets = [0; 16];
    for (bytes, word) in octets.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    SocketAddr::new(IpAddr::from(octets).to_canonical(), u16::from_be(port_be))
}

/// An address as both families are kept in the maps: IPv4 as v4-mapped IPv6.
#[must_use]
pub fn mapped_words(address: IpAddr) -> [u32; 4] {
    let octets = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    };
    words(octets)
}

fn words(octets: [u8; 16]) -> [u32; 4] {
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(octets.chunks_exact(4)) {
        *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    words
}

/// The key under which datagrams to this address and port are found.
#[must_use]
pub fn listener_key(address: SocketAddr) -> types::listener_key {
    types::listener_key { addr_be: mapped_words(address.ip()), port_be: address.port().to_be(), scope: KEY_LISTENER }
}

/// What the program asks the same map about beside destinations. All it wants to know is whether it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mark {
    /// The address is some listener's; fragments do not tell the port.
    Address(IpAddr),
    /// Packets come by the link of this index without a header before the IP header.
    Headerless(u32),
}

impl Mark {
    /// The key under which it is found.
    #[must_use]
    pub fn key(self) -> types::listener_key {
        let (addr_be, scope) = match self {
            Mark::Address(address) => (mapped_words(address), KEY_ADDRESS),
            Mark::Headerless(link) => ([link, 0, 0, 0], KEY_HEADERLESS_LINK),
        };
        types::listener_key { addr_be, port_be: 0, scope }
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mark::Address(address) => write!(f, "{address}"),
            Mark::Headerless(link) => write!(f, "interface {link}"),
        }
    }
}

/// A downstream as the program sees it.
#[must_use]
pub fn downstream_entry(target: &Target) -> types::downstream {
    let address = target.downstream.address;
    let mut entry = types::downstream {
        addr_be: mapped_words(address.ip()),
        port_be: address.port().to_be(),
        delivery: DELIVER_NOWHERE,
        sample: target.downstream.sample,
        ..Default::default()
    };
    match target.delivery {
        Delivery::Unreachable => {}
        Delivery::Local => entry.delivery = DELIVER_LOCAL,
        Delivery::Bare { link, mtu } => {
            entry.delivery = DELIVER_NEIGHBOUR;
            entry.ifindex = link;
            entry.mtu = mtu;
            entry.flags = DOWNSTREAM_BARE;
        }
        Delivery::Neighbour { link, next_hop, mtu, macs, into_pod } => {
            entry.delivery = DELIVER_NEIGHBOUR;
            entry.ifindex = link;
            entry.mtu = mtu;
            if let Some(macs) = macs {
                entry.flags = DOWNSTREAM_MACS | if into_pod { DOWNSTREAM_PEER } else { 0 };
                entry.macs[..6].copy_from_slice(&macs.neighbour);
                entry.macs[6..].copy_from_slice(&macs.own);
            }
            match next_hop {
                IpAddr::V4(v4) => {
                    entry.next_hop_family = libc::AF_INET as u8;
                    entry.next_hop_be[0] = u32::from_ne_bytes(v4.octets());
                }
                IpAddr::V6(v6) => {
                    entry.next_hop_family = libc::AF_INET6 as u8;
                    entry.next_hop_be = words(v6.octets());
                }
            }
        }
    }
    entry
}
