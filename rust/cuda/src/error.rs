//! What can go wrong with a device.

use cudarc::driver::DriverError;
use thiserror::Error;

/// Errors of this crate; the messages are meant for users.
#[derive(Debug, Error)]
pub enum CudaError {
    /// The driver library is not on this machine.
    #[error("no CUDA driver: libcuda.so was not found (install the NVIDIA driver, or use the CPU)")]
    NoDriver,
    /// Driver works, machine has no device.
    #[error("the CUDA driver is installed but reports no device")]
    NoDevice,
    /// The driver is there but refused.
    #[error("the CUDA driver failed in {call}: {source:?}")]
    Driver {
        /// Driver function that failed.
        call: &'static str,
        /// The driver's own code.
        source: DriverError,
    },
    /// An index that no device has.
    #[error("there is no CUDA device {ordinal}: this process sees {count}")]
    Ordinal {
        /// The wish.
        ordinal: i32,
        /// What is there.
        count: i32,
    },
    /// The driver is older than the kernels' instructions.
    #[error("the CUDA driver supports CUDA {}.{}; the kernels need a driver for CUDA 12.0 or later (525.60 or later)", .version.0, .version.1)]
    OldDriver {
        /// (major, minor).
        version: (i32, i32),
    },
    /// The device is older than the kernels' instructions.
    #[error(
        "{name} has compute capability {}.{}; {need} needs {}.{} or later (without it: use the CPU)",
        .capability.0, .capability.1, .least.0, .least.1
    )]
    OldDevice {
        /// Marketing name of the device.
        name: String,
        /// (major, minor).
        capability: (i32, i32),
        /// What was asked for.
        need: &'static str,
        /// (major, minor).
        least: (i32, i32),
    },
    /// A child process cannot use its parent's contexts.
    #[error(
        "CUDA was started before this process was forked, and a forked child cannot use it; \
         hint: start workers with multiprocessing's \"spawn\" method, or keep CUDA tensors out of them"
    )]
    Forked,
    /// The driver could not compile a kernel file.
    #[error("the CUDA driver could not load the kernels of {file}: {source:?}{}", if .log.is_empty() { String::new() } else { format!("\n{}", .log) })]
    Load {
        /// Which kernels.
        file: String,
        /// The driver's own code.
        source: DriverError,
        /// The assembler's messages.
        log: String,
    },
    /// `QLORA_RS_PTX_DIR` names a folder that lacks the file.
    #[error("QLORA_RS_PTX_DIR: cannot read {path}: {source}")]
    PtxDir {
        /// What was looked for.
        path: String,
        /// Why not.
        source: std::io::Error,
    },
    /// A page size or budget that this device cannot have.
    #[error("{0}")]
    Budget(String),
    /// The device has no memory for frames.
    #[error(
        "{name} has {free} bytes free, and a paged pool needs {wish} of them beside {margin} that it leaves free; hint: lower \
         its budget, or free memory there (torch.cuda.empty_cache() gives back what torch only caches)"
    )]
    Full {
        /// Marketing name of the device.
        name: String,
        /// What is there.
        free: usize,
        /// What was asked for.
        wish: usize,
        /// What pools leave.
        margin: usize,
    },
    /// The host cannot give the memory that a pool needs behind it.
    #[error(
        "the host cannot pin {wish} bytes more: {reason}; pinned so far: {pinned} bytes; hint: keep less in the pool, free \
         memory on the host, or raise the limit of its container"
    )]
    HostMemory {
        /// What was asked for.
        wish: usize,
        /// What this process has.
        pinned: usize,
        /// Why not.
        reason: String,
    },
    /// Sizes or types that no kernel takes.
    #[error("{0}")]
    Unsupported(String),
}

/// Names the driver function in which a call failed.
pub(crate) fn failed(call: &'static str) -> impl Fn(DriverError) -> CudaError {
    move |source| match source.0 {
        cudarc::driver::sys::CUresult::CUDA_ERROR_NO_DEVICE => CudaError::NoDevice,
        _ => CudaError::Driver { call, source },
    }
}
