//! Launches `kernels/dequantize.cu`.

use qlora_core::{FloatType, Layout, QuantSpec};

use crate::context::device;
use crate::error::CudaError;
use crate::launch::{DevicePtr, Grid, Queue, arg, ctas, launch, strided_ctas};
use crate::modules::DEQUANTIZE;

/// Scales in device memory; as the kernels take them.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct DeviceScales {
    /// float32 `[blocks]`, or u8 `[blocks]` when doubly quantized.
    pub absmax: DevicePtr,
    /// float32 `[experts, ceil(blocks of an expert / 256)]`; 0 when plain.
    pub group_scale: DevicePtr,
    /// float32 `[experts]`; 0 when plain.
    pub offset: DevicePtr,
}

/// Threads of a CTA.
const THREADS: u32 = 512;
/// Weights in the kernel's word.
const WORD: usize = 8;
/// What a CTA needs to start its wide loads and stores.
const CODES_ALIGNMENT: DevicePtr = 4;
const OUT_ALIGNMENT: DevicePtr = 16;
/// Grid dimensions y and z end here.
const MAX_GRID_Y: usize = 65_535;

/// Write the weight of `layout` to `out` (elements of `dtype`, contiguous).
///
/// Codes that a table of fewer entries than 16 or 256 lacks become NaN: on a device nothing is read back to raise an error.
///
/// # Errors
/// [`CudaError`]: the device, or more than 65,535 experts.
///
/// # Safety
/// The pointers name memory of the queue's device with the sizes that `layout` gives, valid until its stream has passed.
pub unsafe fn dequantize(
    queue: Queue,
    spec: &QuantSpec,
    layout: &Layout,
    codes: DevicePtr,
    scales: DeviceScales,
    out: DevicePtr,
    dtype: FloatType,
) -> Result<(), CudaError> {
    let device = device(queue.device)?;
    if layout.elements() == 0 {
        return Ok(());
    }
    let experts = experts(layout)?;
    let _entered = device.enter()?;
    let block_shift = spec.block_size().trailing_zeros().cast_signed();
    let per_expert = layout.rows() * layout.cols();
    let wide = layout.bits() == 4
        && layout.cols().is_multiple_of(spec.block_size())
        && codes.is_multiple_of(CODES_ALIGNMENT)
        && out.is_multiple_of(OUT_ALIGNMENT);
    if wide {
        let words = (per_expert / WORD) as i64;
        let table = table::<16>(spec);
        // Words that a lane has on the way, as dequantize.cu has them; one round each was best.
        let words_in_flight = if spec.double_quant() { 4 } else { 8 };
        let ctas = ctas(per_expert, THREADS as usize * WORD * words_in_flight)?;
        let name = names(dtype, spec.double_quant()).0;
        let mut args = [arg(&codes), arg(&scales), arg(&out), arg(&words), arg(&block_shift), arg(&table)];
        let function = device.function(&DEQUANTIZE, ("", name))?;
        // SAFETY: the arguments are those of `dequantize_words_*`; the caller vouches for the memory.
        return unsafe { launch(function, Grid::new((ctas, experts), THREADS), queue, &mut args) };
    }
    let (rows, columns) = (layout.rows() as i64, layout.cols() as i64);
    let nibbles = i32::from(layout.bits() == 4);
    let table = table::<256>(spec);
    let ctas = strided_ctas(device, layout.rows() * layout.bytes_per_row(), THREADS as usize, 32);
    let name = names(dtype, spec.double_quant()).1;
    let mut args = [
        arg(&codes),
        arg(&scales),
        arg(&out),
        arg(&rows),
        arg(&columns),
        arg(&block_shift),
        arg(&nibbles),
        arg(&table),
    ];
    let function = device.function(&DEQUANTIZE, ("", name))?;
    // SAFETY: the arguments are those of `dequantize_rows_*`; the caller vouches for the memory.
    unsafe { launch(function, Grid::new((ctas, experts), THREADS), queue, &mut args) }
}

/// Experts as the grid's second dimension.
pub(crate) fn experts(layout: &Layout) -> Result<u32, CudaError> {
    if layout.experts() > MAX_GRID_Y {
        let experts = layout.experts();
        return Err(CudaError::Unsupported(format!(
            "a weight of {experts} experts: the kernels take at most {MAX_GRID_Y}; quantize it in slices"
        )));
    }
    Ok(layout.experts() as u32)
}

/// The codebook, NaN where it has no entry.
pub(crate) fn table<const N: usize>(spec: &QuantSpec) -> [f32; N] {
    let mut table = [f32::NAN; N];
    let values = spec.codebook().values();
    let used = values.len().min(N);
    table[..used].copy_from_slice(&values[..used]);
    table
}

/// Kernels for words and for rows.
fn names(dtype: FloatType, nested: bool) -> (&'static str, &'static str) {
    match (dtype, nested) {
        (FloatType::F32, false) => ("dequantize_words_f32_plain", "dequantize_rows_f32_plain"),
        (FloatType::F32, true) => ("dequantize_words_f32_nested", "dequantize_rows_f32_nested"),
        (FloatType::Bf16, false) => ("dequantize_words_bf16_plain", "dequantize_rows_bf16_plain"),
        (FloatType::Bf16, true) => ("dequantize_words_bf16_nested", "dequantize_rows_bf16_nested"),
        (FloatType::F16, false) => ("dequantize_words_f16_plain", "dequantize_rows_f16_plain"),
        (FloatType::F16, true) => ("dequantize_words_f16_nested", "dequantize_rows_f16_nested"),
    }
}
