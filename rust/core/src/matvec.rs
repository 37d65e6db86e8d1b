//! y = x W^T + b for few tokens x, from the packed W: the dequantized matrix is never written.
//!
//! Every output is one chain of float32 sums whose order follows from the number of columns alone, so it depends
//! neither on the threads, nor on the instruction set, nor on which other tokens and rows there are: a row is cut into
//! units of 32 elements; lane l of 16 adds, unit by unit, element 2 l and then element 2 l + 1 times the token's, each
//! by a fused multiply-add; at the end lane l + 8 is added to l, then l + 4, l + 2 and l + 1. Byte codes are dequantized
//! to float32, a few rows at a time that stay in the cache, and added as `simd/dense.rs` says.
//!
//! NOTE: a bfloat16 product on a processor that multiplies this type has another order, as fixed as this one, and table
//! entries rounded to bfloat16 (see `simd/matvec_bf16.rs`): it takes half the time, and errs by no more than the
//! dequantized bfloat16 weight does.

use half::bf16;

use crate::control::Control;
use crate::dequantize::{Scales, first_unknown_code};
use crate::double_quant::decode_scales;
use crate::error::CoreError;
use crate::float::{CANONICAL_NAN, Element, FloatType, Floats, FloatsMut};
use crate::layout::Layout;
use crate::parallel::Parallel;
use crate::simd::{self, InOrder, SimdLevel, Staged};
use crate::spec::QuantSpec;

/// Elements of a unit: no block size is less.
pub(crate) const UNIT: usize = 32;
/// Sums side by side.
pub(crate) const LANES: usize = UNIT / 2;
/// Rows whose scales are decoded, and whose results are rounded, at a time.
const ROWS_AT_A_TIME: usize = 24;

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
        let multiplies_bf16 = T::TYPE == FloatType::Bf16 && simd::multiplies_bf16(self.level);
        if self.weight.layout.bits() == 8 {
            self.run_staged(&stage::<T, InOrder>(x, cols), products)
        } else if multiplies_bf16 && self.weight.layout.block_size() >= bf16::LEAST_BLOCK {
            self.run_staged(&stage::<T, bf16>(x, cols), products)
        } else {
            self.run_staged(&stage::<T, f32>(x, cols), products)
        }
    }

    fn run_staged<T: Element, X: Staged>(&self, staged: &[X], products: Products<'_, T>) -> Result<(), CoreError> {
        let Products { bias, y, parallel, control } = products;
        let rows = self.weight.layout.rows();
        let tokens = y.len() / rows;
        let blocks = parallel.blocks_per_piece(self.weight.layout.blocks(), self.weight.layout.block_size());
        let per_piece = (blocks / self.weight.layout.blocks_per_row().max(1)).max(1).next_multiple_of(ROWS_AT_A_TIME);
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
        let mut buffer = vec![0.0; per_row * ROWS_AT_A_TIME.min(rows)];
        let mut sums = vec![0.0; tokens * ROWS_AT_A_TIME.min(rows)];
        let mut undefined = false;
        for start in (0..rows).step_by(ROWS_AT_A_TIME) {
            let here = ROWS_AT_A_TIME.min(rows - start);
            let first = piece.first + start;
            let sums = &mut sums[..tokens * here];
            let absmax = match self.weight.scales {
                Scales::Plain(absmax) => &absmax[first * per_row..(first + here) * per_row],
                Scales::Nested { codes, scale, offset } => {
                    let absmax = &mut buffer[..per_row * here];
                    decode_scales(self.level, codes, scale, offset[0], first * per_row, absmax);
                    // The kernels see to the weight's own codes that come next.
                    let next = (first + here) * per_row;
                    simd::prefetch(&codes[next..next + per_row * ROWS_AT_A_TIME.min(rows - start - here)]);
                    absmax
                }
            };
            let strip = Strip {
                codes: &self.weight.codes[first * layout.bytes_per_row()..(first + here) * layout.bytes_per_row()],
                absmax,
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
/// come first, then the second ones: the order in which vectors of codes give theirs. Into a type that holds every x
/// exactly.
fn stage<T: Element, X: Staged>(x: &[T], cols: usize) -> Vec<X> {
    if cols == 0 {
        return Vec::new();
    }
    let padded = cols.next_multiple_of(X::UNIT);
    let mut staged = vec![X::exactly(0.0); x.len() / cols * padded];
    for (token, staged) in x.chunks_exact(cols).zip(staged.chunks_exact_mut(padded)) {
        for (from, unit) in token.chunks(X::UNIT).zip(staged.chunks_exact_mut(X::UNIT)) {
            let part = X::UNIT / X::APART;
            for (index, group) in from.chunks(X::APART).enumerate() {
                for (nth, value) in group.iter().enumerate() {
                    unit[nth * part + index] = X::exactly(value.widen());
                }
            }
        }
    }
    staged
}

/// Some whole rows and all tokens.
pub(crate) struct Strip<'a, X: Staged> {
    pub(crate) codes: &'a [u8],
    /// Of each row in turn.
    pub(crate) absmax: &'a [f32],
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
