//! Bytes from the host to a device: read into pinned buffers, copied by the device's engine while the next are read.

use std::ptr::NonNull;

use cudarc::driver::{result, sys};
use qlora_core::{ByteSink, Piece};

use crate::context::{Device, device};
use crate::error::{CudaError, failed};
use crate::events::{Stamp, event};
use crate::launch::Queue;

/// Buffers of an uploader: while one is copied the other is filled.
const BUFFERS: usize = 2;

/// A [`ByteSink`] that fills a device's memory, over a stream of its own.
///
/// It starts once the caller's stream has done what was queued before (torch hands out memory that the stream may still
/// be using), and has arrived when [`ByteSink::finish`] returns. Dropping it waits for the copies under way.
#[derive(Debug)]
pub struct Uploader {
    device: &'static Device,
    stream: sys::CUstream,
    buffers: Vec<Buffer>,
    buffer_bytes: usize,
    /// The buffer that was handed out last.
    current: usize,
}

/// Pinned memory, and the event after which nothing reads it any more.
#[derive(Debug)]
struct Buffer {
    memory: NonNull<u8>,
    /// Not recorded yet counts as passed.
    free: sys::CUevent,
}

impl Uploader {
    /// An uploader with buffers of `buffer_bytes`.
    ///
    /// # Errors
    /// [`CudaError`]: the device, or no pinned memory.
    ///
    /// # Safety
    /// Every piece that is sent goes to memory of the queue's device that stays allocated, and that nothing else uses
    /// except what is on the queue's stream now, until `finish` has returned or the uploader is dropped.
    pub unsafe fn new(queue: Queue, buffer_bytes: usize) -> Result<Self, CudaError> {
        let device = device(queue.device)?;
        let _entered = device.enter()?;
        let stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("cuStreamCreate"))?;
        // From here on dropping it gives back what there is.
        let mut uploader = Self {
            device,
            stream,
            buffers: Vec::with_capacity(BUFFERS),
            buffer_bytes: buffer_bytes.max(1),
            current: 0,
        };
        for _ in 0..BUFFERS {
            // SAFETY: a context is current; the flags ask for plain cached memory, which the host reads and writes.
            let memory = unsafe { result::malloc_host(uploader.buffer_bytes, 0) }
                .map_err(failed("cuMemHostAlloc"))?
                .cast::<u8>();
            let memory = NonNull::new(memory).ok_or(CudaError::NoDevice)?;
            // SAFETY: just allocated with this size. `buffer` hands it out as bytes, which have to hold a value.
            unsafe { memory.as_ptr().write_bytes(0, uploader.buffer_bytes) };
            match event(Stamp::None) {
                Ok(free) => uploader.buffers.push(Buffer { memory, free }),
                Err(error) => {
                    // SAFETY: was allocated above, and nothing uses it.
                    let _ = unsafe { result::free_host(memory.as_ptr().cast()) };
                    return Err(error);
                }
            }
        }
        let free = uploader.buffers[0].free;
        // SAFETY: event and streams are live; the event is recorded anew before a buffer depends on it, which by then
        // has moved on: a wait refers to what was recorded when it was queued.
        unsafe {
            result::event::record(free, queue.stream as sys::CUstream).map_err(failed("cuEventRecord"))?;
            result::stream::wait_event(stream, free, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT)
                .map_err(failed("cuStreamWaitEvent"))?;
        }
        Ok(uploader)
    }
}

impl ByteSink for Uploader {
    type Error = CudaError;

    fn buffer(&mut self, bytes: usize) -> Result<&mut [u8], CudaError> {
        if bytes > self.buffer_bytes {
            let room = self.buffer_bytes;
            return Err(CudaError::Unsupported(format!("{bytes} bytes do not fit a buffer of {room}")));
        }
        let _entered = self.device.enter()?;
        self.current = (self.current + 1) % self.buffers.len();
        let Buffer { memory, free } = &self.buffers[self.current];
        // SAFETY: the event is live; once it has passed no copy reads the buffer, which belongs to this value alone and
        // was allocated with `buffer_bytes` and filled.
        unsafe {
            result::event::synchronize(*free).map_err(failed("cuEventSynchronize"))?;
            Ok(std::slice::from_raw_parts_mut(memory.as_ptr(), bytes))
        }
    }

    fn send(&mut self, pieces: &[Piece]) -> Result<(), CudaError> {
        let _entered = self.device.enter()?;
        let Buffer { memory, free } = &self.buffers[self.current];
        for &Piece { start, bytes, to } in pieces {
            if start.checked_add(bytes).is_none_or(|end| end > self.buffer_bytes) {
                return Err(CudaError::Unsupported(format!("{bytes} bytes from {start} on are not in the buffer")));
            }
            // SAFETY: inside the buffer, which is not handed out again before the event below has passed; `new`'s caller
            // vouches for the destination.
            unsafe {
                let from = memory.as_ptr().add(start).cast_const().cast();
                sys::cuMemcpyHtoDAsync_v2(to, from, bytes, self.stream)
                    .result()
                    .map_err(failed("cuMemcpyHtoDAsync"))?;
            }
        }
        // SAFETY: both are live and of this context.
        unsafe { result::event::record(*free, self.stream) }.map_err(failed("cuEventRecord"))
    }

    fn finish(&mut self) -> Result<(), CudaError> {
        let _entered = self.device.enter()?;
        // SAFETY: the stream is live.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("cuStreamSynchronize"))
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        // Nothing that fails here could be mended: the memory is then left to the end of the process.
        let Ok(_entered) = self.device.enter() else { return };
        // SAFETY: the stream is live; once it is empty nobody uses buffers and events, which this value owns.
        unsafe {
            if result::stream::synchronize(self.stream).is_err() {
                return;
            }
            for Buffer { memory, free } in self.buffers.drain(..) {
                let _ = result::event::destroy(free);
                let _ = result::free_host(memory.as_ptr().cast());
            }
            let _ = result::stream::destroy(self.stream);
        }
    }
}
