//! Ordinary memory as a device: frames in an anonymous file that is mapped twice in a row, copies done when queued.
//!
//! The only `unsafe` code of this crate: what the pool's bookkeeping says, this carries out on raw memory.

use std::ffi::c_void;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use thiserror::Error;

use crate::backend::{Backend, HostMemory, HostPlace, Lane};

/// Bytes of the smallest page: what the system maps.
const SYSTEM_PAGE: usize = 4096;

/// Ordinary memory could not be had.
#[derive(Debug, Error)]
pub enum HostError {
    /// The system refused.
    #[error("the system gives no memory for {what} of {bytes} bytes: {source}")]
    Memory {
        /// What for.
        what: &'static str,
        /// How much was asked for.
        bytes: usize,
        /// Why not.
        source: Errno,
    },
    /// A page size that cannot be mapped.
    #[error("page_size must be a multiple of {SYSTEM_PAGE} bytes, got {0}")]
    PageSize(usize),
}

/// Frames and homes in ordinary memory. There is one thread of work, the caller's: everything queued is done at once, in
/// the order of the calls, so events mean nothing.
#[derive(Debug)]
pub struct HostBackend {
    page_bytes: usize,
    frames: usize,
    ring: Mapping,
    file: OwnedFd,
    pieces: Vec<HostPiece>,
    /// Time spent fetching: the caller stood still meanwhile.
    stall: Duration,
}

/// Ordinary memory, which the system gives when it is first touched: there is nothing to prepare.
#[derive(Debug, Clone)]
pub struct HostPiece(Arc<Mapping>);

impl HostMemory for HostPiece {
    type Error = HostError;

    fn prepare(&self, _range: Range<usize>) -> Result<(), HostError> {
        Ok(())
    }
}

/// Mapped memory that belongs to this value.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: memory that no thread has a claim on; access goes through `&mut HostBackend`, or by the caller's addresses.
unsafe impl Send for Mapping {}
// SAFETY: as above; a shared mapping gives no access to its memory, only its addresses.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by this module with this length, and not used after its owner. A failure leaves it mapped.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

impl HostBackend {
    /// `frames` frames of `page_bytes`; memory is taken when a frame is first written to.
    ///
    /// # Errors
    /// [`HostError`]: the page size, or no address space.
    pub fn new(frames: usize, page_bytes: usize) -> Result<Self, HostError> {
        if page_bytes == 0 || !page_bytes.is_multiple_of(SYSTEM_PAGE) {
            return Err(HostError::PageSize(page_bytes));
        }
        let what = "frames";
        let bytes = frames
            .checked_mul(page_bytes)
            .filter(|&bytes| bytes <= isize::MAX as usize / 2)
            .ok_or(HostError::Memory { what, bytes: usize::MAX, source: Errno::OVERFLOW })?;
        let failed = |source| HostError::Memory { what, bytes, source };
        let file = memfd_create("qlora-rs-frames", MemfdFlags::CLOEXEC).map_err(failed)?;
        ftruncate(&file, bytes as u64).map_err(failed)?;
        let ring = Mapping::anonymous(2 * bytes.max(SYSTEM_PAGE)).map_err(failed)?;
        for half in [0, bytes].into_iter().filter(|_| bytes > 0) {
            let access = ProtFlags::READ | ProtFlags::WRITE;
            // SAFETY: replaces pages of `ring`, which nothing points into yet, by pages of the file.
            unsafe {
                let start = ring.start.as_ptr().add(half).cast::<c_void>();
                mmap(start, bytes, access, MapFlags::SHARED | MapFlags::FIXED, &file, 0).map_err(failed)?;
            }
        }
        Ok(Self { page_bytes, frames, ring, file, pieces: Vec::new(), stall: Duration::ZERO })
    }

    /// Memory from the start of a frame on, past the end of the ring too.
    fn frame_memory(&mut self, frame: usize, bytes: usize) -> &mut [u8] {
        assert!(frame < self.frames && bytes <= self.frames * self.page_bytes, "the pool keeps to the ring");
        // SAFETY: begins in the first half of the ring and is no longer than the other half; mapped memory is
        // initialised. The caller's own pointers are not used meanwhile: it is the thread that is here.
        unsafe { std::slice::from_raw_parts_mut(self.ring.start.as_ptr().add(frame * self.page_bytes), bytes) }
    }
}

impl Mapping {
    fn anonymous(bytes: usize) -> Result<Self, Errno> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping wherever the system likes; NORESERVE because most of it may never be touched.
        let start =
            unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, access, MapFlags::PRIVATE | MapFlags::NORESERVE) }?;
        NonNull::new(start.cast()).map(|start| Self { start, bytes }).ok_or(Errno::NOMEM)
    }
}

impl HostPiece {
    fn memory(&mut self, offset: usize, bytes: usize) -> &mut [u8] {
        assert!(offset.checked_add(bytes).is_some_and(|end| end <= self.0.bytes), "the pool keeps to its pieces");
        // SAFETY: inside of what is mapped, which is initialised; the backend that owns the piece is the only one that
        // looks into it, and `&mut self` comes from there.
        unsafe { std::slice::from_raw_parts_mut(self.0.start.as_ptr().add(offset), bytes) }
    }
}

impl Backend for HostBackend {
    type Stream = u64;
    type Event = ();
    type Moment = Instant;
    type Memory = HostPiece;
    type Error = HostError;

    fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    fn frames(&self) -> usize {
        self.frames
    }

    fn address(&self, frame: usize) -> u64 {
        self.ring.start.as_ptr() as u64 + (frame * self.page_bytes) as u64
    }

    fn commit(&mut self, _first: usize, _count: usize) -> Result<(), HostError> {
        Ok(()) // the system gives memory at the first touch
    }

    fn decommit(&mut self, first: usize, count: usize) -> Result<(), HostError> {
        let bytes = count * self.page_bytes;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, (first * self.page_bytes) as u64, bytes as u64)
            .map_err(|source| HostError::Memory { what: "giving back frames", bytes, source })
    }

    fn reserve_host(&self, bytes: usize) -> Result<HostPiece, HostError> {
        let mapping = Mapping::anonymous(bytes).map_err(|source| HostError::Memory { what: "homes", bytes, source })?;
        Ok(HostPiece(Arc::new(mapping)))
    }

    fn add_host(&mut self, memory: HostPiece) -> usize {
        self.pieces.push(memory);
        self.pieces.len() - 1
    }

    fn host_address(&self, place: HostPlace) -> u64 {
        self.pieces[place.piece].0.start.as_ptr() as u64 + place.offset as u64
    }

    fn zero_host(&mut self, place: HostPlace, bytes: usize) {
        self.pieces[place.piece].memory(place.offset, bytes).fill(0);
    }

    fn copy_in(&mut self, from: HostPlace, frame: usize, bytes: usize) -> Result<(), HostError> {
        let start = Instant::now();
        let source = NonNull::from(self.pieces[from.piece].memory(from.offset, bytes));
        // SAFETY: a piece and the ring are different mappings, and neither is dropped or moved meanwhile.
        self.frame_memory(frame, bytes).copy_from_slice(unsafe { source.as_ref() });
        self.stall += start.elapsed();
        Ok(())
    }

    fn zero(&mut self, frame: usize, bytes: usize) -> Result<(), HostError> {
        let start = Instant::now();
        self.frame_memory(frame, bytes).fill(0);
        self.stall += start.elapsed();
        Ok(())
    }

    fn copy_out(&mut self, frame: usize, to: HostPlace, bytes: usize) -> Result<(), HostError> {
        let source = NonNull::from(self.frame_memory(frame, bytes));
        // SAFETY: as in `copy_in`.
        self.pieces[to.piece].memory(to.offset, bytes).copy_from_slice(unsafe { source.as_ref() });
        Ok(())
    }

    fn record(&mut self, _lane: Lane<u64>) -> Result<(), HostError> {
        Ok(())
    }

    fn wait(&mut self, _lane: Lane<u64>, _event: &()) -> Result<(), HostError> {
        Ok(())
    }

    fn synchronize(_event: &()) -> Result<(), HostError> {
        Ok(())
    }

    fn stall(&mut self) -> Duration {
        self.stall
    }

    fn moment(&mut self, _lane: Lane<u64>) -> Result<Instant, HostError> {
        Ok(Instant::now())
    }

    fn seconds(begin: &Instant, end: &Instant) -> Result<f64, HostError> {
        Ok(match end.checked_duration_since(*begin) {
            Some(later) => later.as_secs_f64(),
            None => -begin.duration_since(*end).as_secs_f64(),
        })
    }
}
