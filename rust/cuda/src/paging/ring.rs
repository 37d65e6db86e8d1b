//! Frames in a ring of addresses: each piece of device memory is mapped twice, as many frames apart as there are.

use cudarc::driver::sys;

use crate::context::{Device, Relaxed};
use crate::error::{CudaError, failed};
use crate::launch::DevicePtr;
use crate::pressure::{MARGIN, free_bytes};

/// Address space for `frames` frames, twice, and the memory of those that have some.
#[derive(Debug)]
pub(super) struct Ring {
    device: &'static Device,
    start: DevicePtr,
    page_bytes: usize,
    frames: usize,
    /// Of each frame that has memory.
    memory: Vec<Option<sys::CUmemGenericAllocationHandle>>,
}

fn location(device: &Device) -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: device.ordinal }
}

fn properties(device: &Device) -> sys::CUmemAllocationProp {
    // SAFETY: a plain C struct for which all zeros is a valid value: no handles to export, no flags.
    let mut properties = unsafe { std::mem::zeroed::<sys::CUmemAllocationProp>() };
    properties.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location = location(device);
    properties
}

/// What page sizes are multiples of.
fn granularity(device: &Device) -> Result<usize, CudaError> {
    use sys::CUdevice_attribute as Attribute;
    use sys::CUmemAllocationGranularity_flags as Flags;

    if device.attribute(Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED)? == 0 {
        return Err(CudaError::Unsupported(format!(
            "{} does not let addresses be managed, which a paged pool needs",
            device.name
        )));
    }
    let (properties, mut bytes) = (properties(device), 0);
    let flag = Flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
    // SAFETY: the pointers are to live locals.
    unsafe { sys::cuMemGetAllocationGranularity(&raw mut bytes, &raw const properties, flag) }
        .result()
        .map_err(failed("cuMemGetAllocationGranularity"))?;
    Ok(bytes)
}

impl Ring {
    /// Reserves the addresses; no frame has memory yet. The device's context is current.
    pub(super) fn new(device: &'static Device, frames: usize, page_bytes: usize) -> Result<Self, CudaError> {
        let granularity = granularity(device)?;
        if page_bytes == 0 || !page_bytes.is_multiple_of(granularity) {
            return Err(CudaError::Budget(format!(
                "page_size must be a multiple of {granularity} bytes on {}, got {page_bytes}",
                device.name
            )));
        }
        let (budget, total) = (frames.saturating_mul(page_bytes), device.memory_bytes()?);
        if budget > total {
            return Err(CudaError::Budget(format!(
                "a budget of {budget} bytes is more than {} has, which is {total}: lower it",
                device.name
            )));
        }
        let mut start = 0;
        if frames > 0 {
            // SAFETY: the out pointer is a live local; any address will do.
            unsafe { sys::cuMemAddressReserve(&raw mut start, 2 * budget, 0, 0, 0) }
                .result()
                .map_err(failed("cuMemAddressReserve"))?;
        }
        Ok(Self { device, start, page_bytes, frames, memory: vec![None; frames] })
    }

    pub(super) fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    pub(super) fn frames(&self) -> usize {
        self.frames
    }

    /// Of a frame; from `frames()` on, of the same frames once more.
    pub(super) fn address(&self, frame: usize) -> DevicePtr {
        self.start + (frame * self.page_bytes) as DevicePtr
    }

    /// Memory for frames that have none; all or nothing, and the margin stays free.
    pub(super) fn commit(&mut self, first: usize, count: usize) -> Result<(), CudaError> {
        let _entered = self.device.enter()?;
        let _relaxed = Relaxed::enter()?;
        let (free, wish) = (free_bytes()?, count * self.page_bytes);
        if free < wish + MARGIN {
            return Err(CudaError::Full { name: self.device.name.clone(), free, wish, margin: MARGIN });
        }
        for frame in first..first + count {
            if let Err(error) = self.back(frame) {
                self.give_up(first, frame - first);
                return Err(error);
            }
        }
        for round in [first, first + self.frames] {
            if let Err(error) = self.allow(round, count) {
                self.give_up(first, count);
                return Err(error);
            }
        }
        Ok(())
    }

    /// One piece of memory, mapped in both rounds of the ring.
    fn back(&mut self, frame: usize) -> Result<(), CudaError> {
        let (properties, mut handle) = (properties(self.device), 0);
        // SAFETY: the pointers are to live locals.
        unsafe { sys::cuMemCreate(&raw mut handle, self.page_bytes, &raw const properties, 0) }
            .result()
            .map_err(failed("cuMemCreate"))?;
        for (index, round) in [frame, frame + self.frames].into_iter().enumerate() {
            // SAFETY: the addresses are reserved, aligned to pages, and nothing is mapped there: the frame had no memory.
            let mapped = unsafe { sys::cuMemMap(self.address(round), self.page_bytes, 0, handle, 0) };
            if let Err(source) = mapped.result() {
                if index == 1 {
                    self.unmap(frame);
                }
                // SAFETY: just made, and mapped nowhere any more.
                let _ = unsafe { sys::cuMemRelease(handle) };
                return Err(failed("cuMemMap")(source));
            }
        }
        self.memory[frame] = Some(handle);
        Ok(())
    }

    fn allow(&self, first: usize, count: usize) -> Result<(), CudaError> {
        let access = sys::CUmemAccessDesc {
            location: location(self.device),
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: all of these frames have just been mapped; the description is a live local.
        unsafe { sys::cuMemSetAccess(self.address(first), count * self.page_bytes, &raw const access, 1) }
            .result()
            .map_err(failed("cuMemSetAccess"))
    }

    fn unmap(&self, round: usize) {
        // SAFETY: mapped by `back`, and nothing on the device uses it: the pool has seen to that. What cannot be unmapped
        // stays mapped until the process ends.
        let _ = unsafe { sys::cuMemUnmap(self.address(round), self.page_bytes) };
    }

    /// Give the memory of frames back that have some.
    pub(super) fn decommit(&mut self, first: usize, count: usize) -> Result<(), CudaError> {
        let _entered = self.device.enter()?;
        let _relaxed = Relaxed::enter()?;
        self.give_up(first, count);
        Ok(())
    }

    fn give_up(&mut self, first: usize, count: usize) {
        for frame in first..first + count {
            if let Some(handle) = self.memory[frame].take() {
                self.unmap(frame);
                self.unmap(frame + self.frames);
                // SAFETY: made by `back`; released once.
                let _ = unsafe { sys::cuMemRelease(handle) };
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.frames == 0 || crate::context::not_forked().is_err() {
            return;
        }
        let Ok(_entered) = self.device.enter() else { return };
        let _relaxed = Relaxed::enter();
        self.give_up(0, self.frames);
        // SAFETY: reserved with this size, and nothing is mapped there any more.
        let _ = unsafe { sys::cuMemAddressFree(self.start, 2 * self.frames * self.page_bytes) };
    }
}
