//! A CUDA device under a paged pool: a ring of frames, pinned memory behind it, two streams for copies, events.

mod pinned;
mod ring;
mod stalls;

use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{result, sys};
use qlora_paging::{Backend, HostPlace, Lane};

use crate::context::{Device, Relaxed, device, not_forked};
use crate::error::{CudaError, failed};
use crate::events::{Event, Stamp, Stock, Stream};
pub use pinned::Pinned;
use ring::Ring;
use stalls::Stalls;

/// Frames on one device. Callers' streams are `CUstream` handles of this device as integers; 0 is the default stream.
#[derive(Debug)]
pub struct CudaBackend {
    device: &'static Device,
    // NOTE: fields are dropped in this order: the lanes wait for what still uses the others.
    lanes: Lanes,
    ring: Ring,
    events: Arc<Stock>,
    timers: Arc<Stock>,
    pieces: Vec<Pinned>,
    stalls: Stalls,
}

/// The pool's own streams.
#[derive(Debug)]
struct Lanes {
    device: &'static Device,
    fetch: Stream,
    write_back: Stream,
}

impl Lanes {
    fn new(device: &'static Device) -> Result<Self, CudaError> {
        let fetch = stream()?;
        match stream() {
            Ok(write_back) => Ok(Self { device, fetch, write_back }),
            Err(error) => {
                // SAFETY: just made, and empty.
                let _ = unsafe { result::stream::destroy(fetch.0) };
                Err(error)
            }
        }
    }
}

/// A stream beside all others, whose small kernels (zeros) go before larger ones of theirs. A context is current.
fn stream() -> Result<Stream, CudaError> {
    let (mut lowest, mut highest, mut stream) = (0, 0, std::ptr::null_mut());
    let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
    // SAFETY: the out pointers are live locals.
    unsafe {
        sys::cuCtxGetStreamPriorityRange(&raw mut lowest, &raw mut highest)
            .result()
            .map_err(failed("cuCtxGetStreamPriorityRange"))?;
        sys::cuStreamCreateWithPriority(&raw mut stream, flags, highest).result().map_err(failed("cuStreamCreate"))?;
    }
    Ok(Stream(stream))
}

impl Drop for Lanes {
    /// Waits for what is queued: it uses frames and homes, which go next.
    fn drop(&mut self) {
        if not_forked().is_err() {
            return;
        }
        let Ok(_entered) = self.device.enter() else { return };
        let _relaxed = Relaxed::enter();
        for Stream(stream) in [self.fetch, self.write_back] {
            // SAFETY: made by `new`, destroyed once. A device that fails here has failed before.
            unsafe {
                let _ = result::stream::synchronize(stream);
                let _ = result::stream::destroy(stream);
            }
        }
    }
}

impl CudaBackend {
    /// `frames` frames of `page_bytes` on the device of this index; memory is taken when a frame is first used.
    ///
    /// # Errors
    /// [`CudaError::Budget`]: a page size or budget that the device cannot have; or the device's own.
    pub fn new(ordinal: i32, frames: usize, page_bytes: usize) -> Result<Self, CudaError> {
        let device = device(ordinal)?;
        let _entered = device.enter()?;
        let _relaxed = Relaxed::enter()?;
        let ring = Ring::new(device, frames, page_bytes)?;
        let timers = Stock::new(device, Stamp::Time);
        Ok(Self {
            device,
            lanes: Lanes::new(device)?,
            ring,
            events: Stock::new(device, Stamp::None),
            stalls: Stalls::new(Arc::clone(&timers)),
            timers,
            pieces: Vec::new(),
        })
    }

    /// Index of the device.
    #[must_use]
    pub fn ordinal(&self) -> i32 {
        self.device.ordinal
    }

    fn stream(&self, lane: Lane<u64>) -> Stream {
        match lane {
            Lane::In => self.lanes.fetch,
            Lane::Out => self.lanes.write_back,
            Lane::User(stream) => Stream(stream as usize as sys::CUstream),
        }
    }

    /// Calls `copy` with host address, device address and bytes of each part that one copy can take.
    fn each_part(
        &self,
        place: HostPlace,
        frame: usize,
        bytes: usize,
        mut copy: impl FnMut(*mut std::ffi::c_void, sys::CUdeviceptr, usize) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let piece = &self.pieces[place.piece];
        for part in piece.parts(place.offset, bytes) {
            let target = self.ring.address(frame) + (part.start - place.offset) as u64;
            copy(piece.address(part.start), target, part.len())?;
        }
        Ok(())
    }
}

impl Backend for CudaBackend {
    type Stream = u64;
    type Event = Event;
    type Moment = Event;
    type Memory = Pinned;
    type Error = CudaError;

    fn usable() -> Result<(), CudaError> {
        not_forked()
    }

    fn page_bytes(&self) -> usize {
        self.ring.page_bytes()
    }

    fn frames(&self) -> usize {
        self.ring.frames()
    }

    fn address(&self, frame: usize) -> u64 {
        self.ring.address(frame)
    }

    fn commit(&mut self, first: usize, count: usize) -> Result<(), CudaError> {
        self.ring.commit(first, count)
    }

    fn decommit(&mut self, first: usize, count: usize) -> Result<(), CudaError> {
        self.ring.decommit(first, count)
    }

    fn reserve_host(&self, bytes: usize) -> Result<Pinned, CudaError> {
        Pinned::reserve(self.device, bytes)
    }

    fn add_host(&mut self, memory: Pinned) -> usize {
        self.pieces.push(memory);
        self.pieces.len() - 1
    }

    fn host_address(&self, place: HostPlace) -> u64 {
        self.pieces[place.piece].address(place.offset) as u64
    }

    fn zero_host(&mut self, place: HostPlace, bytes: usize) {
        for part in self.pieces[place.piece].parts(place.offset, bytes) {
            let start = self.pieces[place.piece].address(part.start).cast::<u8>();
            // SAFETY: a prepared part of the piece; the pool has waited for copies of this place.
            unsafe { start.write_bytes(0, part.len()) };
        }
    }

    fn copy_in(&mut self, from: HostPlace, frame: usize, bytes: usize) -> Result<(), CudaError> {
        let _entered = self.device.enter()?;
        self.each_part(from, frame, bytes, |host, target, bytes| {
            // SAFETY: pinned memory of this backend, and frames that the pool says have memory; the ring's two rounds make
            // them contiguous. The pool's events keep others away until the copy has ended.
            unsafe { sys::cuMemcpyHtoDAsync_v2(target, host, bytes, self.lanes.fetch.0) }
                .result()
                .map_err(failed("cuMemcpyHtoDAsync"))
        })
    }

    fn zero(&mut self, frame: usize, bytes: usize) -> Result<(), CudaError> {
        let _entered = self.device.enter()?;
        // SAFETY: as in `copy_in`.
        unsafe { sys::cuMemsetD8Async(self.ring.address(frame), 0, bytes, self.lanes.fetch.0) }
            .result()
            .map_err(failed("cuMemsetD8Async"))
    }

    fn copy_out(&mut self, frame: usize, to: HostPlace, bytes: usize) -> Result<(), CudaError> {
        let _entered = self.device.enter()?;
        self.each_part(to, frame, bytes, |host, source, bytes| {
            // SAFETY: as in `copy_in`.
            unsafe { sys::cuMemcpyDtoHAsync_v2(host, source, bytes, self.lanes.write_back.0) }
                .result()
                .map_err(failed("cuMemcpyDtoHAsync"))
        })
    }

    fn record(&mut self, lane: Lane<u64>) -> Result<Event, CudaError> {
        let _entered = self.device.enter()?;
        self.events.record(self.stream(lane), lane == Lane::In)
    }

    fn wait(&mut self, lane: Lane<u64>, event: &Event) -> Result<(), CudaError> {
        let _entered = self.device.enter()?;
        let stream = self.stream(lane);
        if matches!(lane, Lane::User(_)) && event.is_fetch() {
            return self.stalls.hold(stream, event);
        }
        event.hold(stream)
    }

    fn synchronize(event: &Event) -> Result<(), CudaError> {
        event.synchronize()
    }

    fn capturing(&mut self, stream: u64) -> Result<bool, CudaError> {
        use sys::CUstreamCaptureStatus as Status;

        let _entered = self.device.enter()?;
        let mut status = Status::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: the out pointer is a live local; the stream is the caller's.
        match unsafe { sys::cuStreamIsCapturing(self.stream(Lane::User(stream)).0, &raw mut status) } {
            // The default stream, while a stream that waits for it is captured.
            sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT => Ok(true),
            other => {
                other.result().map_err(failed("cuStreamIsCapturing"))?;
                Ok(status != Status::CU_STREAM_CAPTURE_STATUS_NONE)
            }
        }
    }

    fn stall(&mut self) -> Duration {
        let Ok(_entered) = self.device.enter() else { return self.stalls.total() };
        self.stalls.collect();
        self.stalls.total()
    }

    fn moment(&mut self, lane: Lane<u64>) -> Result<Event, CudaError> {
        let _entered = self.device.enter()?;
        self.timers.record(self.stream(lane), lane == Lane::In)
    }

    fn seconds(begin: &Event, end: &Event) -> Result<f64, CudaError> {
        begin.synchronize()?;
        end.synchronize()?;
        begin.seconds_until(end)
    }
}
