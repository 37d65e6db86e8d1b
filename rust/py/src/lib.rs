//! `qlora_rs._core`: what Python sees of the Rust crates. Holds no logic.

mod boundary;
mod checkpoint;
mod cuda;
mod cuda_optim;
mod device;
mod device_weight;
mod dlpack;
mod load;
mod optim;
mod paging;
mod quantize;
mod spec;
mod torch;

use pyo3::prelude::*;

/// The extension module: private, re-exported under better names by the Python package.
#[pymodule]
mod _core {
    use super::PyModule;
    use super::PyResult;
    use super::{Bound, PyModuleMethods};

    #[pymodule_export]
    use super::checkpoint::{checksum, file_checksum, pack_checkpoint, read_header, swap_paths};
    #[pymodule_export]
    use super::cuda::{cuda_quantize, cuda_quantize_scratch, cuda_warmup};
    #[pymodule_export]
    use super::cuda_optim::DeviceStep;
    #[pymodule_export]
    use super::device::driver_probe;
    #[pymodule_export]
    use super::device_weight::DeviceWeight;
    #[pymodule_export]
    use super::load::cuda_load;
    #[pymodule_export]
    use super::optim::{HostStep, dequantize_state, quantize_state};
    #[pymodule_export]
    use super::paging::Pool;
    #[pymodule_export]
    use super::quantize::{dequantize, double_quantize, dynamic_map, linear, quantize, simd_level};
    #[pymodule_export]
    use super::spec::Spec;
    #[pymodule_export]
    use super::torch::unwatched;

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
    #[pymodule_export]
    const NESTED_BLOCK_SIZE: usize = qlora_core::NESTED_BLOCK_SIZE;
    #[pymodule_export]
    const STATE_BLOCK_SIZE: usize = qlora_core::STATE_BLOCK_SIZE;
    #[pymodule_export]
    const MOST_STEP_PAGES: usize = qlora_cuda::MOST_PAGES;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("QUANT_TYPES", super::spec::quant_types())?;
        module.add("BLOCK_SIZES", super::spec::block_sizes())
    }
}
