//! Products of packed rows with bfloat16 tokens by the processor's own products of pairs, AVX512-BF16.
//!
//! A row is cut into units of 128 elements, a register of codes: each of its 32 words holds four, and four shifts bring
//! them to where a permutation of the table looks. Lane l of 16 adds the products of elements 8 l and 8 l + 4, then those
//! of 8 l + 1 and 8 l + 5, and so on, with table entries rounded to bfloat16; where a block ends (for blocks of 64 where a
//! unit ends, whose halves have scales of their own), its sum times the scale is added, fused, to that of the blocks
//! before. The lanes are added as in `matvec.rs`. Subnormal bfloat16 count as 0.

#[allow(clippy::wildcard_imports)] // the instruction set's own names
use std::arch::x86_64::*;

use half::bf16;

use super::Staged;
use super::matvec::{Ahead, Corner, tiles};
use crate::matvec::{LINE, Strip};

const UNIT: usize = bf16::UNIT;
/// Of a unit's codes: a line of memory.
const BYTES: usize = UNIT / 2;
const _: () = assert!(BYTES == LINE);
/// Bytes of tokens that the first-level cache keeps while codes pass through it.
const NEAR: usize = 32 << 10;
/// Two blocks a unit.
const HALF_A_UNIT: usize = UNIT / 2;
/// Blocks of any number of units.
const WHOLE_UNITS: usize = 0;

/// See [`Staged::strip_products`].
///
/// # Safety
/// The processor has AVX-512 F, BW, DQ, VL and BF16; the strip's parts fit each other and `sums`, with at least one
/// column.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn strip_products(strip: &Strip<'_, bf16>, sums: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        match strip.block_size {
            HALF_A_UNIT => strip_products_by::<HALF_A_UNIT>(strip, sums),
            _ => strip_products_by::<WHOLE_UNITS>(strip, sums),
        }
    }
}

/// # Safety
/// As [`strip_products`]; `BLOCK` is that of the strip.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn strip_products_by<const BLOCK: usize>(strip: &Strip<'_, bf16>, sums: &mut [f32]) {
    let tokens = strip.tokens.len() / strip.token_len();
    let rows = sums.len() / tokens;
    let mut row = 0;
    // Few streams come fastest from memory. Tokens that are too large for the first-level cache are read from the second
    // once for each tile: the taller it is the better, and for many tokens three rows fill the registers.
    let near = tokens <= 4 && size_of_val(strip.tokens) <= NEAR;
    // SAFETY: the caller's promise, for rows and tokens that are there.
    unsafe {
        while near && row + 2 <= rows {
            tiles::<2, BLOCK>(strip, row, tokens, sums);
            row += 2;
        }
        while !near && tokens <= 2 && row + 4 <= rows {
            tiles::<4, BLOCK>(strip, row, tokens, sums);
            row += 4;
        }
        while !near && tokens > 2 && row + 3 <= rows {
            tiles::<3, BLOCK>(strip, row, tokens, sums);
            row += 3;
        }
        while row < rows {
            tiles::<1, BLOCK>(strip, row, tokens, sums);
            row += 1;
        }
    }
}

tiles!(tiles, tile, bf16, "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c");

/// `R` rows with `T` tokens, their sums in registers.
///
/// # Safety
/// As [`strip_products_by`]; the rows and tokens are there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn tile<const R: usize, const T: usize, const BLOCK: usize>(
    strip: &Strip<'_, bf16>,
    row: usize,
    token: usize,
    tokens: usize,
    sums: &mut [f32],
) {
    let (bytes_per_row, blocks, stride) = (strip.bytes_per_row(), strip.blocks_per_row(), strip.token_len());
    // Units that share their scales.
    let span = if BLOCK == HALF_A_UNIT { 1 } else { strip.block_size / UNIT };
    let (units, spans) = (strip.cols / UNIT, strip.cols / UNIT / span);
    // SAFETY: the table has 16 entries; rows and tokens lie in the strip.
    let (table, Corner { codes, absmax, x }) =
        unsafe { (_mm512_cvtneps_pbh(_mm512_loadu_ps(strip.table.as_ptr())), Corner::of(strip, row, token)) };
    // Twice the same 16 words: the permutation's fifth index bit then makes no difference.
    // SAFETY: 16 bfloat16 are 32 bytes.
    let table = _mm512_broadcast_i64x4(unsafe { std::mem::transmute::<__m256bh, __m256i>(table) });
    // The first tokens see to the rows that come next.
    let ahead = (token == 0).then(|| Ahead::of(strip, row, R));
    let mut accumulators = [[_mm512_setzero_ps(); R]; T];
    for index in 0..spans {
        if let Some(ahead) = ahead {
            ahead.scale(R * if BLOCK == HALF_A_UNIT { 2 * index } else { index });
        }
        let mut of_span = [[_mm512_setzero_ps(); R]; T];
        for unit in index * span..(index + 1) * span {
            // SAFETY: whole units lie in the rows; a staged token has 128 elements for each.
            unsafe {
                let bytes = load::<R>(codes, unit, bytes_per_row, ahead);
                step(&bytes, table, x.add(unit * UNIT), stride, &mut of_span);
            }
        }
        // SAFETY: a row has as many scales as blocks.
        unsafe { scale::<R, T, BLOCK>(absmax, blocks, index, &of_span, &mut accumulators) };
    }
    if spans * span * UNIT < strip.cols {
        let mut of_span = [[_mm512_setzero_ps(); R]; T];
        for unit in spans * span..units {
            // SAFETY: as above.
            unsafe {
                let bytes = load::<R>(codes, unit, bytes_per_row, ahead);
                step(&bytes, table, x.add(unit * UNIT), stride, &mut of_span);
            }
        }
        if units * UNIT < strip.cols {
            let mut bytes = [_mm512_setzero_si512(); R];
            for (r, bytes) in bytes.iter_mut().enumerate() {
                // SAFETY: the tail has 64 bytes.
                *bytes = unsafe { _mm512_loadu_si512(strip.tail::<BYTES>(row + r).as_ptr().cast()) };
            }
            // SAFETY: tokens are padded to whole units.
            unsafe { step(&bytes, table, x.add(units * UNIT), stride, &mut of_span) };
        }
        // SAFETY: as above.
        unsafe { scale::<R, T, BLOCK>(absmax, blocks, spans, &of_span, &mut accumulators) };
    }
    for (t, accumulators) in accumulators.iter().enumerate() {
        for (r, lanes) in accumulators.iter().enumerate() {
            sums[(row + r) * tokens + token + t] = super::matvec_avx512::sum(*lanes);
        }
    }
}

/// Codes of a unit of each row, and a wish for as many of those ahead.
///
/// # Safety
/// 64 bytes are readable at the unit's place after `codes` and at every `stride` bytes after it; the processor has
/// AVX-512.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn load<const R: usize>(codes: *const u8, unit: usize, stride: usize, ahead: Option<Ahead>) -> [__m512i; R] {
    let mut bytes = [_mm512_setzero_si512(); R];
    for (r, bytes) in bytes.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *bytes = unsafe { _mm512_loadu_si512(codes.add(unit * BYTES + r * stride).cast()) };
        if let Some(ahead) = ahead {
            ahead.codes(unit * R + r);
        }
    }
    bytes
}

/// Add the sums of units that share their scales, times these, to those of the units before.
///
/// # Safety
/// `blocks` scales of each row are readable at `absmax`, and at least one of them belongs to these units.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn scale<const R: usize, const T: usize, const BLOCK: usize>(
    absmax: *const f32,
    blocks: usize,
    index: usize,
    of_span: &[[__m512; R]; T],
    accumulators: &mut [[__m512; R]; T],
) {
    for r in 0..R {
        // SAFETY: the caller's promise.
        let of_block = |block: usize| _mm512_set1_ps(unsafe { *absmax.add(r * blocks + block) });
        let scales = if BLOCK == HALF_A_UNIT {
            // A last unit of one block has nothing in its upper half.
            _mm512_mask_blend_ps(0xff00, of_block(2 * index), of_block((2 * index + 1).min(blocks - 1)))
        } else {
            of_block(index)
        };
        for (sum, of_span) in accumulators.iter_mut().zip(of_span) {
            sum[r] = _mm512_fmadd_ps(of_span[r], scales, sum[r]);
        }
    }
}

/// One unit: 128 weights of each row, before their scale, with those of each token.
///
/// # Safety
/// 128 elements are readable at `x` and at every `stride` elements after it; the processor has AVX512-BF16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn step<const R: usize, const T: usize>(
    bytes: &[__m512i; R],
    table: __m512i,
    x: *const bf16,
    stride: usize,
    sums: &mut [[__m512; R]; T],
) {
    // Where in a word the first, second, third and fourth element stand: the even ones in the high nibbles.
    // SAFETY: the caller's promise.
    unsafe {
        nibbles::<4, R, T>(bytes, table, x, stride, sums);
        nibbles::<0, R, T>(bytes, table, x.add(UNIT / 4), stride, sums);
        nibbles::<12, R, T>(bytes, table, x.add(UNIT / 2), stride, sums);
        nibbles::<8, R, T>(bytes, table, x.add(3 * UNIT / 4), stride, sums);
    }
}

/// The nibble of each word that begins at bit `SHIFT`.
///
/// # Safety
/// 32 elements are readable at `x` and at every `stride` elements after it; the processor has AVX512-BF16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn nibbles<const SHIFT: u32, const R: usize, const T: usize>(
    bytes: &[__m512i; R],
    table: __m512i,
    x: *const bf16,
    stride: usize,
    sums: &mut [[__m512; R]; T],
) {
    let mut values = [table; R];
    for (values, bytes) in values.iter_mut().zip(bytes) {
        *values = _mm512_permutexvar_epi16(_mm512_srli_epi16::<SHIFT>(*bytes), table);
    }
    for (t, sums) in sums.iter_mut().enumerate() {
        // SAFETY: the caller's promise; 32 bfloat16 are 64 bytes.
        let x = unsafe { pairs(_mm512_loadu_si512(x.add(t * stride).cast())) };
        for (sum, values) in sums.iter_mut().zip(values) {
            // SAFETY: the processor has AVX-512.
            *sum = _mm512_dpbf16_ps(*sum, unsafe { pairs(values) }, x);
        }
    }
}

/// # Safety
/// The processor has AVX-512.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn pairs(words: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes, of which any are valid.
    unsafe { std::mem::transmute(words) }
}
