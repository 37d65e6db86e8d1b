//! Weights to codes and float32 scales, block by block.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::codebook::Codebook;
use crate::control::Control;
use crate::error::CoreError;
use crate::float::{CANONICAL_NAN, Element, Floats};
use crate::layout::{Layout, Runs};
use crate::pack::pack_nibbles;
use crate::parallel::Parallel;
use crate::simd::{self, SimdLevel};
use crate::spec::QuantSpec;

/// What a NaN or an infinite weight means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nonfinite {
    /// An error that counts them.
    Raise,
    /// Its block gets the scale NaN (or infinity) and reads back as NaN.
    Propagate,
}

/// Quantize `input`, a weight of `layout`, into packed `codes` and one float32 scale per block in `absmax`.
///
/// The bytes do not depend on the number of threads or on the instruction set, and quantizing consecutive slices of
/// rows gives the bytes of quantizing all at once.
///
/// # Errors
/// [`CoreError::NonFinite`] under [`Nonfinite::Raise`] (the outputs are then unspecified), [`CoreError::Shape`] when a
/// length does not fit the layout, [`CoreError::Interrupted`].
#[allow(clippy::too_many_arguments)] // inputs, outputs, then how to run; each has its own type
pub fn quantize(
    input: Floats<'_>,
    layout: &Layout,
    spec: &QuantSpec,
    nonfinite: Nonfinite,
    codes: &mut [u8],
    absmax: &mut [f32],
    parallel: &Parallel,
    control: &Control,
) -> Result<(), CoreError> {
    let level = simd::simd_level()?;
    quantize_at(level, input, layout, spec, nonfinite, codes, absmax, parallel, control)
}

/// [`quantize`] with a given instruction set, which the processor must have.
///
/// # Errors
/// As [`quantize`].
#[allow(clippy::too_many_arguments)]
pub fn quantize_at(
    level: SimdLevel,
    input: Floats<'_>,
    layout: &Layout,
    spec: &QuantSpec,
    nonfinite: Nonfinite,
    codes: &mut [u8],
    absmax: &mut [f32],
    parallel: &Parallel,
    control: &Control,
) -> Result<(), CoreError> {
    let expected = (layout.elements(), layout.code_bytes(), layout.blocks());
    if (input.len(), codes.len(), absmax.len()) != expected {
        return Err(CoreError::Shape(format!(
            "expected (elements, code bytes, blocks) = {expected:?}, got {:?}",
            (input.len(), codes.len(), absmax.len())
        )));
    }
    match input {
        Floats::F32(values) => run(level, values, layout, spec, nonfinite, codes, absmax, parallel, control),
        Floats::Bf16(values) => run(level, values, layout, spec, nonfinite, codes, absmax, parallel, control),
        Floats::F16(values) => run(level, values, layout, spec, nonfinite, codes, absmax, parallel, control),
    }
}

/// Consecutive blocks, with the slices of input and outputs that belong to them.
struct Piece<'a, T> {
    blocks: std::ops::Range<usize>,
    input: &'a [T],
    codes: &'a mut [u8],
    absmax: &'a mut [f32],
}

#[allow(clippy::too_many_arguments)]
fn run<T: simd::Kernels>(
    level: SimdLevel,
    input: &[T],
    layout: &Layout,
    spec: &QuantSpec,
    nonfinite: Nonfinite,
    mut codes: &mut [u8],
    mut absmax: &mut [f32],
    parallel: &Parallel,
    control: &Control,
) -> Result<(), CoreError> {
    let runs = layout.runs();
    let mut pieces = Vec::new();
    for blocks in runs.pieces(parallel.blocks_per_piece(runs.blocks, runs.block_size)) {
        let (first, last) = (blocks.start, blocks.end);
        let (codes_here, codes_rest) = codes.split_at_mut(runs.byte(last) - runs.byte(first));
        let (absmax_here, absmax_rest) = absmax.split_at_mut(blocks.len());
        (codes, absmax) = (codes_rest, absmax_rest);
        let input = &input[runs.element(first)..runs.element(last)];
        pieces.push(Piece { blocks, input, codes: codes_here, absmax: absmax_here });
    }
    let spoiled = AtomicBool::new(false);
    parallel.for_each(pieces, control, |mut piece| {
        if !quantize_piece(level, &mut piece, &runs, spec) {
            spoiled.store(true, Ordering::Relaxed);
        }
    })?;
    if spoiled.into_inner() && nonfinite == Nonfinite::Raise {
        return Err(count_nonfinite(input));
    }
    Ok(())
}

/// Returns whether every element was finite.
fn quantize_piece<T: simd::Kernels>(level: SimdLevel, piece: &mut Piece<'_, T>, runs: &Runs, spec: &QuantSpec) -> bool {
    let (first, last) = (piece.blocks.start, piece.blocks.end);
    let (element_base, byte_base) = (runs.element(first), runs.byte(first));
    let mut finite = true;
    let mut block = first;
    while block < last {
        let element = runs.element(block) - element_base;
        let byte = runs.byte(block) - byte_base;
        let full = if level == SimdLevel::Scalar { 0 } else { runs.full_blocks(block, last) };
        if full > 0 {
            let elements = full * runs.block_size;
            let bytes = if runs.nibbles { elements / 2 } else { elements };
            finite &= T::encode(
                level,
                &piece.input[element..element + elements],
                runs.block_size,
                spec.codebook(),
                &mut piece.codes[byte..byte + bytes],
                &mut piece.absmax[block - first..block - first + full],
            );
            block += full;
            continue;
        }
        let len = runs.len(block);
        let bytes = if runs.nibbles { len.div_ceil(2) } else { len };
        let scale =
            quantize_block(&piece.input[element..element + len], spec.codebook(), &mut piece.codes[byte..byte + bytes]);
        finite &= scale.is_finite();
        piece.absmax[block - first] = scale;
        block += 1;
    }
    finite
}

/// The truth: one block, element by element. Returns its scale.
pub(crate) fn quantize_block<T: Element>(input: &[T], book: &Codebook, bytes: &mut [u8]) -> f32 {
    let absmax = block_absmax(input);
    let zero = book.zero_code();
    let nibbles = book.bits() == 4;
    if absmax == 0.0 || !absmax.is_finite() {
        bytes.fill(if nibbles { zero << 4 | zero } else { zero });
        return absmax;
    }
    let normalizer = Normalizer::new(absmax);
    let encode = |value: &T| book.encode(normalizer.apply(value.widen()));
    if nibbles {
        for (byte, pair) in bytes.iter_mut().zip(input.chunks(2)) {
            *byte = pack_nibbles(encode(&pair[0]), pair.get(1).map_or(zero, encode));
        }
    } else {
        for (byte, value) in bytes.iter_mut().zip(input) {
            *byte = encode(value);
        }
    }
    absmax
}

/// Largest magnitude; canonical NaN if there is a NaN, else infinity if there is one.
fn block_absmax<T: Element>(input: &[T]) -> f32 {
    // Without its sign a float orders like its bits, infinity above all finite values and NaN above infinity.
    let top = input.iter().map(|value| value.widen().to_bits() & 0x7fff_ffff).max().unwrap_or(0);
    scale_from_bits(top)
}

/// The scale whose bits, without sign, are the largest of a block.
#[inline]
pub(crate) fn scale_from_bits(top: u32) -> f32 {
    let value = f32::from_bits(top);
    if value.is_nan() { CANONICAL_NAN } else { value }
}

/// Is a largest magnitude of these bits a finite normal number, which needs no special care?
#[inline]
fn is_ordinary(top: u32) -> bool {
    (0x0080_0000..0x7f80_0000).contains(&top)
}

/// Stores the scale of a block, of whose largest magnitude `top` are the bits, and returns its reciprocal; a block that
/// needs special care is quantized here instead. `finite` becomes false where an element is not.
#[inline]
pub(crate) fn begin_block<T: Element>(
    top: u32,
    input: &[T],
    book: &Codebook,
    bytes: &mut [u8],
    absmax: &mut f32,
    finite: &mut bool,
) -> Option<f32> {
    if is_ordinary(top) {
        *absmax = f32::from_bits(top);
        return Some(Normalizer::new(*absmax).inverse);
    }
    *absmax = quantize_block(input, book, bytes);
    *finite &= absmax.is_finite();
    None
}

/// Multiplies by the correctly rounded reciprocal of a scale, lifting both by 2^64 where the scale is subnormal.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Normalizer {
    pub(crate) lift: f32,
    pub(crate) inverse: f32,
}

impl Normalizer {
    /// For a finite scale above 0.
    #[inline]
    pub(crate) fn new(scale: f32) -> Self {
        let lift = if scale < f32::MIN_POSITIVE { 18_446_744_073_709_551_616.0 } else { 1.0 };
        Self { lift, inverse: 1.0 / (scale * lift) }
    }

    /// `value / scale`, rounded as a product.
    #[inline]
    pub(crate) fn apply(self, value: f32) -> f32 {
        (value * self.lift) * self.inverse
    }
}

fn count_nonfinite<T: Element>(input: &[T]) -> CoreError {
    let bad = |value: &T| !value.widen().is_finite();
    let first = input.iter().position(bad).unwrap_or(0) as u64;
    CoreError::NonFinite { count: input.iter().filter(|value| bad(value)).count() as u64, first }
}
