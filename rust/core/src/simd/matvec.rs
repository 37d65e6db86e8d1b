//! Which kernel multiplies packed rows with tokens.

use std::arch::x86_64::{__cpuid, _MM_HINT_T1, _mm_prefetch};
use std::sync::OnceLock;

use half::bf16;

use super::amx::{self, Amx};
use super::{Kernels, SimdLevel, dense, matvec_amx, matvec_avx2, matvec_avx512, matvec_bf16};
use crate::codebook::Codebook;
use crate::dequantize::{Table, dequantize_block};
use crate::matvec::{self, LANES, LINE, Strip, UNIT};

/// Does the processor multiply bfloat16 itself, at this level?
pub(crate) fn multiplies_bf16(level: SimdLevel) -> bool {
    level == SimdLevel::Avx512 && is_x86_feature_detected!("avx512bf16")
}

/// Does the processor multiply tiles of bfloat16, at this level?
pub(crate) fn multiplies_tiles(level: SimdLevel) -> bool {
    Amx::available(level)
}

/// Are products of bfloat16 faster by the processor's own instruction than in float32?
///
/// NOTE: with two products a lane they are where more than half as many of them are started as of float32's multiply-adds.
/// AMD's Zen 5 starts 93 % as many (7.6 and 8.2 billion a second), Intel's Emerald Rapids 26 % (1.27 and 4.94): there 32
/// tokens would take one and a half times as long, and one no less. Told by the maker's name, not by a clock: the order of
/// sums must not depend on what else the machine does.
pub(crate) fn gains_by_bf16(level: SimdLevel) -> bool {
    static AMD: OnceLock<bool> = OnceLock::new();
    multiplies_bf16(level) && *AMD.get_or_init(|| vendor() == *b"AuthenticAMD")
}

/// The maker's name in the processor.
fn vendor() -> [u8; 12] {
    let leaf = __cpuid(0);
    let mut name = [0; 12];
    for (part, register) in name.chunks_exact_mut(4).zip([leaf.ebx, leaf.edx, leaf.ecx]) {
        part.copy_from_slice(&register.to_le_bytes());
    }
    name
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
    /// Tokens whose elements lie together, a pair of each in turn.
    const TOGETHER: usize = 1;
    /// Rows that a strip has, but for the last.
    const ROWS: usize = 24;
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

/// Tokens for products of tiles: bfloat16.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Tiled(bf16);

impl Staged for Tiled {
    type Table = [f32; 16];
    const CODES_PER_BYTE: usize = 2;
    const UNIT: usize = bf16::UNIT;
    const APART: usize = bf16::APART;
    const TOGETHER: usize = amx::SIDE;
    const ROWS: usize = amx::ROWS;
    const LEAST_BLOCK: usize = bf16::LEAST_BLOCK;

    #[inline]
    fn exactly(value: f32) -> Self {
        Self(bf16::exactly(value))
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
        // SAFETY: the processor has the features and the lengths fit, as just seen; tiles are used nowhere else.
        unsafe {
            #[cfg(test)]
            if !multiplies_tiles(level) {
                return matvec_amx::strip_products::<amx::Plain>(strip, sums);
            }
            assert!(multiplies_tiles(level), "the processor multiplies no tiles");
            matvec_amx::strip_products::<Amx>(strip, sums);
        }
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

/// What comes after some rows in memory, for a kernel to ask for while it computes: as many lines of codes as it reads, in
/// the order of addresses, and the scales.
///
/// NOTE: scales matter as much as codes. A line of them lasts for a thousand weights, so that the processor foresees none,
/// and waiting for one holds up everything read after it; so does asking for many lines at once.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    codes: *const u8,
    scales: *const u8,
    scale_bytes: usize,
}

impl Ahead {
    /// Of `count` rows from `row` on.
    #[inline]
    pub(super) fn of<X: Staged>(strip: &Strip<'_, X>, row: usize, count: usize) -> Self {
        let distance = (count * strip.bytes_per_row()).max(LEAST_AHEAD);
        Self {
            codes: strip.codes.as_ptr().wrapping_add(row * strip.bytes_per_row() + distance),
            scales: strip.upcoming.as_ptr().wrapping_add(row * strip.blocks_per_row() * strip.scale_bytes),
            scale_bytes: strip.scale_bytes,
        }
    }

    /// The `nth` line of codes.
    #[inline]
    pub(super) fn codes(self, nth: usize) {
        // SAFETY: every x86-64 processor has the instruction, which may name any address. Into the second-level cache:
        // these rows, the next and a token would not fit the first together.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(self.codes.wrapping_add(nth * LINE).cast()) };
    }

    /// The line with the `nth` scale.
    #[inline]
    pub(super) fn scale(self, nth: usize) {
        // SAFETY: as above.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(self.scales.wrapping_add(nth * self.scale_bytes).cast()) };
    }
}

/// Codes that are asked for fewer bytes before their turn may come too late.
const LEAST_AHEAD: usize = 16 << 10;

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
    let rows = strip.codes.len() / strip.bytes_per_row();
    assert!(rows > 0 && sums.len().is_multiple_of(rows));
    assert!(strip.block_size > 0 && strip.block_size.is_multiple_of(X::LEAST_BLOCK));
    assert!(strip.codes.len() == rows * strip.bytes_per_row() && strip.absmax.len() == rows * strip.blocks_per_row());
    assert!(strip.tokens.len() == (sums.len() / rows).next_multiple_of(X::TOGETHER) * strip.token_len());
}
