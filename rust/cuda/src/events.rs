//! Events, and a stock of them that are used again once nobody refers to them.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{result, sys};

use crate::context::{Device, Relaxed, not_forked};
use crate::error::{CudaError, failed};

/// Does an event tell when it was?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stamp {
    /// No: recording it is cheaper.
    None,
    /// Yes.
    Time,
}

/// An event on which a thread sleeps instead of spinning: others have work to do. A context is current.
pub(crate) fn event(stamp: Stamp) -> Result<sys::CUevent, CudaError> {
    use sys::CUevent_flags as Flags;

    let timing = if stamp == Stamp::None { Flags::CU_EVENT_DISABLE_TIMING as u32 } else { 0 };
    let mut event = std::ptr::null_mut();
    // SAFETY: the out pointer is a live local, and a context is current.
    unsafe { sys::cuEventCreate(&raw mut event, timing | Flags::CU_EVENT_BLOCKING_SYNC as u32) }
        .result()
        .map_err(failed("cuEventCreate"))?;
    Ok(event)
}

/// A stream, as a handle that any thread may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stream(pub(crate) sys::CUstream);

// SAFETY: the driver lets any thread use a stream's handle.
unsafe impl Send for Stream {}

#[derive(Debug)]
struct Handle(sys::CUevent);

// SAFETY: the driver lets any thread use an event's handle.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// Events of one device that nobody refers to.
#[derive(Debug)]
pub(crate) struct Stock {
    device: &'static Device,
    stamp: Stamp,
    free: Mutex<Vec<Handle>>,
}

/// A moment on a stream. Clones mean the same moment; when the last is dropped the event goes back to its stock. (What
/// waits for it already goes on waiting for this moment: a wait means what was recorded when it was queued.)
#[derive(Debug, Clone)]
pub struct Event(Arc<Recorded>);

#[derive(Debug)]
struct Recorded {
    handle: Option<Handle>,
    stock: Arc<Stock>,
    /// On the lane in.
    fetch: bool,
}

impl Stock {
    pub(crate) fn new(device: &'static Device, stamp: Stamp) -> Arc<Self> {
        Arc::new(Self { device, stamp, free: Mutex::default() })
    }

    /// The moment after what is queued on the stream so far. `fetch`: it is the lane in. A context is current.
    pub(crate) fn record(self: &Arc<Self>, stream: Stream, fetch: bool) -> Result<Event, CudaError> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let handle = match free {
            Some(handle) => handle,
            None => Handle(event(self.stamp)?),
        };
        let recorded = Recorded { handle: Some(handle), stock: Arc::clone(self), fetch };
        // SAFETY: the event is live, and so is the stream, by the pool's contract with its callers.
        unsafe { result::event::record(recorded.event(), stream.0) }.map_err(failed("cuEventRecord"))?;
        Ok(Event(Arc::new(recorded)))
    }
}

impl Drop for Stock {
    fn drop(&mut self) {
        if not_forked().is_err() {
            return;
        }
        let Ok(_entered) = self.device.enter() else { return };
        for Handle(event) in self.free.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // SAFETY: nobody refers to it. A failure leaves it to the end of the process.
            let _ = unsafe { result::event::destroy(event) };
        }
    }
}

impl Recorded {
    fn event(&self) -> sys::CUevent {
        self.handle.as_ref().map_or(std::ptr::null_mut(), |handle| handle.0)
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        if let Some(handle) = self.handle.take() {
            self.stock.free.lock().unwrap_or_else(PoisonError::into_inner).push(handle);
        }
    }
}

impl Event {
    /// Was it recorded on the lane in?
    pub(crate) fn is_fetch(&self) -> bool {
        self.0.fetch
    }

    /// What is queued on the stream from now on starts after this moment. A context is current.
    pub(crate) fn hold(&self, stream: Stream) -> Result<(), CudaError> {
        // SAFETY: both are live.
        unsafe { result::stream::wait_event(stream.0, self.0.event(), sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) }
            .map_err(failed("cuStreamWaitEvent"))
    }

    /// Has the device passed it?
    pub(crate) fn has_passed(&self) -> Result<bool, CudaError> {
        let _relaxed = Relaxed::enter()?;
        // SAFETY: the event is live.
        match unsafe { sys::cuEventQuery(self.0.event()) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => other.result().map(|()| true).map_err(failed("cuEventQuery")),
        }
    }

    /// The host waits for it.
    pub(crate) fn synchronize(&self) -> Result<(), CudaError> {
        let _entered = self.0.stock.device.enter()?;
        let _relaxed = Relaxed::enter()?;
        // SAFETY: the event is live.
        unsafe { result::event::synchronize(self.0.event()) }.map_err(failed("cuEventSynchronize"))
    }

    /// Seconds from this moment until another, both of which have passed and have time stamps.
    pub(crate) fn seconds_until(&self, end: &Self) -> Result<f64, CudaError> {
        let _entered = self.0.stock.device.enter()?;
        let _relaxed = Relaxed::enter()?;
        let mut milliseconds = 0.0;
        // SAFETY: the out pointer is a live local, and both events are live.
        unsafe { sys::cuEventElapsedTime(&raw mut milliseconds, self.0.event(), end.0.event()) }
            .result()
            .map_err(failed("cuEventElapsedTime"))?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}
