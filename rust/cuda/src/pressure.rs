//! Memory of a device for others than pools: where there is none left, the device's pools give frames back.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use cudarc::driver::sys;
use qlora_paging::{Shared, Until};

use crate::context::{Relaxed, device, not_forked};
use crate::error::{CudaError, failed};
use crate::launch::DevicePtr;
use crate::paging::CudaBackend;

/// A pool of a device, for several threads.
pub type DevicePool = Shared<CudaBackend>;

/// Bytes of a device that pools leave to what is allocated past them and torch: code of kernels, streams, events.
pub(crate) const MARGIN: usize = 256 << 20;

/// All pools, with the index of their device.
static POOLS: Mutex<Vec<(i32, Weak<DevicePool>)>> = Mutex::new(Vec::new());

/// From now on the pool gives way to [`allocate`].
pub fn register(ordinal: i32, pool: &Arc<DevicePool>) {
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    pools.retain(|(_, pool)| pool.strong_count() > 0);
    pools.push((ordinal, Arc::downgrade(pool)));
}

fn pools_of(ordinal: i32) -> Vec<Arc<DevicePool>> {
    let pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    pools.iter().filter(|(of, _)| *of == ordinal).filter_map(|(_, pool)| pool.upgrade()).collect()
}

/// Memory of the device; its pools give frames back for it where they must. Callers may hold locks of their own: neither
/// this nor any thread that it waits for takes a lock that is not this crate's.
///
/// # Errors
/// There is none even so, or the device's own.
pub fn allocate(ordinal: i32, bytes: usize) -> Result<DevicePtr, CudaError> {
    let device = device(ordinal)?;
    let _entered = device.enter()?;
    let _relaxed = Relaxed::enter()?;
    let out_of_memory = match take(bytes)? {
        Taken::Memory(address) => return Ok(address),
        Taken::Nothing(error) => error,
    };
    let pools = pools_of(ordinal);
    let spare: usize = pools.iter().map(|pool| pool.spare_bytes().unwrap_or(0)).sum();
    if free_bytes()? + spare < bytes {
        return Err(out_of_memory);
    }
    // What is free may lie in pieces: where giving back what is missing is not enough, as much as is wanted.
    for wish in [(bytes + MARGIN).saturating_sub(free_bytes()?), bytes] {
        let mut left = wish.max(1);
        for pool in &pools {
            // A pool whose device has failed gives nothing.
            left = left.saturating_sub(pool.give_back(left, Until::Freed).unwrap_or(0));
            if left == 0 {
                break;
            }
        }
        if let Taken::Memory(address) = take(bytes)? {
            return Ok(address);
        }
    }
    Err(out_of_memory)
}

enum Taken {
    Memory(DevicePtr),
    /// The device is out of memory.
    Nothing(CudaError),
}

fn take(bytes: usize) -> Result<Taken, CudaError> {
    let mut address = 0;
    // SAFETY: the out pointer is a live local, and a context is current.
    match unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) }.result() {
        Ok(()) => Ok(Taken::Memory(address)),
        Err(source) if source.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            Ok(Taken::Nothing(failed("cuMemAlloc")(source)))
        }
        Err(source) => Err(failed("cuMemAlloc")(source)),
    }
}

/// Bytes of the device that nobody has; its context is current.
pub(crate) fn free_bytes() -> Result<usize, CudaError> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: the out pointers are live locals, and a context is current.
    unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) }.result().map_err(failed("cuMemGetInfo"))?;
    Ok(free)
}

/// Give back what [`allocate`] gave; pools may then take back what they gave for it.
///
/// # Errors
/// The device's own.
///
/// # Safety
/// The address came from `allocate` for this device, is freed once, and nothing queued on the device still uses it.
pub unsafe fn release(ordinal: i32, address: DevicePtr) -> Result<(), CudaError> {
    not_forked()?;
    let _entered = device(ordinal)?.enter()?;
    let _relaxed = Relaxed::enter()?;
    // SAFETY: the caller's promise.
    unsafe { sys::cuMemFree_v2(address) }.result().map_err(failed("cuMemFree"))?;
    for pool in pools_of(ordinal) {
        pool.memory_was_freed();
    }
    Ok(())
}
