//! Typed access to the program's maps: mapped arrays, single entries, per-CPU entries, and RCU grace periods.

use std::marker::PhantomData;
use std::mem::size_of;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use nix::sys::mman::{MapFlags as MmapFlags, ProtFlags, mmap, munmap};
use nix::unistd::{SysconfVar, sysconf};

use super::skel::types;
use super::slot_allocator::SlotRange;

/// Types with the same bytes in the program and in user space.
///
/// # Safety
/// Only for `repr(C)` types of integers without implicit padding, for which every bit pattern is valid.
pub unsafe trait Plain: Copy {}
// SAFETY: four and one and one integers, 20 bytes, no holes (asserted in `skel`).
unsafe impl Plain for types::listener_key {}
// SAFETY: two u32.
unsafe impl Plain for types::fanout_listener {}
// SAFETY: integers only, without holes, 32 bytes (asserted in `skel`).
unsafe impl Plain for types::cached_listener {}
// SAFETY: integers only, without padding, 64 bytes (asserted in `skel`).
unsafe impl Plain for types::downstream {}
// SAFETY: integers only, without padding, 48 bytes (asserted in `skel`).
unsafe impl Plain for types::trace_control {}
// SAFETY: an integer.
unsafe impl Plain for types::heartbeat {}
// SAFETY: an integer.
unsafe impl Plain for types::link_flags {}
// SAFETY: bytes.
unsafe impl Plain for types::listener_name {}
// SAFETY: integers without holes, 24 bytes (asserted in `skel`).
unsafe impl Plain for types::carried_key {}
// SAFETY: integers.
unsafe impl Plain for types::carried_entry {}
// SAFETY: integers without holes, 56 bytes (asserted in `skel`).
unsafe impl Plain for types::pins_about {}
// SAFETY: an integer.
unsafe impl Plain for u32 {}
// SAFETY: integers only, without holes, 56 bytes (asserted in `skel`).
unsafe impl Plain for types::listener_state {}
// SAFETY: six u32 (asserted in `skel`).
unsafe impl Plain for types::source_key {}

/// The value's bytes.
pub fn bytes_of<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: `Plain` types have no padding, so all their bytes are initialised; the lifetime is the borrow's.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// An array map (`BPF_F_MMAPABLE`) in this process's memory, or a part of it. The kernel aligns entries to 8 bytes.
#[derive(Debug)]
pub struct MappedArray<T> {
    memory: NonNull<u8>,
    length: NonZeroUsize,
    /// Bytes between the first mapped page and the first entry.
    before: usize,
    part: SlotRange,
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
        Self::part(map, SlotRange { start: 0, len: map.max_entries() })
    }

    /// Maps a range of entries.
    ///
    /// # Errors
    /// As for [`MappedArray::new`], and when the range is empty or not in the array.
    pub fn part(map: &MapHandle, part: SlotRange) -> Result<Self> {
        let name = map.name().to_string_lossy();
        ensure!(map.value_size() as usize == size_of::<T>(), "map {name} has values of an unexpected size");
        let page = usize::try_from(sysconf(SysconfVar::PAGE_SIZE)?.context("unknown page size")?)?;
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

    /// Address of an entry.
    ///
    /// # Panics
    /// If `index` is not in the mapped range.
    pub(super) fn entry(&self, index: u32) -> NonNull<u8> {
        let place = index.checked_sub(self.part.start).filter(|&place| place < self.part.len);
        let Some(place) = place else { panic!("entry {index} is not in the mapped range {:?}", self.part) };
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

    /// Number of mapped entries.
    #[must_use]
    pub fn entries(&self) -> u32 {
        self.part.len
    }

    /// Writes an entry that the program does not use yet.
    ///
    /// # Panics
    /// If `index` is past the array's end.
    pub fn write(&mut self, index: u32, value: T) {
        // SAFETY: `entry` is in bounds and aligned to 8, and `T` is at most 8-aligned. The program may read any entry
        // at any time, but what it reads here it does not use before a table names it.
        unsafe { self.entry(index).cast::<T>().as_ptr().write_volatile(value) }
    }

    /// Stores a field of an entry, `offset` bytes from its start, with release ordering.
    ///
    /// # Panics
    /// If `index` is past the array's end, or the field is not aligned and within the entry.
    pub(super) fn store_field<W: AtomicWord>(&mut self, index: u32, offset: usize, value: W) {
        let size = size_of::<W>();
        assert!(offset.is_multiple_of(size) && offset + size <= Self::STRIDE, "no {size}-byte field at {offset}");
        // SAFETY: in bounds, within the entry and aligned, by the assertion and `entry`; mapped for as long as `self`
        // lives, and the kernel reads it as one word.
        unsafe { W::store_release(self.entry(index).add(offset).as_ptr(), value) }
    }
}

/// Integers that one atomic store writes to a map's memory.
pub(super) trait AtomicWord {
    /// Stores the value with release ordering.
    ///
    /// # Safety
    /// `place` is aligned for the type, mapped and written only atomically while this runs.
    unsafe fn store_release(place: *mut u8, value: Self);
}

impl AtomicWord for u16 {
    unsafe fn store_release(place: *mut u8, value: Self) {
        // SAFETY: the caller's promise.
        unsafe { AtomicU16::from_ptr(place.cast()) }.store(value, Ordering::Release);
    }
}

impl AtomicWord for u32 {
    unsafe fn store_release(place: *mut u8, value: Self) {
        // SAFETY: the caller's promise.
        unsafe { AtomicU32::from_ptr(place.cast()) }.store(value, Ordering::Release);
    }
}

impl AtomicWord for u64 {
    unsafe fn store_release(place: *mut u8, value: Self) {
        // SAFETY: the caller's promise.
        unsafe { AtomicU64::from_ptr(place.cast()) }.store(value, Ordering::Release);
    }
}

impl<T> Drop for MappedArray<T> {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; no reference into it outlives `self`. An error would leak memory
        // at worst, and there is nobody to tell.
        let _ = unsafe { munmap(self.memory.cast(), self.length.get()) };
    }
}

/// Waits for an RCU grace period: until no CPU uses tables or downstreams it read before this call.
///
/// # Errors
/// When the kernel refuses the map update that does the waiting.
pub fn wait_for_grace_period(rcu_barrier: &MapHandle, inner: &MapHandle) -> Result<()> {
    let fd = u32::try_from(inner.as_fd().as_raw_fd()).context("a file descriptor is negative")?;
    rcu_barrier.update(bytes_of(&0u32), bytes_of(&fd), MapFlags::ANY).context("cannot wait for an RCU grace period")
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

/// Looks up a key in an array or hash map.
///
/// # Errors
/// When the kernel refuses, or the value has another size.
pub fn lookup<K: Plain, V: Plain>(map: &MapHandle, key: &K) -> Result<Option<V>> {
    let name = || map.name().to_string_lossy().into_owned();
    let found = map.lookup(bytes_of(key), MapFlags::ANY).with_context(|| format!("cannot read map {}", name()))?;
    found
        .map(|bytes| value_of(&bytes).with_context(|| format!("map {} has values of another size", name())))
        .transpose()
}

/// Converts bytes to a value, if the size is right.
#[must_use]
pub fn value_of<T: Plain>(bytes: &[u8]) -> Option<T> {
    // SAFETY: as many bytes as the type has, any bits make one, and reading needs no alignment.
    (bytes.len() == size_of::<T>()).then(|| unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// Stores a value under a key.
///
/// # Errors
/// When the kernel refuses, for instance because the map is full.
pub fn store<K: Plain, V: Plain>(map: &MapHandle, key: &K, value: &V) -> Result<()> {
    map.update(bytes_of(key), bytes_of(value), MapFlags::ANY)
        .with_context(|| format!("cannot write to map {}", map.name().to_string_lossy()))
}
