//! Launches `kernels/double_quantize.cu`.

use qlora_core::{Layout, NESTED_BLOCK_SIZE, dynamic_thresholds};

use crate::context::Device;
use crate::dequantize::experts;
use crate::error::CudaError;
use crate::launch::{DevicePtr, Grid, Queue, arg, launch};
use crate::modules::DOUBLE_QUANTIZE;

const THREADS: u32 = 512;
const WARPS: usize = THREADS as usize / 32;

/// Where doubly quantized scales go, and what making them needs.
#[derive(Debug, Clone, Copy)]
pub struct Nested {
    /// u8 codes `[blocks]`.
    pub codes: DevicePtr,
    /// float32 `[experts, runs]`, runs = ceil(blocks of an expert / 256).
    pub group_scale: DevicePtr,
    /// float32 `[experts]`.
    pub offset: DevicePtr,
    /// Scratch: float64 `[experts, runs]`.
    pub run_sums: DevicePtr,
    /// Scratch: int32 `[experts, runs]`.
    pub run_counts: DevicePtr,
}

/// Quantize the float32 scales of a weight of `layout`. `summed` says that the scratch already holds the runs' sums.
///
/// # Safety
/// The device's context is current; the pointers name its memory, with the sizes that `layout` gives, valid until the
/// queue's stream has passed.
pub(crate) unsafe fn double_quantize(
    device: &Device,
    queue: Queue,
    layout: &Layout,
    absmax: DevicePtr,
    out: &Nested,
    summed: bool,
) -> Result<(), CudaError> {
    let experts = experts(layout)?;
    if experts == 0 {
        return Ok(());
    }
    let blocks = layout.blocks_per_expert() as i64;
    let runs = layout.blocks_per_expert().div_ceil(NESTED_BLOCK_SIZE);
    // An expert without blocks still gets its offset: the mean of nothing, 0.
    let mut grid = Grid::new((runs.div_ceil(WARPS).max(1) as u32, experts), THREADS);
    let Nested { codes, group_scale, offset, run_sums, run_counts } = *out;
    if !summed {
        let mut args = [arg(&absmax), arg(&run_sums), arg(&run_counts), arg(&blocks)];
        let function = device.function(&DOUBLE_QUANTIZE, "double_quantize_sums")?;
        // SAFETY: the arguments are those of the kernel; the caller vouches for the memory.
        unsafe { launch(function, grid, queue, &mut args) }?;
    }
    // The levels of the tree above the runs lie in shared memory, in two halves that take turns.
    let upper_size = runs.div_ceil(NESTED_BLOCK_SIZE).max(1) as i64;
    grid.shared_bytes = u32::try_from(2 * upper_size * 8).unwrap_or(u32::MAX);
    let mut thresholds = [f32::INFINITY; 256];
    thresholds[..255].copy_from_slice(dynamic_thresholds());
    let mut args = [
        arg(&absmax),
        arg(&run_sums),
        arg(&run_counts),
        arg(&codes),
        arg(&group_scale),
        arg(&offset),
        arg(&blocks),
        arg(&upper_size),
        arg(&thresholds),
    ];
    let function = device.function(&DOUBLE_QUANTIZE, "double_quantize_codes")?;
    // SAFETY: as above.
    unsafe { launch(function, grid, queue, &mut args) }
}
