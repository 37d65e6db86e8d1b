//! Launches `kernels/double_quantize.cu`.

use qlora_core::{Layout, NESTED_BLOCK_SIZE, QuantSpec, dynamic_thresholds};

use crate::context::Device;
use crate::dequantize::experts;
use crate::error::CudaError;
use crate::launch::{DevicePtr, Grid, Queue, arg, ctas, launch, strided_ctas};
use crate::modules::DOUBLE_QUANTIZE;

const THREADS: u32 = 256;
const WARPS: usize = THREADS as usize / 32;

/// Where doubly quantized scales go.
#[derive(Debug, Clone, Copy)]
pub struct Nested {
    /// u8 codes `[blocks]`.
    pub codes: DevicePtr,
    /// float32 `[experts, runs]`, runs = ceil(blocks of an expert / 256).
    pub group_scale: DevicePtr,
    /// float32 `[experts]`.
    pub offset: DevicePtr,
}

/// Device memory that quantizing works in: an int32 that tells of NaN and Inf and begins as zero, at 8 float64 sums of the
/// runs, then for each an int32, the number of its scales that are not finite.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scratch {
    address: DevicePtr,
    runs: usize,
}

impl Scratch {
    pub(crate) fn at(address: DevicePtr, layout: &Layout) -> Self {
        Self { address, runs: layout.experts() * layout.blocks_per_expert().div_ceil(NESTED_BLOCK_SIZE) }
    }

    pub(crate) fn sums(self) -> DevicePtr {
        self.address + 8
    }

    pub(crate) fn absent(self) -> DevicePtr {
        self.sums() + 8 * self.runs as DevicePtr
    }

    fn bytes(self) -> usize {
        8 + 12 * self.runs
    }
}

/// Bytes of device memory, at a multiple of 8, that [`crate::quantize`] works in.
#[must_use]
pub fn scratch_bytes(spec: &QuantSpec, layout: &Layout) -> usize {
    if spec.double_quant() { Scratch::at(0, layout).bytes() } else { 8 }
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
    scratch: Scratch,
    summed: bool,
) -> Result<(), CudaError> {
    let experts = experts(layout)?;
    if experts == 0 {
        return Ok(());
    }
    let blocks = layout.blocks_per_expert() as i64;
    let runs = layout.blocks_per_expert().div_ceil(NESTED_BLOCK_SIZE);
    let (absent, sums) = (scratch.absent(), scratch.sums());
    // An expert without blocks still gets its offset: the mean of nothing, 0.
    let grid = Grid::new((ctas(runs.max(1), WARPS)?, experts), THREADS);
    if !summed {
        let mut args = [arg(&absmax), arg(&sums), arg(&absent), arg(&blocks)];
        let function = device.function(&DOUBLE_QUANTIZE, ("", "double_quantize_sums"))?;
        // SAFETY: the arguments are those of the kernel; the caller vouches for the memory.
        unsafe { launch(function, grid, queue, &mut args) }?;
    }
    // The levels of the tree above the runs lie in shared memory, in two halves that take turns.
    let upper_size = runs.div_ceil(NESTED_BLOCK_SIZE).max(1) as i32;
    let grid = Grid {
        // Every CTA reads all sums: no more of them than are on the device at once.
        ctas: (strided_ctas(device, runs, WARPS, 4), experts, 1),
        shared_bytes: u32::try_from(2 * upper_size * 8).unwrap_or(u32::MAX),
        overlap: device.overlaps(),
        ..grid
    };
    let thresholds = threshold_tree();
    let Nested { codes, group_scale, offset } = *out;
    let mut args = [
        arg(&absmax),
        arg(&sums),
        arg(&absent),
        arg(&codes),
        arg(&group_scale),
        arg(&offset),
        arg(&blocks),
        arg(&upper_size),
        arg(&thresholds),
    ];
    let function = device.function(&DOUBLE_QUANTIZE, ("", "double_quantize_codes"))?;
    // SAFETY: as above.
    unsafe { launch(function, grid, queue, &mut args) }
}

/// The thresholds of the dynamic map as a search tree: the children of node i, from 1 on, are 2 i and 2 i + 1.
fn threshold_tree() -> [f32; 256] {
    let mut tree = [0.0; 256];
    for level in 0..8 {
        for index in 0..1 << level {
            tree[(1 << level) + index] = dynamic_thresholds()[(2 * index + 1) * (128 >> level) - 1];
        }
    }
    tree
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_finds_the_number_of_thresholds_below() {
        let tree = threshold_tree();
        for &threshold in dynamic_thresholds() {
            for x in [threshold.next_down(), threshold, threshold.next_up()] {
                let node = (0..8).fold(1, |node, _| 2 * node + usize::from(x > tree[node]));
                assert_eq!(node - 256, dynamic_thresholds().partition_point(|&below| x > below));
            }
        }
    }
}
