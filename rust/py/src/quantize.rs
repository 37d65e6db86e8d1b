//! Quantize, dequantize and multiply in dense CPU memory.

use half::{bf16, f16};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use qlora_core::{
    Control, CoreError, DynamicMap, FloatType, Floats, FloatsMut, Layout, Nonfinite, PackedMatrix, Parallel, Scales,
    dequantize as core_dequantize, double_quantize as core_double_quantize, linear as core_linear,
    quantize as core_quantize,
};

use crate::boundary::{IntoPyErr, Memory, detached, detached_brief, expect, read, write};
use crate::spec::Spec;

/// (experts, rows, columns).
pub type Shape = (usize, usize, usize);

/// From how many elements on a call gets a thread of its own, so that Ctrl-C is answered.
const LONG_CALL: usize = 1 << 26;

fn run<F>(py: Python<'_>, elements: usize, work: F) -> PyResult<()>
where
    F: FnOnce(&Control) -> Result<(), CoreError> + Send,
{
    if elements < LONG_CALL { detached_brief(py, work) } else { detached(py, None, work) }
}

/// Sizes of a weight, checked.
pub fn layout_of(spec: &Spec, (experts, rows, columns): Shape) -> PyResult<Layout> {
    Layout::new(experts, rows, columns, &spec.inner).map_err(IntoPyErr::into_py_err)
}

/// The float type that Python's code names.
pub fn float_type(code: u8) -> PyResult<FloatType> {
    match code {
        0 => Ok(FloatType::F32),
        1 => Ok(FloatType::Bf16),
        2 => Ok(FloatType::F16),
        _ => Err(PyValueError::new_err(format!("unknown dtype code {code}"))),
    }
}

/// Quantize `source` (elements of `dtype`: 0 float32, 1 bfloat16, 2 float16) into `codes` (bytes) and `absmax` (float32).
#[pyfunction]
#[pyo3(signature = (spec, *, layout, source, dtype, codes, absmax, check_finite, num_threads))]
#[allow(clippy::too_many_arguments)] // named at the only call, in _bridge.py
pub fn quantize(
    py: Python<'_>,
    spec: &Spec,
    layout: Shape,
    source: Memory,
    dtype: u8,
    codes: Memory,
    absmax: Memory,
    check_finite: bool,
    num_threads: usize,
) -> PyResult<()> {
    let layout = layout_of(spec, layout)?;
    expect("source", source.1, layout.elements())?;
    expect("codes", codes.1, layout.code_bytes())?;
    expect("absmax", absmax.1, layout.blocks())?;
    let nonfinite = if check_finite { Nonfinite::Raise } else { Nonfinite::Propagate };
    // SAFETY: `_bridge.py` passes live contiguous tensors of this dtype, the outputs freshly made by itself.
    let (floats, codes, absmax) =
        unsafe { (floats(source, float_type(dtype)?), write::<u8>(codes), write::<f32>(absmax)) };
    let parallel = Parallel::new(num_threads);
    run(py, layout.elements(), |control| {
        core_quantize(floats, &layout, &spec.inner, nonfinite, codes, absmax, &parallel, control)
    })
}

/// Quantize the float32 scales of each expert to 8-bit codes, group scales and an offset.
#[pyfunction]
#[pyo3(signature = (spec, *, layout, absmax, codes, scale, offset, num_threads))]
#[allow(clippy::too_many_arguments)]
pub fn double_quantize(
    py: Python<'_>,
    spec: &Spec,
    layout: Shape,
    absmax: Memory,
    codes: Memory,
    scale: Memory,
    offset: Memory,
    num_threads: usize,
) -> PyResult<()> {
    let layout = layout_of(spec, layout)?;
    expect("absmax", absmax.1, layout.blocks())?;
    expect("codes", codes.1, layout.blocks())?;
    expect("scale", scale.1, layout.groups())?;
    expect("offset", offset.1, layout.experts())?;
    // SAFETY: as in `quantize`.
    let (absmax, codes, scale, offset) =
        unsafe { (read::<f32>(absmax), write::<u8>(codes), write::<f32>(scale), write::<f32>(offset)) };
    let parallel = Parallel::new(num_threads);
    run(py, layout.blocks(), |control| {
        core_double_quantize(absmax, layout.blocks_per_expert(), codes, scale, offset, &parallel, control)
    })
}

/// The scales in memory: 8-bit codes with `scale` and `offset`, else float32.
///
/// # Safety
/// As [`read`], for each part.
unsafe fn scales_of<'a>(
    layout: &Layout,
    absmax: Memory,
    scale: Option<Memory>,
    offset: Option<Memory>,
) -> PyResult<Scales<'a>> {
    expect("absmax", absmax.1, layout.blocks())?;
    match (scale, offset) {
        (Some(scale), Some(offset)) => {
            expect("scale", scale.1, layout.groups())?;
            expect("offset", offset.1, layout.experts())?;
            // SAFETY: the caller's promise.
            Ok(unsafe {
                Scales::Nested { codes: read::<u8>(absmax), scale: read::<f32>(scale), offset: read::<f32>(offset) }
            })
        }
        // SAFETY: the caller's promise.
        (None, None) => Ok(unsafe { Scales::Plain(read::<f32>(absmax)) }),
        _ => Err(PyValueError::new_err("scale and offset come together")),
    }
}

/// Elements in memory, only read.
///
/// # Safety
/// As [`read`].
pub unsafe fn floats<'a>(memory: Memory, dtype: FloatType) -> Floats<'a> {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            FloatType::F32 => Floats::F32(read::<f32>(memory)),
            FloatType::Bf16 => Floats::Bf16(read::<bf16>(memory)),
            FloatType::F16 => Floats::F16(read::<f16>(memory)),
        }
    }
}

/// Elements in memory, written.
///
/// # Safety
/// As [`write`].
pub unsafe fn floats_mut<'a>(memory: Memory, dtype: FloatType) -> FloatsMut<'a> {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            FloatType::F32 => FloatsMut::F32(write::<f32>(memory)),
            FloatType::Bf16 => FloatsMut::Bf16(write::<bf16>(memory)),
            FloatType::F16 => FloatsMut::F16(write::<f16>(memory)),
        }
    }
}

/// Dequantize into `out` (elements of `dtype`). With `scale` and `offset` the `absmax` are 8-bit codes, else float32.
#[pyfunction]
#[pyo3(signature = (spec, *, layout, codes, absmax, scale, offset, out, dtype, num_threads))]
#[allow(clippy::too_many_arguments)]
pub fn dequantize(
    py: Python<'_>,
    spec: &Spec,
    layout: Shape,
    codes: Memory,
    absmax: Memory,
    scale: Option<Memory>,
    offset: Option<Memory>,
    out: Memory,
    dtype: u8,
    num_threads: usize,
) -> PyResult<()> {
    let layout = layout_of(spec, layout)?;
    expect("codes", codes.1, layout.code_bytes())?;
    expect("out", out.1, layout.elements())?;
    let dtype = float_type(dtype)?;
    // SAFETY: as in `quantize`.
    let scales = unsafe { scales_of(&layout, absmax, scale, offset) }?;
    // SAFETY: as in `quantize`.
    let (codes, out) = unsafe { (read::<u8>(codes), floats_mut(out, dtype)) };
    let parallel = Parallel::new(num_threads);
    run(py, layout.elements(), |control| core_dequantize(codes, scales, &layout, &spec.inner, out, &parallel, control))
}

/// `y` (tokens, rows) = `x` (tokens, columns) times the transposed matrix, plus `bias` (rows), elements of `dtype`; the
/// dequantized matrix is never written. `absmax`, `scale` and `offset` as in `dequantize`.
#[pyfunction]
#[pyo3(signature = (spec, *, layout, codes, absmax, scale, offset, x, bias, y, dtype, num_threads))]
#[allow(clippy::too_many_arguments)]
pub fn linear(
    py: Python<'_>,
    spec: &Spec,
    layout: Shape,
    codes: Memory,
    absmax: Memory,
    scale: Option<Memory>,
    offset: Option<Memory>,
    x: Memory,
    bias: Option<Memory>,
    y: Memory,
    dtype: u8,
    num_threads: usize,
) -> PyResult<()> {
    let layout = layout_of(spec, layout)?;
    expect("codes", codes.1, layout.code_bytes())?;
    let dtype = float_type(dtype)?;
    // SAFETY: as in `quantize`; the core checks the lengths of x, bias and y against the layout.
    let (codes, scales, x, bias, y) = unsafe {
        (
            read::<u8>(codes),
            scales_of(&layout, absmax, scale, offset)?,
            floats(x, dtype),
            bias.map(|bias| floats(bias, dtype)),
            floats_mut(y, dtype),
        )
    };
    let parallel = Parallel::new(num_threads);
    let matrix = PackedMatrix { codes, scales, layout: &layout, spec: &spec.inner };
    run(py, layout.elements(), |control| core_linear(&matrix, x, bias, y, &parallel, control))
}

/// The 256 float32 values of the signed 8-bit dynamic map, which double quantization uses, or of the unsigned one.
#[pyfunction]
#[pyo3(signature = (signed=true))]
pub fn dynamic_map(signed: bool) -> Vec<f32> {
    let map = if signed { DynamicMap::Signed } else { DynamicMap::Unsigned };
    map.codebook().values().to_vec()
}

/// The instruction set that the kernels use here: "scalar", "avx2" or "avx512" (`QLORA_RS_SIMD` lowers it).
#[pyfunction]
pub fn simd_level() -> PyResult<&'static str> {
    Ok(qlora_core::simd_level().map_err(IntoPyErr::into_py_err)?.as_str())
}
