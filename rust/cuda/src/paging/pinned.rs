//! Pinned host memory. Pages that many threads have touched and the driver then registers are ready about ten times sooner
//! than those that the driver allocates (`benchmarks/device_paging.py`); huge pages double that.

use std::ffi::{c_ulong, c_void};
use std::fs;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys;
use qlora_paging::HostMemory;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::context::{Device, Relaxed, not_forked};
use crate::error::{CudaError, failed};

/// Bytes of a huge page, at whose multiples mappings begin.
const HUGE_PAGE: usize = 2 << 20;
/// Bytes of the smallest page of the system.
const SMALL_PAGE: usize = 4096;
/// More threads than these do not fault pages in any sooner.
const MOST_THREADS: usize = 16;
/// Bytes that are left to the system.
const MARGIN: usize = 512 << 20;
/// `mbind`: take pages from this node while it has some.
const MPOL_PREFERRED: c_ulong = 1;

/// Bytes that this process has pinned for pools.
static PINNED: AtomicUsize = AtomicUsize::new(0);

/// Addresses of host memory; what of them is prepared is pinned. Clones mean the same memory.
#[derive(Debug, Clone)]
pub struct Pinned(Arc<Piece>);

#[derive(Debug)]
struct Piece {
    device: &'static Device,
    mapping: NonNull<u8>,
    mapped: usize,
    /// First of the bytes that are handed out.
    start: NonNull<u8>,
    bytes: usize,
    /// What was registered in one call, ascending; a copy must not go from one into another.
    registered: Mutex<Vec<Range<usize>>>,
}

// SAFETY: memory that no thread has a claim on: access goes by addresses that the pool hands out.
unsafe impl Send for Piece {}
// SAFETY: as above; the list of registrations is locked.
unsafe impl Sync for Piece {}

impl Pinned {
    /// Addresses for so many bytes.
    pub(super) fn reserve(device: &'static Device, bytes: usize) -> Result<Self, CudaError> {
        let refused = |reason: String| refusal(bytes, reason);
        let mapped = bytes
            .checked_add(HUGE_PAGE)
            .filter(|&bytes| isize::try_from(bytes).is_ok())
            .ok_or_else(|| refused("no address space has so many".into()))?;
        enough_memory(bytes)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping wherever the system likes.
        let mapping = unsafe { mmap_anonymous(std::ptr::null_mut(), mapped, access, flags) }
            .map_err(|error| refused(format!("the system has no addresses ({error})")))?;
        let mapping =
            NonNull::new(mapping.cast::<u8>()).ok_or_else(|| refused("the system has no addresses".into()))?;
        // SAFETY: less than HUGE_PAGE bytes into a mapping that is longer.
        let start = unsafe { mapping.add(mapping.align_offset(HUGE_PAGE)) };
        // Where the system gives no huge pages small ones do. Pinned pages would be copied for every forked child, which has
        // no use for them.
        for advice in [Advice::LinuxHugepage, Advice::LinuxDontFork] {
            // SAFETY: advice about our own mapping; neither kind changes its content.
            let _ = unsafe { madvise(mapping.as_ptr().cast(), mapped, advice) };
        }
        if let Some(node) = numa_node(device) {
            prefer(node, start, bytes);
        }
        Ok(Self(Arc::new(Piece { device, mapping, mapped, start, bytes, registered: Mutex::default() })))
    }

    /// Address of a byte.
    pub(super) fn address(&self, offset: usize) -> *mut c_void {
        assert!(offset <= self.0.bytes, "the pool keeps to its pieces");
        // SAFETY: inside of the mapping.
        unsafe { self.0.start.add(offset) }.as_ptr().cast()
    }

    /// `bytes` from `offset` on in parts that one copy can take.
    pub(super) fn parts(&self, offset: usize, bytes: usize) -> Vec<Range<usize>> {
        let end = offset + bytes;
        let registered = self.0.registered.lock().unwrap_or_else(PoisonError::into_inner);
        let inside = registered.iter().map(|range| range.start.max(offset)..range.end.min(end));
        inside.filter(|part| !part.is_empty()).collect()
    }
}

impl HostMemory for Pinned {
    type Error = CudaError;

    fn prepare(&self, range: Range<usize>) -> Result<(), CudaError> {
        assert!(range.start < range.end && range.end <= self.0.bytes, "the pool keeps to its pieces");
        // Others may have taken memory since it was reserved; touching more than there is ends processes.
        enough_memory(range.len())?;
        touch(self.address(range.start).cast(), range.len());
        let _entered = self.0.device.enter()?;
        let _relaxed = Relaxed::enter()?;
        // SAFETY: mapped memory of this length that is registered once; it is unregistered before it is unmapped.
        let outcome = unsafe {
            sys::cuMemHostRegister_v2(self.address(range.start), range.len(), sys::CU_MEMHOSTREGISTER_PORTABLE)
        };
        outcome.result().map_err(|source| refusal(range.len(), failed("cuMemHostRegister")(source).to_string()))?;
        PINNED.fetch_add(range.len(), Ordering::Relaxed);
        let mut registered = self.0.registered.lock().unwrap_or_else(PoisonError::into_inner);
        let index = registered.partition_point(|known| known.start < range.start);
        registered.insert(index, range);
        Ok(())
    }
}

fn refusal(wish: usize, reason: String) -> CudaError {
    CudaError::HostMemory { wish, pinned: PINNED.load(Ordering::Relaxed), reason }
}

fn enough_memory(wish: usize) -> Result<(), CudaError> {
    match memory_left() {
        Some(left) if wish > left.saturating_sub(MARGIN) => Err(refusal(wish, format!("{left} bytes are available"))),
        _ => Ok(()),
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        // A forked child does not have the mapping.
        if not_forked().is_err() {
            return;
        }
        let Ok(_entered) = self.device.enter() else { return };
        let _relaxed = Relaxed::enter();
        for range in self.registered.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // SAFETY: registered at this address; the backend that owned it has waited for its copies.
            let _ = unsafe { sys::cuMemHostUnregister(self.start.add(range.start).as_ptr().cast()) };
            PINNED.fetch_sub(range.len(), Ordering::Relaxed);
        }
        // SAFETY: mapped by `reserve` with this length, and nobody refers to it any more.
        let _ = unsafe { munmap(self.mapping.as_ptr().cast(), self.mapped) };
    }
}

/// Make the system give the pages, by many threads: clearing them is what takes the time.
fn touch(start: *mut u8, bytes: usize) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
    let share = bytes.div_ceil(threads).next_multiple_of(HUGE_PAGE);
    let start = start as usize;
    std::thread::scope(|scope| {
        for first in (0..bytes).step_by(share) {
            scope.spawn(move || {
                for offset in (first..bytes.min(first + share)).step_by(SMALL_PAGE) {
                    // SAFETY: inside of memory that its owner is preparing, so that nobody else uses it yet.
                    unsafe { ((start + offset) as *mut u8).write_volatile(0) };
                }
            });
        }
    });
}

/// Bytes of memory that the system, and the container around this process, have left; None where they do not tell.
fn memory_left() -> Option<usize> {
    let system = fs::read_to_string("/proc/meminfo").ok().and_then(|text| available(&text));
    [system, container_memory_left()].into_iter().flatten().min()
}

/// `MemAvailable` of /proc/meminfo, in bytes.
fn available(meminfo: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

fn container_memory_left() -> Option<usize> {
    let number = |name: &str| -> Option<usize> { fs::read_to_string(name).ok()?.trim().parse().ok() };
    let (folder, limit, used) = match number("/sys/fs/cgroup/memory.max") {
        Some(limit) => ("/sys/fs/cgroup", limit, number("/sys/fs/cgroup/memory.current")?),
        None => (
            "/sys/fs/cgroup/memory",
            number("/sys/fs/cgroup/memory/memory.limit_in_bytes")?,
            number("/sys/fs/cgroup/memory/memory.usage_in_bytes")?,
        ),
    };
    // Cached files count as used, but leave where memory is needed.
    let cached = fs::read_to_string(format!("{folder}/memory.stat")).ok().and_then(|text| inactive_file(&text));
    Some(limit.saturating_sub(used.saturating_sub(cached.unwrap_or(0))))
}

fn inactive_file(stat: &str) -> Option<usize> {
    let line = stat.lines().find_map(|line| line.strip_prefix("inactive_file "))?;
    line.trim().parse().ok()
}

/// The memory node that the device is attached to, on machines that have several.
fn numa_node(device: &Device) -> Option<u32> {
    let address = device.pci_address().ok()?;
    let node = fs::read_to_string(format!("/sys/bus/pci/devices/{address}/numa_node")).ok()?;
    node.trim().parse().ok()
}

/// Pages come from this node while it has some. A system that refuses gives them from wherever threads run.
fn prefer(node: u32, start: NonNull<u8>, bytes: usize) {
    let bits = c_ulong::BITS;
    let mut mask = vec![0 as c_ulong; (node / bits) as usize + 1];
    mask[(node / bits) as usize] = 1 << (node % bits);
    let count = mask.len() as c_ulong * c_ulong::from(bits) + 1;
    // SAFETY: the range is our own mapping, the mask a live local with as many bits as said (the call takes one more).
    unsafe { libc::syscall(libc::SYS_mbind, start.as_ptr(), bytes, MPOL_PREFERRED, mask.as_ptr(), count, 0) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_in_bytes() {
        assert_eq!(available("MemTotal:  9 kB\nMemAvailable:    131031304 kB\n"), Some(131_031_304 * 1024));
        assert_eq!(available("MemTotal:  9 kB\n"), None);
        assert_eq!(inactive_file("anon 5\ninactive_file 123\nactive_file 9\n"), Some(123));
        assert!(memory_left().is_some_and(|left| left > 0));
    }

    #[test]
    fn every_page_is_touched_once() {
        let mut memory = vec![7_u8; 5 * HUGE_PAGE / 2 + 3];
        touch(memory.as_mut_ptr(), memory.len());
        let touched: Vec<_> = (0..memory.len()).filter(|&index| memory[index] == 0).collect();
        assert_eq!(touched, (0..memory.len()).step_by(SMALL_PAGE).collect::<Vec<_>>());
    }
}
