//! y = x W^T + b for few tokens x, from the packed W: the dequantized matrix is never written.
//!
//! Every output is one chain of float32 sums whose order follows from the number of columns alone, so it depends
//! neither on the threads, nor on the instruction set, nor on which other tokens and rows there are: a row is cut into
//! units of 32 elements; lane l of 16 adds, unit by unit, element 2 l and then element 2 l + 1 times the token's, each
//! by a fused multiply-add; at the end lane l + 8 is added to l, then l + 4, l + 2 and l + 1. Byte codes are dequantized
//! to float32, a few rows at a time that stay in the cache, and added as `simd/dense.rs` says.
//!
//! NOTE: a bfloat16 product has another order, as fixed as this one, on a processor that gains by multiplying this type
//! itself (`simd/matvec_bf16.rs`, table entries rounded to bfloat16), and from four tokens on one that multiplies tiles of
//! it (`simd/matvec_amx.rs`, weights rounded): they err by no more than the dequantized bfloat16 weight does.

use half::bf16;

use crate::control::Control;
use crate::dequantize::{Scales, first_unknown_code};
use crate::double_quant::decode_scales;
use crate::error::CoreError;
use crate::float::{CANONICAL_NAN, Element, FloatType, Floats, FloatsMut};
use crate::layout::Layout;
use crate::parallel::Parallel;
use crate::simd::{self, InOrder, SimdLevel, Staged, Tiled};
use crate::spec::QuantSpec;

/// Elements of a unit: no block size is less.
pub(crate) const UNIT: usize = 32;
/// Bytes of memory that come together.
pub(crate) const LINE: usize = 64;
/// Sums side by side.
pub(crate) const LANES: usize = UNIT / 2;

/// A packed matrix (rows, columns).
#[derive(Debug, Clone, Copy)]
pub struct PackedMatrix<'a> {
    /// As packed.
    pub codes: &'a [u8],
    /// One scale a block.
    pub scales: Scales<'a>,
    /// Of one expert.
    pub layout: &'a Layout,
    /// Its data type.
    pub spec: &'a QuantSpec,
}

/// The product of `x` (tokens, columns) and the weight's transpose, plus `bias` (rows), into `y` (tokens, rows), rounded
/// once to y's type, which all three have. A scale that is not finite gives NaN in its row.
///
/// # Errors
/// [`CoreError::Shape`] when lengths or types do not fit; [`CoreError::Code`] for a code that the codebook does not have;
/// [`CoreError::Interrupted`].
pub fn linear(
    weight: &PackedMatrix<'_>,
    x: Floats<'_>,
    bias: Option<Floats<'_>>,
    y: FloatsMut<'_>,
    parallel: &Parallel,
    control: &Control,
) -> Result<(), CoreError> {
    linear_at(simd::simd_level()?, weight, x, bias, y, parallel, control)
}

/// [`linear`] with a given instruction set, which the processor must have.
///
/// # Errors
/// As [`linear`].
pub fn linear_at(
    level: SimdLevel,
    weight: &PackedMatrix<'_>,
    x: Floats<'_>,
    bias: Option<Floats<'_>>,
    y: FloatsMut<'_>,
    parallel: &Parallel,
    control: &Control,
) -> Result<(), CoreError> {
    let job = Job::new(level, weight)?;
    match (x, bias, y) {
        (Floats::F32(x), None, FloatsMut::F32(y)) => job.run(x, None, y, parallel, control),
        (Floats::F32(x), Some(Floats::F32(bias)), FloatsMut::F32(y)) => job.run(x, Some(bias), y, parallel, control),
        (Floats::Bf16(x), None, FloatsMut::Bf16(y)) => job.run(x, None, y, parallel, control),
        (Floats::Bf16(x), Some(Floats::Bf16(bias)), FloatsMut::Bf16(y)) => job.run(x, Some(bias), y, parallel, control),
        (Floats::F16(x), None, FloatsMut::F16(y)) => job.run(x, None, y, parallel, control),
        (Floats::F16(x), Some(Floats::F16(bias)), FloatsMut::F16(y)) => job.run(x, Some(bias), y, parallel, control),
        _ => Err(CoreError::Shape("x, bias and y are of one float type".into())),
    }
}

/// Most tokens in `float` for which [`linear`] is faster than dequantizing the weight and a dense product.
///
/// NOTE: measured on 4096 x 4096 and 14336 x 4096 against torch: at 64 tokens both took the same time on an AMD EPYC with
/// AVX512-BF16; by tiles, on Emerald Rapids, 128 tokens take 0.5 to 0.6 times as long.
///
/// # Errors
/// [`CoreError::Simd`], as every kernel.
pub fn most_fused_tokens(spec: &QuantSpec, float: FloatType) -> Result<usize, CoreError> {
    let way = Way::of(simd::simd_level()?, spec, float, MOST_BY_TILES);
    Ok(if way == Way::Tiles { MOST_BY_TILES } else { MOST_BY_VECTORS })
}

const MOST_BY_VECTORS: usize = 32;
const MOST_BY_TILES: usize = 128;
/// One token takes 1.3 to 1.4 times as long by tiles, which are nearly empty then, four 0.8 to 0.9 times (Emerald Rapids).
const LEAST_BY_TILES: usize = 4;

/// How weights and tokens are multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Byte codes, dequantized to float32 a few rows at a time.
    Bytes,
    /// In float32.
    Single,
    /// Pairs of bfloat16.
    Pairs,
    /// Tiles of bfloat16.
    Tiles,
}

impl Way {
    fn of(level: SimdLevel, spec: &QuantSpec, float: FloatType, tokens: usize) -> Self {
        let is_bf16 = float == FloatType::Bf16 && spec.block_size() >= bf16::LEAST_BLOCK;
        if spec.codebook().bits() == 8 {
            Self::Bytes
        } else if is_bf16 && tokens >= LEAST_BY_TILES && simd::multiplies_tiles(level) {
            Self::Tiles
        } else if is_bf16 && simd::gains_by_bf16(level) {
            Self::Pairs
        } else {
            Self::Single
        }
    }
}

struct Job<'a> {
    level: SimdLevel,
    weight: &'a PackedMatrix<'a>,
}

/// Consecutive rows, and where their results go: for each token a slice.
struct Piece<'a, T> {
    first: usize,
    out: Vec<&'a mut [T]>,
}

impl<'a> Job<'a> {
    fn new(level: SimdLevel, weight: &'a PackedMatrix<'a>) -> Result<Self, CoreError> {
        let layout = weight.layout;
        let fits = match weight.scales {
            Scales::Plain(absmax) => absmax.len() == layout.blocks(),
            Scales::Nested { codes, scale, offset } => {
                (codes.len(), scale.len(), offset.len()) == (layout.blocks(), layout.groups(), 1)
            }
        };
        if !fits || layout.experts() != 1 || weight.codes.len() != layout.code_bytes() {
            return Err(CoreError::Shape(format!(
                "expected one matrix with {} code bytes and {} scales; got {} matrices and {} bytes{}",
                layout.code_bytes(),
                layout.blocks(),
                layout.experts(),
                weight.codes.len(),
                if fits { "" } else { ", and scales of other lengths" }
            )));
        }
        Ok(Self { level, weight })
    }

    fn run<T: Element>(
        &self,
        x: &[T],
        bias: Option<&[T]>,
        y: &mut [T],
        parallel: &Parallel,
        control: &Control,
    ) -> Result<(), CoreError> {
        let (rows, cols) = (self.weight.layout.rows(), self.weight.layout.cols());
        let tokens = x.len().checked_div(cols).or(y.len().checked_div(rows)).unwrap_or(0);
        if x.len() != tokens * cols || y.len() != tokens * rows || bias.is_some_and(|bias| bias.len() != rows) {
            return Err(CoreError::Shape(format!(
                "x has {} elements, y {} and the bias {:?}; the weight is {rows} by {cols}",
                x.len(),
                y.len(),
                bias.map(<[T]>::len)
            )));
        }
        if y.is_empty() {
            return Ok(());
        }
        let products = Products { bias, y, parallel, control };
        match Way::of(self.level, self.weight.spec, T::TYPE, tokens) {
            Way::Bytes => self.run_staged(stage::<T, InOrder>(x, cols).slice(), products),
            Way::Single => self.run_staged(stage::<T, f32>(x, cols).slice(), products),
            Way::Pairs => self.run_staged(stage::<T, bf16>(x, cols).slice(), products),
            Way::Tiles => self.run_staged(stage::<T, Tiled>(x, cols).slice(), products),
        }
    }

    fn run_staged<T: Element, X: Staged>(&self, staged: &[X], products: Products<'_, T>) -> Result<(), CoreError> {
        let Products { bias, y, parallel, control } = products;
        let rows = self.weight.layout.rows();
        let tokens = y.len() / rows;
        let blocks = parallel.blocks_per_piece(self.weight.layout.blocks(), self.weight.layout.block_size());
        let per_piece = (blocks / self.weight.layout.blocks_per_row().max(1)).max(1).next_multiple_of(X::ROWS);
        let mut pieces: Vec<Piece<'_, T>> =
            (0..rows).step_by(per_piece).map(|first| Piece { first, out: Vec::with_capacity(tokens) }).collect();
        for of_token in y.chunks_mut(rows) {
            for (piece, out) in pieces.iter_mut().zip(of_token.chunks_mut(per_piece)) {
                piece.out.push(out);
            }
        }
        let undefined = std::sync::atomic::AtomicBool::new(false);
        let table = X::table(self.weight.spec.codebook());
        parallel.for_each(pieces, control, |piece| {
            if self.piece(staged, &table, bias, piece) {
                undefined.store(true, std::sync::atomic::Ordering::Relaxed);
            }
        })?;
        let entries = self.weight.spec.codebook().values().len();
        if entries < 1 << self.weight.layout.bits() && undefined.into_inner() {
            return first_unknown_code(self.weight.codes, &self.weight.layout.runs(), entries).map_or(Ok(()), Err);
        }
        Ok(())
    }

    /// Returns whether a code may be one that the codebook lacks: a result is NaN, or a byte too large.
    fn piece<T: Element, X: Staged>(
        &self,
        staged: &[X],
        table: &X::Table,
        bias: Option<&[T]>,
        mut piece: Piece<'_, T>,
    ) -> bool {
        let layout = self.weight.layout;
        let entries = self.weight.spec.codebook().values().len();
        let (rows, tokens, per_row) = (piece.out[0].len(), piece.out.len(), layout.blocks_per_row());
        let mut buffer = vec![0.0; per_row * X::ROWS.min(rows)];
        let mut sums = vec![0.0; tokens * X::ROWS.min(rows)];
        let mut undefined = false;
        for start in (0..rows).step_by(X::ROWS) {
            let here = X::ROWS.min(rows - start);
            let first = piece.first + start;
            let sums = &mut sums[..tokens * here];
            let (own, after) = (first * per_row..(first + here) * per_row, (first + here) * per_row);
            let (absmax, upcoming, scale_bytes) = match self.weight.scales {
                Scales::Plain(absmax) => (&absmax[own], bytemuck::cast_slice(&absmax[after..]), size_of::<f32>()),
                Scales::Nested { codes, scale, offset } => {
                    let absmax = &mut buffer[..per_row * here];
                    decode_scales(self.level, codes, scale, offset[0], own.start, absmax);
                    (&*absmax, &codes[after..], 1)
                }
            };
            let strip = Strip {
                codes: &self.weight.codes[first * layout.bytes_per_row()..(first + here) * layout.bytes_per_row()],
                absmax,
                upcoming,
                scale_bytes,
                cols: layout.cols(),
                block_size: layout.block_size(),
                table,
                tokens: staged,
            };
            // The largest code is sought without an early end, so that the compiler makes vector code of it.
            undefined |=
                layout.bits() == 8 && usize::from(strip.codes.iter().fold(0, |top, &code| top.max(code))) >= entries;
            X::strip_products(self.level, &strip, sums);
            // A scale that is not finite makes its row so, if not yet NaN.
            for (sums, absmax) in sums.chunks_exact_mut(tokens).zip(absmax.chunks_exact(per_row.max(1))) {
                let spoiled = sums.iter().any(|sum| !sum.is_finite()) && !absmax.iter().all(|scale| scale.is_finite());
                if spoiled {
                    sums.fill(CANONICAL_NAN);
                }
            }
            for (token, out) in piece.out.iter_mut().enumerate() {
                for (row, value) in out[start..start + here].iter_mut().enumerate() {
                    let sum = sums[row * tokens + token];
                    let sum = bias.map_or(sum, |bias| sum + bias[first + row].widen());
                    undefined |= sum.is_nan();
                    *value = T::narrow(sum);
                }
            }
        }
        undefined
    }
}

/// What a product needs beside its weight and tokens.
struct Products<'a, T> {
    bias: Option<&'a [T]>,
    y: &'a mut [T],
    parallel: &'a Parallel,
    control: &'a Control,
}

/// Tokens unit by unit, zeros after the last. Of each [`Staged::APART`] consecutive elements of a unit all the first ones
/// come first, then the second ones: the order in which vectors of codes give theirs; of [`Staged::TOGETHER`] tokens
/// pair by pair. Into a type that holds every x exactly.
fn stage<T: Element, X: Staged>(x: &[T], cols: usize) -> Aligned<X> {
    if cols == 0 {
        return Aligned::zeros(0);
    }
    let padded = cols.next_multiple_of(X::UNIT);
    let tokens = x.len() / cols;
    let mut staged = Aligned::zeros(tokens.next_multiple_of(X::TOGETHER) * padded);
    let groups = x.chunks(cols * X::TOGETHER).zip(staged.slice_mut().chunks_exact_mut(padded * X::TOGETHER));
    for (tokens, staged) in groups {
        for (token, x) in tokens.chunks_exact(cols).enumerate() {
            for (from, unit) in x.chunks(X::UNIT).zip(staged.chunks_exact_mut(X::UNIT * X::TOGETHER)) {
                let part = X::UNIT / X::APART;
                for (index, group) in from.chunks(X::APART).enumerate() {
                    for (nth, value) in group.iter().enumerate() {
                        let place = nth * part + index;
                        unit[(place / 2 * X::TOGETHER + token) * 2 + place % 2] = X::exactly(value.widen());
                    }
                }
            }
        }
    }
    staged
}

/// Elements that begin where a line of memory does, so that no vector of them lies in two.
struct Aligned<X> {
    memory: Vec<X>,
    start: usize,
    len: usize,
}

impl<X: Staged> Aligned<X> {
    fn zeros(len: usize) -> Self {
        let memory = vec![X::exactly(0.0); len + LINE / size_of::<X>()];
        let start = memory.as_ptr().align_offset(LINE);
        Self { memory, start, len }
    }

    fn slice(&self) -> &[X] {
        &self.memory[self.start..self.start + self.len]
    }

    fn slice_mut(&mut self) -> &mut [X] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// Some whole rows and all tokens.
pub(crate) struct Strip<'a, X: Staged> {
    pub(crate) codes: &'a [u8],
    /// Of each row in turn.
    pub(crate) absmax: &'a [f32],
    /// Scales of the rows after these, as they are stored: `scale_bytes` each.
    pub(crate) upcoming: &'a [u8],
    pub(crate) scale_bytes: usize,
    pub(crate) cols: usize,
    pub(crate) block_size: usize,
    pub(crate) table: &'a X::Table,
    /// As [`stage`] makes them.
    pub(crate) tokens: &'a [X],
}

impl<X: Staged> Strip<'_, X> {
    pub(crate) fn bytes_per_row(&self) -> usize {
        self.cols.div_ceil(X::CODES_PER_BYTE)
    }

    pub(crate) fn blocks_per_row(&self) -> usize {
        self.cols.div_ceil(self.block_size)
    }

    /// Floats of a staged token.
    pub(crate) fn token_len(&self) -> usize {
        self.cols.next_multiple_of(X::UNIT)
    }

    /// Bytes of a row's last, incomplete unit (half as many as its elements); code 0, which every table has, after its end.
    pub(crate) fn tail<const BYTES: usize>(&self, row: usize) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        let end = (row + 1) * self.bytes_per_row();
        let len = (self.cols % X::UNIT).div_ceil(2);
        bytes[..len].copy_from_slice(&self.codes[end - len..end]);
        bytes
    }
}

/// The truth: `sums` (rows, tokens).
pub(crate) fn strip_products(strip: &Strip<'_, f32>, sums: &mut [f32]) {
    let (padded, per_row) = (strip.token_len(), strip.blocks_per_row());
    if padded == 0 {
        sums.fill(0.0);
        return;
    }
    let tokens = strip.tokens.len() / padded;
    for (row, sums) in sums.chunks_exact_mut(tokens).enumerate() {
        let codes = &strip.codes[row * strip.bytes_per_row()..(row + 1) * strip.bytes_per_row()];
        for (token, sum) in strip.tokens.chunks_exact(padded).zip(sums) {
            let mut lanes = [0.0f32; LANES];
            for (index, unit) in token.chunks_exact(UNIT).enumerate() {
                let absmax = strip.absmax[row * per_row + index * UNIT / strip.block_size];
                let bytes = codes.get(index * LANES..(index + 1) * LANES);
                let bytes: [u8; LANES] =
                    bytes.map_or_else(|| strip.tail(row), |full| full.try_into().expect("a unit's bytes"));
                for (lane, sum) in lanes.iter_mut().enumerate() {
                    let (even, odd) = (usize::from(bytes[lane] >> 4), usize::from(bytes[lane] & 15));
                    *sum = (strip.table[even] * absmax).mul_add(unit[lane], *sum);
                    *sum = (strip.table[odd] * absmax).mul_add(unit[LANES + lane], *sum);
                }
            }
            *sum = add_lanes(lanes);
        }
    }
}

/// Lane l + 8 to l, then l + 4, l + 2 and l + 1.
pub(crate) fn add_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::quantize;
    use crate::simd::{SimdLevel, multiplies_bf16};
    use crate::{Nonfinite, QuantType};

    /// Numbers without order between -1 and 1.
    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (f64::from(state >> 8) / f64::from(1 << 23) - 1.0) as f32
        };
        (0..count).map(|_| next()).collect()
    }

    /// Products of bfloat16 tokens by each way of multiplying them that the processor has, whichever it gains by; tiles,
    /// where it has no unit for them, by plain code.
    #[test]
    fn bf16_products_by_every_multiplication_are_those_of_the_dequantized_weight() {
        let (control, parallel) = (Control::default(), Parallel::new(1));
        for (rows, cols, block_size) in [(1, 1, 64), (7, 127, 64), (29, 449, 64), (50, 1153, 128), (26, 640, 4096)] {
            let spec = QuantSpec::new(QuantType::Nf4, block_size, false, None).expect("a spec");
            let layout = Layout::new(1, rows, cols, &spec).expect("a layout");
            let (mut codes, mut absmax) = (vec![0; layout.code_bytes()], vec![0.0; layout.blocks()]);
            let weight = numbers(rows * cols, 7);
            let input = Floats::F32(&weight);
            quantize(input, &layout, &spec, Nonfinite::Raise, &mut codes, &mut absmax, &parallel, &control)
                .expect("finite");
            let mut dequantized = vec![0.0; rows * cols];
            let scales = Scales::Plain(&absmax);
            let out = FloatsMut::F32(&mut dequantized);
            crate::dequantize::dequantize(&codes, scales, &layout, &spec, out, &parallel, &control).expect("fits");
            let packed = PackedMatrix { codes: &codes, scales, layout: &layout, spec: &spec };
            let job = Job::new(SimdLevel::detected(), &packed).expect("fits");
            for tokens in [1, 2, 3, 4, 5, 9, 16, 17, 37] {
                let x: Vec<bf16> = numbers(tokens * cols, 11).into_iter().map(bf16::from_f32).collect();
                let mut ways = vec![vec![bf16::NAN; tokens * rows]; 3];
                let mut run = |way: usize| {
                    let products = Products { bias: None, y: &mut ways[way], parallel: &parallel, control: &control };
                    match way {
                        0 => job.run_staged(stage::<bf16, f32>(&x, cols).slice(), products),
                        1 => job.run_staged(stage::<bf16, Tiled>(&x, cols).slice(), products),
                        _ => job.run_staged(stage::<bf16, bf16>(&x, cols).slice(), products),
                    }
                };
                run(0).expect("fits");
                if multiplies_bf16(SimdLevel::detected()) {
                    run(1).expect("fits");
                    run(2).expect("fits");
                } else {
                    ways.truncate(1);
                }
                for y in &ways {
                    for (token, y) in x.chunks_exact(cols).zip(y.chunks_exact(rows)) {
                        for (row, y) in dequantized.chunks_exact(cols).zip(y) {
                            let terms = || row.iter().zip(token).map(|(w, x)| f64::from(*w) * x.to_f64());
                            let (want, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                            // The result is rounded by up to 2^-8 of it, and so may weights or the table be.
                            assert!((y.to_f64() - want).abs() <= size / 127.0, "{rows} x {cols}, {tokens}: {y} {want}");
                        }
                    }
                }
            }
        }
    }
}
