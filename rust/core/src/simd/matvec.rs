//! Which kernel multiplies packed rows with tokens.

use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};

use half::bf16;

use super::{Kernels, SimdLevel, dense, matvec_avx2, matvec_avx512, matvec_bf16};
use crate::codebook::Codebook;
use crate::dequantize::{Table, dequantize_block};
use crate::matvec::{self, LANES, Strip, UNIT};

/// Does this level use the processor's own bfloat16 products?
pub(crate) fn multiplies_bf16(level: SimdLevel) -> bool {
    level == SimdLevel::Avx512 && is_x86_feature_detected!("avx512bf16")
}

/// Have memory brought into the caches while something else is done.
pub(crate) fn prefetch<T>(data: &[T]) {
    for line in (0..size_of_val(data)).step_by(64) {
        // SAFETY: every x86-64 processor has the instruction, which may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(data.as_ptr().cast::<i8>().wrapping_add(line)) };
    }
}

/// A type that tokens are multiplied in.
///
/// NOTE: as [`super::Kernels`], safe to call with any argument.
pub(crate) trait Staged: Copy + Send + Sync {
    /// What codes stand for.
    type Table: Sync;
    /// Codes that a byte holds.
    const CODES_PER_BYTE: usize;
    /// Elements that are multiplied at a time.
    const UNIT: usize;
    /// Consecutive elements that go to different vectors.
    const APART: usize;
    /// Smaller blocks are not multiplied in this type.
    const LEAST_BLOCK: usize;

    /// A value that this type holds.
    fn exactly(value: f32) -> Self;

    /// The table of a codebook.
    fn table(book: &Codebook) -> Self::Table;

    /// Products of some rows and all tokens into `sums` (rows, tokens).
    fn strip_products(level: SimdLevel, strip: &Strip<'_, Self>, sums: &mut [f32])
    where
        Self: Sized;
}

/// NaN beyond the codebook's entries: a code that does not exist then shows in the result.
fn nibble_table(book: &Codebook) -> [f32; 16] {
    let mut table = [f32::NAN; 16];
    table[..book.values().len()].copy_from_slice(book.values());
    table
}

impl Staged for f32 {
    type Table = [f32; 16];
    const CODES_PER_BYTE: usize = 2;
    const UNIT: usize = UNIT;
    const APART: usize = 2;
    const LEAST_BLOCK: usize = UNIT;

    #[inline]
    fn exactly(value: f32) -> Self {
        value
    }

    fn table(book: &Codebook) -> Self::Table {
        nibble_table(book)
    }

    fn strip_products(level: SimdLevel, strip: &Strip<'_, Self>, sums: &mut [f32]) {
        assert!(level <= SimdLevel::detected(), "the processor has no {}", level.as_str());
        if level == SimdLevel::Scalar || strip.cols == 0 || sums.is_empty() {
            return matvec::strip_products(strip, sums);
        }
        check(strip, sums);
        // SAFETY: the processor has the features and the lengths fit, as just seen.
        unsafe {
            if level == SimdLevel::Avx512 {
                matvec_avx512::strip_products(strip, sums);
            } else {
                matvec_avx2::strip_products(strip, sums);
            }
        }
    }
}

impl Staged for bf16 {
    type Table = [f32; 16];
    const CODES_PER_BYTE: usize = 2;
    const UNIT: usize = 4 * UNIT;
    const APART: usize = 4;
    const LEAST_BLOCK: usize = 2 * UNIT;

    #[inline]
    fn exactly(value: f32) -> Self {
        Self::from_bits((value.to_bits() >> 16) as u16)
    }

    fn table(book: &Codebook) -> Self::Table {
        nibble_table(book)
    }

    fn strip_products(level: SimdLevel, strip: &Strip<'_, Self>, sums: &mut [f32]) {
        assert!(level <= SimdLevel::detected() && multiplies_bf16(level), "the processor multiplies no bfloat16");
        if strip.cols == 0 || sums.is_empty() {
            return sums.fill(0.0);
        }
        check(strip, sums);
        // SAFETY: the processor has the features and the lengths fit, as just seen.
        unsafe { matvec_bf16::strip_products(strip, sums) };
    }
}

/// Where a row's codes and scales and a token begin.
pub(super) struct Corner<X> {
    pub(super) codes: *const u8,
    pub(super) absmax: *const f32,
    pub(super) x: *const X,
}

impl<X: Staged> Corner<X> {
    /// # Safety
    /// The row and the token lie in the strip.
    #[inline]
    pub(super) unsafe fn of(strip: &Strip<'_, X>, row: usize, token: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            Self {
                codes: strip.codes.as_ptr().add(row * strip.bytes_per_row()),
                absmax: strip.absmax.as_ptr().add(row * strip.blocks_per_row()),
                x: strip.tokens.as_ptr().add(token * strip.token_len()),
            }
        }
    }
}

/// `$name::<R, BLOCK>(strip, row, tokens, sums)`: all tokens of `R` rows, by calls of `$tile::<R, T, BLOCK>` with up to
/// four tokens, as many each as can be.
macro_rules! tiles {
    ($name:ident, $tile:ident, $element:ty, $features:literal) => {
        /// All tokens of `R` rows.
        ///
        /// # Safety
        /// As `strip_products`.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn $name<const R: usize, const BLOCK: usize>(
            strip: &Strip<'_, $element>,
            row: usize,
            tokens: usize,
            sums: &mut [f32],
        ) {
            let mut token = 0;
            while token < tokens {
                let left = tokens - token;
                let here = left.div_ceil(left.div_ceil(4));
                // SAFETY: the caller's promise.
                unsafe {
                    match here {
                        1 => $tile::<R, 1, BLOCK>(strip, row, token, tokens, sums),
                        2 => $tile::<R, 2, BLOCK>(strip, row, token, tokens, sums),
                        3 => $tile::<R, 3, BLOCK>(strip, row, token, tokens, sums),
                        _ => $tile::<R, 4, BLOCK>(strip, row, token, tokens, sums),
                    }
                }
                token += here;
            }
        }
    };
}
pub(super) use tiles;

/// Tokens for weights with byte codes: float32, one element after the other.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub(crate) struct InOrder(f32);

/// Rows with byte codes that are dequantized, into the cache, at a time.
const ROWS_AT_A_TIME: usize = 4;

impl Staged for InOrder {
    type Table = Table;
    const CODES_PER_BYTE: usize = 1;
    const UNIT: usize = LANES;
    const APART: usize = 1;
    const LEAST_BLOCK: usize = UNIT;

    #[inline]
    fn exactly(value: f32) -> Self {
        Self(value)
    }

    fn table(book: &Codebook) -> Self::Table {
        Table::new(book)
    }

    fn strip_products(level: SimdLevel, strip: &Strip<'_, Self>, sums: &mut [f32]) {
        if strip.cols == 0 || sums.is_empty() {
            return sums.fill(0.0);
        }
        check(strip, sums);
        // SAFETY: the type is float32 under another name.
        let tokens = unsafe { std::slice::from_raw_parts(strip.tokens.as_ptr().cast::<f32>(), strip.tokens.len()) };
        let (len, per_row) = (strip.token_len(), strip.blocks_per_row());
        let whole = strip.cols / strip.block_size;
        let body = whole * strip.block_size;
        let mut rows = vec![0.0f32; ROWS_AT_A_TIME * len];
        let pieces = strip.codes.chunks(ROWS_AT_A_TIME * strip.cols).zip(strip.absmax.chunks(ROWS_AT_A_TIME * per_row));
        for ((codes, absmax), sums) in pieces.zip(sums.chunks_mut(ROWS_AT_A_TIME * (tokens.len() / len))) {
            let here = codes.len() / strip.cols;
            let parts = codes.chunks_exact(strip.cols).zip(absmax.chunks_exact(per_row));
            for ((codes, absmax), row) in parts.zip(rows.chunks_exact_mut(len)) {
                let (blocks, last) = codes.split_at(body);
                f32::decode(level, blocks, &absmax[..whole], strip.block_size, strip.table, false, &mut row[..body]);
                if let Some(&absmax) = absmax.get(whole) {
                    dequantize_block(last, absmax, strip.table, &mut row[body..strip.cols]);
                }
            }
            dense::products(level, &rows[..here * len], tokens, len, sums);
        }
    }
}

/// What the kernels' memory accesses rest on.
fn check<X: Staged>(strip: &Strip<'_, X>, sums: &[f32]) {
    let (rows, tokens) = (strip.codes.len() / strip.bytes_per_row(), strip.tokens.len() / strip.token_len());
    assert!(strip.block_size > 0 && strip.block_size.is_multiple_of(X::LEAST_BLOCK) && sums.len() == rows * tokens);
    assert!(strip.codes.len() == rows * strip.bytes_per_row() && strip.absmax.len() == rows * strip.blocks_per_row());
    assert!(strip.tokens.len() == tokens * strip.token_len());
}
