//! The one place that launches kernels.

use std::ffi::c_void;

use cudarc::driver::{result, sys};

use crate::context::Device;
use crate::error::{CudaError, failed};
use crate::modules::Function;

/// An address in device memory; 0 is the null pointer.
pub type DevicePtr = u64;

/// Where work is queued.
#[derive(Debug, Clone, Copy)]
pub struct Queue {
    /// Index of the device.
    pub device: i32,
    /// The caller's stream there: a `CUstream` handle as an integer (0: the default stream).
    pub stream: usize,
}

/// Where a kernel runs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    pub(crate) ctas: (u32, u32, u32),
    pub(crate) threads: u32,
    pub(crate) shared_bytes: u32,
    /// CTAs of one cluster along z; 1 for none.
    pub(crate) cluster: u32,
    /// Let the kernel start before the one before it in the stream has ended (it waits for it by itself).
    pub(crate) overlap: bool,
}

impl Grid {
    pub(crate) fn new(ctas: (u32, u32), threads: u32) -> Self {
        Self { ctas: (ctas.0, ctas.1, 1), threads, shared_bytes: 0, cluster: 1, overlap: false }
    }
}

/// The address of a kernel argument, as the driver takes them.
pub(crate) fn arg<T>(value: &T) -> *mut c_void {
    std::ptr::from_ref(value).cast_mut().cast()
}

/// Queue a kernel on the caller's stream; the device's context must be current.
///
/// # Safety
/// `args` points to live values of the kernel's parameter types, in its order, and the device memory that they name is
/// valid for what the kernel does with it until the stream has passed it.
pub(crate) unsafe fn launch(
    function: &Function,
    grid: Grid,
    queue: Queue,
    args: &mut [*mut c_void],
) -> Result<(), CudaError> {
    function.allow_shared(grid.shared_bytes)?;
    let stream = queue.stream as sys::CUstream;
    if !grid.overlap && grid.cluster == 1 {
        // SAFETY: the caller's promise.
        return unsafe {
            result::launch_kernel(function.handle, grid.ctas, (grid.threads, 1, 1), grid.shared_bytes, stream, args)
        }
        .map_err(failed("cuLaunchKernel"));
    }
    // SAFETY: plain C structs for which all zeros is a valid value.
    let (mut attributes, mut config) =
        unsafe { (std::mem::zeroed::<[sys::CUlaunchAttribute; 2]>(), std::mem::zeroed::<sys::CUlaunchConfig>()) };
    let mut used = 0;
    if grid.overlap {
        attributes[used].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attributes[used].value.programmaticStreamSerializationAllowed = 1;
        used += 1;
    }
    if grid.cluster > 1 {
        attributes[used].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        attributes[used].value.clusterDim =
            sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: 1, y: 1, z: grid.cluster };
        used += 1;
    }
    (config.gridDimX, config.gridDimY, config.gridDimZ) = grid.ctas;
    (config.blockDimX, config.blockDimY, config.blockDimZ) = (grid.threads, 1, 1);
    config.sharedMemBytes = grid.shared_bytes;
    config.hStream = stream;
    config.attrs = attributes.as_mut_ptr();
    config.numAttrs = used as u32;
    // SAFETY: the caller's promise; the configuration and its attributes are live locals.
    unsafe { sys::cuLaunchKernelEx(&raw const config, function.handle, args.as_mut_ptr(), std::ptr::null_mut()) }
        .result()
        .map_err(failed("cuLaunchKernelEx"))
}

/// CTAs that take `items`, `per_cta` each.
pub(crate) fn ctas(items: usize, per_cta: usize) -> Result<u32, CudaError> {
    i32::try_from(items.div_ceil(per_cta)).map(i32::cast_unsigned).map_err(|_| {
        CudaError::Unsupported(format!("a weight of {items} elements is more than one launch takes: use slices"))
    })
}

/// CTAs that share `items`, `per_cta` at a time, without more of them than `per_multiprocessor` each.
pub(crate) fn strided_ctas(device: &Device, items: usize, per_cta: usize, per_multiprocessor: u32) -> u32 {
    let needed = u32::try_from(items.div_ceil(per_cta)).unwrap_or(u32::MAX);
    needed.min(device.multiprocessors * per_multiprocessor).max(1)
}
