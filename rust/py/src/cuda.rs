//! Queue the kernels on device memory; all calls return before the work is done.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use qlora_core::{Layout, QuantSpec};
use qlora_cuda::{CudaError, DevicePtr, DeviceScales, LowRank, Nested, Operands, Quantized, Queue};

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
fn run<F>(py: Python<'_>, work: F) -> PyResult<()>
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

/// A packed weight in device memory, checked once. The caller keeps its tensors alive, and makes a new one when they move.
#[pyclass(frozen, module = "qlora_rs._core")]
pub struct DeviceWeight {
    spec: QuantSpec,
    layout: Layout,
    codes: DevicePtr,
    scales: DeviceScales,
}

#[pymethods]
impl DeviceWeight {
    /// Scales are doubly quantized iff the spec says so; only then `scale` and `offset` are given.
    #[new]
    #[pyo3(signature = (spec, *, layout, codes, absmax, scale, offset))]
    fn new(
        spec: &Spec,
        layout: Shape,
        codes: Memory,
        absmax: Memory,
        scale: Option<Memory>,
        offset: Option<Memory>,
    ) -> PyResult<Self> {
        let layout = layout_of(spec, layout)?;
        expect("codes", codes.1, layout.code_bytes())?;
        let scales = scales_of(spec, &layout, absmax, scale, offset)?;
        Ok(Self { spec: spec.inner.clone(), layout, codes: pointer(codes), scales })
    }

    /// Write the float weight to `out` (elements of `dtype`).
    #[pyo3(signature = (queue, out, dtype))]
    fn dequantize(&self, py: Python<'_>, queue: QueueOf, out: Memory, dtype: u8) -> PyResult<()> {
        let dtype = float_type(dtype)?;
        expect("out", out.1, self.layout.elements())?;
        let (queue, out) = (queue_of(queue), pointer(out));
        run(py, || {
            // SAFETY: `_bridge.py` passes live contiguous tensors of this device, whose lengths were checked.
            unsafe { qlora_cuda::dequantize(queue, &self.spec, &self.layout, self.codes, self.scales, out, dtype) }
        })
    }

    /// Up to how many tokens `linear` multiplies without dequantizing; 0: never.
    fn most_fused_tokens(&self, device: i32) -> PyResult<u32> {
        qlora_cuda::most_fused_tokens(device, &self.spec, &self.layout, self.codes).map_err(IntoPyErr::into_py_err)
    }

    /// y = x W^T + bias + lora scale * xa B^T in one kernel: x (tokens, in), y (tokens, out), bias (out) or None, and
    /// `lora` None or (xa (tokens, r), B (out, r), r, scale); all of `dtype`, bfloat16 or float16. `settled` says that
    /// nothing writes to the weight any more: it may then be fetched before the kernel before has ended.
    #[pyo3(signature = (queue, tokens, x, y, bias, lora, dtype, settled))]
    #[allow(clippy::too_many_arguments)] // named at the only call, in _bridge.py
    fn linear(
        &self,
        py: Python<'_>,
        queue: QueueOf,
        tokens: u32,
        x: Memory,
        y: Memory,
        bias: Option<Memory>,
        lora: Option<(Memory, Memory, usize, f32)>,
        dtype: u8,
        settled: bool,
    ) -> PyResult<()> {
        let dtype = float_type(dtype)?;
        let (rows, columns, count) = (self.layout.rows(), self.layout.cols(), tokens as usize);
        expect("x", x.1, count * columns)?;
        expect("y", y.1, count * rows)?;
        if let Some(bias) = bias {
            expect("bias", bias.1, rows)?;
        }
        if let Some((xa, b, rank, _)) = lora {
            expect("xa", xa.1, count * rank)?;
            expect("B", b.1, rows * rank)?;
        }
        let lora =
            lora.map(|(xa, b, rank, scale)| LowRank { xa: pointer(xa), b: pointer(b), scale, rank: rank as i32 });
        let bias = bias.map_or(0, pointer);
        let operands = Operands { x: pointer(x), y: pointer(y), bias, settled, lora, tokens, dtype };
        let queue = queue_of(queue);
        run(py, || {
            // SAFETY: `_bridge.py` passes live contiguous tensors of this device, whose lengths were checked.
            unsafe { qlora_cuda::linear_4bit(queue, &self.spec, &self.layout, self.codes, self.scales, &operands) }
        })
    }
}

/// Checked against the layout; the two parts of doubly quantized scales are there iff the spec says so.
fn scales_of(
    spec: &Spec,
    layout: &Layout,
    absmax: Memory,
    scale: Option<Memory>,
    offset: Option<Memory>,
) -> PyResult<DeviceScales> {
    let nested = spec.inner.double_quant();
    expect("absmax", absmax.1, layout.blocks())?;
    expect("scale", scale.map_or(0, |memory| memory.1), if nested { layout.groups() } else { 0 })?;
    expect("offset", offset.map_or(0, |memory| memory.1), if nested { layout.experts() } else { 0 })?;
    Ok(DeviceScales {
        absmax: pointer(absmax),
        group_scale: scale.map_or(0, pointer),
        offset: offset.map_or(0, pointer),
    })
}

/// Compile every kernel for this device now, so that none is compiled in a graph capture or a timed step.
#[pyfunction]
pub fn cuda_warmup(py: Python<'_>, device: i32) -> PyResult<()> {
    run(py, || qlora_cuda::device(device)?.warmup())
}
