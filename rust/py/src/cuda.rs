//! Queue the kernels on device memory; all calls return before the work is done.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use qlora_core::Layout;
use qlora_cuda::{CudaError, DevicePtr, Nested, Quantized, Queue};

use crate::boundary::{IntoPyErr, Memory, expect};
use crate::quantize::{Shape, float_type, layout_of};
use crate::spec::Spec;

pyo3::import_exception!(qlora_rs.errors, DeviceError);
pyo3::import_exception!(qlora_rs.errors, UnsupportedError);

impl IntoPyErr for CudaError {
    fn into_py_err(self) -> PyErr {
        match self {
            Self::Unsupported(message) => UnsupportedError::new_err(message),
            Self::Budget(message) => PyValueError::new_err(message),
            _ => DeviceError::new_err(self.to_string()),
        }
    }
}

/// Device index and the stream's handle, as `_bridge.py` gives them.
pub type QueueOf = (i32, usize);

/// Launching can wait for room in the driver's queue, and a kernel's first use compiles it: not under the GIL.
pub fn run<F>(py: Python<'_>, work: F) -> PyResult<()>
where
    F: FnOnce() -> Result<(), CudaError> + Send,
{
    py.detach(work).map_err(IntoPyErr::into_py_err)
}

pub fn queue_of((device, stream): QueueOf) -> Queue {
    Queue { device, stream }
}

fn pointer((address, _): Memory) -> DevicePtr {
    address as DevicePtr
}

/// u8 codes, group scales and offset of doubly quantized scales.
type NestedMemory = (Memory, Memory, Memory);

/// How many int64 `cuda_quantize` needs to work in.
#[pyfunction]
pub fn cuda_quantize_scratch(spec: &Spec, layout: Shape) -> PyResult<usize> {
    Ok(qlora_cuda::scratch_bytes(&spec.inner, &layout_of(spec, layout)?).div_ceil(8))
}

/// Quantize `source` into `codes` and float32 `absmax`, and these again into `nested`, which is given iff the spec asks for
/// it. `scratch`: `cuda_quantize_scratch` int64; with `check_finite` its first four bytes, an int32, become 1 where NaN or
/// Inf is seen, else 0.
#[pyfunction]
#[pyo3(signature = (spec, *, queue, layout, source, dtype, codes, absmax, nested, scratch, check_finite))]
#[allow(clippy::too_many_arguments)] // named at the only call, in _bridge.py
pub fn cuda_quantize(
    py: Python<'_>,
    spec: &Spec,
    queue: QueueOf,
    layout: Shape,
    source: Memory,
    dtype: u8,
    codes: Memory,
    absmax: Memory,
    nested: Option<NestedMemory>,
    scratch: Memory,
    check_finite: bool,
) -> PyResult<()> {
    let (layout, dtype) = (layout_of(spec, layout)?, float_type(dtype)?);
    expect("source", source.1, layout.elements())?;
    expect("codes", codes.1, layout.code_bytes())?;
    expect("absmax", absmax.1, layout.blocks())?;
    expect("nested parts", usize::from(nested.is_some()), usize::from(spec.inner.double_quant()))?;
    let nested = nested.map(|parts| nested_of(&layout, parts)).transpose()?;
    expect("scratch", scratch.1, qlora_cuda::scratch_bytes(&spec.inner, &layout).div_ceil(8))?;
    let out =
        Quantized { codes: pointer(codes), absmax: pointer(absmax), scratch: pointer(scratch), check_finite, nested };
    let (source, queue) = (pointer(source), queue_of(queue));
    run(py, || {
        // SAFETY: `_bridge.py` passes live contiguous tensors of this device, whose lengths were checked above.
        unsafe { qlora_cuda::quantize(queue, &spec.inner, &layout, source, dtype, &out) }
    })
}

fn nested_of(layout: &Layout, (codes, scale, offset): NestedMemory) -> PyResult<Nested> {
    expect("scale codes", codes.1, layout.blocks())?;
    expect("scale", scale.1, layout.groups())?;
    expect("offset", offset.1, layout.experts())?;
    Ok(Nested { codes: pointer(codes), group_scale: pointer(scale), offset: pointer(offset) })
}

/// Compile every kernel for this device now, so that none is compiled in a graph capture or a timed step.
#[pyfunction]
pub fn cuda_warmup(py: Python<'_>, device: i32) -> PyResult<()> {
    run(py, || qlora_cuda::device(device)?.warmup())
}
