//! Launches `kernels/quantize.cu`.

use cudarc::driver::{result, sys};
use qlora_core::codebook::FP4_CODE_BY_RANK;
use qlora_core::{Codebook, FloatType, Layout, NESTED_BLOCK_SIZE, QuantSpec, Search};

use crate::context::{Device, device};
use crate::double_quantize::{Nested, Scratch, double_quantize};
use crate::error::{CudaError, failed};
use crate::launch::{DevicePtr, Grid, Queue, arg, ctas, launch, strided_ctas};
use crate::modules::QUANTIZE;

const THREADS: u32 = 512;
const WARPS: usize = THREADS as usize / 32;
const WORD: usize = 8;
/// Weights that a CTA takes: as many as 256 blocks of [`SUMMED_BLOCK`] hold.
const CTA_WEIGHTS: usize = THREADS as usize * 4 * WORD;
/// Blocks of this size make a CTA's scales one run of double quantization's tree.
const SUMMED_BLOCK: usize = CTA_WEIGHTS / NESTED_BLOCK_SIZE;
/// A block of this many weights is the most that one warp's lanes hold, a word each.
const LARGEST_WARP_BLOCK: usize = 256;
const CODES_ALIGNMENT: DevicePtr = 4;
const WEIGHT_ALIGNMENT: DevicePtr = 16;
const CELLS: usize = 32;
const CELLS_PER_UNIT: f32 = 15.0;
/// See quantize.cu: leaves the cell at bit 7 and up.
const CELL_MAGIC: f32 = 98_304.0 + 16.5;

/// `Cell` of quantize.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct Cell {
    threshold: f32,
    /// The code below the threshold; above it is the next.
    below: u32,
}

/// `Search` of quantize.cu.
#[repr(C)]
struct SearchTable {
    thresholds: [f32; 256],
    code_of_rank: u64,
    steps: i32,
    zero_code: u32,
    nibbles: i32,
}

/// What [`quantize`] writes.
#[derive(Debug, Clone, Copy)]
pub struct Quantized {
    /// Packed codes.
    pub codes: DevicePtr,
    /// float32 scales.
    pub absmax: DevicePtr,
    /// [`crate::scratch_bytes`] to work in; the first four are an int32.
    pub scratch: DevicePtr,
    /// That int32 shall become 1 if a NaN or infinite value is seen, else 0.
    pub check_finite: bool,
    /// Given when the scales are quantized too.
    pub nested: Option<Nested>,
}

/// Quantize the weight of `layout` (elements of `dtype`, contiguous).
///
/// # Errors
/// [`CudaError`]: the device, or more than 65,535 experts doubly quantized.
///
/// # Safety
/// The pointers name memory of the queue's device with the sizes that `layout` gives, valid until its stream has passed.
pub unsafe fn quantize(
    queue: Queue,
    spec: &QuantSpec,
    layout: &Layout,
    weight: DevicePtr,
    dtype: FloatType,
    out: &Quantized,
) -> Result<(), CudaError> {
    let device = device(queue.device)?;
    let _entered = device.enter()?;
    let scratch = Scratch::at(out.scratch, layout);
    if out.check_finite {
        // SAFETY: the caller's promise.
        unsafe { result::memset_d8_async(out.scratch, 0, 4, queue.stream as sys::CUstream) }
            .map_err(failed("cuMemsetD8Async"))?;
    }
    let mut summed = false;
    if layout.elements() > 0 {
        let wide = spec.block_size() <= LARGEST_WARP_BLOCK
            && layout.cols().is_multiple_of(spec.block_size())
            && out.codes.is_multiple_of(CODES_ALIGNMENT)
            && weight.is_multiple_of(WEIGHT_ALIGNMENT);
        let cells = if wide { cell_table(spec.codebook()) } else { None };
        // SAFETY: the caller's promise.
        summed = unsafe {
            match cells {
                Some(cells) => words(device, queue, spec, layout, (weight, dtype), out, &cells)?,
                None => rows(device, queue, spec, layout, (weight, dtype), out)?,
            }
        };
    }
    match &out.nested {
        // SAFETY: the caller's promise.
        Some(nested) => unsafe { double_quantize(device, queue, layout, out.absmax, nested, scratch, summed) },
        None => Ok(()),
    }
}

/// Returns whether it left the sums of the scales' runs.
unsafe fn words(
    device: &Device,
    queue: Queue,
    spec: &QuantSpec,
    layout: &Layout,
    (weight, dtype): (DevicePtr, FloatType),
    out: &Quantized,
    cells: &[Cell; CELLS],
) -> Result<bool, CudaError> {
    let words = (layout.elements() / WORD) as i64;
    let block_shift = spec.block_size().trailing_zeros().cast_signed();
    let zero_word = u32::from(spec.codebook().zero_code()) * 0x1111_1111;
    let flag = flag(out);
    // A CTA's scales are one run of one expert.
    let runs_are_whole = layout.experts() == 1 || layout.blocks_per_expert().is_multiple_of(NESTED_BLOCK_SIZE);
    let summed = out.nested.is_some() && spec.block_size() == SUMMED_BLOCK && runs_are_whole;
    let scratch = Scratch::at(out.scratch, layout);
    let (sums, absent) = if summed { (scratch.sums(), scratch.absent()) } else { (0, 0) };
    let mut args = [
        arg(&weight),
        arg(&out.codes),
        arg(&out.absmax),
        arg(&flag),
        arg(&sums),
        arg(&absent),
        arg(&words),
        arg(&block_shift),
        arg(&zero_word),
        arg(cells),
    ];
    let grid = Grid { overlap: device.overlaps(), ..Grid::new((ctas(layout.elements(), CTA_WEIGHTS)?, 1), THREADS) };
    // SAFETY: the arguments are those of `quantize_words_*`; the caller vouches for the memory.
    unsafe { launch(device.function(&QUANTIZE, ("", names(dtype).0))?, grid, queue, &mut args) }?;
    Ok(summed)
}

unsafe fn rows(
    device: &Device,
    queue: Queue,
    spec: &QuantSpec,
    layout: &Layout,
    (weight, dtype): (DevicePtr, FloatType),
    out: &Quantized,
) -> Result<bool, CudaError> {
    let (rows, columns) = ((layout.experts() * layout.rows()) as i64, layout.cols() as i64);
    let block_shift = spec.block_size().trailing_zeros().cast_signed();
    let search = search_table(spec.codebook());
    let flag = flag(out);
    let mut args = [
        arg(&weight),
        arg(&out.codes),
        arg(&out.absmax),
        arg(&flag),
        arg(&rows),
        arg(&columns),
        arg(&block_shift),
        arg(&search),
    ];
    let grid = Grid::new((strided_ctas(device, layout.blocks(), WARPS, 16), 1), THREADS);
    // SAFETY: the arguments are those of `quantize_rows_*`; the caller vouches for the memory.
    unsafe { launch(device.function(&QUANTIZE, ("", names(dtype).1))?, grid, queue, &mut args) }?;
    Ok(false)
}

/// Where the kernels report NaN and Inf, or null.
fn flag(out: &Quantized) -> DevicePtr {
    if out.check_finite { out.scratch } else { 0 }
}

/// The cell of a normalized value, as quantize.cu finds it. It never falls as x grows, so an x above its own cell's
/// threshold is above all thresholds of the cells before, and no others.
fn cell_of(x: f32) -> usize {
    (x.mul_add(CELLS_PER_UNIT, CELL_MAGIC).to_bits() >> 7) as usize % CELLS
}

/// `None` where the codebook needs a search: not ascending, or two thresholds in a cell.
fn cell_table(codebook: &Codebook) -> Option<[Cell; CELLS]> {
    if codebook.search() != Search::Ascending || codebook.bits() != 4 {
        return None;
    }
    let mut cells = [Cell { threshold: f32::INFINITY, below: 0 }; CELLS];
    for &threshold in codebook.thresholds() {
        let cell = cell_of(threshold);
        if cells[cell].threshold != f32::INFINITY {
            return None;
        }
        cells[cell].threshold = threshold;
        for later in &mut cells[cell + 1..] {
            later.below += 1;
        }
    }
    Some(cells)
}

/// Thresholds in ascending order of x, and the code of each rank.
fn search_table(codebook: &Codebook) -> SearchTable {
    let nibbles = codebook.bits() == 4;
    let (ascending, code_of_rank) = match codebook.search() {
        Search::Ascending => (codebook.thresholds().to_vec(), 0xfedc_ba98_7654_3210),
        Search::SignedMagnitude => signed_magnitude(codebook.thresholds()),
    };
    let mut thresholds = [f32::INFINITY; 256];
    thresholds[..ascending.len()].copy_from_slice(&ascending);
    SearchTable {
        thresholds,
        code_of_rank,
        steps: if nibbles { 4 } else { 8 },
        zero_code: u32::from(codebook.zero_code()),
        nibbles: i32::from(nibbles),
    }
}

/// FP4 as one ascending search. Its rule is "|x| above t goes up, bit 3 is set where x < 0": below zero that is "x above
/// the float before -t", and zero itself is told from the negative by the float before it.
fn signed_magnitude(thresholds: &[f32]) -> (Vec<f32>, u64) {
    let negative = thresholds.iter().rev().map(|threshold| (-threshold).next_down());
    let below_zero = 0.0f32.next_down();
    let ascending = negative.chain([below_zero]).chain(thresholds.iter().copied()).collect();
    let positive = FP4_CODE_BY_RANK.iter().copied();
    let codes = positive.clone().rev().map(|code| code | 8).chain(positive);
    let code_of_rank = codes.enumerate().fold(0, |all, (rank, code)| all | u64::from(code) << (4 * rank));
    (ascending, code_of_rank)
}

/// Kernels for words and for rows.
fn names(dtype: FloatType) -> (&'static str, &'static str) {
    match dtype {
        FloatType::F32 => ("quantize_words_f32", "quantize_rows_f32"),
        FloatType::Bf16 => ("quantize_words_bf16", "quantize_rows_bf16"),
        FloatType::F16 => ("quantize_words_f16", "quantize_rows_f16"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qlora_core::QuantType;

    /// What `quantize_rows_*` does with the table.
    fn encode(table: &SearchTable, x: f32) -> u8 {
        let mut rank = 0;
        let mut half = 1 << (table.steps - 1);
        while half > 0 {
            if x > table.thresholds[rank + half - 1] {
                rank += half;
            }
            half /= 2;
        }
        if table.nibbles == 1 { (table.code_of_rank >> (4 * rank)) as u8 & 15 } else { rank as u8 }
    }

    fn floats_around(book: &Codebook) -> Vec<f32> {
        let marks = book.thresholds().iter().chain(book.values()).flat_map(|&value| [value, -value]);
        let around = marks.flat_map(|mark| [mark.next_down(), mark, mark.next_up()]);
        around.chain([0.0, -0.0, f32::from_bits(1), -f32::from_bits(1)]).filter(|x| x.abs() <= 1.0).collect()
    }

    #[test]
    fn device_search_gives_the_codes_of_the_codebook_around_every_threshold() {
        let user = Codebook::user(&[-1.0, -0.01, 0.0, 0.005, 0.3, 0.5, 1.0]).expect("valid");
        let built_in = QuantType::ALL.iter().filter_map(|&quant_type| Codebook::built_in(quant_type));
        for book in built_in.chain([user]) {
            let table = search_table(&book);
            for x in floats_around(&book) {
                assert_eq!(encode(&table, x), book.encode(x), "{x:e}");
            }
        }
    }

    #[test]
    fn cells_give_the_codes_of_the_codebook_around_every_threshold() {
        for quant_type in [QuantType::Nf4, QuantType::Int4] {
            let book = Codebook::built_in(quant_type).expect("built in");
            let cells = cell_table(&book).expect("no two thresholds share a cell");
            for x in floats_around(&book) {
                let cell = cells[cell_of(x)];
                assert_eq!((cell.below + u32::from(x > cell.threshold)) as u8, book.encode(x), "{x:e}");
            }
        }
        let steps = (-1000i16..=1000).map(|step| f32::from(step) / 1000.0);
        assert!(steps.clone().zip(steps.skip(1)).all(|(a, b)| cell_of(a) <= cell_of(b)));
        assert!(cell_table(&Codebook::built_in(QuantType::Fp4).expect("built in")).is_none());
    }
}
